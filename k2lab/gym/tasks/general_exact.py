"""Held-out general instructions with one right answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2lab.core.errors import DataError
from k2lab.gym.tasks._records import choose

if TYPE_CHECKING:
    from k2lab.gym.task import Task


@dataclass(frozen=True, kw_only=True)
class GeneralExact:
    """General instructions: the response must equal the reference answer.

    Uses the instruction records of `source` with an output of at most `longest` characters; others are passed over.
    """

    source: str = "general_instructions"  # records of this source only; "" = of any
    limit: int = 100  # tasks at most; 0 = all
    longest: int = 80  # characters of the reference answer
    max_tokens: int = 48  # tokens of a response
    ignore_case: bool = False
    seed: int = 0  # chooses the records if there are more than `limit`

    def tasks(self, records: Iterable[dict[str, Any]]) -> list[Task]:
        """One task per fitting record; `meta.task` is the record's kind of task. Raises DataError if no record fits."""
        from k2lab.gym.task import Task, question_of

        fitting = [
            record
            for record in records
            if "instruction" in record
            and (not self.source or record.get("source") == self.source)
            and 0 < len(record["output"].strip()) <= self.longest
        ]
        if not fitting:
            raise DataError(
                "no record fits the task general_exact",
                allowed=f"instruction records of source {self.source or '(any)'}, output of at most {self.longest} characters",
            )
        return [
            Task(
                key=f"general_exact/{record['key']}",
                messages=question_of(record),
                answer=record["output"],
                rewards=("exact_match",),
                options={"exact_match": {"ignore_case": self.ignore_case}},
                max_tokens=self.max_tokens,
                meta={"task": record.get("task", "")},
            )
            for record in choose(fitting, self.limit, self.seed, "general_exact")
        ]

    @staticmethod
    def examples() -> list[GeneralExact]:
        return [GeneralExact(), GeneralExact(source="", limit=0, ignore_case=True)]
