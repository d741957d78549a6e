"""Tasks of reasoning-gym that are shipped with K2 Lab: which families and levels, how they are stored, what records they become.

`_reasoning_tasks.txt.gz` is made by `tests/data/make_reasoning_tasks.py` from reasoning-gym 0.1.25
(https://github.com/open-thought/reasoning-gym, Apache-2.0) with the settings below and fixed seeds. Its text:

    # lines of attribution and licence
    > family TAB level TAB what all its questions begin with TAB what they end with    (the last two as JSON texts)
    middle of a question TAB answer                                                    (one line per task)
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from k2lab.core.errors import DataError, RecipeError, did_you_mean
from k2lab.data.records import Record
from k2lab.data.sources._solvers import group_of_question

FILE = Path(__file__).with_name("_reasoning_tasks.txt.gz")
LICENSE = "Apache-2.0"
VERSION = "0.1.25"  # of reasoning-gym


@dataclass(frozen=True)
class Level:
    """One difficulty of a family: reasoning-gym's settings, at most how many different tasks are shipped, and whether a trace
    would be short enough for a small model (else records are bare tasks: for tools, or to measure)."""

    settings: dict[str, Any]
    rows: int = 2500
    traced: bool = True


def _sum(terms: int, low: int, high: int, rows: int = 4000, traced: bool = True) -> Level:
    return Level({"min_terms": terms, "max_terms": terms, "min_digits": low, "max_digits": high}, rows, traced)


def _range(name: str, low: int, high: int, rows: int = 2500, traced: bool = True) -> Level:
    return Level({f"min_{name}": low, f"max_{name}": high}, rows, traced)


def _legs(animals: int, most: int, rows: int = 2500) -> Level:
    return Level({"min_animals": animals, "max_animals": animals, "min_instances": 1, "max_instances": most}, rows)


def _equation(high: int) -> Level:
    return Level({"min_terms": 2, "max_terms": 2, "max_value": high, "operators_weights": [0.5, 0.5, 0.0]})


# Difficulty n is entry n - 1.
LEVELS: dict[str, tuple[Level, ...]] = {
    "chain_sum": (
        _sum(2, 1, 1),
        _sum(3, 1, 1),
        _sum(2, 2, 2, rows=8000),
        _sum(2, 3, 3, rows=8000),
        _sum(3, 2, 2),
        _sum(2, 4, 4),
        _sum(2, 6, 8, traced=False),
        _sum(3, 8, 10, rows=3000, traced=False),
    ),
    "products": (
        _sum(2, 1, 1),
        _sum(3, 1, 1),
        _sum(4, 1, 1),
        _sum(2, 2, 2, rows=2500, traced=False),
        _sum(2, 4, 6, rows=2500, traced=False),
    ),
    "spell_backward": (
        _range("word_len", 3, 3),
        _range("word_len", 4, 4),
        _range("word_len", 5, 5),
        _range("word_len", 6, 7),
        _range("word_len", 8, 10),
    ),
    "word_sequence_reversal": (_range("words", 2, 3), _range("words", 4, 5), _range("words", 6, 8, rows=1500)),
    "letter_counting": (_range("words", 1, 2), _range("words", 3, 4), _range("words", 5, 6, rows=1500)),
    "gcd": (_range("value", 1, 20), _range("value", 1, 100), _range("value", 100, 1000)),
    "lcm": (_range("value", 1, 10), _range("value", 1, 30), _range("value", 1, 100)),
    "count_bits": (_range("n", 1, 63), _range("n", 64, 255), _range("n", 256, 1023), _range("n", 1024, 10**6, traced=False)),
    "simple_equations": (_equation(5), _equation(10), _equation(30)),
    "leg_counting": (_legs(1, 15), _legs(2, 9, rows=6000), _legs(3, 9)),
    "prime_factorization": (_range("value", 2, 50), _range("value", 51, 200), _range("value", 201, 1000)),
}


class Row(NamedTuple):
    """One shipped task; `place` counts the tasks of its family and level."""

    family: str
    level: int
    place: int
    question: str
    answer: str


@cache
def _sections() -> dict[tuple[str, int], tuple[str, str, list[str]]]:
    """(beginning of all questions, their end, lines) by (family, level)."""
    try:
        text = gzip.decompress(FILE.read_bytes()).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"the shipped tasks cannot be read: {error}", where=str(FILE), next="Install k2lab again") from None
    found = {}
    for section in text.split("\n> ")[1:]:
        title, *lines = section.rstrip("\n").split("\n")
        family, level, head, tail = title.split("\t")
        found[family, int(level)] = (json.loads(head), json.loads(tail), lines)
    return found


def levels_shipped() -> tuple[tuple[str, int], ...]:
    """All (family, level) that are shipped."""
    return tuple(_sections())


@cache
def rows(family: str, level: int) -> tuple[Row, ...]:
    """The shipped tasks of a level. Raises DataError if the file is missing or damaged."""
    head, tail, lines = _sections()[family, level]
    found = []
    for place, line in enumerate(lines):
        middle, answer = line.split("\t")
        if "\\" in middle:
            middle = json.loads(f'"{middle}"')
        found.append(Row(family, level, place, f"{head}{middle}{tail}", answer))
    return tuple(found)


def digest(settings: object) -> str:
    """sha256 hex over settings, the shipped file, and the code that makes traces."""
    made = hashlib.sha256(repr(settings).encode())
    for path in (FILE, Path(__file__), Path(__file__).with_name("_solvers.py")):
        made.update(hashlib.sha256(path.read_bytes()).digest())
    return made.hexdigest()


def selection(
    families: Mapping[str, int] | Sequence[str], count: int, low: int, high: int, traced: bool
) -> list[tuple[tuple[str, int], int]]:
    """[((family, level), number of tasks)] for what a recipe names: "family", "family:LEVEL" or "family:LOW-HIGH" -> number.

    A family's number is shared evenly by its levels; a list, or nothing, shares `count` evenly by families. Raises RecipeError.
    """
    if not isinstance(families, Mapping):
        names = tuple(families) or tuple(LEVELS)
        families = {name: count // len(names) + (place < count % len(names)) for place, name in enumerate(names)}
    chosen: list[tuple[tuple[str, int], int]] = []
    for name, number in families.items():
        family, levels = _levels(name, low, high, traced)
        if number < 1:
            raise RecipeError("at least one task is needed", where=f"families.{name}", got=number)
        chosen += [((family, level), number // len(levels) + (n < number % len(levels))) for n, level in enumerate(levels)]
    keys = [key for key, _ in chosen]
    for family, level in keys:
        if keys.count((family, level)) > 1:
            raise RecipeError(f"level {level} of {family} is named twice", where="families")
    return [(key, number) for key, number in chosen if number]


def _levels(name: str, low: int, high: int, traced: bool) -> tuple[str, list[int]]:
    family, _, span = name.partition(":")
    where = f"families.{name}"
    if family not in LEVELS:
        hint = did_you_mean(family, LEVELS)
        raise RecipeError(f"there is no shipped family {family!r}", where=where, allowed=", ".join(LEVELS), next=hint)
    top = len(LEVELS[family])
    if span:
        first, _, last = span.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or not 1 <= int(first) <= int(last or first) <= top:
            allowed = f"1 to {top}, as in {family}:1 or {family}:1-{top}"
            raise RecipeError("no such levels", where=where, got=span, allowed=allowed)
        return family, list(range(int(first), int(last or first) + 1))
    chosen = [n for n in range(max(low, 1), min(high or top, top) + 1) if LEVELS[family][n - 1].traced or not traced]
    if not chosen:
        what = f"{family} has no such level" + (" with traces" if traced else "")
        raise RecipeError(what, where=where, got=f"{low} to {high or top}", allowed=f"1 to {top}")
    return family, chosen


def tags(row: Row, source: str) -> Record:
    """What all records of shipped tasks carry beside prompt and answer."""
    return {
        "answer": row.answer,
        "rewards": ["exact_match"],
        "domain": row.family,
        "difficulty": row.level,
        "group": group_of_question(row.family, row.question),
        "key": f"{source}:{row.family}:{row.level}:{row.place}",
        "source": source,
        "license": LICENSE,
    }
