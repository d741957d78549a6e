"""Finds personal data and secrets (e-mail, phone, API and private keys, card numbers) and masks them or drops the record."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from k2lab.core.errors import RecipeError
from k2lab.data.filtering import Log
from k2lab.data.records import Record, map_text, text_of

_KEYS = (
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]*?(?:-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)",
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS
    r"\bAIza[0-9A-Za-z_-]{35}(?![\w-])",  # Google
    r"\bgh[pousr]_[0-9A-Za-z]{36,255}\b|\bgithub_pat_[0-9A-Za-z_]{60,255}\b",
    r"\bglpat-[0-9A-Za-z_-]{20,}",  # GitLab
    r"\bsk-(?:[a-z]+[0-9]*-)*[0-9A-Za-z_-]{20,}",  # OpenAI, Anthropic and others
    r"\b[rs]k_live_[0-9A-Za-z]{16,}",  # Stripe
    r"\bhf_[0-9A-Za-z]{30,}\b",  # Hugging Face
    r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",  # Slack
    r"\beyJ[0-9A-Za-z_-]{8,}\.eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}",  # JSON web token
)
_PATTERNS = {
    "key": re.compile("|".join(_KEYS)),
    "email": re.compile(
        r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
    ),
    # Unbroken, or in the groups that are printed on cards: 4-4-4-4 (up to 19 digits) and 4-6-5.
    "card": re.compile(
        r"(?<![\w.+-])(?<!\d )"
        r"(?:[2-6]\d{12,18}|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1\d{1,3})?|3\d{3}([ -])\d{6}\2\d{5})"
        r"(?![\w-]|\.\d| \d)"
    ),
    # International with +, or North American with separators; bare digit runs are left alone (they are mostly no phones).
    "phone": re.compile(
        r"(?<![\w.+-])(?:\+(?!\d+\.\d+(?![\d.]))[1-9]\d{0,2}(?:[ .-]?\(0?\d{1,4}\))?(?:[ .-]?\d){6,12}"
        r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[ .-]\d{4})(?![\w-]|\.\d)"
    ),
}


# Texts without any of these cannot match; looking for them is many times faster than the expression.
_MARKS = {
    "email": ("@",),
    "key": ("PRIVATE KEY", "AKIA", "ASIA", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-")
    + ("k_live_", "hf_", "xox", "eyJ"),
}


@dataclass(frozen=True, kw_only=True)
class Pii:
    """Masks personal data and secrets, or drops the records that hold them.

    E-mail addresses, phone numbers (international, or North American with separators), API keys of known forms, private keys,
    payment card numbers (13 to 19 digits that pass the Luhn check). It knows no names, addresses or other countries' local
    numbers. Masked text reads `<EMAIL>`, `<PHONE>`, `<KEY>`, `<CARD>`.
    """

    mode: Literal["mask", "drop"] = "mask"
    kinds: tuple[str, ...] = ("key", "email", "card", "phone")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        unknown = [kind for kind in self.kinds if kind not in _PATTERNS]
        if unknown or not self.kinds:
            raise RecipeError("kinds must be known", got=", ".join(unknown) or "none", allowed=", ".join(_PATTERNS))
        if self.mode not in ("mask", "drop"):
            raise RecipeError("mode must be known", got=self.mode, allowed="mask, drop")

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields masked records, or (mode "drop") those with nothing to mask. The log never shows what was found."""
        for record in records:
            found: dict[str, int] = {}
            if not self._suspicious(text_of(record)):
                yield record
                continue
            masked = map_text(record, lambda text: self._mask(text, found))  # noqa: B023 (called at once)
            if not found:
                yield record
                continue
            why = "found " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
            if self.mode == "drop":
                log.drop(record, why, excerpt=_around(text_of(masked)))
            else:
                log.change(masked, why, excerpt=_around(text_of(masked)))
                yield masked

    def _suspicious(self, text: str) -> bool:
        return any(_may_hold(kind, text) and _PATTERNS[kind].search(text) for kind in self.kinds)

    def _mask(self, text: str, found: dict[str, int]) -> str:
        for kind in _PATTERNS:  # keys first: parts of a key may look like a number
            if kind in self.kinds:
                text = _PATTERNS[kind].sub(lambda match: _replace(kind, match[0], found), text)  # noqa: B023 (called at once)
        return text

    @staticmethod
    def examples() -> list[Pii]:
        return [Pii(), Pii(mode="drop", kinds=("key", "card"))]


def _may_hold(kind: str, text: str) -> bool:
    marks = _MARKS.get(kind)
    return marks is None or any(mark in text for mark in marks)


def _replace(kind: str, text: str, found: dict[str, int]) -> str:
    if kind == "card" and not passes_luhn(text):
        return text
    found[kind] = found.get(kind, 0) + 1
    return f"<{kind.upper()}>"


def passes_luhn(text: str) -> bool:
    """The Luhn check (ISO/IEC 7812-1) over the digits of `text`."""
    digits = [int(ch) for ch in reversed(text) if ch.isdigit()]
    doubled = [2 * d - 9 * (d > 4) for d in digits[1::2]]
    return len(digits) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _around(masked: str) -> str:
    """The masked text from a little before its first mask."""
    at = min((i for kind in _PATTERNS if (i := masked.find(f"<{kind.upper()}>")) >= 0), default=0)
    return ("..." if at > 60 else "") + masked[max(0, at - 60) :]
