"""General instructions with computed answers: text tasks, arithmetic, yes/no questions, greetings. Made, not copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.rng import rng
from k2lab.data.records import Record
from k2lab.data.sources import _general


@dataclass(frozen=True, kw_only=True)
class GeneralInstructions:
    """General instructions with computed answers: repeat, spell, count, sort, calculate, yes or no, greetings.

    Every answer is right by construction, and no question occurs twice. A kind of task that has fewer different questions
    than its share (small talk has 21) gives all that it has, so that fewer than `count` records may come.
    """

    count: int = 2000  # records, shared evenly among the kinds of task
    tasks: tuple[str, ...] = ()  # kinds of task; () = all
    seed: int = 0
    domain: str = "general"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for task in self.tasks:
            if task not in _general.TASKS:
                hint = did_you_mean(task, _general.TASKS)
                raise RecipeError(f"there is no general task {task!r}", allowed=", ".join(_general.TASKS), next=hint)
        if self.count < 1:
            raise RecipeError("count must be positive", got=self.count)

    def records(self) -> Iterator[Record]:
        """Instruction records; `task` names the kind, `group` what the question is about (hold-out goes by it)."""
        tasks = self.tasks or tuple(_general.TASKS)
        for place, task in enumerate(tasks):
            share = self.count // len(tasks) + (place < self.count % len(tasks))
            yield from self._of_task(task, share)

    def _of_task(self, task: str, share: int) -> Iterator[Record]:
        seen: set[tuple[str, str]] = set()
        # Kinds with few questions repeat themselves; after this many draws all of them have come with near certainty.
        draws = 20 * share + 400
        for draw in range(draws):
            if len(seen) == share:
                return
            about, instruction, given, output = _general.TASKS[task](rng(self.seed, "general_instructions", task, draw))
            if (instruction, given) in seen:
                continue
            seen.add((instruction, given))
            yield {
                "key": f"general_instructions:{task}:{draw}",
                "instruction": instruction,
                "input": given,
                "output": output,
                "source": "general_instructions",
                "domain": self.domain,
                "license": "Apache-2.0",
                "task": task,
                "group": f"general_instructions:{task}:{about}",
            }

    def fingerprint(self) -> str:
        """sha256 hex over the records themselves (keywords and builtins differ between Python versions)."""
        digest = hashlib.sha256(repr(self).encode())
        for record in self.records():
            digest.update(json.dumps(record, sort_keys=True).encode())
        return digest.hexdigest()

    @staticmethod
    def examples() -> list[GeneralInstructions]:
        return [GeneralInstructions(count=200), GeneralInstructions(count=50, tasks=("arithmetic", "spell"))]
