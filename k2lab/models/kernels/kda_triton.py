"""Triton kernels around Kimi Delta Attention: short convolution with SiLU over packed documents, unit vectors.

Imported lazily, on CUDA only (it needs triton). All arithmetic is fp32; inputs and outputs keep their own dtype. Sums over tokens
(gradients of weights) are written per program and added afterwards, so that results do not depend on the order of programs.

Legend: `T` tokens, `X` channels, `J` taps (4), `R` rows (token, head), `D` head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TAPS = 4  # shorter convolutions are padded with zero taps in front


# ---------------------------------------------------------------- short convolution


# Numbers of tokens differ in every pack: no version of a kernel for some of them.
@triton.jit(do_not_specialize=["T", "skip"])
def _conv_forward(x, taps, first, y, T, skip, X: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr):
    """y_t = silu(sum_i taps[3 - i] x_{t - i}) for t >= skip, of tokens t - i >= first_t."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT) + skip
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    in_x, in_t = channels < X, tokens < T
    start = tl.load(first + tokens, mask=in_t, other=0)
    total = tl.zeros((BT, BX), dtype=tl.float32)
    for i in tl.static_range(4):
        from_t = tokens - i
        seen = in_t & (from_t >= start)
        part = tl.load(x + from_t[:, None] * X + channels[None, :], mask=seen[:, None] & in_x[None, :], other=0.0).to(tl.float32)
        total += part * tl.load(taps + (3 - i) * X + channels, mask=in_x, other=0.0).to(tl.float32)[None, :]
    total *= tl.sigmoid(total)
    place = y + (tokens - skip)[:, None] * X + channels[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=in_t[:, None] & in_x[None, :])


@triton.jit(do_not_specialize=["T", "skip"])
def _conv_backward(x, taps, first, grad, grad_x, grad_taps, T, skip, X: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr):
    """One pass over tokens s .. s + BT with the last three tokens and their unfinished gradients in registers; the pre-activation
    is computed again. Three tokens after the block add to its gradients of x, not to those of the taps."""
    s = tl.program_id(0).to(tl.int64) * BT
    channels = tl.program_id(1) * BX + tl.arange(0, BX)
    in_x = channels < X
    w0 = tl.load(taps + channels, mask=in_x, other=0.0).to(tl.float32)
    w1 = tl.load(taps + X + channels, mask=in_x, other=0.0).to(tl.float32)
    w2 = tl.load(taps + 2 * X + channels, mask=in_x, other=0.0).to(tl.float32)
    w3 = tl.load(taps + 3 * X + channels, mask=in_x, other=0.0).to(tl.float32)
    x1 = tl.load(x + (s - 1) * X + channels, mask=in_x & (s >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(x + (s - 2) * X + channels, mask=in_x & (s >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(x + (s - 3) * X + channels, mask=in_x & (s >= 3), other=0.0).to(tl.float32)
    g0 = tl.zeros((BX,), dtype=tl.float32)
    g1, g2, g3 = g0, g0, g0
    a1, a2, a3 = g0, g0, g0  # unfinished gradients of x at t - 1, t - 2, t - 3
    for i in range(BT + 3):
        t = s + i
        here = t < T
        start = tl.load(first + t, mask=here, other=0)
        x0 = tl.load(x + t * X + channels, mask=in_x & here, other=0.0).to(tl.float32)
        out = tl.load(grad + (t - skip) * X + channels, mask=in_x & here & (t >= skip), other=0.0).to(tl.float32)
        x1 = tl.where(t - 1 >= start, x1, 0.0)
        x2 = tl.where(t - 2 >= start, x2, 0.0)
        x3 = tl.where(t - 3 >= start, x3, 0.0)
        z = x0 * w3 + x1 * w2 + x2 * w1 + x3 * w0
        share = tl.sigmoid(z)
        d = out * share * (1.0 + z * (1.0 - share))
        a3 += tl.where(t - 3 >= start, d * w0, 0.0)
        a2 += tl.where(t - 2 >= start, d * w1, 0.0)
        a1 += tl.where(t - 1 >= start, d * w2, 0.0)
        tl.store(grad_x + (t - 3) * X + channels, a3.to(grad_x.dtype.element_ty), mask=in_x & (i >= 3) & (t - 3 < T))
        own = tl.where(i < BT, d, 0.0)
        g3 += own * x0
        g2 += own * x1
        g1 += own * x2
        g0 += own * x3
        a3, a2, a1 = a2, a1, d * w3
        x3, x2, x1 = x2, x1, x0
    place = grad_taps + tl.program_id(0).to(tl.int64) * 4 * X + channels
    tl.store(place, g0, mask=in_x)
    tl.store(place + X, g1, mask=in_x)
    tl.store(place + 2 * X, g2, mask=in_x)
    tl.store(place + 3 * X, g3, mask=in_x)


def conv_forward(x: torch.Tensor, taps: torch.Tensor, first_T: torch.Tensor, skip: int) -> torch.Tensor:
    """silu(convolution) of x [T, X] with taps [4, X]; first_T i32[T] is the first token of each token's document. Tokens before
    `skip` are only seen by later ones: returns [T - skip, X]."""
    T, X = x.shape
    y = x.new_empty(T - skip, X)
    BT, BX = 16, min(256, triton.next_power_of_2(X))
    _conv_forward[(triton.cdiv(T - skip, BT), triton.cdiv(X, BX))](x, taps, first_T, y, T, skip, X, BT, BX, num_warps=4)
    return y


def conv_backward(
    x: torch.Tensor, taps: torch.Tensor, first_T: torch.Tensor, skip: int, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x [T, X] and of the taps f32[4, X]; grad [T - skip, X]."""
    T, X = x.shape
    BT, BX = 64, min(512, triton.next_power_of_2(X))
    blocks = triton.cdiv(T, BT)
    grad_x, parts = torch.empty_like(x), torch.empty(blocks, 4, X, dtype=torch.float32, device=x.device)
    grid = (blocks, triton.cdiv(X, BX))
    _conv_backward[grid](x, taps, first_T, grad, grad_x, parts, T, skip, X, BT, BX, num_warps=max(1, BX // 128))
    return grad_x, parts.sum(0)


# ---------------------------------------------------------------- unit vectors


@triton.jit(do_not_specialize=["R"])
def _unit_forward(x, y, scale, R, eps, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    rows, columns = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BD)
    place = rows[:, None] * D + columns[None, :]
    inside = (rows < R)[:, None] & (columns < D)[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1) + eps)
    tl.store(y + place, (values * inverse[:, None]).to(y.dtype.element_ty), mask=inside)
    tl.store(scale + rows, inverse, mask=rows < R)


def unit_forward(x: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / sqrt(|x|^2 + eps) over the last axis, the factors f32[...])."""
    D, R = x.shape[-1], x.numel() // x.shape[-1]
    y, scale = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    BR, BD = 32, triton.next_power_of_2(D)
    _unit_forward[(triton.cdiv(R, BR),)](x, y, scale, R, eps, D, BR, BD, num_warps=4)
    return y, scale
