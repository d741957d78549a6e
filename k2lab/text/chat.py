"""Kimi's chat format: messages to tokens with the mask of the assistant's own tokens, and training views of a conversation.

A message is a role token, the display name, `<|im_middle|>`, its text and `<|im_end|>`; nothing stands between messages. Tools
are declared first, then comes the system message. Thinking (`<think>...</think>`) is written only for assistant messages
behind the last finished answer (one without tool calls); earlier messages carry an empty pair. So a conversation with thoughts is
not append-only: `training_views` cuts it into one token sequence per answer, as the model saw it when it answered.
Parsing and the OpenAI form of messages are in `k2lab.text.parsing` and `k2lab.text.openai`, re-exported here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2lab.core.errors import DataError
from k2lab.core.types import Message, Reasoning, Text, ToolCall, ToolResult
from k2lab.text import layout
from k2lab.text.openai import from_openai, to_openai
from k2lab.text.parsing import parse
from k2lab.text.template import DEFAULT_SYSTEM
from k2lab.text.tokenizer import Tokenizer

__all__ = ["DEFAULT_SYSTEM", "Rendered", "from_openai", "parse", "render", "to_openai", "training_views"]

ROLE_TOKEN = {
    "user": layout.IM_USER,
    "assistant": layout.IM_ASSISTANT,
    "system": layout.IM_SYSTEM,
    "tool": layout.IM_SYSTEM,
}
_ALLOWED = {"user": (Text,), "system": (Text,), "assistant": (Reasoning, Text, ToolCall), "tool": (ToolResult,)}


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: `tokens`, and for each whether the assistant produced it (so that it may be trained on)."""

    tokens: list[int]
    trained: list[bool]


class _Writer:
    """Collects special ids and ordinary texts; texts are encoded together at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pieces: list[tuple[int | str, bool]] = []

    def special(self, name: str, trained: bool = False) -> None:
        self.pieces.append((self.tokenizer.special_id(name), trained))

    def text(self, text: str, trained: bool = False) -> None:
        """Ordinary text, which must be followed by a special token before the next text."""
        if text:
            assert not self.pieces or isinstance(self.pieces[-1][0], int), "neighbouring texts must be encoded as one"
            self.pieces.append((text, trained))

    def header(self, role_token: str, name: str) -> None:
        self.special(role_token)
        self.text(name)
        self.special(layout.IM_MIDDLE)

    def finish(self) -> Rendered:
        coded = iter(self.tokenizer.encode_batch([piece for piece, _ in self.pieces if isinstance(piece, str)]))
        tokens: list[int] = []
        trained: list[bool] = []
        for piece, flag in self.pieces:
            ids = next(coded) if isinstance(piece, str) else [piece]
            tokens += ids
            trained += [flag] * len(ids)
        return Rendered(tokens, trained)


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    thinking: bool = False,
    default_system: bool = True,
) -> Rendered:
    """The tokens of a conversation in Kimi's format.

    Args: `tools` OpenAI-style tool specifications; `add_generation_prompt` ends with the header of an assistant message to come;
    `thinking` writes a think block into every assistant message, as K2-Thinking expects (it is implied when any message has
    reasoning, so none is ever dropped without the rule above); `default_system` inserts Kimi's default system message when the
    first message is none.

    The last message counts as the answer in progress: without `add_generation_prompt` its own thoughts and those of its tool loop
    are kept. `trained` marks the assistant's text, thoughts, tool calls and closing `<|im_end|>`, not headers; where thoughts
    have been removed by the history rule, history is context only (it is trained in its own view).
    Tool-call ids are written as `functions.{name}:{index}`, counted over the conversation, and tool results follow their
    call's new id; a result whose call is not there keeps its id. Order within an assistant message: thoughts, text, calls.

    Raises DataError for messages that the format cannot express (empty list, a part that does not fit the role, tools that are no
    JSON), RecipeError if the tokenizer lacks a chat token.
    """
    _check(messages)
    out = _Writer(tokenizer)
    if tools:
        out.header(layout.IM_SYSTEM, "tool_declare")
        out.text(_tools_json(tools))
        out.special(layout.IM_END)
    if default_system and messages[0].role != "system":
        out.header(layout.IM_SYSTEM, "system")
        out.text(DEFAULT_SYSTEM)
        out.special(layout.IM_END)
    reasoned = _reasoned(messages)
    history = _history_end(messages, add_generation_prompt)
    ids: dict[str, str] = {}
    num_calls = 0
    for index, message in enumerate(messages):
        out.header(ROLE_TOKEN[message.role], message.name or message.role)
        if message.role == "assistant":
            trained = not (reasoned and index <= history)
            if thinking or reasoned:
                out.special(layout.THINK, trained)
                out.text(_thoughts(message) if index > history else "", trained)
                out.special(layout.THINK_END, trained)
            out.text(message.content, trained)
            num_calls = _calls(out, message, num_calls, ids, trained)
            out.special(layout.IM_END, trained)
        else:
            out.text(_context_text(message, ids))
            out.special(layout.IM_END)
    if add_generation_prompt:
        out.header(layout.IM_ASSISTANT, "assistant")
    return out.finish()


def training_views(messages: Sequence[Message]) -> list[list[Message]]:
    """Prefixes of a conversation which, each rendered on its own, train every assistant message exactly once, in the context in
    which the model produced it.

    Without thoughts the whole conversation is one view. With thoughts there is one view per finished answer (usually: per user
    turn), plus one for an unfinished tool loop at the end; answers before the first thought share a view.
    """
    messages = list(messages)
    if not _reasoned(messages):
        return [messages]
    ends = [index for index, message in enumerate(messages, 1) if _is_final(message)]
    if any(message.role == "assistant" for message in messages[ends[-1] if ends else 0 :]):
        ends.append(len(messages))
    prefixes = [messages[:end] for end in ends]
    nexts = prefixes[1:] + prefixes[-1:]
    return [prefix for prefix, following in zip(prefixes, nexts) if _reasoned(following)]


def _is_final(message: Message) -> bool:
    """Whether `message` is a finished answer: the assistant's, without tool calls."""
    return message.role == "assistant" and not any(isinstance(part, ToolCall) for part in message.parts)


def _thoughts(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Reasoning))


def _reasoned(messages: Sequence[Message]) -> bool:
    return any(_thoughts(message) for message in messages)


def _history_end(messages: Sequence[Message], add_generation_prompt: bool) -> int:
    """Index of the last finished answer that something follows, -1 if there is none."""
    past = messages if add_generation_prompt else messages[:-1]
    return max((index for index, message in enumerate(past) if _is_final(message)), default=-1)


def _calls(out: _Writer, message: Message, num_calls: int, ids: dict[str, str], trained: bool) -> int:
    """Writes the tool calls of `message`, notes their ids, and returns the number of calls so far."""
    calls = [part for part in message.parts if isinstance(part, ToolCall)]
    if calls:
        out.special(layout.SECTION_BEGIN, trained)
        for call in calls:
            call_id = f"functions.{call.name}:{num_calls}"
            num_calls += 1
            if call.id:
                ids[call.id] = call_id
            out.special(layout.CALL_BEGIN, trained)
            out.text(call_id, trained)
            out.special(layout.CALL_ARGUMENT, trained)
            out.text(call.arguments, trained)
            out.special(layout.CALL_END, trained)
        out.special(layout.SECTION_END, trained)
    return num_calls


def _context_text(message: Message, ids: dict[str, str]) -> str:
    if message.role != "tool":
        return message.content
    (result,) = message.parts
    assert isinstance(result, ToolResult)
    return f"## Return of {ids.get(result.id, result.id)}\n{result.content}"


def _tools_json(tools: list[dict[str, Any]]) -> str:
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            "tools must be a list of tool specifications", got=tools, allowed="[{'type': 'function', 'function': {...}}]"
        )
    try:
        return json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DataError(f"a tool specification is no JSON: {error}", where="tools") from None


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in _ALLOWED:
            raise DataError("unknown role", where=f"{where}.role", got=message.role, allowed=", ".join(_ALLOWED))
        wrong = [type(part).__name__ for part in message.parts if not isinstance(part, _ALLOWED[message.role])]
        if wrong:
            allowed = ", ".join(kind.__name__ for kind in _ALLOWED[message.role])
            raise DataError(f"a {message.role} message cannot hold this part", where=where, got=wrong[0], allowed=allowed)
        if message.role == "tool" and len(message.parts) != 1:
            raise DataError("a tool message holds exactly one ToolResult", where=where, got=f"{len(message.parts)} parts")
