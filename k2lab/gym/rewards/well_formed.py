"""Reward for a complete turn in Kimi's format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from k2lab.text.layout import BOS, EOS, IM_END, PAD, THINK, THINK_END

_SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|" + "|".join(map(re.escape, (BOS, EOS, PAD, THINK, THINK_END))))


@dataclass(frozen=True, kw_only=True)
class WellFormed:
    """1 if the response ends with the end-of-turn token, says something, and holds no other special token; else 0.

    It looks at decoded text, in which a special token's name that the model spelled out letter by letter looks like the token.
    """

    end: str = IM_END
    allowed: tuple[str, ...] = ()  # other special tokens that may occur, e.g. "<think>", "</think>"

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed", tuple(self.allowed))

    def score(self, task: Any, response: str) -> float:
        if not response.endswith(self.end):
            return 0.0
        text = response[: -len(self.end)]
        others = [name for name in _SPECIAL.findall(text) if name not in self.allowed]
        return float(not others and self.end not in text and bool(_SPECIAL.sub("", text).strip()))

    @staticmethod
    def examples() -> list[WellFormed]:
        return [WellFormed(), WellFormed(allowed=(THINK, THINK_END))]
