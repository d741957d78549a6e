"""Reward for what reasoning-gym's own scorer calls right: for tasks with more than one right answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from k2lab.core.errors import DataError, MachineError
from k2lab.gym.rewards._answer import answer_of, final_answer


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """1 if reasoning-gym's scorer of the task's family calls the answer wholly right, else 0 (extra k2lab[gym]).

    Partial credit counts 0, and so does a response that makes the scorer fail. The fields say how the task was made, so that the
    scorer sees all of it; the source `reasoning_gym` writes them into a record's `options`.
    """

    family: str = ""
    seed: int = 0
    size: int = 1
    index: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def score(self, task: Any, response: str) -> float:
        """Raises MachineError without the package, DataError if the installed version makes another task of these fields."""
        if not self.family:
            raise DataError("the reward reasoning_gym needs the task's family", next='Put it into the record\'s "options"')
        data, item = _item(self.family, self.seed, self.size, self.index, json.dumps(self.settings, sort_keys=True))
        if item["answer"] != answer_of(task):
            raise DataError(
                "the installed reasoning-gym makes another task of the same seed",
                where=f"{self.family}, seed {self.seed}, item {self.index}",
                got=item["answer"],
                allowed=answer_of(task),
                next="Install the version that made the data, or make the data again",
            )
        try:
            return float(data.score_answer(answer=final_answer(response), entry=item) == 1)
        except Exception:  # the scorers fail in their own ways on text that they cannot read
            return 0.0

    @staticmethod
    def examples() -> list[ReasoningGym]:
        return [ReasoningGym(), ReasoningGym(family="countdown", seed=1, size=10, index=3)]


@lru_cache(maxsize=4096)
def _item(family: str, seed: int, size: int, index: int, settings: str) -> tuple[Any, dict[str, Any]]:
    """(reasoning-gym's data set, its item `index`); `settings` is JSON text."""
    data = _dataset(family, seed, size, settings)
    return data, data[index]


@lru_cache(maxsize=64)
def _dataset(family: str, seed: int, size: int, settings: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise MachineError(
            f"reasoning-gym is needed to judge this task and not installed ({error})",
            where="reward reasoning_gym",
            next='Run: pip install "k2lab[gym]"',
        ) from None
    return reasoning_gym.create_dataset(family, seed=seed, size=size, **json.loads(settings))
