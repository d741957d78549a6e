"""Drops texts that repeat themselves: duplicate lines, paragraphs and word n-grams, after Gopher."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from k2lab.data.filtering import Log
from k2lab.data.records import Record, text_of
from k2lab.data.words import Words, mix

_CHUNK = 2048  # records looked at together
_NOT_BLANK = re.compile(r"\S+")
_ODD = np.uint64(0xD1B54A32D192ED03)  # spreads text numbers over 64 bits


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Drops texts that repeat themselves: duplicate lines, paragraphs and word n-grams.

    Rules and default limits of Rae et al. 2021 ("Scaling Language Models", table A1), as shares of a text. The first occurrence
    of a line or n-gram is no duplicate (but the most frequent n-gram counts with all its occurrences, of which there must be
    two). Shares by characters are of those of words, or of non-blank lines. 1.0 turns a rule off. Texts of fewer than
    `min_words` words pass: their shares say nothing.
    """

    min_words: int = 30
    duplicate_lines: float = 0.30  # lines that occurred before / lines
    duplicate_line_chars: float = 0.20  # the same by characters
    duplicate_paragraphs: float = 0.30  # paragraphs (split by blank lines) that occurred before / paragraphs
    duplicate_paragraph_chars: float = 0.20
    top_2gram: float = 0.20  # characters covered by the most frequent word n-gram
    top_3gram: float = 0.18
    top_4gram: float = 0.16
    duplicate_5gram: float = 0.15  # characters inside word n-grams that occurred before
    duplicate_6gram: float = 0.14
    duplicate_7gram: float = 0.13
    duplicate_8gram: float = 0.12
    duplicate_9gram: float = 0.11
    duplicate_10gram: float = 0.10

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields the records within all limits; the first broken rule is the reason of a drop."""
        while chunk := list(islice(records, _CHUNK)):
            for record, why in zip(chunk, self._judge([text_of(record) for record in chunk])):
                if why:
                    log.drop(record, why)
                else:
                    yield record

    def _judge(self, texts: list[str]) -> list[str]:
        """Why each text must go, or ""."""
        words = Words(texts, split=_NOT_BLANK)
        long_S = np.diff(words.starts_S1) >= self.min_words
        chars_S = np.maximum(_sum_by(words.text_N, words.lengths_N, len(texts)), 1)
        why = [self._judge_lines(text) if long else "" for text, long in zip(texts, long_S)]
        for grams in _repeated(words, long_S):
            n = grams.n
            limit = getattr(self, f"top_{n}gram" if n < 5 else f"duplicate_{n}gram")
            shares_S = (_top_chars if n < 5 else _duplicate_chars)(words, grams, len(texts)) / chars_S
            name = f"the most frequent {n}-gram" if n < 5 else f"duplicate {n}-grams"
            for i in np.flatnonzero(long_S & (shares_S > limit)) if limit < 1.0 else ():
                why[i] = why[i] or f"{name}: {shares_S[i]:.0%} of the characters, over {limit:.0%}"
        return why

    def _judge_lines(self, text: str) -> str:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(set(lines)) < len(lines):
            share, chars = _duplicates(lines)
            if share > self.duplicate_lines:
                return f"duplicate lines: {share:.0%}, over {self.duplicate_lines:.0%}"
            if chars > self.duplicate_line_chars:
                return f"characters in duplicate lines: {chars:.0%}, over {self.duplicate_line_chars:.0%}"
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        if len(set(paragraphs)) < len(paragraphs):
            share, chars = _duplicates(paragraphs)
            if share > self.duplicate_paragraphs:
                return f"duplicate paragraphs: {share:.0%}, over {self.duplicate_paragraphs:.0%}"
            if chars > self.duplicate_paragraph_chars:
                return f"characters in duplicate paragraphs: {chars:.0%}, over {self.duplicate_paragraph_chars:.0%}"
        return ""

    @staticmethod
    def examples() -> list[Repetition]:
        return [Repetition(), Repetition(min_words=100, duplicate_lines=0.5)]


def _duplicates(parts: list[str]) -> tuple[float, float]:
    """Shares of `parts` that occurred before in the list: by number, by characters."""
    seen: set[str] = set()
    number = chars = 0
    for part in parts:
        if part in seen:
            number += 1
            chars += len(part)
        seen.add(part)
    return number / len(parts), chars / sum(map(len, parts))


def _sum_by(owner: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=size)


@dataclass(frozen=True)
class _Grams:
    """The n-grams that occur at least twice in their text: first word, text, how often there, whether it occurred before."""

    n: int
    first: np.ndarray  # i64[M], rising
    owner: np.ndarray  # i64[M]
    often: np.ndarray  # i64[M]
    again: np.ndarray  # bool[M]


def _repeated(words: Words, wanted_S: np.ndarray) -> Iterator[_Grams]:
    """Repeated n-grams of the wanted texts for n = 2 ... 10.

    An (n+1)-gram can only repeat where the n-gram at its start does, so each n looks only at what the one before found.
    """
    first = np.flatnonzero(wanted_S[words.text_N])
    # The text's number goes into the hash, so that one sort serves all texts.
    hashed = mix(words.text_N[first].astype(np.uint64) * _ODD + words.hashes_N[first])
    for n in range(2, 11):
        inside = first + n - 1 < words.starts_S1[words.text_N[first] + 1]
        first, hashed = first[inside], hashed[inside]
        hashed = mix(hashed * _ODD + words.hashes_N[first + n - 1])
        order = np.argsort(hashed)
        ranked = hashed[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(order) else order
        sizes = np.diff(np.append(starts, len(order)))
        often, again = np.zeros(len(order), np.int64), np.ones(len(order), bool)
        often[order] = np.repeat(sizes, sizes)
        if len(order):
            again[np.minimum.reduceat(order, starts)] = False
        twice = often > 1
        first, hashed = first[twice], hashed[twice]
        yield _Grams(n, first, words.text_N[first], often[twice], again[twice])


def _top_chars(words: Words, grams: _Grams, size: int) -> np.ndarray:
    """f64[S]: per text, characters of its most frequent n-gram's occurrences together."""
    chars = sum((words.lengths_N[grams.first + k] for k in range(grams.n)), np.zeros(len(grams.first), np.int64)) * grams.often
    most = np.zeros(size, dtype=np.int64)
    # Gopher takes the most frequent n-gram; of several equally frequent ones the longest.
    top = np.zeros(size, dtype=np.int64)
    np.maximum.at(top, grams.owner, grams.often)
    is_top = grams.often == top[grams.owner]
    np.maximum.at(most, grams.owner[is_top], chars[is_top])
    return most.astype(np.float64)


def _duplicate_chars(words: Words, grams: _Grams, size: int) -> np.ndarray:
    """f64[S]: per text, characters of words inside n-grams that occurred before, each word counted once."""
    covered = np.zeros(len(words.hashes_N), dtype=bool)
    for k in range(grams.n):
        covered[grams.first[grams.again] + k] = True
    return _sum_by(words.text_N[covered], words.lengths_N[covered], size)
