"""Products of Newton-Schulz on Hopper GPUs in Triton: symmetric ones at half the work, sums fused into their ends.

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N: `x_BMN`, `gram_BMM`.

Every product here has the form  out = alpha L R + beta C (+ diagonal I)  for each matrix of a stack, in 16 bits, float32 sums.
Where L R is symmetric (X X^T, and products of polynomials of one Gram matrix, which commute) only the tiles that touch the upper
triangle are computed; each is stored twice, the second time transposed. Tiles travel by TMA, which also fills and cuts at edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tiles:
    """Shape of one program: tile rows, columns, inner length; warps; stages of loads in flight."""

    m: int = 128
    n: int = 128
    k: int = 64
    warps: int = 4
    stages: int = 3


# Symmetric: two programs of four warps share a multiprocessor (98 KB of shared memory each), so one's end, with its two stores,
# hides behind the other's products. Measured on an H100 against 128 x 256 tiles: 2 % slower at M = 2048, 13 % faster at 1024.
SYMMETRIC, TIMES = Tiles(), Tiles(n=256, warps=8)
GROUP = 8  # tile rows that are walked together, so that their inputs stay in L2
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def fits(rows: int, cols: int) -> bool:
    """Whether TMA can address such matrices: rows of whole 16 bytes, on both sides."""
    return rows % 8 == 0 and cols % 8 == 0


def symmetric(
    left_BMK: Tensor,
    right_BMK: Tensor,
    out_BMM: Tensor,
    alpha: float,
    *,
    plus: tuple[float, Tensor] | None = None,
    scale_B: Tensor | None = None,
    diagonal: float = 0.0,
) -> Tensor:
    """out = (alpha left right^T + beta C) scale^2 + diagonal I, where the caller knows left right^T to be symmetric.

    `plus`: (beta, C_BMM), symmetric too. `scale_B`: float32, one per matrix. Returns `out_BMM`.
    """
    return _launch(left_BMK, right_BMK, out_BMM, alpha, plus, scale_B, diagonal, symmetric=True)


def times(
    left_BMM: Tensor,
    x_BMN: Tensor,
    out_BMN: Tensor,
    alpha: float,
    *,
    plus: tuple[float, Tensor] | None = None,
    scale_B: Tensor | None = None,
) -> Tensor:
    """out = (alpha left x + beta C) scale. Arguments as in `symmetric`. Returns `out_BMN`."""
    if plus is None and scale_B is None and left_BMM.dtype == out_BMN.dtype:
        return out_BMN.baddbmm_(left_BMM, x_BMN, beta=0.0, alpha=alpha)  # nothing to fuse: cuBLAS is faster
    return _launch(left_BMM, x_BMN, out_BMN, alpha, plus, scale_B, 0.0, symmetric=False)


def _launch(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    alpha: float,
    plus: tuple[float, Tensor] | None,
    scale_B: Tensor | None,
    diagonal: float,
    *,
    symmetric: bool,
) -> Tensor:
    count, rows, inner = left.shape
    cols = out.shape[-1]
    tiles = SYMMETRIC if symmetric else TIMES
    row_tiles, col_tiles = triton.cdiv(rows, tiles.m), triton.cdiv(cols, tiles.n)
    per_matrix = row_tiles * col_tiles
    if symmetric:
        per_matrix = tiles.n // tiles.m * col_tiles * (col_tiles + 1) // 2
    tile = [1, tiles.m, tiles.n]
    out_desc = TensorDescriptor.from_tensor(out, tile)
    _product[(count * per_matrix,)](
        TensorDescriptor.from_tensor(left, [1, tiles.m, tiles.k]),
        TensorDescriptor.from_tensor(right, [1, tiles.n, tiles.k] if symmetric else [1, tiles.k, tiles.n]),
        TensorDescriptor.from_tensor(plus[1], tile) if plus else out_desc,
        out_desc,
        TensorDescriptor.from_tensor(out, [1, tiles.n, tiles.m]),
        scale_B,
        float(alpha),
        float(plus[0]) if plus else 0.0,
        float(diagonal),
        inner,
        row_tiles,
        col_tiles,
        per_matrix,
        SYMMETRIC=symmetric,
        PLUS=plus is not None,
        DIAGONAL=diagonal != 0.0,
        POWER=0 if scale_B is None else 2 if symmetric else 1,
        BLOCK_M=tiles.m,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        GROUP=GROUP,
        OUT=DTYPES[out.dtype],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


@triton.jit
def _place(tile, row_tiles, col_tiles, SYMMETRIC: tl.constexpr, RATIO: tl.constexpr, GROUP: tl.constexpr):
    """(tile row, tile column) of flat tile `tile`: the upper triangle by columns, or all tiles by groups of rows."""
    if SYMMETRIC:
        # Column j of the triangle holds j + 1 groups of RATIO tiles: the inverse of j (j + 1) / 2, mended after rounding.
        flat = tile // RATIO
        j = ((tl.sqrt(8.0 * flat + 1.0) - 1.0) * 0.5).to(tl.int32)
        j = tl.where(j * (j + 1) // 2 > flat, j - 1, j)
        j = tl.where((j + 1) * (j + 2) // 2 <= flat, j + 1, j)
        i = (flat - j * (j + 1) // 2) * RATIO + tile % RATIO
    else:
        width = GROUP * col_tiles
        first = (tile // width) * GROUP
        height = min(row_tiles - first, GROUP)
        i = first + (tile % width) % height
        j = (tile % width) // height
    return i, j


@triton.jit
def _product(
    left_desc,
    right_desc,
    c_desc,
    out_desc,
    mirror_desc,
    scale_ptr,
    alpha,
    beta,
    diagonal,
    inner,
    row_tiles,
    col_tiles,
    per_matrix,
    SYMMETRIC: tl.constexpr,
    PLUS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OUT: tl.constexpr,
):
    """One tile of one matrix."""
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    b = tl.program_id(0) // per_matrix
    i, j = _place(tl.program_id(0) % per_matrix, row_tiles, col_tiles, SYMMETRIC, RATIO, GROUP)
    row, col = i * BLOCK_M, j * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, inner, BLOCK_K):
        left = left_desc.load([b, row, k]).reshape(BLOCK_M, BLOCK_K)
        if SYMMETRIC:
            right = right_desc.load([b, col, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            right = right_desc.load([b, k, col]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(left, right, acc)
    acc = acc * alpha
    if PLUS:
        acc += beta * c_desc.load([b, row, col]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
    if POWER > 0:
        scale = tl.load(scale_ptr + b)
        acc = acc * scale
        if POWER == 2:
            acc = acc * scale
    if DIAGONAL:
        on = (row + tl.arange(0, BLOCK_M))[:, None] == (col + tl.arange(0, BLOCK_N))[None, :]
        acc += tl.where(on, diagonal, 0.0)
    out = acc.to(OUT)
    out_desc.store([b, row, col], out.reshape(1, BLOCK_M, BLOCK_N))
    if SYMMETRIC:  # noqa: SIM102
        if i // RATIO != j:  # tiles on the diagonal hold their own mirror image
            mirror_desc.store([b, col, row], out.T.reshape(1, BLOCK_N, BLOCK_M))
