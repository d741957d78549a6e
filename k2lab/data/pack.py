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
    each document has weight 0 (its target is a copy of its own token, never used). Streams are [T] or [T, K]; floats become f32,
    integers i64. `pair_S` and `sign_S` are always there; every pair in a pack is whole: as many chosen as rejected sides of it.

    Raises DataError if the samples carry different streams, or a stream of different shapes.
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
    streams_T = {name: _stream(name, samples, last_S) for name in names}
    pair_S, sign_S = _pairs(samples)
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
        pair_S=pair_S,
        sign_S=sign_S,
    )


def _pairs(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """(pair ids i64[S], signs f32[S]) of the samples; (-1, 0) for a sample that belongs to no pair."""
    sides = [sample.pair or (-1, 0) for sample in samples]
    pair_S = np.array([pair for pair, _ in sides], dtype=np.int64)
    sign_S = np.array([sign for _, sign in sides], dtype=np.float32)
    assert set(sign_S[pair_S >= 0].tolist()) <= {1.0, -1.0}, "a side of a pair is chosen (+1) or rejected (-1)"
    # The same pair may be there twice, where one epoch ends and the next begins.
    whole = np.array_equal(np.sort(pair_S[sign_S > 0]), np.sort(pair_S[sign_S < 0]))
    assert whole, "a pack holds one side of a pair without the other"
    return pair_S, sign_S


def _stream(name: str, samples: Sequence[Sample], last_S: np.ndarray) -> np.ndarray:
    arrays = [np.asarray(sample.streams[name]) for sample in samples]
    for sample, array in zip(samples, arrays, strict=True):
        if array.shape[1:] != arrays[0].shape[1:] or len(array) != len(sample.tokens):
            raise DataError(
                f"the stream {name!r} has another shape than its sample or pack asks for",
                where=sample.key,
                got=str(array.shape),
                allowed=str((len(sample.tokens), *arrays[0].shape[1:])),
            )
    dtype = np.int64 if arrays[0].dtype.kind in "iub" else np.float32
    return _shift([array.astype(dtype, copy=False) for array in arrays], last_S)


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


def unit_length(unit: Sequence[Sample], seq_len: int) -> int:
    """Tokens of a unit. Raises DataError if it does not fit into one row of `seq_len` tokens."""
    length = sum(len(sample.tokens) for sample in unit)
    if length > seq_len:
        raise DataError(
            f"{len(unit)} samples that must stay together have {length} tokens, more than seq_len = {seq_len}",
            where=unit[0].key,
            next="Raise seq_len, or leave such units out",
        )
    return length


def cut(sample: Sample, seq_len: int) -> list[Sample]:
    """A long sample as pieces of at most `seq_len` tokens that overlap by one context token: each token is predicted once."""
    pieces, begin = [], 0
    while True:
        end = min(begin + seq_len, len(sample.tokens))
        pieces.append(piece(sample, begin, end))
        if end == len(sample.tokens):
            return pieces
        begin = end - 1
