"""Rollouts: a model does tasks, with or without tools, many at once.

Every consumer of a model's behaviour (evaluation, RL, preference pairs, teacher data) goes through `roll_out`. All rollouts of
all tasks are sampled together, turn by turn; between turns the tools that were called run in threads. What goes wrong inside
one rollout is recorded in it and never raised: a run does not end because one reward divides by zero.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from k2lab.core.errors import DataError, K2Error, RecipeError
from k2lab.core.types import Completion, Group, Rollout, SampleParams, StopReason, ToolCall
from k2lab.gym.agent import TOOL_TIMEOUT, Conversation, Toolbox, calls_of
from k2lab.gym.task import Task, judged
from k2lab.text import chat

MAX_TOOL_CALLS = 16
Progress = Callable[[int, int], None]


def roll_out(
    tasks: Sequence[Task],
    sampler: Any,
    tokenizer: Any,
    *,
    k: int = 1,
    params: SampleParams,
    seed: int,
    policy_version: int = 0,
    tools: Sequence[Any] = (),
    max_turns: int = 1,
    max_tool_calls: int = MAX_TOOL_CALLS,
    tool_timeout: float = TOOL_TIMEOUT,
    default_system: bool = False,
    thinking: bool = False,
    keys_prefix: str = "",
    progress: Progress | None = None,
) -> list[Group]:
    """Does every task `k` times; one group per task, in the given order.

    `sampler` has `sample(prompts, params, keys)` (`k2lab.sampling`), `tokenizer` is a `text.tokenizer.Tokenizer`.

    Limits: `params.max_tokens` is the number of tokens that the model may write in one rollout, over all its turns; 0 means each
    task's own `max_tokens`. A rollout goes on while its last turn holds tool calls and has ended properly, and turns (a task's
    own `max_turns`, else the argument) and tokens are left. Calls beyond `max_tool_calls` of a rollout get an error as result.

    Tools: `tools` (slots or names) are offered to every task, besides those that a task names itself. Results come back as
    context (weight 0), under the tool's name, in the order of the calls; what a call did wrong is its result's text. A tool that
    raises or does not return within `tool_timeout` seconds is the tool's fault, so it is also the rollout's `error`.

    Draws: `seed` replaces `params.seed`; a turn's draws are a function of (`seed`, `keys_prefix`, task key, sample index, turn,
    `policy_version`), not of other tasks. The first turn under version 0 has the key "<prefix><task key>/<index>".

    `Rollout.usage`: prompt, response, context (tokens: of the first prompt, the model's, of results), turns, last_turn (tokens
    of the last turn), tool_calls, tool_results (calls that got one), tool_errors (whose result is an error). `Rollout.timings`:
    sample (this rollout's share of its batches' seconds), tools (seconds of its calls). `stop` is the last turn's: EOS, LENGTH
    (the tokens are used up), CONTEXT (the window is full; `error` if it was so before the first turn). A task's rewards judge
    the last turn's decoded text; one that raises, or gives no number in [0, 1], counts 0 and is the `error`.

    `progress(done, total)` is called after each turn with the number of rollouts that have ended. Raises RecipeError for
    settings that make no sense and for rewards or tools that do not exist, DataError for no task or a key twice, and what the
    sampler raises.
    """
    _check(tasks, k, params, max_turns)
    boxes = _Boxes(tools, tool_timeout)
    judges = _judges(tasks)
    runs = []
    for task in tasks:
        box = boxes.of(task)
        prompt = _prompt(task, box, tokenizer, thinking, default_system)
        for index in range(k):
            runs.append(
                _Run(
                    task=task,
                    index=index,
                    box=box,
                    talk=Conversation(tokenizer, list(task.messages), list(prompt)),
                    prompt=len(prompt),
                    limit=params.max_tokens or task.max_tokens,
                    turns_left=task.max_turns or max_turns,
                    calls_left=max_tool_calls,
                    key=f"{keys_prefix}{task.key}/{index}" + (f" policy {policy_version}" if policy_version else ""),
                )
            )
    going, turn = runs, 0
    while going:
        _sample(going, turn, sampler, replace(params, seed=seed, stop_tokens=(tokenizer.im_end_id, *params.stop_tokens)))
        going = [run for run in going if run.wants_tools()]
        _call_tools(going)
        turn += 1
        if progress is not None:
            progress(len(runs) - len(going), len(runs))
    rollouts = [run.finish(judges[place // k]) for place, run in enumerate(runs)]
    return [Group(task.key, tuple(rollouts[n * k : n * k + k])) for n, task in enumerate(tasks)]


def _prompt(task: Task, box: Toolbox, tokenizer: Any, thinking: bool, default_system: bool) -> list[int]:
    return chat.render(
        list(task.messages),
        tokenizer,
        tools=box.specs or None,
        add_generation_prompt=True,
        thinking=thinking,
        default_system=default_system,
    ).tokens


def _check(tasks: Sequence[Task], k: int, params: SampleParams, max_turns: int) -> None:
    if k < 1 or (k > 1 and params.temperature == 0):
        raise RecipeError(
            f"k = {k} samples with temperature {params.temperature:g} make no sense", allowed="k = 1, or a temperature above 0"
        )
    if params.max_tokens < 0 or max_turns < 1:
        raise RecipeError(
            "limits must be positive",
            got=f"max_tokens={params.max_tokens}, max_turns={max_turns}",
            allowed="max_turns of at least 1, max_tokens of at least 1 (0: each task's own)",
        )
    check_keys(tasks)


def check_keys(tasks: Sequence[Task]) -> None:
    """DataError if there is no task, or if two have the same key (their draws would be the same)."""
    if not tasks:
        raise DataError("there is no task to run")
    twice = [key for key, count in Counter(task.key for task in tasks).items() if count > 1]
    if twice:
        raise DataError("two tasks have the same key", got=twice[0])


class _Boxes:
    """The toolbox of each task: what all are offered and what the task names; equal ones are made once."""

    def __init__(self, tools: Sequence[Any], timeout: float) -> None:
        self.tools, self.timeout = tuple(tools), timeout
        self.made: dict[tuple[str, ...], Toolbox] = {(): Toolbox(self.tools, timeout=timeout)}

    def of(self, task: Task) -> Toolbox:
        if task.tools not in self.made:
            shared = self.made[()]
            own = [tool for tool in Toolbox(task.tools).tools.items() if tool[0] not in shared.tools]
            self.made[task.tools] = Toolbox([*self.tools, *(tool for _, tool in own)], timeout=self.timeout)
        return self.made[task.tools]


def _judges(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Each task's rewards, built; equal ones once. A reward that does not exist is the user's mistake and is raised."""
    made: dict[str, dict[str, Any]] = {}
    found = []
    for task in tasks:
        same = json.dumps([task.rewards, task.options], sort_keys=True, default=repr)
        if same not in made:
            made[same] = task.judges()
        found.append(made[same])
    return found


# ---------------------------------------------------------------- one rollout


@dataclass
class _Run:
    """A rollout in progress."""

    task: Task
    index: int
    box: Toolbox
    talk: Conversation
    prompt: int  # tokens of the first prompt
    limit: int  # tokens that the model may write in all
    turns_left: int
    calls_left: int
    key: str
    last: tuple[int, ...] = ()  # the last turn's tokens
    stop: StopReason = StopReason.ERROR
    versions: tuple[int, int] | None = None
    error: str = ""
    usage: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"sample": 0.0, "tools": 0.0})

    @property
    def room(self) -> int:
        """Tokens that the model may still write."""
        return self.limit - self.usage["response"]

    def take(self, completion: Completion) -> None:
        """Appends a turn; `completion` may be longer than what is left and is then cut."""
        completion = _cut(completion, self.room)
        self.usage["turns"] += 1
        self.usage["response"] += len(completion.tokens)
        self.turns_left -= 1
        self.stop, self.last = completion.stop, completion.tokens
        first = self.versions[0] if self.versions else completion.policy_version
        self.versions = (first, completion.policy_version)
        try:
            message = self.talk.take(completion)
        except K2Error as problem:
            self.stop, self.last, self.error = StopReason.ERROR, (), str(problem)
            return
        self.usage["tool_calls"] += len(calls_of(message))
        if self.stop is StopReason.CONTEXT and self.usage["turns"] == 1 and not completion.tokens:
            self.error = f"the prompt of {self.prompt} tokens leaves no room in the model's window"

    def wants_tools(self) -> bool:
        """Whether there are calls to run and a turn to use their results in."""
        ended = self.stop in (StopReason.EOS, StopReason.STOP_TOKEN)
        called = ended and self.turns_left > 0 and self.room > 0 and not self.error and bool(calls_of(self.talk.messages[-1]))
        return called and bool(self.box.tools)

    def calls(self) -> list[ToolCall]:
        """The last turn's calls; those beyond the limit carry an error instead of being made."""
        calls = calls_of(self.talk.messages[-1])
        allowed, self.calls_left = self.calls_left, max(0, self.calls_left - len(calls))
        over = "the limit of tool calls is reached"
        return [call if n < allowed else replace(call, error=call.error or over) for n, call in enumerate(calls)]

    def finish(self, judges: dict[str, Any]) -> Rollout:
        if self.last or self.usage["turns"] > 1:
            self.talk.drop_open_context()
        response = self.talk.tokenizer.decode(self.last)
        rewards = {name: self._judge(name, reward, response) for name, reward in judges.items()}
        assert self.versions is not None, "a rollout has at least one turn"
        self.usage["context"] = len(self.talk.tokens) - self.usage["response"] - self.prompt
        names = ("prompt", "response", "context", "turns", "last_turn", "tool_calls", "tool_results", "tool_errors")
        self.usage.update(prompt=self.prompt, last_turn=len(self.last))
        return Rollout(
            task=self.task.key,
            index=self.index,
            messages=tuple(self.talk.messages),
            tokens=np.array(self.talk.tokens, dtype=np.int32),
            weight=np.array(self.talk.weight, dtype=np.float32),
            logprobs=np.array(self.talk.logprobs, dtype=np.float32),
            rewards=rewards,
            reward=0.0 if self.error else math.prod(rewards.values()),
            stop=self.stop,
            policy_version=self.versions,
            usage={name: self.usage[name] for name in names},
            timings={name: round(seconds, 6) for name, seconds in self.seconds.items()},
            error=self.error,
            response=response,
        )

    def _judge(self, name: str, reward: Any, response: str) -> float:
        try:
            return judged(self.task, name, reward, response)
        except Exception as problem:  # a reward may be anybody's code
            own = isinstance(problem, K2Error)
            said = str(problem) if own else f"the reward {name} failed: {type(problem).__name__}: {problem}"
            self.error = self.error or said
            return 0.0


def _cut(completion: Completion, room: int) -> Completion:
    """The completion as it would have been with a limit of `room` tokens: draws depend on the position alone."""
    if len(completion.tokens) < room or (len(completion.tokens) == room and completion.stop is not StopReason.CONTEXT):
        return completion
    return replace(
        completion,
        tokens=completion.tokens[:room],
        logprobs=completion.logprobs[:room],
        top=completion.top[:room],
        stop=StopReason.LENGTH,
    )


# ---------------------------------------------------------------- as JSON

_PLAIN = ("task", "index", "rewards", "reward", "usage", "timings", "error", "response")


def to_json(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON, exactly; `messages` are left out, since they follow from the task and the tokens."""
    table = {name: getattr(rollout, name) for name in _PLAIN}
    arrays = {name: getattr(rollout, name).tolist() for name in ("tokens", "weight", "logprobs")}
    return {**table, **arrays, "stop": rollout.stop.value, "policy_version": list(rollout.policy_version)}


def from_json(table: dict[str, Any]) -> Rollout:
    """The rollout that `to_json` wrote, with no messages."""
    return Rollout(
        **{name: table[name] for name in _PLAIN},
        messages=(),
        tokens=np.array(table["tokens"], dtype=np.int32),
        weight=np.array(table["weight"], dtype=np.float32),
        logprobs=np.array(table["logprobs"], dtype=np.float32),
        stop=StopReason(table["stop"]),
        policy_version=(table["policy_version"][0], table["policy_version"][1]),
    )


# ---------------------------------------------------------------- a turn of all


def _sample(runs: Sequence[_Run], turn: int, sampler: Any, params: SampleParams) -> None:
    """Samples the next turn of all runs; those with the same limit go together, with the most that one of them has left."""
    by_limit: dict[int, list[_Run]] = {}
    for run in runs:
        by_limit.setdefault(run.limit, []).append(run)
    for batch in by_limit.values():
        began = time.perf_counter()
        done = sampler.sample(
            [run.talk.tokens for run in batch],
            replace(params, max_tokens=max(run.room for run in batch)),
            [run.key + (f" turn {turn}" if turn else "") for run in batch],
        )
        share = (time.perf_counter() - began) / len(batch)
        for run, completion in zip(batch, done, strict=True):
            run.seconds["sample"] += share
            run.take(completion)


def _call_tools(runs: Sequence[_Run]) -> None:
    """Runs the calls of all runs' last turns together, and gives each run its results."""
    boxes: dict[int, list[tuple[_Run, list[ToolCall]]]] = {}
    for run in runs:
        boxes.setdefault(id(run.box), []).append((run, run.calls()))
    for asked in boxes.values():
        answers = iter(asked[0][0].box.run([call for _, calls in asked for call in calls]))
        for run, calls in asked:
            mine = [next(answers) for _ in calls]
            run.talk.give([answer.content for answer in mine])
            run.usage["tool_results"] += len(mine)
            run.usage["tool_errors"] += sum(bool(answer.error) for answer in mine)
            run.seconds["tools"] += sum(answer.seconds for answer in mine)
            run.error = next((answer.error for answer in mine if answer.broken), run.error)
