"""What the source `reasoning_gym` and its allow-list's maker share: the package, its families, the allow-list, tags of an item.

`_reasoning_gym_allowed.json` is made by `tests/data/make_reasoning_gym_allowed.py`: for every family a verdict with its reason,
and the reward that judges it: `exact_match` where one text is right, else `reasoning_gym` (the family's own scorer).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from k2lab.core.errors import DataError, MachineError, RecipeError, did_you_mean

ALLOWED = Path(__file__).with_name("_reasoning_gym_allowed.json")


def package(where: str) -> Any:
    """The module `reasoning_gym`. Raises MachineError that names the extra if it is missing."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise MachineError(
            f"reasoning-gym is needed here and not installed ({error})",
            where=where,
            next='Run: pip install "k2lab[gym]" (it needs a C compiler), or use the source reasoning_tasks, which needs nothing',
        ) from None
    return reasoning_gym


@cache
def verdicts() -> dict[str, dict[str, Any]]:
    """The allow-list: family -> {"allowed", "why", "reward", ...}."""
    return json.loads(ALLOWED.read_text(encoding="utf-8"))["families"]


def require_allowed(family: str, where: str) -> dict[str, Any]:
    """The verdict on an allowed family. Raises RecipeError for an unknown family, and for a refused one with the reason."""
    known = verdicts()
    allowed = [name for name, verdict in known.items() if verdict["allowed"]]
    if family not in known:
        hint = did_you_mean(family, allowed)
        raise RecipeError(f"reasoning-gym has no family {family!r}", where=where, allowed=", ".join(allowed), next=hint)
    if not known[family]["allowed"]:
        raise RecipeError(f"the family {family} is not used: {known[family]['why']}", where=where, allowed=", ".join(allowed))
    return known[family]


def dataset(family: str, seed: int, size: int, settings: dict[str, Any], where: str) -> Any:
    """reasoning-gym's data set: item i is a function of the arguments. Raises MachineError (package), RecipeError (settings)."""
    gym = package(where)
    try:
        return gym.create_dataset(family, seed=seed, size=size, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"reasoning-gym refuses the settings of {family}: {error}", where=where, got=settings) from None


def item_of(data: Any, index: int, where: str) -> dict[str, Any]:
    """Item `index`, checked to have a question and an answer in text."""
    item = data[index]
    if not isinstance(item["answer"], str) or not item["answer"].strip() or not item["question"].strip():
        raise DataError("reasoning-gym made an item without an answer", where=f"{where}, item {index}", got=repr(item["answer"]))
    return item


def difficulty_of(metadata: dict[str, Any]) -> int | float | str | None:
    """A number or text where the item says how hard it is: its own value of each difficulty setting, else the setting's range."""
    value = metadata.get("difficulty")
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return value
    if not isinstance(value, dict):
        return None
    parts = []
    for name, span in value.items():
        own = metadata.get(name)
        if isinstance(own, (int, float)) and not isinstance(own, bool):
            parts.append(f"{name} {own}")
        elif isinstance(span, (list, tuple)) and len(span) == 2:
            parts.append(f"{name} {span[0]}" if span[0] == span[1] else f"{name} {span[0]} to {span[1]}")
        elif isinstance(span, (int, float, str)):
            parts.append(f"{name} {span}")
    return ", ".join(parts) or None
