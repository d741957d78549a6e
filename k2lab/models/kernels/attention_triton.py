"""The largest logit of a head, found only where an upper bound exceeds a threshold; the device decides.

Legend: `T` packed tokens, `H` heads, `C` query and key width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from k2lab.models.pack import Ragged


@triton.jit
def _maxima_kernel(
    q, k, firsts, lengths, bound_H, max_H, scale, tau, H, C: tl.constexpr, BC: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """B queries of one head and document against the keys up to the last of them."""
    first, document, h = tl.program_id(0) * B, tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + document)
    if (first < length) & (tl.load(bound_H + h) > tau):
        start = tl.load(firsts + document).to(tl.int64)
        i, c = first + tl.arange(0, B), tl.arange(0, BC)
        rows = ((start + i[:, None]) * H + h) * C + c[None, :]
        query = tl.load(q + rows, (i[:, None] < length) & (c[None, :] < C), 0.0)
        largest = tl.full((B, B), float("-inf"), tl.float32)
        for begin in range(0, first + B, B):
            j = begin + tl.arange(0, B)
            columns = ((start + j[None, :]) * H + h) * C + c[:, None]
            key = tl.load(k + columns, (j[None, :] < length) & (c[:, None] < C), 0.0)
            seen = (j[None, :] <= i[:, None]) & (i[:, None] < length)
            largest = tl.maximum(largest, tl.where(seen, tl.dot(query, key), float("-inf")))
        tl.atomic_max(max_H + h, tl.max(tl.max(largest, 1), 0) * scale)


def maxima(
    q_THC: torch.Tensor, k_THC: torch.Tensor, bound_H: torch.Tensor, scale: float, ragged: Ragged, tau: float
) -> torch.Tensor:
    """`bound_H` where it is at most tau, elsewhere the largest scaled logit of the head over all documents. q and k are dense."""
    _, H, C = q_THC.shape
    assert q_THC.is_contiguous() and k_THC.is_contiguous()
    max_H = torch.where(bound_H > tau, float("-inf"), bound_H)
    B = 64
    _maxima_kernel[triton.cdiv(ragged.longest, B), ragged.num_documents, H](
        q_THC, k_THC, ragged.firsts, ragged.lengths, bound_H, max_H, scale, tau, H, C, max(16, triton.next_power_of_2(C)), B
    )
    return max_H
