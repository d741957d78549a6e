"""One file per thing: a slot file holds one public frozen dataclass, and the file's name is its name in recipes.

A *slot kind* is a folder. `load("filter", "length")` imports `k2lab/data/filters/length.py` and returns its one public
dataclass; `load("filter", "my/own.py")` does the same with a user's file. There is no table of names to edit.
Files whose name starts with `_` are no slots. The docstring's first line is the help text; `examples()` returns instances
that the test suite runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from k2lab.core.errors import RecipeError, did_you_mean

ROOMS = {
    "stage": "k2lab.stages",
    "source": "k2lab.data.sources",
    "filter": "k2lab.data.filters",
    "task": "k2lab.gym.tasks",
    "reward": "k2lab.gym.rewards",
    "tool": "k2lab.gym.tools",
    "optimizer": "k2lab.optim",
    "schedule": "k2lab.optim.schedules",
    "objective": "k2lab.engine.objectives",
}


@dataclass(frozen=True)
class Slot:
    """Marks a recipe field whose value is a slot table: `optim: Annotated[Any, Slot("optimizer")]`."""

    kind: str


def folder(kind: str) -> Path:
    """The folder that holds the slot files of `kind`."""
    return Path(__file__).resolve().parents[2].joinpath(*ROOMS[kind].split("."))


@cache
def names(kind: str) -> tuple[str, ...]:
    """Names of all shipped slots of `kind`, from the file names alone (nothing is imported).

    A room that holds other code beside its slots (optim) marks slot files by the line `# slot` as their first line.
    """
    found = []
    for path in sorted(folder(kind).glob("*.py")):
        if path.name.startswith("_"):
            continue
        if kind == "optimizer" and not path.read_text(encoding="utf-8").startswith("# slot"):
            continue
        found.append(path.stem)
    return tuple(found)


def load(kind: str, name: str, where: str = "") -> type:
    """The slot class called `name`: a shipped slot, or a path to a `.py` file of the user's.

    Raises RecipeError if there is no such slot or the file does not hold exactly one public frozen dataclass.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"there is no {kind} file {name!r}", where=where, next="Give a path that exists")
        module = _import_file(path.resolve())
    else:
        known = names(kind)
        if name not in known:
            raise RecipeError(
                f"there is no {kind} called {name!r}",
                where=where,
                allowed=", ".join(known) + ", or a path to your own .py file",
                next=did_you_mean(name, known),
            )
        module = importlib.import_module(f"{ROOMS[kind]}.{name}")
    public: list[Any] = [
        value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and isinstance(value, type)
        and value.__module__ == module.__name__
        and dataclasses.is_dataclass(value)
    ]
    if len(public) != 1 or not public[0].__dataclass_params__.frozen:
        raise RecipeError(
            f"{module.__file__} must hold exactly one public frozen dataclass",
            where=where,
            got=", ".join(cls.__name__ for cls in public) or "none",
            next="Start other classes' names with '_' or move them to a file whose name starts with '_'",
        )
    public[0].slot_name = name if not name.endswith(".py") else Path(name).stem
    public[0].slot_path = name
    return public[0]


def _import_file(path: Path):
    key = f"k2lab_user_{path.stem}_{abs(hash(str(path))):x}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise RecipeError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def first_line(cls: type) -> str:
    """The help text of a slot: its docstring's first line."""
    return (cls.__doc__ or "").strip().split("\n")[0]
