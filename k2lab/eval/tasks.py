"""Running tasks with a sampler: scores per item and sample, shape of the responses, and the settings in words.

Axes: P tasks (problems), K samples per task.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.eval import stats
from k2lab.gym.task import Task
from k2lab.text import chat

# What `TaskRun.shape` reports about responses, all judged by token ids.
ENDS, NON_EMPTY, NO_OTHER_SPECIAL = "ends with <|im_end|>", "non-empty", "no other special token"


@dataclass(frozen=True)
class TaskRun:
    """What a model did with P tasks, K samples each.

    `scores_PK` the product of each task's rewards and `rewards_PK` each reward by name (NaN where a task does not have it), in
    [0, 1]; `shape_PK` 0 or 1 by the names above; `completions[p][k]` and their decoded texts `responses[p][k]`; `settings` in
    words.
    """

    tasks: tuple[Task, ...]
    scores_PK: np.ndarray
    rewards_PK: dict[str, np.ndarray]
    shape_PK: dict[str, np.ndarray]
    completions: tuple[tuple[Completion, ...], ...]
    responses: tuple[tuple[str, ...], ...]
    settings: str

    def avg_at_k(self) -> stats.Estimate:
        """Mean score: avg@k with an interval over tasks."""
        return stats.avg_at_k(self.scores_PK)

    def shape(self) -> dict[str, stats.Estimate]:
        """Shares of responses that end their turn, say something, and hold no other special token."""
        return {name: stats.avg_at_k(table_PK) for name, table_PK in self.shape_PK.items()}

    def stops(self) -> dict[str, int]:
        """How many responses ended for which reason."""
        found = Counter(completion.stop.value for row in self.completions for completion in row)
        return {reason.value: found[reason.value] for reason in StopReason if found[reason.value]}

    def only(self, chosen: Sequence[int]) -> TaskRun:
        """The same run restricted to some tasks, by place."""
        rows = list(chosen)
        return TaskRun(
            tasks=tuple(self.tasks[p] for p in rows),
            scores_PK=self.scores_PK[rows],
            rewards_PK={name: table[rows] for name, table in self.rewards_PK.items()},
            shape_PK={name: table[rows] for name, table in self.shape_PK.items()},
            completions=tuple(self.completions[p] for p in rows),
            responses=tuple(self.responses[p] for p in rows),
            settings=self.settings,
        )

    def samples(self, limit: int = 5) -> list[dict[str, str]]:
        """The first completions of the first `limit` tasks, for reading: {"prompt", "completion", "stop"}."""
        return [
            {
                "prompt": task.messages[-1].content,
                "completion": responses[0],
                "stop": row[0].stop.value,
            }
            for task, responses, row in list(zip(self.tasks, self.responses, self.completions))[:limit]
        ]


def run_tasks(
    tasks: Sequence[Task],
    sampler: Any,
    tokenizer: Any,
    *,
    k: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int = 0,
    thinking: bool = False,
    default_system: bool = True,
) -> TaskRun:
    """Asks every task `k` times and scores the answers.

    `sampler` has `sample(prompts, params, keys)` (`k2lab.sampling`); `tokenizer` is a `k2lab.text.tokenizer.Tokenizer`. The key
    of sample j of a task is "<task key>/<j>": draws don't depend on other tasks, and two models see the same ones.
    `max_tokens` overrides the tasks' own limits. A prompt that does not fit the window is an empty response and scores so.
    Raises RecipeError for k > 1 with greedy decoding, whose samples would be equal; DataError for no task or a key twice.
    """
    if k < 1 or (k > 1 and temperature == 0):
        raise RecipeError(
            f"k = {k} samples with temperature {temperature:g} make no sense", allowed="k = 1, or a temperature above 0"
        )
    if not tasks:
        raise DataError("there is no task to run")
    twice = [key for key, count in Counter(task.key for task in tasks).items() if count > 1]
    if twice:
        raise DataError("two tasks have the same key", got=twice[0])
    end = tokenizer.im_end_id
    prompts = [
        chat.render(
            list(task.messages), tokenizer, add_generation_prompt=True, thinking=thinking, default_system=default_system
        ).tokens
        for task in tasks
    ]
    groups: dict[int, list[int]] = defaultdict(list)
    for place, task in enumerate(tasks):
        groups[task.max_tokens if max_tokens is None else max_tokens].append(place)
    completions: list[list[Completion]] = [[] for _ in tasks]
    for limit, places in groups.items():
        params = SampleParams(max_tokens=limit, temperature=temperature, top_p=top_p, stop_tokens=(end,), seed=seed)
        requests = [(place, f"{tasks[place].key}/{sample}") for place in places for sample in range(k)]
        done = sampler.sample([prompts[place] for place, _ in requests], params, [key for _, key in requests])
        for (place, _), completion in zip(requests, done, strict=True):
            completions[place].append(completion)
    responses = [[tokenizer.decode(completion.tokens) for completion in row] for row in completions]
    scores_PK, rewards_PK = _score(tasks, responses, k)
    return TaskRun(
        tasks=tuple(tasks),
        scores_PK=scores_PK,
        rewards_PK=rewards_PK,
        shape_PK=_shape(completions, tokenizer, end),
        completions=tuple(map(tuple, completions)),
        responses=tuple(map(tuple, responses)),
        settings=_settings(thinking, temperature, top_p, k, sorted(groups)),
    )


def _score(tasks: Sequence[Task], responses: list[list[str]], k: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    scores_PK = np.ones((len(tasks), k))
    rewards_PK: dict[str, np.ndarray] = {}
    for p, task in enumerate(tasks):
        for j, response in enumerate(responses[p]):
            for name, value in task.scores(response).items():
                rewards_PK.setdefault(name, np.full((len(tasks), k), np.nan))[p, j] = value
                scores_PK[p, j] *= value
    return scores_PK, rewards_PK


def _shape(completions: list[list[Completion]], tokenizer: Any, end: int) -> dict[str, np.ndarray]:
    special = frozenset(tokenizer.special.values())
    rows: dict[str, list[list[float]]] = {ENDS: [], NON_EMPTY: [], NO_OTHER_SPECIAL: []}
    for row in completions:
        complete = [bool(c.tokens) and c.tokens[-1] == end for c in row]
        bodies = [c.tokens[:-1] if whole else c.tokens for c, whole in zip(row, complete)]
        rows[ENDS].append([float(whole) for whole in complete])
        rows[NON_EMPTY].append([float(bool(tokenizer.decode(body, skip_special=True).strip())) for body in bodies])
        rows[NO_OTHER_SPECIAL].append([float(special.isdisjoint(body)) for body in bodies])
    return {name: np.array(table) for name, table in rows.items()}


def _settings(thinking: bool, temperature: float, top_p: float, k: int, limits: list[int]) -> str:
    parts = ["thinking" if thinking else "non-thinking", f"temperature {temperature:g}"]
    if temperature > 0 and top_p < 1:
        parts.append(f"top-p {top_p:g}")
    return ", ".join([*parts, f"k={k}", "max " + "/".join(map(str, limits)) + " tokens"])
