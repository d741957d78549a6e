"""The room of kernels: what its modules need to be imported, and that every import of one, most of them inside functions that run
on CUDA only, names a module and things in it that exist."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import k2lab
from k2lab.models import kernels, slower

ROOM = Path(kernels.__file__).parent
NAMES = sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "__init__")
NEED_TRITON = [name for name in NAMES if name.endswith(("_triton", "_gluon"))]
TREE = Path(k2lab.__file__).parents[1]
FILES = sorted(path for room in ("k2lab", "tests", "bench") for path in (TREE / room).rglob("*.py"))
LIBRARIES = {"triton", "fla", "cudnn"}
PACKAGE = kernels.__name__


def at_import(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports at its top level."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def defined(name: str) -> set[str]:
    """Top-level names of a module of the room."""
    found = set()
    for node in ast.parse((ROOM / f"{name}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def test_only_modules_that_say_so_need_triton() -> None:
    for name in NAMES:
        needed = {full.split(".")[0] for full in at_import(ast.parse((ROOM / f"{name}.py").read_text()))} & LIBRARIES
        assert needed == ({"triton"} if name in NEED_TRITON else set()), name


def test_what_needs_triton_is_imported_lazily() -> None:
    hidden = {f"{PACKAGE}.{name}" for name in NEED_TRITON}
    for path in FILES:
        if path.parent == ROOM and path.stem in NEED_TRITON:
            continue
        early = [full for full in at_import(ast.parse(path.read_text())) if full.startswith(tuple(hidden))]
        assert not early, f"{path}: {early}"


def _uses(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module of the room, name taken from it or None) of every import of the room, with `module.name` in the same scope."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.Module | ast.FunctionDef):
            continue
        nodes = list(ast.walk(scope))
        local = {}
        for node in nodes if isinstance(scope, ast.FunctionDef) else scope.body:
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                local |= {alias.asname or alias.name: alias.name for alias in node.names}
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE + "."):
                yield from ((node.module.removeprefix(PACKAGE + "."), alias.name) for alias in node.names)
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local:
                yield local[node.value.id], node.attr


def test_imports_name_what_exists() -> None:
    seen = set()
    for path in FILES:
        for module, name in _uses(ast.parse(path.read_text())):
            assert module in NAMES, f"{path}: {module}"
            assert name is None or name in defined(module), f"{path}: {module}.{name}"
            seen.add(module)
    assert seen == set(NAMES)  # nothing in the room is without a user


def test_missing_kernels_are_none_and_said_once(recwarn: pytest.WarningsRecorder) -> None:
    asked = []

    @slower.or_none("a library", "the slow way is taken")
    def load() -> Any:
        asked.append(1)
        raise ImportError("no such thing")

    @slower.or_none("a library", "another way is taken")
    def broken() -> Any:
        raise AttributeError("a mistake of ours")

    assert [load(), load()] == [None, None] and len(asked) == 1
    assert [str(each.message) for each in recwarn.list] == ["a library cannot be used (no such thing): the slow way is taken"]
    with pytest.raises(AttributeError, match="a mistake of ours"):
        broken()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_every_module_can_be_imported(name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{name}")
    assert defined(name) <= set(vars(module))
