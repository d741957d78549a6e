"""Drops records whose text is too short or too long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.core.errors import RecipeError
from k2lab.data.filtering import Log
from k2lab.data.records import Record, text_of


@dataclass(frozen=True, kw_only=True)
class Length:
    """Drops records whose text (all parts together, without surrounding blanks) is too short or too long."""

    min_chars: int = 1
    max_chars: int = 0  # 0 = no limit

    def __post_init__(self) -> None:
        if self.min_chars < 0 or self.max_chars < 0 or (self.max_chars and self.max_chars < self.min_chars):
            got = f"min_chars = {self.min_chars}, max_chars = {self.max_chars}"
            raise RecipeError("the limits cannot be met", got=got, allowed="0 <= min_chars <= max_chars, or max_chars = 0")

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields the records within the limits."""
        for record in records:
            chars = len(text_of(record).strip())
            if chars < self.min_chars:
                log.drop(record, f"{chars} characters, fewer than {self.min_chars}")
            elif self.max_chars and chars > self.max_chars:
                log.drop(record, f"{chars} characters, more than {self.max_chars}")
            else:
                yield record

    @staticmethod
    def examples() -> list[Length]:
        return [Length(), Length(min_chars=20, max_chars=100_000)]
