"""The functions of `int4` for CUDA tensors, equal to them bit for bit: every weight, word and scale is read or written once.

Divisions are IEEE divisions, rounding to whole codes is the addition of 1.5 x 2^23 (ties to even, and no -0 comes out), products
of a code and a scale are exact in fp32 and rounded to bf16 once. Nothing is flushed to zero. Imported on CUDA devices only, since
it needs triton.

Legend: `N` groups of all rows, `G` weights of a group, `W` words of 8 codes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST, HIGHEST = tl.constexpr(2.0**-126), tl.constexpr(145 * 2.0**118)  # of scales
MAGIC = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding it leaves a whole number in the lowest bits
MAGIC_BITS = tl.constexpr(0x4B400000)
# 2^23 and 2^23 + 8: the bits of a code + 8, put into those of 2^23, are the number 2^23 + code + 8.
BIG_BITS, BIG = tl.constexpr(0x4B000000), tl.constexpr(8388616.0)
GROUPS, WORDS = 128, 512  # of a program


# ---------------------------------------------------------------- kernels


@triton.jit
def _codes(w_NG, first, num, G: tl.constexpr, PG: tl.constexpr, BN: tl.constexpr):
    """Codes as fp32 [BN, PG], scales fp32 [BN], which hold bf16 numbers, of BN groups from `first` on, and the groups' mask."""
    n = first + tl.arange(0, BN).to(tl.int64)
    g = tl.arange(0, PG)
    mask = (n < num)[:, None] & (g < G)[None, :]
    x = tl.load(w_NG + n[:, None] * G + g[None, :], mask=mask, other=0.0).to(tl.bfloat16).to(tl.float32)
    # as whole numbers, so that a NaN is the largest of all
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    unfinite = top >= 0x7F800000
    amax = tl.where(unfinite, 0, top).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full([BN], 7.0, tl.float32)).to(tl.bfloat16).to(tl.float32)
    scale = tl.minimum(tl.maximum(scale, LOWEST), HIGHEST)
    x = tl.where(unfinite[:, None], 0.0, x)
    code = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    code = tl.minimum(tl.maximum(code, -7.0), 7.0)
    return code, tl.where(unfinite, float("nan"), scale), n


@triton.jit
def values_kernel(w_NG, out_NG, num, G: tl.constexpr, PG: tl.constexpr, BN: tl.constexpr):
    """bf16(code x scale)."""
    code, scale, n = _codes(w_NG, tl.program_id(0).to(tl.int64) * BN, num, G, PG, BN)
    g = tl.arange(0, PG)
    value = ((code + MAGIC) - MAGIC) * scale[:, None]
    tl.store(out_NG + n[:, None] * G + g[None, :], value.to(tl.bfloat16), mask=(n < num)[:, None] & (g < G)[None, :])


@triton.jit
def grid_kernel(
    w_NG, out, scales_N, num, G: tl.constexpr, PG: tl.constexpr, BN: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """Codes, int8 [N, G] or (PACK) int32 [N, G / 8], and scales."""
    code, scale, n = _codes(w_NG, tl.program_id(0).to(tl.int64) * BN, num, G, PG, BN)
    tl.store(scales_N + n, scale.to(tl.bfloat16), mask=n < num)
    whole = (code + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    if PACK:
        nibble = tl.reshape(whole + 8, [BN, PG // 8, 8]) << (4 * tl.arange(0, 8))[None, None, :]
        word = tl.arange(0, PG // 8)
        mask = (n < num)[:, None] & (word < G // 8)[None, :]
        tl.store(out + n[:, None] * (G // 8) + word[None, :], tl.sum(nibble, axis=2), mask=mask)
    else:
        g = tl.arange(0, PG)
        tl.store(out + n[:, None] * G + g[None, :], whole.to(tl.int8), mask=(n < num)[:, None] & (g < G)[None, :])


@triton.jit
def pack_kernel(codes, out_W, num, BW: tl.constexpr):
    """Codes int8 [W, 8] -> words."""
    w = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    i = tl.arange(0, 8)
    code = tl.load(codes + w[:, None] * 8 + i[None, :], mask=(w < num)[:, None], other=0).to(tl.int32)
    tl.store(out_W + w, tl.sum(((code + 8) & 15) << (4 * i)[None, :], axis=1), mask=w < num)


@triton.jit
def unpack_kernel(packed_W, out, num, BW: tl.constexpr):
    """Words -> codes int8 [W, 8]."""
    w = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    i = tl.arange(0, 8)
    word = tl.load(packed_W + w, mask=w < num, other=0)
    code = ((word[:, None] >> (4 * i)[None, :]) & 15) - 8
    tl.store(out + w[:, None] * 8 + i[None, :], code.to(tl.int8), mask=(w < num)[:, None])


@triton.jit
def dequantise_kernel(packed_W, scales_N, out, num, PER: tl.constexpr, BW: tl.constexpr):
    """bf16(code x scale), stored as out's type; PER words share a scale."""
    w = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)
    i = tl.arange(0, 8)
    word = tl.load(packed_W + w, mask=w < num, other=0)
    scale = tl.load(scales_N + w // PER, mask=w < num, other=0.0).to(tl.float32)
    nibble = (word[:, None] >> (4 * i)[None, :]) & 15
    value = ((nibble | BIG_BITS).to(tl.float32, bitcast=True) - BIG) * scale[:, None]
    tl.store(out + w[:, None] * 8 + i[None, :], value.to(tl.bfloat16).to(out.dtype.element_ty), mask=(w < num)[:, None])


# ---------------------------------------------------------------- functions, as in `int4`


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _readable(w: torch.Tensor) -> torch.Tensor:
    """Contiguous, and of a type that the kernels round to bf16 themselves."""
    return (w if w.dtype in (torch.bfloat16, torch.float16, torch.float32) else w.to(torch.bfloat16)).contiguous()


def _grid(w: torch.Tensor, group: int, out: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w, packed = _readable(w), out.dtype == torch.int32
    with torch.cuda.device_of(w):
        grid_kernel[(triton.cdiv(scales.numel(), GROUPS),)](w, out, scales, scales.numel(), group, _power(group), GROUPS, packed)
    return out, scales


def int4_grid(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales."""
    scales = torch.empty(*w.shape[:-1], w.shape[-1] // group, dtype=torch.bfloat16, device=w.device)
    return _grid(w, group, torch.empty(w.shape, dtype=torch.int8, device=w.device), scales)


def quantise(
    w: torch.Tensor, group: int, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales, in `out` if it is given."""
    if out is None:
        packed = torch.empty(*w.shape[:-1], w.shape[-1] // 8, dtype=torch.int32, device=w.device)
        out = packed, torch.empty(*w.shape[:-1], w.shape[-1] // group, dtype=torch.bfloat16, device=w.device)
    return _grid(w, group, *out)


def values(w: torch.Tensor, group: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The bf16 values on the grid, as `dtype`."""
    w = _readable(w)
    out = torch.empty(w.shape, dtype=torch.bfloat16, device=w.device)
    num = w.numel() // group
    with torch.cuda.device_of(w):
        values_kernel[(triton.cdiv(num, GROUPS),)](w, out, num, group, _power(group), GROUPS)
    return out.to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 -> int32."""
    codes = codes.contiguous()
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int32, device=codes.device)
    with torch.cuda.device_of(codes):
        pack_kernel[(triton.cdiv(packed.numel(), WORDS),)](codes, packed, packed.numel(), WORDS)
    return packed


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 -> codes int8."""
    packed = packed.contiguous()
    codes = torch.empty(*packed.shape[:-1], columns, dtype=torch.int8, device=packed.device)
    with torch.cuda.device_of(packed):
        unpack_kernel[(triton.cdiv(packed.numel(), WORDS),)](packed, codes, packed.numel(), WORDS)
    return codes


def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, ...] | torch.Size | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values, in `out` (contiguous, of as many elements and of type `dtype`) if it is given."""
    packed, scales = packed.contiguous(), scales.contiguous()
    columns, group = packed.shape[-1] * 8, packed.shape[-1] * 8 // scales.shape[-1]
    out = torch.empty(*packed.shape[:-1], columns, dtype=dtype, device=packed.device) if out is None else out
    if group % 8:  # a word has several scales
        codes = unpack(packed, columns).float().unflatten(-1, (scales.shape[-1], group))
        out.copy_((codes * scales.float().unsqueeze(-1)).flatten(-2).to(torch.bfloat16))
        return out
    with torch.cuda.device_of(packed):
        dequantise_kernel[(triton.cdiv(packed.numel(), WORDS),)](packed, scales, out, packed.numel(), group // 8, WORDS)
    return out
