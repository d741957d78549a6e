"""Negative log-likelihood of samples under a model, on packed batches.

Legend: `T` packed tokens, `D` width, `W` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from k2lab.core.errors import DataError, NumericsError
from k2lab.core.types import Sample
from k2lab.data.pack import cut, pack
from k2lab.models.losses import token_logprobs


def sample_nats(model: Any, samples: Sequence[Sample], seq_len: int, tokens_per_batch: int, chunk: int = 1024) -> np.ndarray:
    """sum over tokens of weight x -log p(token | its context), f64[len(samples)], in nats.

    `model` is a `core.types.Model`. A sample longer than `seq_len` is cut into pieces that overlap by one context token, so each
    token is predicted once. Packs hold at most `tokens_per_batch` tokens (or one piece). Raises NumericsError if not finite.
    """
    if seq_len < 2:
        raise DataError("seq_len must be at least 2: one token of context and one to predict", got=seq_len)
    nats = np.zeros(len(samples), dtype=np.float64)
    weight_WD = model.head()
    with torch.inference_mode(), evaluating(model):
        for places, pieces in _groups(samples, seq_len, tokens_per_batch):
            batch = pack(pieces)
            rows = np.flatnonzero(batch.weight_T)
            if not len(rows):
                continue
            hidden_TD = model.hidden(batch)
            picked = torch.from_numpy(rows).to(hidden_TD.device)
            targets = torch.from_numpy(batch.targets_T[rows]).to(hidden_TD.device)
            logprobs = token_logprobs(hidden_TD[picked], weight_WD, targets, chunk=chunk).double().cpu().numpy()
            owners = np.repeat(places, np.diff(batch.starts_S1))[rows]
            np.add.at(nats, owners, -logprobs * batch.weight_T[rows])
    if not np.isfinite(nats).all():
        bad = samples[int(np.flatnonzero(~np.isfinite(nats))[0])].key
        raise NumericsError("the model's log-likelihood is not finite", where=f"document {bad}")
    return nats


def _groups(samples: Sequence[Sample], seq_len: int, tokens_per_batch: int) -> Iterator[tuple[np.ndarray, list[Sample]]]:
    """Pieces of about equal length side by side (attention pads within a group), with the places of their samples."""
    pieces = [(place, part) for place, sample in enumerate(samples) for part in cut(sample, seq_len) if len(part.tokens) > 1]
    pieces.sort(key=lambda each: len(each[1].tokens))
    group: list[tuple[int, Sample]] = []
    size = 0
    for place, part in pieces:
        if group and size + len(part.tokens) > tokens_per_batch:
            yield np.array([n for n, _ in group]), [piece for _, piece in group]
            group, size = [], 0
        group.append((place, part))
        size += len(part.tokens)
    if group:
        yield np.array([n for n, _ in group]), [piece for _, piece in group]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; training mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
