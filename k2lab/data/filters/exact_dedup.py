"""Drops records whose text occurred before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.data.filtering import Log
from k2lab.data.records import Record, text_of


@dataclass(frozen=True, kw_only=True)
class ExactDedup:
    """Drops records whose text occurred before; the first one stays. Holds 16 bytes and a key per kept record.

    `normalise`: upper and lower case and different blanks between words count as the same text.
    """

    normalise: bool = True

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields the first record of each text."""
        seen: dict[bytes, str] = {}
        for record in records:
            text = text_of(record)
            if self.normalise:
                text = " ".join(text.lower().split())
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if digest in seen:
                log.drop(record, f"the same text as {seen[digest]}")
            else:
                seen[digest] = record["key"]
                yield record

    @staticmethod
    def examples() -> list[ExactDedup]:
        return [ExactDedup(), ExactDedup(normalise=False)]
