"""Bits per byte: how well a model predicts held-out documents, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.types import Sample
from k2lab.eval import stats
from k2lab.eval._nll import sample_nats


@dataclass(frozen=True)
class Document:
    """A tokenised document: ids i[T], the size of its text in bytes, and where it came from."""

    tokens: Sequence[int] | np.ndarray
    num_bytes: int
    key: str
    domain: str = ""


@dataclass(frozen=True)
class DocumentBits:
    """Per document, in the given order: `bits` f64, `tokens` predicted (all but the first) and `bytes` i64, `domain`, `key`."""

    bits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    domain: tuple[str, ...]
    key: tuple[str, ...]

    def of(self, domain: str) -> DocumentBits:
        """Only the documents of one domain. Raises DataError if there is none."""
        chosen = [n for n, name in enumerate(self.domain) if name == domain]
        if not chosen:
            raise DataError(f"no document has the domain {domain!r}", allowed=", ".join(sorted(set(self.domain))))
        names = tuple(self.domain[n] for n in chosen), tuple(self.key[n] for n in chosen)
        return DocumentBits(self.bits[chosen], self.tokens[chosen], self.bytes[chosen], *names)

    def bits_per_byte(self, seed: int = 0) -> stats.Estimate:
        """sum of bits / sum of bytes, bootstrapped over documents."""
        return stats.ratio(self.bits, self.bytes, seed, "bits_per_byte")

    def nats_per_token(self, seed: int = 0) -> stats.Estimate:
        """Loss: sum of nats / sum of predicted tokens, bootstrapped over documents. Not comparable between tokenizers."""
        return stats.ratio(self.bits * math.log(2), self.tokens, seed, "nats_per_token")


def document_bits(
    model: Any, docs: Sequence[Document], seq_len: int, *, tokens_per_batch: int = 16384, chunk: int = 1024
) -> DocumentBits:
    """-log2 p(document) under `model` (a `core.types.Model`), each token but the first predicted exactly once.

    Documents longer than `seq_len` are cut into pieces that overlap by one context token; documents of a pack do not see each
    other. The first token is context only (give documents that start with [BOS]). `tokens_per_batch` packed tokens are computed
    at once, `chunk` rows of logits. Raises DataError for documents without a token to predict or without bytes.
    """
    for doc in docs:
        if len(doc.tokens) < 2 or doc.num_bytes < 1:
            raise DataError(
                "a document needs a token to predict and a byte of text",
                where=doc.key,
                got=f"{len(doc.tokens)} tokens, {doc.num_bytes} bytes",
            )
    samples = []
    for doc in docs:
        weight = np.ones(len(doc.tokens), dtype=np.float32)
        weight[0] = 0
        samples.append(Sample(tokens=np.asarray(doc.tokens, dtype=np.int32), weight=weight, key=doc.key, source=doc.domain))
    nats = sample_nats(model, samples, seq_len, tokens_per_batch, chunk)
    return DocumentBits(
        bits=nats / math.log(2),
        tokens=np.array([len(doc.tokens) - 1 for doc in docs], dtype=np.int64),
        bytes=np.array([doc.num_bytes for doc in docs], dtype=np.int64),
        domain=tuple(doc.domain for doc in docs),
        key=tuple(doc.key for doc in docs),
    )


def documents(reader: Any) -> list[Document]:
    """The documents of a `data.shards.TokenReader`."""
    return [
        Document(tokens=reader[n], num_bytes=int(reader.text_bytes[n]), key=reader.key(n), domain=reader.domain(n))
        for n in range(len(reader))
    ]
