"""Weighing domains into one global order of documents per epoch, the same for any number of ranks and after any restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from k2lab.core.errors import DataError, did_you_mean
from k2lab.core.rng import rng


def epoch_order(
    seed: int, stage: str, epoch: int, domains: Sequence[str] | np.ndarray, weights: Mapping[str, float] | None = None
) -> np.ndarray:
    """The order i64[M] in which epoch `epoch` (from 0) goes through document ids.

    `domains[i]` is the domain of document i; `weights[domain]` says how often each of its documents is expected per epoch:
    1.0 once (also for domains without a weight), 2.0 twice, 0.5 half of them, 0 none. Of a fraction, each epoch takes another
    part of one fixed random order, so that with 0.5 two epochs cover every document exactly once. The number of documents an
    epoch takes of a domain differs from weight x size by less than one.

    Raises DataError for an unknown domain, a weight that is negative or not finite, or an epoch without any document.
    """
    names, domain_of = np.unique(np.asarray(domains, dtype=str), return_inverse=True)
    known = names.tolist()
    _check(weights or {}, known)
    parts = []
    for place, domain in enumerate(known):
        ids = np.flatnonzero(domain_of == place)
        weight = Fraction((weights or {}).get(domain, 1.0)).limit_denominator(1_000_000)
        whole, rest = divmod(weight, 1)
        parts.append(np.tile(ids, int(whole)))
        if rest:
            order = rng(seed, stage, "mixture", domain).permutation(ids)
            begin, end = (int((epoch + k) * rest * len(ids)) for k in (0, 1))
            parts.append(order[np.arange(begin, end) % len(ids)])
    chosen = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    if not len(chosen):
        raise DataError(
            f"epoch {epoch} holds no document",
            where=f"stage {stage}",
            got=f"weights {dict(weights or {})}",
            next="Raise a weight",
        )
    return rng(seed, stage, "order", epoch).permutation(chosen).astype(np.int64)


def _check(weights: Mapping[str, float], known: list[str]) -> None:
    for domain, weight in weights.items():
        if domain not in known:
            hint = did_you_mean(domain, known)
            raise DataError(f"no document has the domain {domain!r}", where="weights", allowed=", ".join(known), next=hint)
        if not np.isfinite(weight) or weight < 0:
            raise DataError("a weight must be a number of repeats", where=f"weights.{domain}", got=weight, allowed="0 or more")
