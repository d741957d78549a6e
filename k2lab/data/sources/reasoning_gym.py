"""Tasks that reasoning-gym makes on the spot: about a hundred families of puzzles, arithmetic, logic, games and code.

Needs the extra `k2lab[gym]`. Only families of an allow-list: its maker found that each one's own answers score 1, that nonsense
and other tasks' answers don't, and that tasks are a function of the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.errors import RecipeError
from k2lab.data.records import Record
from k2lab.data.sources import _reasoning_gym as live
from k2lab.data.sources._solvers import group_of_question, solve


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Tasks made by reasoning-gym (extra k2lab[gym]): families of an allow-list, any number, with their own settings.

    Records are `task` records, or `reasoning` records where K2 Lab has a solver for the family. `domain` is the family. No two
    records are the same task: an item that repeats an earlier one (`group`) is passed over, and the next is drawn.
    """

    families: dict[str, int]  # family -> number of tasks, e.g. { chain_sum = 1000, countdown = 200 }
    # Settings per family, passed to reasoning-gym: { chain_sum = { min_terms = 2, max_terms = 3 } }
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    traces: bool = True  # a worked-out solution where there is a solver
    longest_trace: int = 200  # characters; a task with a longer trace becomes a bare task
    name: str = "reasoning_gym"  # begins the records' keys; give a second source of this type another

    def __post_init__(self) -> None:
        if not self.families:
            raise RecipeError("name at least one family", where="families")
        for family, number in self.families.items():
            live.require_allowed(family, f"families.{family}")
            if number < 1:
                raise RecipeError("at least one task is needed", where=f"families.{family}", got=number)
        for family, table in self.settings.items():
            if family not in self.families:
                names = ", ".join(self.families)
                raise RecipeError("settings of a family that is not used", where=f"settings.{family}", allowed=names)
            if {"seed", "size"} & set(table):
                raise RecipeError("seed and size are the source's own", where=f"settings.{family}", got=table)

    def records(self) -> Iterator[Record]:
        """Task and reasoning records. Raises MachineError without the package, RecipeError for settings that it refuses or that
        allow fewer different tasks than asked for."""
        for family, number in self.families.items():
            yield from self._of_family(family, number)

    def _of_family(self, family: str, number: int) -> Iterator[Record]:
        where, table = f"{self.name}: {family}", self.settings.get(family, {})
        reward = live.require_allowed(family, where)["reward"]
        size = 20 * number + 200
        data = live.dataset(family, self.seed, size, table, where)
        seen: set[str] = set()
        for index in range(size):
            item = live.item_of(data, index, where)
            question, answer = item["question"], item["answer"]
            group = group_of_question(family, question)
            if group in seen:
                continue
            seen.add(group)
            record: Record = {"prompt": question}
            found = solve(family, question, answer) if self.traces else None
            if found is not None and len(found[0]) <= self.longest_trace:
                record |= {"reasoning": found[0], "final": found[1]}
            record |= {"answer": answer, "rewards": [reward]}
            if reward == "reasoning_gym":
                made = {"family": family, "seed": self.seed, "size": size, "index": index, "settings": table}
                record["options"] = {"reasoning_gym": made}
            difficulty = live.difficulty_of(item["metadata"])
            if difficulty is not None:
                record["difficulty"] = difficulty
            key = f"{self.name}:{family}:{self.seed}:{index}"
            yield {**record, "domain": family, "group": group, "key": key, "source": self.name, "license": "Apache-2.0"}
            if len(seen) == number:
                return
        what = f"only {len(seen)} different tasks came in {size} draws"
        raise RecipeError(what, where=where, got=number, next="Ask for fewer, or widen the family's settings")

    def fingerprint(self) -> str:
        """sha256 hex over the settings, the version of reasoning-gym, and the solvers."""
        from importlib.metadata import version

        from k2lab.data.sources import _solvers

        live.package(self.name)
        with open(_solvers.__file__, "rb") as file:
            solvers = hashlib.file_digest(file, "sha256").hexdigest()
        text = json.dumps([repr(self), version("reasoning-gym"), solvers])
        return hashlib.sha256(text.encode()).hexdigest()

    @staticmethod
    def examples() -> list[ReasoningGym]:
        return [
            ReasoningGym(families={"chain_sum": 20}, settings={"chain_sum": {"max_terms": 3, "max_digits": 2}}),
            ReasoningGym(families={"countdown": 3, "spell_backward": 5}, traces=False),
        ]
