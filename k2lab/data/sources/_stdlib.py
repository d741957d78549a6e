"""Docstrings of the running interpreter's standard library.

Python modules are parsed (`ast`), never imported, so that no module's side effects happen. Only modules written in C, which have
no source to parse, are imported: public ones (`math`), and private ones whose names a public module of the same name passes on
(`_struct` for `struct`, `_socket` for `socket`).

Left out: tests, idlelib, lib2to3, turtledemo, the generated codec tables in `encodings`, installed packages, names with a leading
underscore, `antigravity`, `this`, and C modules that act on the terminal or need a display when imported.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import importlib.machinery
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from k2lab.core.errors import DataError, MachineError

LICENSE = "PSF-2.0"
VERSION = 1  # raised when the same interpreter would give other texts

_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings", "_bundled"}
_NOT_THE_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "lib-dynload"}
_SKIPPED_MODULES = {"antigravity", "this", "readline", "posix", "nt"}
# C modules known by another name than their public one without the underscore.
_BACKS = {"posix": "os", "nt": "os", "_thread": "threading"}

Kind = Literal["module", "class", "function", "method", "property"]


@dataclass(frozen=True)
class Documented:
    """One documented object: `name` is qualified by `module`, builtins are not; `signature` is "(a, b=1)" or "" for none."""

    name: str
    module: str
    kind: Kind
    signature: str
    doc: str


@cache
def collect() -> tuple[Documented, ...]:
    """All documented public objects, ordered by module and then as defined. About 2 s for the first call of a process."""
    found: dict[str, dict[str, Documented]] = {}
    passed_on: list[tuple[str, str, tuple[str, ...]]] = []
    collecting = gc.isenabled()
    gc.disable()  # millions of syntax nodes and no cycles: the collector would cost three times the parsing
    try:
        for module, path in _files():
            tree = _parse(path)
            found[module] = {each.name: each for each in _from_tree(module, tree)}
            passed_on += [(module, private, names) for private, names in _reexports(module, tree)]
    finally:
        if collecting:
            gc.enable()
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and name not in _SKIPPED_MODULES and name not in found and _is_c(name):
            found[name] = {each.name: each for each in _from_c(name, name, ("*",))}
    for module, private, names in passed_on:
        # Nothing is imported for names that are private or also defined in Python.
        wanted = tuple(name for name in names if not name.startswith("_") and f"{module}.{name}" not in found[module])
        for each in _from_c(module, private, wanted) if wanted else ():
            found[module].setdefault(each.name, each)  # a definition in Python comes first
    return tuple(each for module in sorted(found) for each in found[module].values())


@cache
def digest() -> str:
    """sha256 hex over the interpreter's build and the bytes of the library's files: changes when `collect()` may change."""
    total = hashlib.sha256(f"{VERSION}\0{sys.implementation.name}\0{sys.version}\0{sys.platform}".encode())
    for module, path in _files():
        total.update(module.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@cache
def _files() -> tuple[tuple[str, Path], ...]:
    root = sysconfig.get_path("stdlib")
    if not os.path.isfile(os.path.join(root, "os.py")):
        raise MachineError(
            "the sources of Python's standard library are not on this machine",
            where=root,
            next="Use a Python that comes with its library as .py files, or another source (jsonl, text_folder)",
        )
    found = []
    for folder, folders, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        parts = () if inside == "." else tuple(inside.split(os.sep))
        folders[:] = [name for name in folders if not _is_skipped_folder(name, top=not parts)]
        if parts and "__init__.py" not in files:
            folders[:] = []
            continue
        for name in files:
            stem = name.removesuffix(".py")
            if stem == name or (stem.startswith("_") and stem != "__init__"):
                continue
            module = ".".join(parts if stem == "__init__" else (*parts, stem))
            if module and module not in _SKIPPED_MODULES:
                found.append((module, Path(folder, name)))
    return tuple(sorted(found))


def _is_skipped_folder(name: str, top: bool) -> bool:
    return name in _SKIPPED_FOLDERS | _NOT_THE_LIBRARY or name.startswith("_") or not name.isidentifier() or (top and "-" in name)


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules are not the user's concern
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise DataError(f"a module of the standard library does not parse: {error}", where=str(path)) from None


# ---------------------------------------------------------------- modules with source


def _from_tree(module: str, tree: ast.Module) -> Iterator[Documented]:
    if doc := ast.get_docstring(tree):
        yield Documented(module, module, "module", "", doc)
    seen: set[str] = set()
    for each in _definitions(tree.body, module, module, inside_class=False):
        if each.name not in seen:
            seen.add(each.name)
            yield each


def _definitions(body: list[ast.stmt], prefix: str, module: str, inside_class: bool) -> Iterator[Documented]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            doc = ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                if doc:
                    yield Documented(name, module, "class", _init_signature(node), doc)
                yield from _definitions(node.body, name, module, inside_class=True)
            elif doc:
                yield _function(node, name, module, inside_class, doc)
        else:
            # Definitions under `if sys.platform ...:`, `try:`, `with ...:`.
            for branch in ("body", "handlers", "orelse", "finalbody"):
                for inner in getattr(node, branch, None) or []:
                    nested = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    if not isinstance(node, ast.expr) and isinstance(nested[0] if nested else None, ast.stmt):
                        yield from _definitions(nested, prefix, module, inside_class)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, module: str, method: bool, doc: str) -> Documented:
    decorators = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in node.decorator_list}
    if method and decorators & {"property", "cached_property", "abstractproperty", "setter", "DynamicClassAttribute"}:
        return Documented(name, module, "property", "", doc)
    signature = _signature(node.args, drop_first=method and "staticmethod" not in decorators)
    return Documented(name, module, "method" if method else "function", signature, doc)


def _init_signature(node: ast.ClassDef) -> str:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _signature(item.args, drop_first=True)
    return ""


def _signature(args: ast.arguments, drop_first: bool) -> str:
    if drop_first:
        if args.posonlyargs:
            if len(args.defaults) == len(args.posonlyargs) + len(args.args):
                args.defaults = args.defaults[1:]
            args.posonlyargs = args.posonlyargs[1:]
        elif args.args:
            if len(args.defaults) == len(args.args):
                args.defaults = args.defaults[1:]
            args.args = args.args[1:]
    return f"({ast.unparse(args)})"


def _reexports(module: str, tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(C module, names) that `module` takes over as its own by `from _x import a, b`, also under `try:` and `if`."""
    stack = list(reversed(tree.body))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ImportFrom):
            private = node.module or ""
            if node.level == 0 and _is_own(private, module) and _is_c(private):
                yield private, tuple(a.name for a in node.names if a.asname in (None, a.name))
        elif isinstance(node, (ast.If, ast.Try)):
            handlers = [inner for handler in getattr(node, "handlers", []) for inner in handler.body]
            stack += reversed(node.body + handlers + node.orelse)


def _is_own(private: str, module: str) -> bool:
    if private in _BACKS:
        return _BACKS[private] == module
    bare = private.removeprefix("_")
    return bare != private and (bare in module.split(".") or bare == module.replace(".", "_"))


# ---------------------------------------------------------------- modules written in C


@cache
def _is_c(name: str) -> bool:
    if name in sys.builtin_module_names:
        return True
    spec = importlib.machinery.PathFinder.find_spec(name) if "." not in name else None
    return spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


@cache
def _import_c(name: str) -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # modules on their way out warn when imported
            return importlib.import_module(name)
    except ImportError:  # built without the library that it wraps
        return None


def _from_c(module: str, holder: str, names: tuple[str, ...]) -> Iterator[Documented]:
    """Documented objects of the C module `holder`, named as members of `module`; `names` ("*" = all public ones)."""
    value = _import_c(holder)
    if value is None:
        return
    if module == holder and value.__doc__:
        yield Documented(module, module, "module", "", inspect.cleandoc(value.__doc__))
    for name in sorted(vars(value)) if "*" in names else names:
        member = getattr(value, name, None)
        if name.startswith("_") or (isinstance(member, type) and member.__name__ != name):
            continue  # private, or a second name such as `socket.error` for OSError
        # Builtins are called `len`, not `builtins.len`.
        yield from _from_object(member, name if module == "builtins" else f"{module}.{name}", module)


def _from_object(value: object, name: str, module: str) -> Iterator[Documented]:
    doc = _doc(value)
    if isinstance(value, type):
        if doc:
            yield Documented(name, module, "class", _text_signature(value), doc)
        for key, member in vars(value).items():
            if key.startswith("_") or isinstance(member, type):
                continue
            if inner := _doc(member):
                kind: Kind = "method" if callable(member) or isinstance(member, (classmethod, staticmethod)) else "property"
                if kind == "method" or inspect.isdatadescriptor(member):
                    yield Documented(f"{name}.{key}", module, kind, _text_signature(member) if kind == "method" else "", inner)
    elif doc and inspect.isroutine(value):
        yield Documented(name, module, "function", _text_signature(value), doc)


def _doc(value: object) -> str:
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _text_signature(value: object) -> str:
    value = getattr(value, "__func__", value)
    text = getattr(value, "__text_signature__", None)
    return re.sub(r"\(\$\w+(, /)?(, )?", "(", text, count=1) if isinstance(text, str) else ""


# ---------------------------------------------------------------- sentences

_CALL_LINE = re.compile(r"^[\w.]+\(.*\)\s*(->.*)?$|^[\w.]+\(.*->")
_END = re.compile(r"(?<=[.!?])['\")]?(?=\s|$)")
_NOT_AN_END = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Inc|no|approx|resp|Jr|Dr|Mr|[A-Z])|\.\.)\.$")
_MARKUP = re.compile(r">>>|->|::|\.\.\.|--|==|[{}<>|\\*]|^\w+\(|https?:")
_NO_LETTER = re.compile(r"[^A-Za-z ]")


def first_sentence(doc: str) -> str:
    """The first whole sentence of a docstring on one line, with its final stop; "" if it has none.

    A first paragraph that only repeats the call ("f(x) -> y") is passed over. A paragraph without a stop is taken whole.
    """
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and _CALL_LINE.match(lines[0]):
            lines.pop(0)
        text = " ".join(line for line in lines if line)
        if not text:
            continue
        for match in _END.finditer(text):
            if not _NOT_AN_END.search(text[: match.start()]):
                return text[: match.end()]
        return text if text[-1] in ".!?" else text + "."
    return ""


def is_sentence(text: str, shortest: int, longest: int) -> bool:
    """True for three words or more that start with a capital letter, of fitting length, and that look like prose, not markup."""
    words = text.split()
    return (
        shortest <= len(text) <= longest
        and len(words) >= 3
        and text[0].isalpha()
        and text[0].isupper()
        and text[-1] in ".!?"
        and text[-2] not in ",:;(=-"
        and not _MARKUP.search(text)
        and text.count("(") == text.count(")")
        and text.count("`") % 2 == 0
        and len(_NO_LETTER.sub("", text)) >= 0.8 * len(text)
    )
