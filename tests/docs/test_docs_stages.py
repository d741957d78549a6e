"""docs/stages.md is what the stage classes say. After a change: `python tests/docs/test_docs_stages.py`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from k2lab.core import schema, slots

PAGE = Path(__file__).parents[2] / "docs" / "stages.md"
# Classes that several stages are derived from, and how the page calls them.
SHARED = {
    "Training": "Every training stage",
    "FineTuning": "Stages that train on conversations",
    "Replaying": "Stages that mix earlier data in",
    "Asking": "Stages that sample answers",
}


# A comment of these forms speaks of the fields below it, not of one alone.
OF_SEVERAL = re.compile(r", and |, or |\bthese\b|\btwo\b|this many|keep the newest|Most turns|token limit")


def comments(cls: type) -> list[tuple[list[str], str]]:
    """(names of fields, the comment that explains them) of a class's own body; fields under one comment belong together."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    rows: list[tuple[list[str], str]] = []
    last, required = -1, False
    for node in ast.parse("\n".join(lines)).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        above: list[str] = []
        at = node.lineno - 2
        while at >= 0 and lines[at].strip().startswith("#"):
            above.insert(0, lines[at].strip().lstrip("# "))
            at -= 1
        beside = lines[node.end_lineno - 1].partition("  # ")[2].partition("type: ignore")[0].strip(" #")
        name = node.target.id  # type: ignore[union-attr]
        joined = rows and node.lineno == last + 1 and OF_SEVERAL.search(rows[-1][1]) and required == (node.value is None)
        if above or beside or not joined:
            rows.append(([name], " ".join([*above, *([beside] if beside else [])])))
        else:
            rows[-1][0].append(name)
        last, required = node.end_lineno, node.value is None
    return rows


def default(cls: type, name: str) -> str:
    field = next(item for item in dataclasses.fields(cls) if item.name == name)
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if items and all(hasattr(type(item), "slot_name") for item in items):
        return ", ".join(f"`{type(item).slot_name}`" for item in items)
    return f"`{_toml(schema.to_table(value))}`"


def _toml(value: Any) -> str:
    from k2lab.core.recipe import _toml as written

    return "{}" if value == {} else written(list(value) if isinstance(value, tuple) else value)


def table(cls: type, owner: type) -> list[str]:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for names, text in comments(owner):
        shown = ", ".join(f"`{name}`" for name in names)
        defaults = ", ".join(dict.fromkeys(default(cls, name) for name in names))
        lines.append(f"| {shown} | {defaults} | {text.replace('|', '/')} |")
    return lines if len(lines) > 2 else []


def reference() -> str:
    """The page: shared fields first, then one section a stage."""
    classes = {name: slots.load("stage", name) for name in slots.names("stage")}
    parents = {base.__name__: base for cls in classes.values() for base in cls.__mro__ if base.__name__ in SHARED}
    intro = "Written from the stage classes (in `k2lab/stages`). Fields that several stages share come first."
    page = ["# Stages", "", intro, ""]
    for name, title in SHARED.items():
        base = parents[name]
        own = [SHARED[other.__name__] for other in base.__mro__[1:] if other.__name__ in SHARED]
        page += [f"## {title}", ""]
        page += [f"And those of: {', '.join(own)}.", ""] if own else []
        page += [*table(base, base), ""]
    for name, cls in classes.items():
        doc = inspect.cleandoc(cls.__doc__ or "").replace("\n\n", "\n\n").strip()
        shared = [SHARED[base.__name__] for base in cls.__mro__ if base.__name__ in SHARED]
        page += [f"## {name}", "", doc, "", f"Writes: {cls.kind}." + (f" Also: {', '.join(shared)}." if shared else ""), ""]
        rows = table(cls, cls)
        page += [*rows, ""] if rows else []
    return "\n".join(page).rstrip() + "\n"


def test_page_is_what_the_classes_say():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tests/docs/test_docs_stages.py"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
