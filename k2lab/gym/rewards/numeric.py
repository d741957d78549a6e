"""Reward for a right number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from k2lab.core.errors import DataError
from k2lab.gym.rewards._answer import answer_of, final_answer

# A sign counts unless it stands between two operands; thousands may be grouped by commas; digits inside words are no number.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"
    r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?(?![A-Za-z_])"
)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """1 if the last number of the response equals the last number of the task's answer, else 0.

    Numbers agree if they differ by at most `absolute`, or by at most `relative` times the larger magnitude.
    """

    absolute: float = 1e-6
    relative: float = 0.0

    def score(self, task: Any, response: str) -> float:
        """Raises DataError if the task's answer holds no number."""
        wanted = _last_number(answer_of(task))
        if wanted is None:
            raise DataError("the answer of a numeric task holds no number", got=answer_of(task))
        got = _last_number(final_answer(response))
        if got is None:
            return 0.0
        return float(math.isclose(got, wanted, rel_tol=self.relative, abs_tol=self.absolute))

    @staticmethod
    def examples() -> list[Numeric]:
        return [Numeric(), Numeric(absolute=0.0, relative=0.01)]
