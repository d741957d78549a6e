"""Tasks with one right answer and a worked-out solution: sums, products, spelling, counting, equations.

{"prompt": "State the final answer to the following arithmetic problem: 47 + 25 =", "reasoning": "7+5=12, 4+2+1=07",
"final": "72", "answer": "72", ...}. Prompts and answers are reasoning-gym's (Apache-2.0) and come with K2 Lab; the
solutions are K2 Lab's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from k2lab.core.errors import RecipeError
from k2lab.core.rng import derive
from k2lab.data.records import Record
from k2lab.data.sources import _reasoning_tasks as shipped
from k2lab.data.sources._solvers import SHORTCUTS, Solved, solve


@dataclass(frozen=True, kw_only=True)
class ReasoningTasks:
    """Verifiable tasks of eleven families (sums, products, spelling, counting, ...) in several difficulties, with worked traces.

    Records are `reasoning` records that are tasks, too: `answer` and `rewards` say how an answer is judged, `domain` is the
    family, `difficulty` the level (from 1), `group` is equal for tasks that differ only in the order of their numbers.
    No task comes twice, so two of these sources with different `offset` never share one.
    """

    # Family -> number of tasks: { chain_sum = 2000, "spell_backward:1-3" = 900, "products:4" = 300 }; a family's number is shared
    # evenly by its levels. Or a list of those names (empty: all families), which share `count`.
    families: dict[str, int] | list[str] = field(default_factory=tuple)  # type: ignore[assignment]
    count: int = 2000  # tasks in all, where `families` is a list
    # Family -> what its questions must match (a regular expression), e.g. { chain_sum = "[+]" } for sums without differences.
    matching: dict[str, str] = field(default_factory=dict)
    # Levels of families that are named without any; 0 = up to the hardest (with traces: the hardest that has a short one).
    min_difficulty: int = 1
    max_difficulty: int = 0
    offset: int = 0  # tasks passed over at the beginning of each family's level: for sets that share no task
    traces: bool = True  # give each task its worked-out solution; else the records are bare tasks
    # Family -> how often a task is worked out by a short cut where that gives the right answer: a word of three letters spelled
    # backward by swapping its ends (spell_backward). Every trace is right, but a model that picks the habit up fails with longer
    # words: data of mixed quality, whose habits preferences and rewards sort out.
    shortcuts: dict[str, float] = field(default_factory=dict)
    name: str = "reasoning_tasks"  # begins the records' keys; give a second source of this type another

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise RecipeError("must not be negative", where="offset", got=self.offset)
        if self.count < 1:
            raise RecipeError("must be positive", where="count", got=self.count)
        chosen = [key for key, _ in self._selection()]
        for family, pattern in self.matching.items():
            if family not in {name for name, _ in chosen}:
                raise RecipeError("a family that is not chosen", where=f"matching.{family}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"no regular expression: {error}", where=f"matching.{family}", got=pattern) from None
        for family, share in self.shortcuts.items():
            if family not in SHORTCUTS or family not in {name for name, _ in chosen}:
                raise RecipeError(
                    "a family that is not chosen, or has no short cut",
                    where=f"shortcuts.{family}",
                    allowed=", ".join(SHORTCUTS),
                )
            if not 0 <= share <= 1:
                raise RecipeError("a share lies between 0 and 1", where=f"shortcuts.{family}", got=share)
        for key in chosen:
            if self.traces and not shipped.LEVELS[key[0]][key[1] - 1].traced:
                raise RecipeError(
                    f"level {key[1]} of {key[0]} is too hard for a short trace", where="families", next="Set traces = false"
                )

    def _selection(self) -> list[tuple[tuple[str, int], int]]:
        return shipped.selection(self.families, self.count, self.min_difficulty, self.max_difficulty, self.traces)

    def records(self) -> Iterator[Record]:
        """Reasoning records, or task records without traces. Warns of tasks left out because their trace failed its check, and
        of levels that have fewer tasks than were asked for."""
        dropped, short = 0, []
        for key, number in self._selection():
            fitting = [row for row in shipped.rows(*key) if re.search(self.matching.get(key[0], ""), row.question)]
            rows = fitting[self.offset : self.offset + number]
            if len(rows) < number:
                short.append(f"{key[0]}:{key[1]} gives {len(rows)} of {number}")
            for row in rows:
                tags = shipped.tags(row, self.name)
                if not self.traces:
                    yield {"prompt": row.question, **tags}
                    continue
                found = self._solved(row, tags)
                if found is None:
                    dropped += 1
                    continue
                yield {"prompt": row.question, "reasoning": found[0], "final": found[1], **tags}
        if dropped:
            warnings.warn(f"{self.name}: {dropped} tasks without a right trace were left out", stacklevel=2)
        if short:
            warnings.warn(f"{self.name}: there are fewer tasks than asked for: {', '.join(short)}", stacklevel=2)

    def _solved(self, row: shipped.Row, tags: Record) -> Solved | None:
        share = self.shortcuts.get(row.family, 0.0)
        if share and derive(0, "reasoning_tasks", "shortcut", str(tags["group"])) / 2**128 < share:
            found = solve(row.family, row.question, row.answer, shortcut=True)
            if found is not None:
                return found
        return solve(row.family, row.question, row.answer)

    def fingerprint(self) -> str:
        """sha256 hex over the settings, the shipped tasks and the solvers."""
        return shipped.digest(repr(self))

    @staticmethod
    def examples() -> list[ReasoningTasks]:
        return [
            ReasoningTasks(count=100),
            ReasoningTasks(families={"chain_sum": 60, "spell_backward:1-2": 20}, offset=50),
            ReasoningTasks(families={"products:4": 10}, traces=False),
            ReasoningTasks(families={"chain_sum:3": 20, "leg_counting:1-2": 20}, matching={"chain_sum": "[+]"}),
        ]
