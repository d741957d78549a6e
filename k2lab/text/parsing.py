"""Liberal parsing of what a model wrote in Kimi's chat format into a Message; nothing that it wrote gets lost.

In tokens only special ids have meaning; text that merely looks like them stays text. In text (all that some servers return)
the strings themselves have meaning. Accepted beyond the format: section tokens in the singular, calls without a section, missing
end tokens after truncation, names without `functions.`, blanks around ids, arguments that are no JSON (kept, with the error).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from k2lab.core.types import Message, Part, Reasoning, Text, ToolCall, ToolResult
from k2lab.text import layout
from k2lab.text.tokenizer import Tokenizer

Item = tuple[bool, str]  # (is a marker, its name or the text)

_SINGULAR_BEGIN, _SINGULAR_END = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
_BEGINS = {layout.SECTION_BEGIN, _SINGULAR_BEGIN}
_ENDS = {layout.SECTION_END, _SINGULAR_END}
_CALLS = {*_BEGINS, layout.CALL_BEGIN}
_ROLES = {layout.IM_USER: "user", layout.IM_ASSISTANT: "assistant", layout.IM_SYSTEM: "system"}
_RESULT = re.compile(r"## Return of ([^\n]*)\n?(.*)", re.DOTALL)
_CALL_ID = re.compile(r"(?:functions\.)?(?P<name>.*?)(?::\d+)?", re.DOTALL)
_ID_AND_ARGUMENTS = re.compile(r"\s*([^\s{]+)\s*(\{.*)", re.DOTALL)


def parse(tokens_or_text: Iterable[int] | str, tokenizer: Tokenizer) -> Message:
    """The message that a completion holds: an assistant's, unless the tokens start with another role's header.

    Reads up to the first `<|im_end|>`, eos or padding token. The parts are Reasoning (`<think>`; also when its start stood in the
    prompt or its end is missing), Text, ToolCalls with `error` set where the call is not usable; an empty message has one empty
    Text. A message that starts with the text `## Return of` under a system header not named `system` is a tool result.
    """
    if isinstance(tokens_or_text, str):
        items = _items_of_text(tokens_or_text, tokenizer)
    else:
        items = _items_of_tokens(tokens_or_text, tokenizer)
    role, name, items = _header(items)
    if role == "assistant":
        return Message("assistant", _assistant(items), name)
    text = _join(items)
    result = _RESULT.fullmatch(text) if role == "system" and name is not None else None
    if result:
        return Message("tool", (ToolResult(*result.groups()),), name if name != "tool" else None)
    return Message(role, (Text(text),), name)  # type: ignore[arg-type]


def arguments_error(arguments: str) -> str | None:
    """Why `arguments` is not usable as a call's arguments (a JSON object), or None if it is."""
    try:
        value = json.loads(arguments)
    except ValueError as error:
        return f"the arguments are not valid JSON: {error}"
    except RecursionError:
        return "the arguments are not valid JSON: nested too deeply"
    return None if isinstance(value, dict) else f"the arguments are not a JSON object but {type(value).__name__}"


# ---------------------------------------------------------------- tokens or text -> items


def _stops(tokenizer: Tokenizer) -> set[str]:
    roles = tokenizer._vocabulary.roles
    return {name for name in (roles.get("im_end"), roles.get("eos"), roles.get("pad")) if name}


def _items_of_text(text: str, tokenizer: Tokenizer) -> list[Item]:
    names = {*tokenizer.special, *layout.OFFSETS, _SINGULAR_BEGIN, _SINGULAR_END}
    stops = _stops(tokenizer)
    items: list[Item] = []
    pattern = "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name)))
    for index, piece in enumerate(re.split(f"({pattern})", text)):
        if index % 2 and piece in stops:
            break
        if piece:
            items.append((bool(index % 2), piece))
    return items


def _items_of_tokens(tokens: Iterable[int], tokenizer: Tokenizer) -> list[Item]:
    name_of = {token_id: name for name, token_id in tokenizer.special.items()}
    stops = {tokenizer.special[name] for name in _stops(tokenizer)}
    items: list[Item] = []
    run: list[int] = []
    for token in tokens:
        if token in stops:
            break
        if token not in name_of:
            run.append(token)
            continue
        if run:
            items.append((False, tokenizer.decode(run)))
            run = []
        items.append((True, name_of[token]))
    if run:
        items.append((False, tokenizer.decode(run)))
    return list(_with_singulars(items))


def _with_singulars(items: list[Item]) -> Iterator[Item]:
    """Section tokens in the singular are no special tokens; they count where only a section token can stand: right before a
    call's begin token, and right after a call's end token."""
    for index, (marker, text) in enumerate(items):
        if marker:
            yield marker, text
            continue
        after = items[index - 1] == (True, layout.CALL_END) if index else False
        before = items[index + 1] == (True, layout.CALL_BEGIN) if index + 1 < len(items) else False
        if after and text.lstrip().startswith(_SINGULAR_END):
            yield True, _SINGULAR_END
            text = text.lstrip().removeprefix(_SINGULAR_END)
        if before and text.rstrip().endswith(_SINGULAR_BEGIN):
            text = text.rstrip().removesuffix(_SINGULAR_BEGIN)
            if text:
                yield False, text
            yield True, _SINGULAR_BEGIN
        elif text:
            yield False, text


# ---------------------------------------------------------------- items -> parts


def _join(items: list[Item]) -> str:
    return "".join(text for _, text in items)


def _header(items: list[Item]) -> tuple[str, str | None, list[Item]]:
    """Role, display name where it differs from the role's, and what follows the header, if there is one."""
    if items and items[0][0] and items[0][1] in _ROLES and (True, layout.IM_MIDDLE) in items[:3]:
        middle = items.index((True, layout.IM_MIDDLE))
        role, name = _ROLES[items[0][1]], _join(items[1:middle])
        return role, name if name and name != role else None, items[middle + 1 :]
    return "assistant", None, items


def _find(items: list[Item], names: set[str]) -> int:
    """Index of the first of these markers, or the number of items."""
    return next((index for index, (marker, text) in enumerate(items) if marker and text in names), len(items))


def _assistant(items: list[Item]) -> tuple[Part, ...]:
    start, end, calls = (_find(items, names) for names in ({layout.THINK}, {layout.THINK_END}, _CALLS))
    reasoning = ""
    if start < len(items) and not _join(items[:start]).strip():
        inside = items[start + 1 :]
        # A missing end token: thoughts go on to the first call or to the end.
        end = _find(inside, {layout.THINK_END})
        cut = end if end < len(inside) else _find(inside, _CALLS)
        reasoning = _join(inside[:cut])
        items = inside[cut + 1 :] if end < len(inside) else inside[cut:]
    elif end < min(start, calls):  # the prompt ended with the start token
        reasoning, items = _join(items[:end]), items[end + 1 :]
    body = _Body()
    for marker, text in items:
        body.take(marker, text)
    parts: list[Part] = [Reasoning(reasoning)] if reasoning else []
    text = body.finish()
    if text or not (parts or body.calls):
        parts.append(Text(text))
    return (*parts, *body.calls)


@dataclass
class _Body:
    """Reads text and tool calls; `state` is where the next text belongs."""

    state: str = "text"  # text | between (calls of a section) | id | arguments
    texts: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)  # text behind the first call
    calls: list[ToolCall] = field(default_factory=list)
    call_id: str = ""
    arguments: str | None = None

    def take(self, marker: bool, text: str) -> None:
        in_call = self.state in ("id", "arguments")
        if marker and (text in _BEGINS or text in _ENDS or text == layout.CALL_BEGIN):
            self.close(complete=False)
            self.state = "between" if text in _BEGINS else "text" if text in _ENDS else "id"
        elif marker and text == layout.CALL_END and in_call:
            self.close(complete=True)
            self.state = "between"
        elif marker and text == layout.CALL_ARGUMENT and self.state == "id":
            self.state, self.arguments = "arguments", ""
        elif self.state == "arguments":
            self.arguments = (self.arguments or "") + text
        elif self.state == "id":
            self.call_id += text
        elif self.calls:
            self.tail.append(text)
        elif self.state == "text" or text.strip():
            self.texts.append(text)

    def close(self, complete: bool) -> None:
        """Ends the call in progress, if there is one."""
        if self.state in ("id", "arguments"):
            self.calls.append(_tool_call(self.call_id, self.arguments, complete))
        self.call_id, self.arguments = "", None

    def finish(self) -> str:
        """Ends the message; returns its text. Blanks behind calls mean nothing and are left out."""
        self.close(complete=False)
        self.state = "text"
        tail = "".join(self.tail)
        return "".join(self.texts) + (tail if tail.strip() else "")


def _tool_call(call_id: str, arguments: str | None, complete: bool) -> ToolCall:
    if arguments is None:  # the token between id and arguments is missing
        both = _ID_AND_ARGUMENTS.fullmatch(call_id)
        call_id, arguments = both.groups() if both else (call_id, "")
    call_id = call_id.strip()
    match = _CALL_ID.fullmatch(call_id)
    assert match is not None, "the pattern matches every text"
    name = match["name"].strip()
    error = "the call has no name" if not name else arguments_error(arguments)
    if error and not complete:
        error = f"the call was cut off: {error}"
    return ToolCall(name, arguments, call_id or None, error)
