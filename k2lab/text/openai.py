"""Messages in the OpenAI form (`{"role": ..., "content": ..., "tool_calls": ...}`) to ours and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from k2lab.core.errors import DataError, did_you_mean
from k2lab.core.types import Message, Part, Reasoning, Text, ToolCall, ToolResult
from k2lab.text.parsing import arguments_error

_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def from_openai(dicts: Sequence[dict[str, Any]], where: str = "messages") -> list[Message]:
    """Messages from OpenAI-style dicts; `reasoning_content` becomes Reasoning, `tool_calls` ToolCalls (their arguments may be
    JSON text or an object; text that is no JSON object is kept with its error), a `tool` message a ToolResult.

    Keys whose value is None count as absent. Raises DataError that names the key for unknown roles, unknown keys, wrong types.
    """
    if isinstance(dicts, (str, dict)) or not isinstance(dicts, Sequence):
        raise DataError("a conversation must be a list of messages", where=where, got=type(dicts).__name__)
    return [_message(value, f"{where}[{index}]") for index, value in enumerate(dicts)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError("a message must be an object", where=where, got=f"{type(value).__name__}: {value!r}")
    value = {key: item for key, item in value.items() if item is not None}
    role = value.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        hint = "Write 'developer' messages as 'system'" if role == "developer" else did_you_mean(str(role), _KEYS)
        raise DataError("unknown role", where=f"{where}.role", got=repr(role), allowed=", ".join(_KEYS), next=hint)
    for key in value:
        if key not in _KEYS[role]:
            raise DataError(
                f"a {role} message has no such key",
                where=f"{where}.{key}",
                got=value[key],
                allowed=", ".join(sorted(_KEYS[role])),
                next=did_you_mean(str(key), _KEYS[role]),
            )
    name = _string(value, "name", where) or None
    if role == "tool":
        call_id = _string(value, "tool_call_id", where)
        if call_id is None:
            raise DataError("a tool message must say which call it answers", where=f"{where}.tool_call_id", got="no such key")
        return Message("tool", (ToolResult(call_id, _content(value, where)),), name)
    parts: list[Part] = []
    if reasoning := _string(value, "reasoning_content", where):
        parts.append(Reasoning(reasoning))
    calls = _tool_calls(value.get("tool_calls", []), f"{where}.tool_calls")
    text = "" if "content" not in value and (parts or calls) else _content(value, where)
    if text or not (parts or calls):
        parts.append(Text(text))
    return Message(role, (*parts, *calls), name)  # type: ignore[arg-type]


def _string(value: dict[str, Any], key: str, where: str) -> str | None:
    item = value.get(key)
    if item is not None and not isinstance(item, str):
        raise DataError("must be text", where=f"{where}.{key}", got=f"{type(item).__name__}: {item!r}")
    return item


def _content(value: dict[str, Any], where: str) -> str:
    """The content's text: a str, or a list of `{"type": "text", "text": ...}`."""
    where = f"{where}.content"
    if "content" not in value:
        raise DataError("a message needs content", where=where, got="no such key, or null")
    content = value["content"]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError("must be text or a list of text parts", where=where, got=f"{type(content).__name__}: {content!r}")
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                "only text parts are supported", where=f"{where}[{index}]", got=part, allowed="{'type': 'text', 'text': '...'}"
            )
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[ToolCall]:
    if not isinstance(calls, list):
        raise DataError("must be a list of tool calls", where=where, got=f"{type(calls).__name__}: {calls!r}")
    found = []
    for index, call in enumerate(calls):
        here = f"{where}[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise DataError(
                "a tool call must be an object with the key function",
                where=here,
                got=call,
                allowed="{'id': '...', 'type': 'function', 'function': {'name': '...', 'arguments': '{...}'}}",
            )
        name = _string(function, "name", f"{here}.function")
        if not name:
            raise DataError("a tool call must name its function", where=f"{here}.function.name", got=function)
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            try:
                arguments = json.dumps(arguments, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise DataError(f"not JSON: {error}", where=f"{here}.function.arguments", got=arguments) from None
        if not isinstance(arguments, str):
            raise DataError("must be JSON text or an object", where=f"{here}.function.arguments", got=arguments)
        found.append(ToolCall(name, arguments, _string(call, "id", here), arguments_error(arguments)))
    return found


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI-style dicts of `messages`, for servers and for `apply_chat_template`. Calls without an id get the one that `render`
    writes: `functions.{name}:{index}`, counted over the conversation."""
    dicts: list[dict[str, Any]] = []
    num_calls = 0
    for message in messages:
        value: dict[str, Any] = {"role": message.role}
        if message.name:
            value["name"] = message.name
        if message.role == "tool":
            (result,) = message.parts
            assert isinstance(result, ToolResult), "a tool message holds one ToolResult"
            dicts.append({**value, "tool_call_id": result.id, "content": result.content})
            continue
        value["content"] = message.content
        if reasoning := "".join(part.text for part in message.parts if isinstance(part, Reasoning)):
            value["reasoning_content"] = reasoning
        calls = []
        for call in message.parts:
            if isinstance(call, ToolCall):
                call_id = call.id or f"functions.{call.name}:{num_calls}"
                function = {"name": call.name, "arguments": call.arguments}
                calls.append({"id": call_id, "type": "function", "function": function})
                num_calls += 1
        if calls:
            value["tool_calls"] = calls
        dicts.append(value)
    return dicts
