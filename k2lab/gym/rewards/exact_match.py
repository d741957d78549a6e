"""Reward for giving exactly the right answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k2lab.gym.rewards._answer import answer_of, final_answer


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """1 if the response equals the task's answer, else 0.

    Both sides are normalised in the same way; the options about where the answer stands apply to the response only.
    """

    squeeze: bool = True  # runs of blanks and line ends count as one blank
    ignore_case: bool = False
    strip: str = ""  # characters removed from both ends, e.g. ".!" so that a final stop does not matter
    last_line: bool = False  # only the last line that is not blank is the answer
    after: str = ""  # the answer follows the last occurrence of this text, e.g. "####"; without it the score is 0

    def score(self, task: Any, response: str) -> float:
        text = final_answer(response)
        if self.after:
            if self.after not in text:
                return 0.0
            text = text.rsplit(self.after, 1)[1]
        if self.last_line:
            lines = [line for line in text.splitlines() if line.strip()]
            text = lines[-1] if lines else ""
        return float(self._normal(text) == self._normal(answer_of(task)))

    def _normal(self, text: str) -> str:
        text = " ".join(text.split()) if self.squeeze else text.strip()
        if self.strip:
            text = text.strip(self.strip + " ")
        return text.casefold() if self.ignore_case else text

    @staticmethod
    def examples() -> list[ExactMatch]:
        return [ExactMatch(), ExactMatch(ignore_case=True, strip=".", last_line=True), ExactMatch(after="####")]
