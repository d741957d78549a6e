"""Running tasks with a sampler: scores per item and sample, shape of the responses, and the settings in words.

Axes: P tasks (problems), K samples per task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2lab.core.types import Group, Rollout, SampleParams, StopReason
from k2lab.eval import stats
from k2lab.gym.agent import TOOL_TIMEOUT, Toolbox
from k2lab.gym.rollouts import MAX_TOOL_CALLS, check_keys, from_json, roll_out, to_json
from k2lab.gym.task import Task
from k2lab.text.layout import THINK, THINK_END

# What `TaskRun.shape` reports about responses, all judged by token ids.
ENDS, NON_EMPTY, NO_OTHER_SPECIAL = "ends with <|im_end|>", "non-empty", "no other special token"


@dataclass(frozen=True)
class TaskRun:
    """What a model did with P tasks, K samples each.

    `scores_PK` the rollouts' rewards (0 where one could not be judged), `rewards_PK` each reward by name (NaN where a task does
    not have it), in [0, 1]; `shape_PK` 0 or 1 by the names above, of the last turns; `groups[p].rollouts[k]` everything else;
    `settings` in words.
    """

    tasks: tuple[Task, ...]
    scores_PK: np.ndarray
    rewards_PK: dict[str, np.ndarray]
    shape_PK: dict[str, np.ndarray]
    groups: tuple[Group, ...]
    settings: str

    @property
    def k(self) -> int:
        """Samples per task."""
        return int(self.scores_PK.shape[1])

    def avg_at_k(self) -> stats.Estimate:
        """Mean score: avg@k with an interval over tasks."""
        return stats.avg_at_k(self.scores_PK)

    def shape(self) -> dict[str, stats.Estimate]:
        """Shares of responses that end their turn, say something, and hold no other special token."""
        return {name: stats.avg_at_k(table_PK) for name, table_PK in self.shape_PK.items()}

    def stops(self) -> dict[str, int]:
        """How many responses ended for which reason."""
        found = Counter(rollout.stop.value for rollout in self.rollouts())
        return {reason.value: found[reason.value] for reason in StopReason if found[reason.value]}

    def rollouts(self) -> list[Rollout]:
        """All rollouts, task by task."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    def errors(self) -> Counter[str]:
        """Why rollouts could not be served or judged, and how many."""
        return Counter(rollout.error for rollout in self.rollouts() if rollout.error)

    def usage_PK(self, name: str) -> np.ndarray:
        """One of the numbers of `Rollout.usage` for every rollout, f64[P, K]."""
        return np.array([[float(rollout.usage[name]) for rollout in group.rollouts] for group in self.groups])

    def families(self, key: str = "domain") -> dict[str, list[int]]:
        """Places of the tasks by what their `meta` says under `key`, in order of names; tasks that do not say are left out."""
        found: dict[str, list[int]] = {}
        for place, task in enumerate(self.tasks):
            if task.meta.get(key):
                found.setdefault(str(task.meta[key]), []).append(place)
        return dict(sorted(found.items()))

    def only(self, chosen: Sequence[int]) -> TaskRun:
        """The same run restricted to some tasks, by place."""
        rows = list(chosen)
        return TaskRun(
            tasks=tuple(self.tasks[p] for p in rows),
            scores_PK=self.scores_PK[rows],
            rewards_PK={name: table[rows] for name, table in self.rewards_PK.items()},
            shape_PK={name: table[rows] for name, table in self.shape_PK.items()},
            groups=tuple(self.groups[p] for p in rows),
            settings=self.settings,
        )

    def samples(self, limit: int = 5) -> list[dict[str, str]]:
        """The first completions of the first `limit` tasks, for reading: {"prompt", "completion", "stop"}."""
        return [
            {"prompt": task.messages[-1].content, "completion": group.rollouts[0].response, "stop": group.rollouts[0].stop.value}
            for task, group in list(zip(self.tasks, self.groups))[:limit]
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
    tools: Sequence[Any] = (),
    max_turns: int = 1,
    max_tool_calls: int = MAX_TOOL_CALLS,
    tool_timeout: float = TOOL_TIMEOUT,
    thinking: bool = False,
    default_system: bool = True,
    progress: Callable[[int, int], None] | None = None,
    batch: int | None = None,
    journal: Any = None,
) -> TaskRun:
    """Asks every task `k` times and scores the answers: `gym.rollouts.roll_out`, counted.

    The key of sample j of a task is "<task key>/<j>": draws don't depend on other tasks, and two models see the same ones.
    `max_tokens` overrides the tasks' own limits. A prompt that does not fit the window is an empty response and scores so.
    `batch` rollouts are done together (None: all); after each batch its groups are added to `journal` (anything with `entries`
    and `add(entry)`, such as an append-only file), and batches that it has already are not done again; rollouts that come out
    of it have no `messages`. For the errors raised see `roll_out`.
    """
    params = SampleParams(max_tokens=max_tokens or 0, temperature=temperature, top_p=top_p)
    check_keys(tasks)
    size = max(1, batch // max(1, k)) if batch else len(tasks)
    groups: list[Group] = []
    for number, first in enumerate(range(0, len(tasks), size)):
        if journal is not None and number < len(journal.entries):
            groups += [_group_of(entry) for entry in journal.entries[number]]
            continue
        made = roll_out(
            tasks[first : first + size],
            sampler,
            tokenizer,
            k=k,
            params=params,
            seed=seed,
            tools=tools,
            max_turns=max_turns,
            max_tool_calls=max_tool_calls,
            tool_timeout=tool_timeout,
            thinking=thinking,
            default_system=default_system,
            progress=_shifted(progress, first * k, len(tasks) * k),
        )
        groups += made
        if journal is not None:
            journal.add([{"task": group.task, "rollouts": [to_json(rollout) for rollout in group.rollouts]} for group in made])
    limits = sorted({task.max_tokens for task in tasks} if max_tokens is None else {max_tokens})
    settings = _settings(thinking, params, k, limits)
    if tools:
        settings += f", with {', '.join(Toolbox(tools).tools)} in at most {max_turns} turns"
    return task_run(tasks, groups, tokenizer, settings)


def _shifted(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def _group_of(entry: dict[str, Any]) -> Group:
    return Group(entry["task"], tuple(from_json(table) for table in entry["rollouts"]))


def task_run(tasks: Sequence[Task], groups: Sequence[Group], tokenizer: Any, settings: str = "") -> TaskRun:
    """The counts of rollouts that exist already; every group has the same number of them."""
    rewards_PK: dict[str, np.ndarray] = {}
    shape = (len(groups), len(groups[0].rollouts))
    for p, group in enumerate(groups):
        for j, rollout in enumerate(group.rollouts):
            for name, value in rollout.rewards.items():
                rewards_PK.setdefault(name, np.full(shape, np.nan))[p, j] = value
    return TaskRun(
        tasks=tuple(tasks),
        scores_PK=np.array([[rollout.reward for rollout in group.rollouts] for group in groups]),
        rewards_PK=rewards_PK,
        shape_PK=_shape(groups, tokenizer),
        groups=tuple(groups),
        settings=settings,
    )


def _shape(groups: Sequence[Group], tokenizer: Any) -> dict[str, np.ndarray]:
    end, special = tokenizer.im_end_id, frozenset(tokenizer.special.values())
    rows: dict[str, list[list[float]]] = {ENDS: [], NON_EMPTY: [], NO_OTHER_SPECIAL: []}
    for group in groups:
        last = [r.tokens[len(r.tokens) - r.usage["last_turn"] :].tolist() for r in group.rollouts]
        complete = [bool(tokens) and tokens[-1] == end for tokens in last]
        bodies = [tokens[:-1] if whole else tokens for tokens, whole in zip(last, complete)]
        answers = [_behind_thoughts(body, tokenizer) for body in bodies]
        rows[ENDS].append([float(whole) for whole in complete])
        rows[NON_EMPTY].append([float(bool(tokenizer.decode(body, skip_special=True).strip())) for body in answers])
        rows[NO_OTHER_SPECIAL].append([float(special.isdisjoint(body)) for body in answers])
    return {name: np.array(table) for name, table in rows.items()}


def _behind_thoughts(body: list[int], tokenizer: Any) -> list[int]:
    """What follows a complete think block at the beginning; the whole body where there is none."""
    think, done = tokenizer.special.get(THINK), tokenizer.special.get(THINK_END)
    if think is None or done is None or not body or body[0] != think or done not in body:
        return body
    return body[body.index(done) + 1 :]


def _settings(thinking: bool, params: SampleParams, k: int, limits: list[int]) -> str:
    parts = ["thinking" if thinking else "plain prompt", f"temperature {params.temperature:g}"]
    if params.temperature > 0 and params.top_p < 1:
        parts.append(f"top-p {params.top_p:g}")
    return ", ".join([*parts, f"k={k}", "max " + "/".join(map(str, limits)) + " tokens"])
