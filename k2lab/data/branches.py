"""Packs in which samples with the same beginning share it: a prompt is there once, for all responses to it.

    samples   p0 p1 p2 a0 a1     p0 p1 p2 b0 b1 b2            (p: the prompt, tokens before the first trained one)
    pack      p0 p1 | p2 a0 a1 | p2 b0 b1 b2                  the stem, then its branches

Each branch begins with a copy of the prompt's last token, whose hidden state predicts the branch's first own token; so targets,
weights and streams lie in a branch as in any document, and objectives need to know nothing. A stem is a sequence without a
trained token. Branches attend to their stem and themselves; positions continue the stem's. All sums, log-probabilities and
gradients are those of the samples laid end to end, up to rounding. Which models can do it is said by `TrainModel.shares_stems`.

Axes: T packed tokens, S sequences in the pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from k2lab.core.types import Batch, Sample
from k2lab.data.pack import pack, piece

LEAST = 8  # a stem of fewer tokens is not worth its bookkeeping
# Attention takes longer over branches, which are gathered, than over whole documents, which are not; a branch of more tokens than
# this, and than twice its stem, would lose more there than the stem saves elsewhere (measured with tiny-k2 on one thread: copies
# in groups of 8 take 1.6 times as long for 40 + 32 tokens of prompt and response, 1.1 for 32 + 200, 0.8 if 64 + 512 were shared).
LONG = 256


@dataclass(frozen=True)
class Branched(Batch):
    """A `Batch` with `parent_S` i64[S]: the sequence that each sequence continues, an earlier one, or -1 (numpy on the host and
    after the move to a device). A parent has no parent."""

    parent_S: Any = None


def stem_length(sample: Sample) -> int:
    """Tokens of the sample that branches could share: all before the last context token; 0 if sharing does not pay."""
    trained = np.flatnonzero(sample.weight)
    stem = int(trained[0]) - 1 if len(trained) else 0
    return stem if stem >= LEAST and len(sample.tokens) - stem <= max(LONG, 2 * stem) else 0


def continues(sample: Sample, before: Sample) -> bool:
    """True if a pack that ends with `before` needs only the branch of `sample`: both have the same context."""
    stem = stem_length(sample)
    return (
        stem > 0
        and stem == stem_length(before)
        and sample.pair is None
        and before.pair is None
        and np.array_equal(sample.tokens[: stem + 1], before.tokens[: stem + 1])
    )


def branched(samples: Sequence[Sample]) -> Batch:
    """One pack of the samples in their order, where neighbours with the same context share it; a plain `Batch` if none do."""
    parts: list[Sample] = []
    parents: list[int] = []
    for run in _runs(samples):
        if len(run) == 1:
            parts.append(run[0])
            parents.append(-1)
            continue
        stem = stem_length(run[0])
        nothing = {name: np.zeros_like(array[:stem]) for name, array in run[0].streams.items()}
        parents += [-1] + [len(parts)] * len(run)
        parts.append(
            replace(
                run[0], tokens=run[0].tokens[:stem], weight=np.zeros(stem, np.float32), streams=nothing, key=f"{run[0].key}~stem"
            )
        )
        parts += [replace(piece(sample, stem, len(sample.tokens)), key=sample.key) for sample in run]
    batch = pack(parts)
    if max(parents) < 0:
        return batch
    parent_S = np.array(parents, dtype=np.int64)
    lengths_S = np.diff(batch.starts_S1)
    offset_S = np.where(parent_S >= 0, lengths_S[parent_S], 0)
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}
    values["positions_T"] = batch.positions_T + np.repeat(offset_S, lengths_S)
    return Branched(**values, parent_S=parent_S)


def _runs(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Neighbours with the same context."""
    run: list[Sample] = []
    for sample in samples:
        if run and not continues(sample, run[-1]):
            yield run
            run = []
        run.append(sample)
    yield run
