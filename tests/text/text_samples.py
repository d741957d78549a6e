"""Texts for the tests of the text room."""

from __future__ import annotations

import json

from k2lab.core.rng import rng
from k2lab.core.types import Message, Part, Reasoning, Text, ToolCall, ToolResult
from k2lab.text import layout

VOCAB_SIZE = 540

SENTENCES = (
    "The quick brown fox doesn't jump over the lazy dog, and we've seen it's WE'RE true in 1999 and 2024.\n",
    "def area(width: float, height: float) -> float:\n    return width * height  # rectangle\n\n",
    "你好，世界。中文English混合的文本，北京市有很多人。\n",
    "Ελληνικά, русский текст, العربية and naïve café façades; emoji 🎉🙂 too.\n",
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n',
)


def corpus() -> list[str]:
    """120 texts: the sentences above in counter-based random order."""
    return ["".join(SENTENCES[i] for i in rng(0, "text", "corpus", n).integers(0, len(SENTENCES), 6)) for n in range(120)]


POOLS = (
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ '’",
    " \t\n\r\f\v\u00a0\u2003\u3000\u200b\u0085",
    "0123456789.,:;+-*/()[]{}<>|\\_\"'`~!@#$%^&=?",
    "你好世界中文混合的文本北京々〆ー漢字かなカナ",
    "🙂🎉👩‍👩‍👧🏳️‍🌈\u0301\u0338\ufe0f",
    "ſßİıǅﬁαΩжЯعربहिन्दी\u0000\u0007\ufffd\ufeff\U0010ffff",
)


def random_text(*key: str | int) -> str:
    """A text of up to 60 characters; runs from several scripts, sometimes a special token's name."""
    draw = rng(0, "text", *key)
    parts = []
    for _ in range(int(draw.integers(0, 8))):
        if draw.random() < 0.1:
            parts.append(list(layout.OFFSETS)[int(draw.integers(0, len(layout.OFFSETS)))])
        pool = POOLS[int(draw.integers(0, len(POOLS)))]
        parts.append("".join(pool[i] for i in draw.integers(0, len(pool), int(draw.integers(1, 9)))))
    return "".join(parts)


def _safe(*key: str | int) -> str:
    """A random text without special-token names (which a template's text would turn into special tokens)."""
    text = random_text(*key)
    for name in layout.OFFSETS:
        text = text.replace(name, "!")
    return text


def random_conversation(*key: str | int) -> list[Message]:
    """One to four turns with optional system message, names, thoughts, tool loops; ids as `render` writes them.

    Each assistant message holds some text, or a call; a third of the conversations has no thoughts at all.
    """
    draw = rng(0, "text", "conversation", *key)
    thoughtful = draw.random() < 0.67
    messages: list[Message] = []
    if draw.random() < 0.5:
        messages.append(Message("system", (Text(_safe(*key, "system")),)))
    num_calls = 0

    def assistant(calls: list[ToolCall]) -> Message:
        at = len(messages)
        parts: list[Part] = []
        if thoughtful and draw.random() < 0.6 and (thought := _safe(*key, at, "thought")):
            parts.append(Reasoning(thought))
        text = _safe(*key, at, "text")
        if text or not (parts or calls):
            parts.append(Text(text))
        return Message("assistant", (*parts, *calls), "Kimi" if draw.random() < 0.1 else None)

    for turn in range(int(draw.integers(1, 5))):
        name = "Ann" if draw.random() < 0.2 else None
        messages.append(Message("user", (Text(_safe(*key, turn, "user")),), name))
        for loop in range(int(draw.integers(0, 3))):
            calls = []
            for n in range(int(draw.integers(1, 3))):
                arguments = json.dumps({"q": _safe(*key, turn, loop, n)}, ensure_ascii=bool(draw.random() < 0.5))
                calls.append(ToolCall("find.it", arguments, f"functions.find.it:{num_calls}"))
                num_calls += 1
            messages.append(assistant(calls))
            for call in calls:
                named = "find.it" if draw.random() < 0.5 else None
                messages.append(Message("tool", (ToolResult(call.id or "", _safe(*key, call.id or "")),), named))
        if turn == 0 or draw.random() < 0.9:
            messages.append(assistant([]))
    return messages
