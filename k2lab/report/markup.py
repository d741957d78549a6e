"""Small pieces of HTML that several sections share. All text of a run directory passes through `esc`."""

from __future__ import annotations

from html import escape
from typing import Any

# Controls are shown as pictures, and marks that reorder text are taken out: output of a model must not change how the page reads.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_REORDER = dict.fromkeys((*range(8234, 8239), *range(8294, 8298), 8206, 8207, 1564), 65533)


def esc(value: Any) -> str:
    """Text safe inside elements and quoted attributes."""
    return escape(str(value).translate(_CONTROLS | _REORDER))


def shorten(value: Any, limit: int) -> str:
    """Escaped text of at most `limit` characters; says how many are missing."""
    text = str(value)
    if len(text) <= limit:
        return esc(text)
    return f'{esc(text[:limit])}<span class="unit"> \u2026 {len(text) - limit} more characters</span>'


def tip(label: str, explanation: str) -> str:
    """A word with an explanation that shows under the pointer, on focus or on a tap."""
    return f'<span class="tip" tabindex="0">{esc(label)}<i role="note">{esc(explanation)}</i></span>'


def section(key: str, title: str, intro: str, body: str) -> str:
    """A section, or nothing if its body is empty. `intro` is plain text."""
    if not body:
        return ""
    lead = f'<p class="intro">{esc(intro)}</p>' if intro else ""
    return f'<section id="{key}"><h2>{esc(title)}</h2>{lead}{body}</section>'


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(`a.b`, text) pairs of nested tables; lists are joined."""
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            pairs += flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return pairs
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return [(prefix, str(value))]
