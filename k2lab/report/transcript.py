"""What a model wrote, with thoughts, tool calls and their results set apart. All of it is escaped, and marks in odd places stay
visible."""

from __future__ import annotations

import json
import re

from k2lab.report.markup import esc

# Thoughts; a section of tool calls; a result that was appended for a call (only behind its heading, so that a model that writes
# the marks of a turn by itself is shown as it wrote); the end of the last turn.
_PIECES = re.compile(
    r"<think>(?P<think>.*?)(?:</think>|\Z)"
    r"|<\|tool_calls?_section_begin\|>(?P<calls>.*?)(?:<\|tool_calls?_section_end\|>|\Z)"
    r"|(?:<\|im_end\|>)?<\|im_[a-z]+\|>(?P<tool>[^<|]{0,80})<\|im_middle\|>## Return of (?P<id>[^\n<]{0,120})\n"
    r"(?P<result>.*?)(?:<\|im_end\|>|\Z)(?:<\|im_assistant\|>[^<|]{0,40}<\|im_middle\|>)?",
    re.S,
)
_CALL = re.compile(r"(?P<name>.*?)<\|tool_call_argument_begin\|>(?P<arguments>.*?)(?:<\|tool_call_end\|>|\Z)", re.S)
_END = "<|im_end|>"

Piece = tuple[str, str, str]  # (kind, whose, text); kinds: text, think, call, result


def pieces(text: str) -> list[Piece]:
    """The parts of a response in order; an end mark at the very end is left off, since why it ended is told beside it."""
    found: list[Piece] = []
    place = 0
    text = text.removesuffix(_END)
    for match in _PIECES.finditer(text):
        _text(found, text[place : match.start()])
        place = match.end()
        if match["think"] is not None:
            found += [("think", "", match["think"].strip())] if match["think"].strip() else []
        elif match["calls"] is not None:
            found += _calls(match["calls"])
        else:
            found.append(("result", match["tool"].strip() or _function(match["id"]), match["result"].strip("\n")))
    _text(found, text[place:])
    return found


def _text(found: list[Piece], text: str) -> None:
    if text.strip():
        found.append(("text", "", text))


def _calls(text: str) -> list[Piece]:
    found: list[Piece] = []
    for part in filter(str.strip, text.split("<|tool_call_begin|>")):
        call = _CALL.match(part)
        if call is None:
            found.append(("call", "", part.strip()))
        else:
            found.append(("call", _function(call["name"]), _arguments(call["arguments"])))
    return found


def _function(identity: str) -> str:
    """`python` of `functions.python:0`."""
    return identity.strip().removeprefix("functions.").partition(":")[0]


def _arguments(text: str) -> str:
    """A call's arguments as a person reads them: the text itself if there is only one, `name: value` lines if there are more."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()
    if not isinstance(table, dict) or not table:
        return text.strip()
    if len(table) == 1 and isinstance(next(iter(table.values())), str):
        return str(next(iter(table.values())))
    return "\n".join(f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in table.items())


def show(text: str, limit: int) -> str:
    """The response as HTML, at most `limit` characters of it."""
    cut = text[:limit]
    parts = [_shown(*piece) for piece in pieces(cut)]
    if len(text) > limit:
        parts.append(f'<p class="note">\u2026 {len(text) - limit} more characters</p>')
    return "".join(parts) or '<p class="none">(nothing)</p>'


def _shown(kind: str, whose: str, text: str) -> str:
    body = f"<pre>{esc(text)}</pre>"
    if kind == "text":
        return body
    name = whose[:60]
    words = {
        "think": "thinks",
        "call": f"calls {name}" if name else "makes a call that cannot be read",
        "result": f"{name or 'the tool'} returns",
    }
    return f'<div class="part {kind}"><b>{esc(words[kind])}</b>{body}</div>'
