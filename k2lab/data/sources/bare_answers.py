"""Tasks of `reasoning_tasks` with bare answers, as most question-and-answer data has them: right, but nothing is worked out.

{"prompt": "State the final answer to the following arithmetic problem: 47 + 25 =", "response": "72", "answer": "72", ...}.
Prompts and answers are reasoning-gym's (Apache-2.0) and come with K2 Lab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from k2lab.data.records import Record
from k2lab.data.sources.reasoning_tasks import ReasoningTasks


@dataclass(frozen=True, kw_only=True)
class BareAnswers:
    """Verifiable tasks answered at once, {"prompt","response"}: beside worked-out traces, a habit that verifiers can unteach.

    A small model that answers at once is mostly wrong, and one that has seen both kinds of answers gives both; which kind is
    right more often is what preferences and rewards can teach.
    """

    # As in the source `reasoning_tasks`: family, "family:LEVEL" or "family:LOW-HIGH" -> number of tasks.
    families: dict[str, int] = field(default_factory=lambda: {"chain_sum:3": 1000})
    # Family -> what its questions must match (a regular expression).
    matching: dict[str, str] = field(default_factory=dict)
    offset: int = 0  # tasks passed over at the beginning of each family's level
    name: str = "bare_answers"  # begins the records' keys; give a second source of this type another

    def __post_init__(self) -> None:
        self._tasks()

    def _tasks(self) -> ReasoningTasks:
        return ReasoningTasks(families=self.families, matching=self.matching, offset=self.offset, traces=False, name=self.name)

    def records(self) -> Iterator[Record]:
        """Response records that are tasks; warns of levels that have fewer tasks than were asked for."""
        for record in self._tasks().records():
            yield {"prompt": record["prompt"], "response": record["answer"]} | {k: v for k, v in record.items() if k != "prompt"}

    def fingerprint(self) -> str:
        """sha256 hex over the settings and the shipped tasks."""
        return self._tasks().fingerprint()

    @staticmethod
    def examples() -> list[BareAnswers]:
        return [BareAnswers(families={"chain_sum:3": 40}), BareAnswers(families={"leg_counting:2": 20}, offset=100, name="legs")]
