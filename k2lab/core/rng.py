"""Counter-based randomness: every draw is a function of what it is for, never of what was drawn before.

`rng(seed, "pretrain", "order", epoch)` returns the same generator on every rank, thread, restart and in any order of calls,
so nothing about randomness has to be saved in a checkpoint. There is no global generator in K2 Lab.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Key = str | int


def derive(seed: int, *key: Key) -> int:
    """A 128-bit integer that depends on `seed` and every part of `key` (blake2b of their typed, length-prefixed texts)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        if not isinstance(part, (int, str)):
            raise TypeError(f"rng keys are str or int, got {type(part).__name__}: {part!r}")
        raw = f"{type(part).__name__}:{part}".encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return int.from_bytes(digest.digest(), "little")


def rng(seed: int, *key: Key) -> np.random.Generator:
    """A Philox generator for (`seed`, *`key`), e.g. `rng(seed, stage, purpose, step_or_sample_key)`."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=derive(seed, *key)))
