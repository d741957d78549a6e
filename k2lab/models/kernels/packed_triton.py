"""Low-rank products over groups of rows (Triton): the parts of a LoRA term that are narrow on one side, so that reading the rows
takes all of the time. Rows may be fetched from the tokens where they lie. Sums run in a fixed order. Imported on CUDA devices
only, since it needs triton.

Legend: `T` tokens, `E` experts, `R` aligned rows, `C` width of a row, `P` low-rank columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inner_kernel(
    a, factors, low_RP, expert_M, token_R, scale, C, E,
    P: tl.constexpr, GATHER: tl.constexpr, ALONG: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """low[r] = scale x factors a[r]; a [R, C] or (GATHER) [T, C]; factors [E, P, C] or (ALONG) [E, C, P]. A tile of rows a
    program; tiles of no expert are left alone."""
    m = tl.program_id(0)
    e = tl.load(expert_M + m)
    if e < E:
        r = m * BM + tl.arange(0, BM)
        k, p = tl.arange(0, BK), tl.arange(0, P)
        row = tl.load(token_R + r).to(tl.int64) if GATHER else r.to(tl.int64)
        rows = a + row[:, None] * C + k[None, :]
        first = factors + e.to(tl.int64) * C * P
        # [BK, P]
        columns = first + (k[:, None] * P + p[None, :] if ALONG else k[:, None] + p[None, :] * C)
        acc = tl.zeros([BM, P], tl.float32)
        for start in range(0, C, BK):
            inside = start + k < C
            x = tl.load(rows + start, mask=inside[None, :], other=0.0)
            f = tl.load(columns + (start * P if ALONG else start), mask=inside[:, None], other=0.0)
            acc = tl.dot(x, f, acc)
        tl.store(low_RP + r.to(tl.int64)[:, None] * P + p[None, :], (acc * scale).to(low_RP.dtype.element_ty))


@triton.jit
def sums_kernel(
    low_RP, a, out, token_R, ends_E, C,
    P: tl.constexpr, GATHER: tl.constexpr, ALONG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the expert's rows of low[r]^T a[r], [E, P, C], or (ALONG) of a[r]^T low[r], [E, C, P]. BC columns of an
    expert a program."""
    e = tl.program_id(0).to(tl.int64)
    c, p, i = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, P), tl.arange(0, BR)
    start = tl.load(ends_E + e - 1, mask=e > 0, other=0)
    end = tl.load(ends_E + e)
    inside = (c < C)[None, :]
    acc = tl.zeros([P, BC], tl.float32)
    for first in range(start, end, BR):
        r = first + i
        row = tl.load(token_R + r).to(tl.int64) if GATHER else r.to(tl.int64)
        x = tl.load(a + row[:, None] * C + c[None, :], mask=inside, other=0.0)
        low = tl.load(low_RP + r.to(tl.int64)[:, None] * P + p[None, :])
        acc = tl.dot(tl.trans(low), x, acc)
    at = out + e * C * P + (c[None, :] * P + p[:, None] if ALONG else p[:, None] * C + c[None, :])
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside & (p[:, None] >= 0))
