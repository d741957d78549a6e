"""Drops near duplicates: MinHash with locality-sensitive hashing finds candidates, exact Jaccard similarity decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from k2lab.core.errors import RecipeError
from k2lab.core.rng import rng
from k2lab.data.filtering import Log
from k2lab.data.records import Record, text_of
from k2lab.data.words import Words, mix

_CHUNK = 4096  # records hashed at once


@dataclass(frozen=True, kw_only=True)
class NearDedup:
    """Drops records whose word shingles have a Jaccard similarity of `threshold` or more with an earlier kept record's.

    MinHash (Broder 1997) in `bands` bands of `rows` values: a pair of similarity s becomes a candidate with probability
    1 - (1 - s^rows)^bands, 99.8% at 0.8 with the defaults. Candidates are compared exactly, so nothing below the threshold
    is dropped (but for 64-bit hash collisions). Holds 8 bytes per word and about 1.5 KB per record.
    """

    threshold: float = 0.8  # Jaccard similarity
    shingle: int = 3  # words per shingle; a shorter text is one shingle
    bands: int = 20
    rows: int = 6
    seed: int = 0  # of the hash functions

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise RecipeError("threshold must be a similarity", got=self.threshold, allowed="over 0, at most 1")
        if min(self.shingle, self.bands, self.rows) < 1:
            raise RecipeError("shingle, bands and rows must be positive", got=repr(self))

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields records in order; of near duplicates the first stays."""
        buckets: list[dict[int, list[int]]] = [{} for _ in range(self.bands)]
        kept_keys: list[str] = []
        kept_sets: list[np.ndarray] = []
        while chunk := list(islice(records, _CHUNK)):
            shingles, starts = self._shingles([text_of(record) for record in chunk])
            bands = self._bands(shingles, starts).tolist()
            for i, record in enumerate(chunk):
                own = shingles[starts[i] : starts[i + 1]]
                if not len(own):  # no words: nothing to compare
                    yield record
                    continue
                hits = [bucket.get(value) for bucket, value in zip(buckets, bands[i])]
                candidates = sorted({j for hit in hits if hit for j in hit})
                match = next(((j, s) for j in candidates if (s := _jaccard(own, kept_sets[j])) >= self.threshold), None)
                if match is not None:
                    log.drop(record, f"similarity {match[1]:.2f} with {kept_keys[match[0]]}")
                    continue
                for bucket, value in zip(buckets, bands[i]):
                    bucket.setdefault(value, []).append(len(kept_keys))
                kept_keys.append(record["key"])
                kept_sets.append(own.copy())
                yield record

    def _shingles(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Sorted different shingle hashes u64 of all texts, one text after the other, and their boundaries i64[S+1]."""
        words = Words(texts)
        hashes, first = words.ngrams(self.shingle)
        owner = words.text_N[first]
        for n in range(1, self.shingle):  # texts of exactly n words
            short, at = words.ngrams(n)
            alone = np.diff(words.starts_S1)[words.text_N[at]] == n
            hashes = np.concatenate([hashes, short[alone]])
            owner = np.concatenate([owner, words.text_N[at][alone]])
        order = np.lexsort((hashes, owner))
        hashes, owner = hashes[order], owner[order]
        fresh = np.ones(len(hashes), dtype=bool)
        fresh[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
        hashes, owner = hashes[fresh], owner[fresh]
        return hashes, np.searchsorted(owner, np.arange(len(texts) + 1))

    def _bands(self, shingles: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """u64[S, bands]: one hash per band of MinHash values. Each value is the least of (a x + b) mod 2^64 over a text's
        shingles x, which are well mixed already; a is odd, so the map is a permutation of the 64-bit numbers."""
        draws = rng(self.seed, "near_dedup", "hash").integers(0, 2**64, size=(self.bands * self.rows, 2), dtype=np.uint64)
        filled = np.flatnonzero(np.diff(starts))
        out = np.zeros((len(starts) - 1, self.bands), dtype=np.uint64)
        if not len(filled):
            return out
        for band in range(self.bands):
            combined = np.full(len(filled), band, dtype=np.uint64)
            for a, b in draws[band * self.rows : (band + 1) * self.rows]:
                least = np.minimum.reduceat(shingles * (a | np.uint64(1)) + b, starts[filled])
                combined = mix(combined * np.uint64(0x9E3779B97F4A7C15) + least)
            out[filled, band] = combined
        return out

    @staticmethod
    def examples() -> list[NearDedup]:
        return [NearDedup(), NearDedup(threshold=0.7, shingle=5, bands=32, rows=4)]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted arrays of different values."""
    if len(a) > len(b):
        a, b = b, a
    at = np.searchsorted(b, a)
    common = int(np.count_nonzero(b[np.minimum(at, len(b) - 1)] == a))
    return common / (len(a) + len(b) - common)
