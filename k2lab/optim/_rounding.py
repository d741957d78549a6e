"""Stochastic rounding to bfloat16: up or down by chance, so that the mean is right and small updates are not lost.

The chance is counter-based, as everywhere: a function of the parameter's name, the number of updates done and the element, so
nothing is saved and a resumed run rounds as the run that was never stopped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2lab.core.rng import derive


def seed(name: str, update: int) -> int:
    """Seed of all draws for parameter `name` in update number `update`."""
    return derive(0, "stochastic rounding", name, update) % 2**31


def is_stochastic(weight: Tensor) -> bool:
    """Whether a weight that is its own master can be rounded stochastically: bfloat16 is the top half of float32."""
    return weight.dtype == torch.bfloat16


def round_into(out: Tensor, value: Tensor, seed: int) -> None:
    """Writes `value` (float32) into `out` (bfloat16, same shape), each element to one of its two neighbours.

    The upper one is taken with the share of the gap that `value` has passed. Infinities and NaN stay what they are.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=value.device)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    out.copy_(torch.where(value.isfinite(), rounded, value))
