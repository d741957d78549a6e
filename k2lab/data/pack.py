"""Packing: samples -> rows -> a `Batch`. The only place that shifts tokens against their targets.

Axes: T packed tokens, S sequences (samples) in the pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.types import Batch, Sample


def pack(samples: Sequence[Sample]) -> Batch:
    """One `Batch` of the samples laid end to end, in their order.

    Position i of a document holds `targets_T[i] = tokens[i+1]` and the weight and streams of token i+1; the last position of
    each document has weight 0 (its target is a copy of its own token, never used).
    """
    if not samples:
        raise DataError("a pack needs at least one sample")
    lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
    starts_S1 = np.concatenate([[0], np.cumsum(lengths)])
    tokens_T = np.concatenate([sample.tokens for sample in samples]).astype(np.int64)
    last_S = starts_S1[1:] - 1
    targets_T = np.concatenate([tokens_T[1:], tokens_T[-1:]])
    targets_T[last_S] = tokens_T[last_S]
    weight_T = _shift([sample.weight for sample in samples], last_S).astype(np.float32)
    positions_T = np.arange(len(tokens_T), dtype=np.int64) - np.repeat(starts_S1[:-1], lengths)
    names = samples[0].streams.keys()
    for sample in samples:
        if sample.streams.keys() != names:
            raise DataError(
                f"samples of one pack carry different streams: {sorted(names)} and {sorted(sample.streams)}", where=sample.key
            )
    streams_T = {name: _shift([sample.streams[name] for sample in samples], last_S) for name in names}
    return Batch(
        tokens_T=tokens_T,
        targets_T=targets_T,
        weight_T=weight_T,
        positions_T=positions_T,
        starts_S1=starts_S1,
        keys=tuple(sample.key for sample in samples),
        sources=tuple(sample.source for sample in samples),
        streams_T=streams_T,
        num_tokens=int(np.count_nonzero(weight_T)),
    )


def _shift(arrays: Sequence[np.ndarray], last_S: np.ndarray) -> np.ndarray:
    flat = np.concatenate(arrays)
    shifted = np.concatenate([flat[1:], np.zeros_like(flat[:1])])
    shifted[last_S] = 0
    return shifted


def piece(sample: Sample, begin: int, end: int) -> Sample:
    """Tokens [begin, end) of a sample as a sample of its own; its first token is context (weight 0)."""
    if begin == 0 and end == len(sample.tokens):
        return sample
    weight = sample.weight[begin:end].copy()
    weight[0] = 0
    streams = {name: array[begin:end].copy() for name, array in sample.streams.items()}
    for array in streams.values():
        array[0] = 0
    return Sample(
        tokens=sample.tokens[begin:end],
        weight=weight,
        key=f"{sample.key}#{begin}",
        source=sample.source,
        streams=streams,
        pair=sample.pair,
        meta=sample.meta,
    )


def cut(sample: Sample, seq_len: int) -> list[Sample]:
    """A long sample as pieces of at most `seq_len` tokens that overlap by one context token: each token is predicted once."""
    pieces, begin = [], 0
    while True:
        end = min(begin + seq_len, len(sample.tokens))
        pieces.append(piece(sample, begin, end))
        if end == len(sample.tokens):
            return pieces
        begin = end - 1
