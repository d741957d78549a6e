"""The two passes over memory of a Muon step on GPUs: momentum on the way into the stack, decay and update on the way out.

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N: `x_BMN`; a parameter's own matrices have R rows and C columns.

Each element is read once and written once per pass. A parameter with more rows than columns is transposed on the way, tile by
tile, so that one stack can hold both kinds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_R, BLOCK_C = 64, 64
NUM_WARPS = 8


def gather(grad_BRC: Tensor, momentum_BRC: Tensor, out_BMN: Tensor, sums_BX: Tensor, mu: float, *, nesterov: bool) -> None:
    """Momentum <- mu momentum + grad (in place); out <- grad + mu momentum (Nesterov) or momentum.

    `out_BMN` is bfloat16, transposed if R > C. `sums_BX` [B, `blocks(R, C)`] float32 takes sums of squares of `out` before
    rounding, one per tile: their sum over X is the squared Frobenius norm.
    """
    count, rows, cols = grad_BRC.shape
    _gather[(blocks(rows, cols), count)](
        grad_BRC,
        momentum_BRC,
        out_BMN,
        sums_BX,
        mu,
        rows,
        cols,
        NESTEROV=nesterov,
        TRANSPOSED=rows > cols,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )


def scatter(
    update_BMN: Tensor,
    weight_BRC: Tensor,
    copy_BRC: Tensor | None,
    keep: float,
    scale: float,
    seed: int | None = None,
    first: int = 0,
) -> None:
    """weight <- keep x weight + scale x update, and the low-precision `copy` of it, if there is one.

    `seed`: rounds a bfloat16 weight stochastically, by Philox of (seed, `first` + matrix, element), so that the same step
    rounds alike wherever it runs; None = to nearest.
    """
    count, rows, cols = weight_BRC.shape
    _scatter[(blocks(rows, cols), count)](
        update_BMN,
        weight_BRC,
        weight_BRC if copy_BRC is None else copy_BRC,
        keep,
        scale,
        rows,
        cols,
        seed or 0,
        first,
        TRANSPOSED=rows > cols,
        COPY=copy_BRC is not None,
        STOCHASTIC=seed is not None,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )


def blocks(rows: int, cols: int) -> int:
    """Tiles of one matrix."""
    return triton.cdiv(rows, BLOCK_R) * triton.cdiv(cols, BLOCK_C)


@triton.jit
def _offsets(rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(start of this program's matrix, offsets of its tile, the same in the transposed matrix, mask)."""
    col_blocks = tl.cdiv(cols, BLOCK_C)
    r = (tl.program_id(0) // col_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = (tl.program_id(0) % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    start = tl.program_id(1).to(tl.int64) * rows * cols
    return start, r * cols + c, c * rows + r, (r < rows) & (c < cols)


@triton.jit
def _gather(
    grad_ptr,
    momentum_ptr,
    out_ptr,
    sums_ptr,
    mu,
    rows,
    cols,
    NESTEROV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start, here, turned, mask = _offsets(rows, cols, BLOCK_R, BLOCK_C)
    grad = tl.load(grad_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
    momentum = tl.load(momentum_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
    momentum = mu * momentum + grad
    tl.store(momentum_ptr + start + here, momentum.to(momentum_ptr.dtype.element_ty), mask=mask)
    out = grad + mu * momentum if NESTEROV else momentum
    tl.store(sums_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(out * out))
    out = out.to(out_ptr.dtype.element_ty)
    if TRANSPOSED:
        tl.store(out_ptr + start + tl.trans(turned), tl.trans(out), mask=tl.trans(mask))
    else:
        tl.store(out_ptr + start + here, out, mask=mask)


@triton.jit
def _scatter(
    update_ptr,
    weight_ptr,
    copy_ptr,
    keep,
    scale,
    rows,
    cols,
    seed,
    first,
    TRANSPOSED: tl.constexpr,
    COPY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start, here, turned, mask = _offsets(rows, cols, BLOCK_R, BLOCK_C)
    if TRANSPOSED:
        update = tl.trans(tl.load(update_ptr + start + tl.trans(turned), mask=tl.trans(mask), other=0.0))
    else:
        update = tl.load(update_ptr + start + here, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + start + here, mask=mask, other=0.0).to(tl.float32)
    weight = keep * weight + scale * update.to(tl.float32)
    if STOCHASTIC:
        weight = _round_up_or_down(weight, here, first + tl.program_id(1), seed)
    tl.store(weight_ptr + start + here, weight.to(weight_ptr.dtype.element_ty), mask=mask)
    if COPY:
        tl.store(copy_ptr + start + here, weight.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _round_up_or_down(value, offset, matrix, seed):
    """One of the two bfloat16 neighbours, each with the chance that makes the mean right. Infinities and NaN stay."""
    bits = value.to(tl.uint32, bitcast=True)
    zero = tl.zeros_like(offset).to(tl.uint32)
    noise, _, _, _ = tl.philox(seed, offset.to(tl.uint32), zero + matrix.to(tl.uint32), zero, zero)
    rounded = (bits + (noise & 0xFFFF)) & 0xFFFF0000
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, bits).to(tl.float32, bitcast=True)
