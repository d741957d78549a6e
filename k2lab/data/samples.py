"""Samples from token shards and from rendered chats, and fixed validation batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from k2lab.core.rng import rng
from k2lab.core.types import Batch, Sample
from k2lab.data.pack import cut, pack


class TokenSamples:
    """Documents of token shards as samples: every token but the first is trained."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.domains = reader.domains
        self.num_tokens = reader.num_tokens

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        tokens = np.asarray(self.reader[index], dtype=np.int32)
        weight = np.ones(len(tokens), dtype=np.float32)
        weight[0] = 0
        return Sample(tokens=tokens, weight=weight, key=self.reader.key(index), source=self.domains[index])


def chat_sample(tokens: Sequence[int], trained: Sequence[bool], key: str, source: str = "") -> Sample:
    """A rendered chat as a sample that is trained on the assistant's tokens only."""
    weight = np.array(trained, dtype=np.float32)
    weight[0] = 0
    return Sample(tokens=np.array(tokens, dtype=np.int32), weight=weight, key=key, source=source)


def valid_batches(
    samples: Any, seq_len: int, tokens_per_batch: int, limit: int, seed: int, stage: str, rank: int = 0, world: int = 1
) -> list[Batch]:
    """Fixed validation batches of this rank: up to `limit` held-out tokens in a seeded order, each token predicted once.

    Batches are formed globally and dealt round-robin, so the sum over ranks doesn't depend on their number.
    """
    order = rng(seed, stage, "validation").permutation(len(samples))
    batches: list[list[Sample]] = [[]]
    total = size = 0
    for index in order:
        for part in cut(samples[int(index)], seq_len):
            length = len(part.tokens)
            if length < 2:
                continue
            if size + length > tokens_per_batch and batches[-1]:
                batches.append([])
                size = 0
            batches[-1].append(part)
            size, total = size + length, total + length
        if total >= limit:
            break
    return [pack(group) for group in batches[rank::world] if group]
