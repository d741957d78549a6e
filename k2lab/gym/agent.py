"""What an agent needs besides a sampler: tools that are called safely, and a conversation that keeps the model's own tokens.

A *tool* has `spec() -> dict` (an OpenAI-style specification) and `call(arguments_json) -> str`; slots of kind "tool" are tools.
Nothing that a model writes and nothing that a tool does ends a run: what went wrong becomes the text of the call's result.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.errors import RecipeError
from k2lab.core.schema import build_slot
from k2lab.core.types import Completion, Message, Text, ToolCall, ToolResult
from k2lab.text import chat

# A tool has its own, shorter limit; this one is for a tool that does not keep it.
TOOL_TIMEOUT = 60.0


@dataclass(frozen=True)
class Answer:
    """What came of one tool call: `content` for the model; `error` why it did not succeed, "" if it did (a tool says so by a
    last line that begins with "error:"); `broken` if the tool and not the model is to blame, since it raised, did not return in
    time, or returned no text; `seconds` it took."""

    content: str
    error: str = ""
    broken: bool = False
    seconds: float = 0.0


class Toolbox:
    """Tools by name; `run` calls many at once, each in its own thread.

    `tools` are tool slots, or their names. A call that takes longer than `timeout` seconds is given up (its thread cannot be
    ended and is left behind). At most `workers` calls run at the same time. Raises RecipeError for a tool that has no usable
    specification, or two of one name.
    """

    def __init__(self, tools: Sequence[Any] = (), *, timeout: float = TOOL_TIMEOUT, workers: int | None = None) -> None:
        if not timeout > 0:
            raise RecipeError("a tool's time limit must be positive", where="timeout", got=timeout)
        self.timeout, self.workers = timeout, workers or max(2, os.cpu_count() or 1)
        self.tools: dict[str, Any] = {}
        self.specs: list[dict[str, Any]] = []
        for tool in tools:
            tool = build_slot("tool", tool, "tools") if isinstance(tool, (str, dict)) else tool
            spec = tool.spec()
            try:
                name = spec["function"]["name"]
            except (KeyError, TypeError):
                name = None
            if not isinstance(name, str) or not name:
                raise RecipeError(
                    "a tool's spec() must name its function",
                    where=f"tool {type(tool).__name__}",
                    got=spec,
                    allowed='{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}',
                )
            if name in self.tools:
                raise RecipeError("two tools have the same name", got=name)
            self.tools[name] = tool
            self.specs.append(spec)

    def run(self, calls: Sequence[ToolCall]) -> list[Answer]:
        """One answer per call, in the given order. Never raises for what a model wrote or a tool did."""
        answers: list[Answer | None] = [self._refuse(call) for call in calls]
        open_calls = [place for place, answer in enumerate(answers) if answer is None]
        jobs = [_Job(self.tools[calls[place].name].call, calls[place].arguments) for place in open_calls]
        _run_all(jobs, self.workers, self.timeout)
        for place, job in zip(open_calls, jobs):
            answers[place] = self._answer(calls[place].name, job)
        return [answer for answer in answers if answer is not None]

    def _refuse(self, call: ToolCall) -> Answer | None:
        """The answer to a call that cannot be made; None for one that can."""
        if call.error:
            return _failed(f"this call could not be read: {call.error}")
        if call.name not in self.tools:
            there = ", ".join(self.tools) or "none"
            return _failed(f"there is no tool {call.name!r}; tools: {there}")
        return None

    def _answer(self, name: str, job: _Job) -> Answer:
        if job.late:
            return _failed(f"{name} did not return within {self.timeout:g} seconds", broken=True, seconds=self.timeout)
        if job.raised is not None:
            return _failed(f"{name} failed: {type(job.raised).__name__}: {job.raised}", broken=True, seconds=job.seconds)
        if not isinstance(job.result, str):
            text = f"{name} failed: it returned {type(job.result).__name__}, not text"
            return _failed(text, broken=True, seconds=job.seconds)
        content = _clean(job.result)
        last = content.rstrip().rpartition("\n")[2]
        return Answer(content, error=last if last.startswith("error:") else "", seconds=job.seconds)


def _failed(why: str, broken: bool = False, seconds: float = 0.0) -> Answer:
    why = _clean(why)
    return Answer(f"error: {why}", why, broken, seconds)


def _clean(text: str) -> str:
    """Text that UTF-8 can hold: what a tool returns may have lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------- calls in threads


@dataclass
class _Job:
    """One call of `function(argument)`; its thread writes `result`, `raised` and `seconds` before it sets `done`."""

    function: Callable[[str], Any]
    argument: str
    began: float = 0.0
    late: bool = False
    done: bool = False
    result: Any = None
    raised: BaseException | None = None
    seconds: float = 0.0


def _run_all(jobs: Sequence[_Job], workers: int, timeout: float) -> None:
    """Runs the jobs in daemon threads, at most `workers` at a time; each gets `timeout` seconds from its own start."""
    change = threading.Condition()

    def work(job: _Job) -> None:
        result, raised = None, None
        try:
            result = job.function(job.argument)
        except BaseException as error:
            raised = error
        with change:
            if not job.late:  # nobody looks at a job that was given up
                job.result, job.raised, job.seconds, job.done = result, raised, time.perf_counter() - job.began, True
            change.notify()

    waiting, running = list(reversed(jobs)), list[_Job]()
    with change:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                job.began = time.perf_counter()
                running.append(job)
                threading.Thread(target=work, args=(job,), daemon=True, name="k2-tool").start()
            ends = min(job.began for job in running) + timeout
            change.wait(max(0.0, ends - time.perf_counter()))
            now = time.perf_counter()
            for job in running:
                job.late = not job.done and now - job.began >= timeout
            running = [job for job in running if not (job.done or job.late)]


# ---------------------------------------------------------------- conversations


def result_message(call: ToolCall, index: int, content: str) -> Message:
    """The message that carries a tool's result: under the tool's name, for the id that the model wrote (or, where it wrote none,
    the one that the format gives to call `index` of the conversation)."""
    return Message("tool", (ToolResult(call.id or f"functions.{call.name}:{index}", content),), call.name or None)


def calls_of(message: Message) -> list[ToolCall]:
    """The tool calls of a message."""
    return [part for part in message.parts if isinstance(part, ToolCall)]


@dataclass
class Conversation:
    """A conversation that a model takes part in. Its own tokens stay as they were sampled; everything else is rendered once.

    `messages` in order; `tokens`, `weight` (1.0 on the model's tokens) and `logprobs` (0.0 elsewhere) are equally long.
    `num_calls` counts tool calls, as the format's ids do.
    """

    tokenizer: Any
    messages: list[Message]
    tokens: list[int]
    weight: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_calls: int = 0

    def __post_init__(self) -> None:
        self.weight = self.weight or [0.0] * len(self.tokens)
        self.logprobs = self.logprobs or [0.0] * len(self.tokens)
        self.num_calls = self.num_calls or sum(len(calls_of(message)) for message in self.messages)

    def take(self, completion: Completion) -> Message:
        """Appends a turn of the model; returns it parsed. Raises DataError for ids that are no tokens of the tokenizer; the turn
        is then part of `tokens`, and its message is empty."""
        self.tokens += completion.tokens
        self.weight += [1.0] * len(completion.tokens)
        self.logprobs += completion.logprobs
        self.messages.append(Message("assistant", (Text(""),)))
        self.messages[-1] = chat.parse(completion.tokens, self.tokenizer)
        return self.messages[-1]

    def give(self, contents: Sequence[str]) -> None:
        """Appends the results of the last message's tool calls, in their order, and the header of the next turn."""
        calls = calls_of(self.messages[-1])
        results = [
            result_message(call, self.num_calls + n, content)
            for n, (call, content) in enumerate(zip(calls, contents, strict=True))
        ]
        self.num_calls += len(calls)
        self.ask(results)

    def ask(self, messages: Sequence[Message]) -> None:
        """Appends messages that are not the model's, and the header of its next turn. Only where no message has thoughts: the
        format drops those from history, so a conversation that goes on after them has to be rendered anew."""
        closed = bool(self.tokens) and self.tokens[-1] == self.tokenizer.im_end_id
        end = [] if closed else [self.tokenizer.im_end_id]
        self._context([*end, *chat.render(messages, self.tokenizer, add_generation_prompt=True, default_system=False).tokens])
        self.messages += messages

    def drop_open_context(self) -> None:
        """Removes tokens behind the model's last one: nothing was predicted from them."""
        while self.tokens and not self.weight[-1]:
            self.tokens.pop()
            self.weight.pop()
            self.logprobs.pop()

    def _context(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.weight += [0.0] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
