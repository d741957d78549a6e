"""Samples with made-up streams for every objective: what it needs decides what they carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from k2lab.core.rng import rng
from k2lab.core.types import Sample
from k2lab.data.samples import no_teacher_sample, ptx_sample, rl_sample, teacher_sample, with_streams

TOP_K = 4


def sample_of(tokens: np.ndarray, key: str) -> Sample:
    """The first third of the tokens is context."""
    weight = np.ones(len(tokens), dtype=np.float32)
    weight[: max(1, len(tokens) // 3)] = 0
    return Sample(tokens=tokens.astype(np.int32), weight=weight, key=key, source="made up")


def items(needs: Sequence[str], sequences: Sequence[np.ndarray], vocab: int, seed: int = 0) -> list:
    """Samples of the sequences, with what `needs` names; for "pairs", units of two neighbours each.

    Log-probabilities lie round those of a model that knows nothing. Every fifth sample is PTX, every fourth has no teacher.
    """
    found = [_item(needs, sample_of(tokens, f"s{n}"), n, vocab, seed) for n, tokens in enumerate(sequences)]
    if "pairs" not in needs:
        return found
    units = zip(found[::2], found[1::2], strict=True)
    return [tuple(dataclasses.replace(s, pair=(n, sign)) for s, sign in zip(unit, (1, -1))) for n, unit in enumerate(units)]


def _item(needs: Sequence[str], sample: Sample, n: int, vocab: int, seed: int) -> Sample:
    draw, length = rng(seed, "made up", n), len(sample.tokens)

    def logprobs() -> np.ndarray:
        return (-np.log(vocab) + draw.normal(0, 0.15, length)).astype(np.float32)

    if "ref_logprobs" in needs:
        sample = with_streams(sample, ref_logprobs=logprobs())
    if "ptx" in needs:
        kept = with_streams(sample, logprobs=logprobs())
        sample = ptx_sample(sample) if n % 5 == 4 else rl_sample(kept, float(np.float32(draw.uniform(-1, 1))))
    if "teacher" in needs:
        ids = np.stack([draw.permutation(vocab)[:TOP_K] for _ in range(length)])
        shares = np.sort(draw.dirichlet(np.ones(TOP_K + 1), length)[:, :TOP_K], -1)[:, ::-1]
        sample = no_teacher_sample(sample, TOP_K) if n % 4 == 3 else teacher_sample(sample, ids, np.log(shares))
    return sample
