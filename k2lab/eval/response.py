"""Response loss: how well a model predicts the text of held-out answers, without the template's tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.types import Sample
from k2lab.eval import stats
from k2lab.eval._nll import sample_nats


@dataclass(frozen=True)
class Chat:
    """A rendered conversation: `tokens`, which of them are the assistant's (`trained`), and its stable identity."""

    tokens: Sequence[int]
    trained: Sequence[bool]
    key: str


@dataclass(frozen=True)
class ResponseLoss:
    """Per chat, in the given order: `nats` f64 summed over its response text tokens, their number `tokens` i64, `key`."""

    nats: np.ndarray
    tokens: np.ndarray
    key: tuple[str, ...]

    def per_token(self, seed: int = 0) -> stats.Estimate:
        """sum of nats / sum of tokens, bootstrapped over chats."""
        return stats.ratio(self.nats, self.tokens, seed, "response_loss")


def joined(parts: Sequence[ResponseLoss]) -> ResponseLoss:
    """All chats of several results, in their order."""
    nats, tokens = (np.concatenate([getattr(part, name) for part in parts]) for name in ("nats", "tokens"))
    return ResponseLoss(nats, tokens, tuple(key for part in parts for key in part.key))


def response_loss(
    model: Any,
    chats: Sequence[Chat],
    special_ids: Collection[int],
    seq_len: int,
    *,
    tokens_per_batch: int = 16384,
    chunk: int = 1024,
) -> ResponseLoss:
    """Negative log-likelihood of the assistants' text tokens, each given everything before it.

    A token counts if it is `trained` and none of `special_ids` (`tokenizer.special.values()`): the end-of-turn token, which every
    chat model soon predicts with certainty, would otherwise dilute the loss of short answers. Raises DataError for chats
    without a counted token, and for chats longer than `seq_len` (cutting one would take away an answer's question).
    """
    special = frozenset(special_ids)
    samples = []
    for chat in chats:
        if len(chat.tokens) != len(chat.trained):
            raise DataError(
                "tokens and marks differ in length", where=chat.key, got=f"{len(chat.tokens)} and {len(chat.trained)}"
            )
        if len(chat.tokens) > seq_len:
            raise DataError(
                f"the chat of {len(chat.tokens)} tokens is longer than seq_len = {seq_len}",
                where=chat.key,
                next="Raise seq_len, or leave the chat out and say so",
            )
        counted = [bool(mark) and token not in special for token, mark in zip(chat.tokens, chat.trained)]
        if not any(counted[1:]):
            raise DataError("the chat holds no response text", where=chat.key)
        weight = np.array(counted, dtype=np.float32)
        weight[0] = 0
        samples.append(Sample(tokens=np.array(chat.tokens, dtype=np.int32), weight=weight, key=chat.key))
    nats = sample_nats(model, samples, seq_len, tokens_per_batch, chunk)
    tokens = np.array([int(sample.weight.sum()) for sample in samples], dtype=np.int64)
    return ResponseLoss(nats, tokens, tuple(chat.key for chat in chats))
