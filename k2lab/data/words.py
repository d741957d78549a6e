"""Words and word n-grams of many texts as 64-bit hashes, vectorised: what dedup, repetition and contamination share.

Legend: `N` words of all texts together, `S` texts; `starts_S1` i64[S+1] are cumulative text boundaries.
Hashes do not depend on the process (unlike Python's `hash`): 8 bytes of blake2b per word, mixed by splitmix64's finaliser
(Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count

import numpy as np

_WORD = re.compile(r"\w+")
_GOLDEN = 0x9E3779B97F4A7C15


def hash_texts(parts: Sequence[bytes]) -> np.ndarray:
    """u64[len(parts)]: 8 bytes of blake2b of each."""
    raw = b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, elementwise on u64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Words:
    """Words of `texts`: lower-cased runs of letters, digits and underscores, or `split`'s matches if another regex is given.

    `hashes_N` u64[N], `lengths_N` i64[N] characters, `starts_S1` i64[S+1], `text_N` i64[N] index of each word's text.
    """

    def __init__(self, texts: Sequence[str], split: re.Pattern[str] = _WORD) -> None:
        per_text = [split.findall(text.lower()) for text in texts]
        ids: dict[str, int] = defaultdict(count().__next__)  # numbers words as they come
        id_N = np.fromiter(map(ids.__getitem__, chain.from_iterable(per_text)), dtype=np.int64)
        vocabulary = list(ids)
        self.hashes_N = hash_texts([word.encode("utf-8", "surrogatepass") for word in vocabulary])[id_N]
        self.lengths_N = np.array([len(word) for word in vocabulary], dtype=np.int64)[id_N]
        counts_S = np.array([len(words) for words in per_text], dtype=np.int64)
        self.starts_S1 = np.concatenate([[0], np.cumsum(counts_S)]).astype(np.int64)
        self.text_N = np.repeat(np.arange(len(texts)), counts_S)

    def ngrams(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes u64[M], first i64[M]) of all n-grams that lie inside one text, in order; `first` indexes `hashes_N`."""
        count = len(self.hashes_N) - n + 1
        if count <= 0:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        first = np.flatnonzero(self.text_N[:count] == self.text_N[n - 1 :])
        # The seed holds n, so that n-grams of different lengths never meet.
        hashed = np.full(len(first), (n * _GOLDEN) % 2**64, dtype=np.uint64)
        for k in range(n):
            hashed = mix(hashed * np.uint64(_GOLDEN) + self.hashes_N[first + k])
        return hashed, first
