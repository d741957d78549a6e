"""Numbers judged by their bits: one look at a tensor tells whether it holds NaN or infinity, and whether it is zero all over."""

from __future__ import annotations

import torch

from k2lab.quant import compiled

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The bits of infinity, or for E4M3, which has none, of its NaN: numbers from there on are not finite.
LIMITS = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
    torch.float8_e4m3fn: 0x7F,
}


def largest(tensor: torch.Tensor) -> int:
    """The bits without sign of the largest of a tensor's numbers, of a type in LIMITS: 0 if all are zero (or there are none),
    the type's limit or more if one is not finite."""
    if not tensor.numel():
        return 0
    size = tensor.element_size()
    mask = (1 << (8 * size - 1)) - 1
    if compiled.wanted(tensor) and (loops := compiled.module("_loops")) is not None:
        stored = tensor.detach().contiguous().view(_WHOLE[size]).reshape(-1).numpy().view(f"u{size}")
        return int(loops.largest(stored, stored.dtype.type(mask)))
    return int((tensor.detach().contiguous().view(_WHOLE[size]) & mask).max())
