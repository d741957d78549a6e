"""Triton kernels over rows of logits, one program per row. Imported on CUDA only.

A row of up to `HELD` entries is read once and held in registers; a longer one is read twice, tile by tile. Arithmetic is fp32
whatever the logits' type.

Legend: `c` rows, `W` vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# The longest row held in registers, by bytes per logit. Reading a row of bf16 twice, the second time from the cache, is faster
# than holding it from 32,768 on (2.7 against 2.3 TB/s on an H100); of fp32 not (2.7 against 2.9).
HELD = {2: 16384, 4: 65536}
TILE = 16384


@triton.jit
def _statistics(logits, W: tl.constexpr, TILE: tl.constexpr):
    """(maximum, sum of exp(logit - maximum)) of the row that starts at `logits`, tile by tile; the maximum of a row of -inf is
    taken as -1e30."""
    columns = tl.arange(0, TILE)
    top = tl.full((), -1e30, tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, W, TILE):
        x = tl.load(logits + first + columns, mask=first + columns < W, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    return top, total


@triton.jit
def _cross_entropy(
    logits,
    grads,
    targets,
    weights,
    nll,
    stride,
    grad_stride,
    W: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    NARROWS: tl.constexpr,
):
    """nll = log sum exp - logit of the target; grads = weight (softmax - one at the target). Rows of weight 0: zeros, unread."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    grads += row * grad_stride
    weight = tl.load(weights + row).to(tl.float32)
    columns = tl.arange(0, TILE)
    if weight == 0:
        tl.store(nll + row, 0.0)
        if WITH_GRAD:
            for first in range(0, W, TILE):
                tl.store(grads + first + columns, tl.zeros((TILE,), grads.dtype.element_ty), mask=first + columns < W)
    else:
        target = tl.load(targets + row)
        chosen = tl.load(logits + target).to(tl.float32)
        if HELD:
            x = tl.load(logits + columns, mask=columns < W, other=float("-inf")).to(tl.float32)
            top = tl.max(x, 0)
            x = tl.exp(x - top)
            total = tl.sum(x, 0)
            if WITH_GRAD:
                grad = x * (weight / total)
                grad = tl.where(columns == target, grad - weight, grad)
                tl.store(grads + columns, grad.to(grads.dtype.element_ty), mask=columns < W)
        else:
            top, total = _statistics(logits, W, TILE)
            if WITH_GRAD:
                tl.debug_barrier()  # every thread has read its target before any gradient overwrites it
                for first in range(0, W, TILE):
                    x = tl.load(logits + first + columns, mask=first + columns < W, other=0.0).to(tl.float32)
                    grad = tl.exp(x - top) * (weight / total)
                    grad = tl.where(first + columns == target, grad - weight, grad)
                    if NARROWS:
                        tl.debug_barrier()
                    tl.store(grads + first + columns, grad.to(grads.dtype.element_ty), mask=first + columns < W)
        tl.store(nll + row, tl.log(total) + top - chosen)


@triton.jit
def _log_sum_exp(logits, out, stride, W: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total = _statistics(logits + row * stride, W, TILE)
    tl.store(out + row, tl.log(total) + top)


@triton.jit
def _two_softmaxes(
    logits,
    grads,
    shift1,
    scale1,
    shift2,
    scale2,
    stride,
    grad_stride,
    W: tl.constexpr,
    TILE: tl.constexpr,
    NARROWS: tl.constexpr,
):
    """grads = scale1 exp(logit - shift1) - scale2 exp(logit - shift2). Rows of both scales 0: zeros, unread."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    grads += row * grad_stride
    s1, s2 = tl.load(shift1 + row), tl.load(shift2 + row)
    a, b = tl.load(scale1 + row), tl.load(scale2 + row)
    columns = tl.arange(0, TILE)
    if (a == 0) & (b == 0):
        for first in range(0, W, TILE):
            tl.store(grads + first + columns, tl.zeros((TILE,), grads.dtype.element_ty), mask=first + columns < W)
    else:
        for first in range(0, W, TILE):
            x = tl.load(logits + first + columns, mask=first + columns < W, other=0.0).to(tl.float32)
            grad = a * tl.exp(x - s1) - b * tl.exp(x - s2)
            if NARROWS:
                tl.debug_barrier()
            tl.store(grads + first + columns, grad.to(grads.dtype.element_ty), mask=first + columns < W)


def _warps(tile: int) -> int:
    return max(1, min(16, tile // 1024))


def _narrows(logits_cW: torch.Tensor, grads_cW: torch.Tensor) -> bool:
    """True if gradients of a smaller type overwrite their row from its beginning: then a tile may be written when all threads
    have read it (and reaches no tile that they have not). Otherwise every thread overwrites what it alone read."""
    assert grads_cW.element_size() <= logits_cW.element_size()
    return grads_cW.dtype != logits_cW.dtype


def cross_entropy(
    logits_cW: torch.Tensor,
    grads_cW: torch.Tensor | None,
    targets_c: torch.Tensor,
    weights_c: torch.Tensor,
    nll_c: torch.Tensor,
    held: int | None = None,
    tile: int = TILE,
    warps: int | None = None,
) -> None:
    """Writes `nll_c` (0 where the weight is 0) and d(sum of weight x nll)/d logits to `grads_cW`, which may lie in the
    memory of `logits_cW` (each row where that row begins), or be None. Rows may be strided."""
    c, W = logits_cW.shape
    fits = triton.next_power_of_2(W)
    keep = fits <= (held or HELD[logits_cW.element_size()])
    tile = fits if keep else min(tile, fits)
    out = logits_cW if grads_cW is None else grads_cW
    _cross_entropy[(c,)](
        logits_cW,
        out,
        targets_c,
        weights_c,
        nll_c,
        logits_cW.stride(0),
        out.stride(0),
        W=W,
        HELD=keep,
        TILE=tile,
        WITH_GRAD=grads_cW is not None,
        NARROWS=_narrows(logits_cW, out),
        num_warps=warps or _warps(tile),
    )


def log_sum_exp(logits_cW: torch.Tensor, out_c: torch.Tensor, tile: int = TILE) -> None:
    """log of the sum of exp over each row, fp32 [c]; -inf where a row is -inf throughout."""
    c, W = logits_cW.shape
    tile = min(tile, triton.next_power_of_2(W))
    _log_sum_exp[(c,)](logits_cW, out_c, logits_cW.stride(0), W=W, TILE=tile, num_warps=_warps(tile))


def two_softmaxes(
    logits_cW: torch.Tensor,
    grads_cW: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    second: tuple[torch.Tensor, torch.Tensor],
    tile: int = TILE,
) -> None:
    """scale exp(logit - shift) of the `first` (shift [c], scale [c]) less that of the `second` -> `grads_cW`, which may lie in
    the memory of `logits_cW` (each row where that row begins)."""
    c, W = logits_cW.shape
    tile = min(tile, triton.next_power_of_2(W))
    _two_softmaxes[(c,)](
        logits_cW,
        grads_cW,
        *first,
        *second,
        logits_cW.stride(0),
        grads_cW.stride(0),
        W=W,
        TILE=tile,
        NARROWS=_narrows(logits_cW, grads_cW),
        num_warps=_warps(tile),
    )
