"""N-gram language models with interpolated Witten-Bell smoothing: the floor that a trained model must beat.

Every document stands as [BOS] tokens [EOS]; BOS is never predicted, EOS is. With h a context of k symbols, h' the same without
its oldest symbol, c counts in training, T(h) the number of different symbols seen after h, and c(h) their sum (Witten and Bell
1991; interpolated as in Chen and Goodman 1998, section 2.6):

    p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),    p(w | h) = p(w | h') for an unseen h,

down to the empty context, below which all V + 1 symbols (V tokens and EOS) are equally likely. A context that would reach over
the start of a document is filled with BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Doc = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class _Level:
    """Counts for contexts of one length: sorted keys of (context, symbol) pairs and of contexts."""

    pairs: np.ndarray  # i64[pairs]
    pair_counts: np.ndarray  # i64[pairs]
    contexts: np.ndarray  # i64[contexts]
    totals: np.ndarray  # i64[contexts]: c(h)
    types: np.ndarray  # i64[contexts]: T(h)


class NgramModel:
    """An n-gram model of `order` n (1 = unigram, 2 = bigram, 3 = trigram) over token ids under `vocab_size`.

    Raises ValueError for an id outside the vocabulary, no training document, or (vocab_size + 2) ** order beyond 63 bits.
    """

    def __init__(self, train_docs: Sequence[Doc], vocab_size: int, order: int) -> None:
        if order < 1 or (vocab_size + 2) ** order >= 2**63:
            raise ValueError(f"order {order} with {vocab_size} tokens does not fit: 1 or more, (vocab_size + 2) ** order < 2**63")
        if not len(train_docs):
            raise ValueError("an n-gram model needs at least one training document")
        self.vocab_size, self.order = vocab_size, order
        self._bos, self._eos, self._size = vocab_size, vocab_size + 1, vocab_size + 2
        contexts, symbols = self._events(train_docs)
        self._levels = []
        for context in contexts:
            pairs, pair_counts = np.unique(context * self._size + symbols, return_counts=True)
            # Pairs are sorted by context first, so a context's pairs are one run.
            owners = pairs // self._size
            starts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
            types = np.diff(np.append(starts, len(pairs)))
            self._levels.append(_Level(pairs, pair_counts, owners[starts], np.add.reduceat(pair_counts, starts), types))

    def _events(self, docs: Sequence[Doc]) -> tuple[list[np.ndarray], np.ndarray]:
        """Contexts of length 0, 1, ... order - 1 as numbers in base V + 2 (i64[M] each), and the predicted symbols i64[M]."""
        pad = max(self.order - 1, 1)
        lengths = np.array([len(doc) for doc in docs], dtype=np.int64)
        ends = np.cumsum(lengths + 1 + pad)
        stream = np.full(int(ends[-1]) if len(docs) else 0, self._bos, dtype=np.int64)
        is_token = np.ones(len(stream), dtype=bool)
        starts = ends - lengths - 1 - pad
        for k in range(pad):
            is_token[starts + k] = False
        is_token[ends - 1] = False
        tokens = np.concatenate([np.asarray(doc, dtype=np.int64) for doc in docs]) if len(docs) else np.zeros(0, np.int64)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
        stream[is_token] = tokens
        stream[ends - 1] = self._eos
        is_token[ends - 1] = True
        at = np.flatnonzero(is_token)
        contexts = [np.zeros(len(at), dtype=np.int64)]
        for k in range(1, self.order):
            contexts.append(contexts[-1] + stream[at - k] * self._size ** (k - 1))
        return contexts, stream[at]

    def probabilities(self, docs: Sequence[Doc]) -> np.ndarray:
        """f64[M]: p of every token and final EOS of `docs`, in order, one document after the other."""
        contexts, symbols = self._events(docs)
        p = np.full(len(symbols), 1.0 / (self.vocab_size + 1))
        for level, context in zip(self._levels, contexts):
            p = self._interpolate(level, context, symbols, p)
        return p

    def next_probabilities(self, context: Doc) -> np.ndarray:
        """f64[V + 1]: p of each token and, last, of EOS after `context` (tokens from the start of a document). Sums to 1."""
        filled = [self._bos] * (self.order - 1) + [int(token) for token in context]
        symbols = np.append(np.arange(self.vocab_size), self._eos)
        p = np.full(len(symbols), 1.0 / (self.vocab_size + 1))
        value = 0
        for k, level in enumerate(self._levels):
            value += filled[-k] * self._size ** (k - 1) if k else 0
            p = self._interpolate(level, np.full(len(symbols), value, dtype=np.int64), symbols, p)
        return p

    def _interpolate(self, level: _Level, context: np.ndarray, symbols: np.ndarray, lower: np.ndarray) -> np.ndarray:
        total, types = (_look_up(level.contexts, values, context) for values in (level.totals, level.types))
        count = _look_up(level.pairs, level.pair_counts, context * self._size + symbols)
        return np.where(total > 0, (count + types * lower) / np.maximum(total + types, 1), lower)

    def bits(self, docs: Sequence[Doc]) -> float:
        """Total bits (-log2 p) of `docs`, their EOS included."""
        return float(-np.log2(self.probabilities(docs)).sum())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values at `wanted`, 0 where it is not among the sorted `keys`."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def ngram_bits(train_docs: Sequence[Doc], valid_docs: Sequence[Doc], vocab_size: int, order: int) -> float:
    """Total bits that an n-gram model of `order`, trained on `train_docs`, needs for `valid_docs` (each with its EOS).

    Divide by the documents' text bytes for bits per byte. Token ids are 0 to vocab_size - 1.
    """
    return NgramModel(train_docs, vocab_size, order).bits(valid_docs)
