"""Held-out questions about library objects: does the answer name the object that was asked about?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2lab.core.errors import DataError
from k2lab.gym.tasks._records import choose

if TYPE_CHECKING:
    from k2lab.gym.task import Task


@dataclass(frozen=True, kw_only=True)
class DocstringNames:
    """Docstring questions: the answer must name the object that was asked about.

    Uses instruction records with an `object` that the reference output names; others are passed over. The question usually
    names the object, too (`meta.named_in_question`), so this measures whether a model keeps to what it was asked, not what it
    knows.
    """

    limit: int = 100  # tasks at most; 0 = all
    max_tokens: int = 48  # tokens of a response
    seed: int = 0  # chooses the records if there are more than `limit`

    def tasks(self, records: Iterable[dict[str, Any]]) -> list[Task]:
        """One task per fitting record. Raises DataError if no record fits."""
        from k2lab.gym.rewards.contains import Contains
        from k2lab.gym.task import Task, question_of

        reward = Contains()
        fitting = [
            record
            for record in records
            if record.get("object") and "instruction" in record and reward.score({"answer": record["object"]}, record["output"])
        ]
        if not fitting:
            raise DataError(
                "no record fits the task docstring_names",
                allowed='instruction records with the key "object" whose output names the object',
            )
        return [
            Task(
                key=f"docstring_names/{record['key']}",
                messages=question_of(record),
                answer=record["object"],
                gold=record["output"],
                rewards=("contains",),
                max_tokens=self.max_tokens,
                meta={
                    "module": record.get("module", ""),
                    "named_in_question": bool(reward.score({"answer": record["object"]}, record["instruction"])),
                },
            )
            for record in choose(fitting, self.limit, self.seed, "docstring_names")
        ]

    @staticmethod
    def examples() -> list[DocstringNames]:
        return [DocstringNames(), DocstringNames(limit=0, max_tokens=32)]
