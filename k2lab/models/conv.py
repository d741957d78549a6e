"""Causal depthwise convolution over packed documents, with SiLU: the short convolution of Kimi Delta Attention.

A convolution of kernel J is J shifted multiply-adds over the whole pack; only the first J - 1 tokens of each document would see
their neighbour's tokens, and these few rows are computed again without them.

Legend: `T` packed tokens, `X` channels, `J` kernel length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k2lab.models import conv_gpu
from k2lab.models.pack import Pack


def near_starts(pack: Pack, reach: int) -> torch.Tensor:
    """i64[n] the first `reach` tokens of every document but the first."""
    known = pack.__dict__.setdefault("_near_starts", {})
    if reach not in known:
        bounds = zip(pack.starts[1:-1], pack.starts[2:])
        rows = [t for start, end in bounds for t in range(start, min(start + reach, end))]
        known[reach] = torch.tensor(rows, dtype=torch.int64, device=pack.device)
    return known[reach]


def crossing(pack: Pack, shift: int) -> torch.Tensor:
    """i64[n] tokens t of which t - shift exists and lies in an earlier document."""
    rows = near_starts(pack, shift)
    return rows[rows >= shift]


class ShortConv(torch.autograd.Function):
    """silu(sum_j w_j x_{t - J + 1 + j}) within documents. x [T, X], weight [X, J] -> [T, X]."""

    @staticmethod
    def forward(ctx, x, weight, pack):
        taps = weight.t().contiguous()
        J = len(taps)
        y = x * taps[J - 1]
        for shift in range(1, min(J, len(x))):
            y[shift:].addcmul_(x[:-shift], taps[J - 1 - shift])
        # rows near a document's start: the same sum without the terms from before it
        edge = near_starts(pack, J - 1)
        if len(edge):
            exact = x.index_select(0, edge) * taps[J - 1]
            first = _first_of(pack, edge)
            for shift in range(1, J):
                inside = (edge - shift >= first).to(x.dtype).unsqueeze(1)
                exact.addcmul_(x.index_select(0, (edge - shift).clamp_(min=0)) * inside, taps[J - 1 - shift])
            y.index_copy_(0, edge, exact)
        ctx.save_for_backward(x, y, taps)
        ctx.pack = pack
        return F.silu(y)

    @staticmethod
    def backward(ctx, grad):
        x, y, taps = ctx.saved_tensors
        J, pack = len(taps), ctx.pack
        grad_y = torch.ops.aten.silu_backward(grad, y)
        grad_x = grad_y * taps[J - 1]
        grad_taps = torch.empty_like(taps)
        buffer = torch.mul(grad_y, x)
        grad_taps[J - 1] = buffer.sum(0)
        for shift in range(1, J):
            if shift >= len(x):
                grad_taps[J - 1 - shift] = 0
                continue
            later = grad_y[shift:]
            cross = crossing(pack, shift)
            if len(cross):
                # terms across a boundary do not exist: take their gradient out before it spreads
                later = later.clone().index_fill_(0, cross - shift, 0.0)
            grad_x[:-shift].addcmul_(later, taps[J - 1 - shift])
            grad_taps[J - 1 - shift] = torch.mul(later, x[:-shift], out=buffer[shift:]).sum(0)
        return grad_x, grad_taps.t(), None


def _first_of(pack: Pack, tokens: torch.Tensor) -> torch.Tensor:
    """The first token of each token's document."""
    starts = torch.tensor(pack.starts, device=tokens.device)
    return starts[torch.searchsorted(starts, tokens, right=True) - 1]


def short_conv(x_TX: torch.Tensor, weight_XJ: torch.Tensor, pack: Pack, skip: int = 0) -> torch.Tensor:
    """Causal depthwise convolution with SiLU; tokens see only their own document. [T, X] -> [T - skip, X]: the first `skip`
    tokens are only seen by later ones."""
    if x_TX.device.type == "cuda" and conv_gpu.takes(x_TX, weight_XJ):
        return conv_gpu.ShortConvGPU.apply(x_TX, weight_XJ, conv_gpu.first_tokens(pack), skip)
    y = ShortConv.apply(x_TX, weight_XJ, pack)
    return y[skip:] if skip else y
