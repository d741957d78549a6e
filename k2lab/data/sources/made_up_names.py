"""Names that exist nowhere, to be written once more: exercises in copying a word that was never seen.

"Copy this name: `loader.SplitWait.no_value`" -> "`loader.SplitWait.no_value`". A model can't know such names, so nothing helps
but looking back at the question: the ability (induction) with which it later names the object that it is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from k2lab.core.errors import RecipeError
from k2lab.core.rng import rng
from k2lab.data.records import Record
from k2lab.data.sources.python_reference import topics, topics_fingerprint

if TYPE_CHECKING:
    import numpy as np

_ASKS = (
    "Repeat `{}`.",
    "Write `{}` once more.",
    "Copy this name: `{}`",
    "Quote `{}`.",
    "What is written here: `{}`?",
    "Say `{}`.",
)
_WORD = re.compile(r"[A-Za-z_]{2,12}")


@dataclass(frozen=True, kw_only=True)
class MadeUpNames:
    """Exercises in copying: dotted names made of words of Python's language reference, to be written once more.

    Records carry `split`, so that these exercises only train (or only measure) unless you say otherwise.
    """

    count: int = 4000  # records
    parts: tuple[int, ...] = (1, 3)  # fewest and most parts between dots
    repeat: float = 0.2  # how often a word of the same name comes again, as in "config.ConfigReader"
    split: Literal["train", "valid", "any"] = "train"  # which part the records go to; any = held out like other records
    seed: int = 0
    domain: str = "made_up_names"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.count < 1:
            raise RecipeError("count must be positive", got=self.count)
        if len(self.parts) != 2 or not 1 <= self.parts[0] <= self.parts[1]:
            raise RecipeError("parts are the fewest and the most of them", got=self.parts, allowed="two numbers, e.g. [1, 3]")
        if not 0.0 <= self.repeat < 1.0:
            raise RecipeError("repeat is a share", got=self.repeat, allowed="at least 0, under 1")

    def records(self) -> Iterator[Record]:
        """Instruction records; `object` is the name. Raises MachineError if this Python has no topics."""
        words = sorted({word for text in topics().values() for word in _WORD.findall(text)})
        for number in range(self.count):
            draw = rng(self.seed, "made_up_names", number)
            name = self._name(draw, words)
            record = {
                "key": f"made_up_names:{number}",
                "instruction": _ASKS[int(draw.integers(len(_ASKS)))].format(name),
                "input": "",
                "output": f"`{name}`",
                "source": "made_up_names",
                "domain": self.domain,
                "license": "Apache-2.0",
                "object": name,
            }
            yield record if self.split == "any" else {**record, "split": self.split}

    def _name(self, draw: np.random.Generator, words: list[str]) -> str:
        used: list[str] = []

        def word() -> str:
            if used and draw.random() < self.repeat:
                return used[int(draw.integers(len(used)))]
            used.append(words[int(draw.integers(len(words)))])
            return used[-1]

        return ".".join(_part(draw, word) for _ in range(int(draw.integers(self.parts[0], self.parts[1] + 1))))

    def fingerprint(self) -> str:
        """sha256 hex over the settings and the words' text."""
        return topics_fingerprint(self)

    @staticmethod
    def examples() -> list[MadeUpNames]:
        return [MadeUpNames(count=50), MadeUpNames(count=20, parts=(2, 2), repeat=0.5, split="any")]


def _part(draw: np.random.Generator, word: Callable[[], str]) -> str:
    """One part of a name in one of Python's manners: snake_case, CamelCase, runtogether, or capitals with a digit."""
    words = [word().strip("_").lower() or "x" for _ in range(1 + int(draw.random() < 0.6) + int(draw.random() < 0.25))]
    manner = draw.random()
    if manner < 0.4:
        return "_".join(words)
    if manner < 0.75:
        return "".join(each.capitalize() for each in words)
    if manner < 0.9:
        return "".join(words)
    return words[0].upper() + str(int(draw.integers(10))) + "".join(each.capitalize() for each in words[1:])
