"""Samples from token shards and rendered chats, preference pairs, streams for objectives, and fixed validation batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.rng import derive, rng
from k2lab.core.types import Batch, Sample
from k2lab.data.pack import cut, pack, unit_length


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


class Rendered(Protocol):
    """Tokens, and for each whether the assistant wrote it (`k2lab.text.chat.Rendered`)."""

    tokens: list[int]
    trained: list[bool]


def preference_unit(chosen: Rendered, rejected: Rendered, key: str, source: str = "") -> tuple[Sample, Sample]:
    """(chosen, rejected) as a unit that stays in one row; the pair's id follows from `key`, the sides' keys are `key#chosen` and
    `key#rejected`.

    Raises DataError if the two sides are equal or a side has no trained token.
    """
    if list(chosen.tokens) == list(rejected.tokens):
        raise DataError("the chosen and the rejected side of a preference pair are equal", where=key, next="Leave the pair out")
    pair = derive(0, "pair", key) >> 65  # 63 bits: a non-negative i64
    sides = []
    for name, side, sign in (("chosen", chosen, 1), ("rejected", rejected, -1)):
        if not any(side.trained[1:]):
            raise DataError(f"the {name} side of a preference pair has no trained token", where=key, next="Leave the pair out")
        sample = chat_sample(side.tokens, side.trained, f"{key}#{name}", source)
        sides.append(dataclasses.replace(sample, pair=(pair, sign)))
    return sides[0], sides[1]


def with_streams(sample: Sample, **streams: np.ndarray) -> Sample:
    """The sample with these streams besides those it has; each is about token t as predicted from tokens < t."""
    return dataclasses.replace(sample, streams={**sample.streams, **streams})


def rl_sample(sample: Sample, advantage: float) -> Sample:
    """A rollout's sample, which carries `logprobs`, with the streams `advantages` (constant) and `ptx` (0) of RL objectives."""
    length = len(sample.tokens)
    return with_streams(sample, advantages=np.full(length, advantage, np.float32), ptx=np.zeros(length, np.float32))


def ptx_sample(sample: Sample) -> Sample:
    """A plain sample among rollouts: it is trained by the `ptx` term of RL objectives."""
    zeros = np.zeros(len(sample.tokens), np.float32)
    return with_streams(sample, logprobs=zeros, advantages=zeros, ptx=np.ones(len(sample.tokens), np.float32))


def teacher_sample(sample: Sample, ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> Sample:
    """The sample with a teacher's top-k: at t the K tokens most probable there and their log-probabilities, best first; -inf
    marks an entry that is not there. Rows of weight 0 are not read."""
    return with_streams(
        sample,
        teacher_ids=np.asarray(ids_TK, np.int64),
        teacher_logprobs=np.asarray(logprobs_TK, np.float32),
        teacher=np.ones(len(sample.tokens), np.float32),
    )


def no_teacher_sample(sample: Sample, top_k: int) -> Sample:
    """A plain sample among those with a teacher's top-k: it is trained by the LM term only."""
    shape = (len(sample.tokens), top_k)
    return with_streams(
        sample,
        teacher_ids=np.zeros(shape, np.int64),
        teacher_logprobs=np.zeros(shape, np.float32),
        teacher=np.zeros(len(sample.tokens), np.float32),
    )


def valid_batches(
    samples: Any, seq_len: int, tokens_per_batch: int, limit: int, seed: int, stage: str, rank: int = 0, world: int = 1
) -> list[Batch]:
    """Fixed validation batches of this rank: up to `limit` held-out tokens in a seeded order, each token predicted once; units
    (tuples of samples) stay whole.

    Batches are formed globally and dealt round-robin, so the sum over ranks doesn't depend on their number.
    """
    order = rng(seed, stage, "validation").permutation(len(samples))
    batches: list[list[Sample]] = [[]]
    total = size = 0
    for index in order:
        item = samples[int(index)]
        for unit in [item] if isinstance(item, tuple) else [(part,) for part in cut(item, seq_len) if len(part.tokens) >= 2]:
            length = unit_length(unit, seq_len)
            if size + length > tokens_per_batch and batches[-1]:
                batches.append([])
                size = 0
            batches[-1] += unit
            size, total = size + length, total + length
        if total >= limit:
            break
    mine = [pack(group) for group in batches[rank::world] if group]
    if mine or not batches[0]:
        return mine
    # With fewer batches than ranks, an idle rank takes part with a batch that counts nothing: sums go over all ranks.
    idle = pack(batches[0])
    streams = {name: np.zeros_like(array) for name, array in idle.streams_T.items()}
    nothing = {"pair_S": np.full_like(idle.pair_S, -1), "sign_S": np.zeros_like(idle.sign_S), "num_tokens": 0}
    return [dataclasses.replace(idle, weight_T=np.zeros_like(idle.weight_T), streams_T=streams, **nothing)]
