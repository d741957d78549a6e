"""A task: what is asked, what is right, who judges. Plain data, so that it can be stored, hashed and sent to workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.errors import DataError, K2Error
from k2lab.core.schema import build_slot
from k2lab.core.types import Message
from k2lab.text.layout import IM_END

# Responses that nobody should be rewarded for.
_NONSENSE = ("", IM_END, f" {IM_END}", f"qzxv jkwp vvvq{IM_END}", "qzxv jkwp vvvq")


@dataclass(frozen=True)
class Task:
    """One question. `key` is its stable identity; `messages` end with the user's turn; `answer` is what rewards compare with and
    `gold` a whole response that is right (the answer itself if empty). `rewards` are names of reward slots (or paths), `options`
    their settings by name. `max_tokens` limits what the model writes, over all turns; `tools` are names of tool slots (or paths)
    that it may call, and `max_turns` how many turns it has (0: as the caller says). `meta` is free JSON."""

    key: str
    messages: tuple[Message, ...]
    answer: str
    rewards: tuple[str, ...]
    gold: str = ""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_tokens: int = 48
    tools: tuple[str, ...] = ()
    max_turns: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    def judges(self) -> dict[str, Any]:
        """The task's rewards by name, built. Raises RecipeError for a reward or setting that does not exist."""
        return {
            name: build_slot("reward", {"type": name, **self.options.get(name, {})}, f"task {self.key}") for name in self.rewards
        }

    def scores(self, response: str) -> dict[str, float]:
        """What each reward says about a response (decoded text, special tokens included).

        Raises RecipeError for a reward or setting that does not exist, DataError for a score outside [0, 1] or NaN, and whatever
        a reward raises.
        """
        return {name: judged(self, name, reward, response) for name, reward in self.judges().items()}

    def score(self, response: str) -> float:
        """The product of all rewards: 1 only if every one of them is satisfied. For the errors raised see `scores`."""
        total = 1.0
        for value in self.scores(response).values():
            total *= value
        return total


def judged(task: Task, name: str, reward: Any, response: str) -> float:
    """What `reward`, called `name`, says about a response. Raises DataError unless it is a number in [0, 1]."""
    value = reward.score(task, response)
    if isinstance(value, str) or not 0 <= value <= 1:
        raise DataError("a reward lies outside [0, 1]", where=f"task {task.key}, reward {name}", got=value)
    return float(value)


def question_of(record: dict[str, Any]) -> tuple[Message, ...]:
    """The user's turn of an instruction record: the instruction and, after a blank line, its input if it has one."""
    given = record.get("input") or ""
    return (Message.text("user", record["instruction"] + (f"\n\n{given}" if given else "")),)


def check_tasks(tasks: Iterable[Task]) -> list[str]:
    """What is wrong with the tasks, one sentence each; empty if all can be won and none can be won by nonsense.

    The gold response must score 1, empty and nonsense responses less; keys must differ; the last message must be the user's or a
    tool's; a task needs a reward and room for its gold response.
    """
    problems, seen = [], set[str]()
    for task in tasks:
        if task.key in seen:
            problems.append(f"{task.key}: the key occurs twice.")
        seen.add(task.key)
        if not task.messages or task.messages[-1].role not in ("user", "tool"):
            problems.append(f"{task.key}: the last message must be the user's or a tool's.")
        if not task.rewards:
            problems.append(f"{task.key}: it has no reward.")
            continue
        if task.max_tokens < 1:
            problems.append(f"{task.key}: max_tokens = {task.max_tokens} leaves no room for an answer.")
        try:
            scores = task.scores((task.gold or task.answer) + IM_END)
            low = {name: value for name, value in scores.items() if value != 1}
            if low:
                named = ", ".join(f"{name} = {value:g}" for name, value in low.items())
                problems.append(f"{task.key}: its own gold response does not score 1 ({named}).")
            for nonsense in _NONSENSE:
                if task.score(nonsense) >= 1:
                    problems.append(f"{task.key}: the response {nonsense!r} scores 1.")
        except K2Error as error:
            problems.append(f"{task.key}: {error}")
        except Exception as error:  # a reward may be anybody's code
            problems.append(f"{task.key}: a reward failed: {type(error).__name__}: {error}")
    return problems
