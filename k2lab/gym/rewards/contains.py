"""Reward for naming something."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from k2lab.gym.rewards._answer import answer_of, final_answer


@dataclass(frozen=True, kw_only=True)
class Contains:
    """1 if the response contains the task's answer, else 0.

    With `whole_name` the answer must stand by itself: `json.dump` is not in "json.dumps", nor `path` in "os.path.join".
    """

    ignore_case: bool = False
    whole_name: bool = True  # not part of a longer word or dotted name

    def score(self, task: Any, response: str) -> float:
        answer = answer_of(task).strip()
        if not answer:
            return 0.0
        pattern = re.escape(answer)
        if self.whole_name:
            pattern = rf"(?<!\w)(?<!\w\.){pattern}(?!\w)(?!\.\w)"
        return float(re.search(pattern, final_answer(response), re.IGNORECASE if self.ignore_case else 0) is not None)

    @staticmethod
    def examples() -> list[Contains]:
        return [Contains(), Contains(ignore_case=True, whole_name=False)]
