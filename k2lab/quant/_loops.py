"""The loops of `_int4_numba` and `_fp8_numba`, compiled by numba: one pass over memory each, on one core, without Python's lock.

All of them are in this one file because numba keeps what it compiled by the content of a function's own file, and would not see
that a loop it calls from another file had changed. They take contiguous arrays; bf16 numbers come and go as uint16. Inner loops
are those that LLVM turns into vector instructions: over neighbours, without branches, largest values by halving or by column.

Divisions are IEEE divisions in fp32, rounding to whole codes is the addition of 1.5 x 2^23 (ties to even, and no -0 comes out),
products are rounded to bf16 once. Where `torch.set_flush_denormal(True)` makes the processor read subnormal numbers as 0, weights
below 2^-126 and products with subnormal scales become 0, here as in PyTorch's own operations.

Legend: `I` columns, `G` groups of a row, `b` blocks of columns; `first` and `last` bound rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

F32, I8, I32, U8, U16, U32 = np.float32, np.int8, np.int32, np.uint8, np.uint16, np.uint32
SIGN, SIZE = U32(0x80000000), U32(0x7FFFFFFF)
MAGIC, MAGIC_BITS = F32(12582912.0), I32(0x4B400000)  # 1.5 x 2^23: adding it leaves a whole number in the lowest bits
SEVEN, LARGEST = F32(7.0), F32(448.0)
INT4_LOWEST, INT4_HIGHEST = U32(0x00800000), U32(0x7E110000)  # the bits of 2^-126 and 145 x 2^118, of scales
FP8_LOWEST, FP8_HIGHEST = F32(2.0**-126), F32(9586980 * 2.0**96)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiled when it is first called, and kept for other processes beside this file or in the user's cache folder; where none
    can be written, each process compiles for itself."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": no folder for it
        return njit(**options)(function)


# ---------------------------------------------------------------- numbers


@_compiled
def _bf16(value):
    """The bits of a number rounded to bf16, ties to even; in the upper half of 32 bits. Of NaN, those whose lower half is zero
    stay NaN: those that operations of finite numbers give, and all that bf16 holds."""
    bits = F32(value).view(np.uint32)
    return U32(U32(bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) & U32(0xFFFF0000))


@_compiled
def largest(stored, mask):
    """The largest of unsigned numbers after the mask: in 512 lanes, then of these."""
    lanes, whole = np.zeros(512, stored.dtype), stored.size // 512
    for row in range(whole):
        part = stored[row * 512 : (row + 1) * 512]
        for i in range(512):
            size = part[i] & mask
            lanes[i] = size if size > lanes[i] else lanes[i]
    part = stored[whole * 512 :]
    for i in range(part.size):
        size = part[i] & mask
        lanes[i] = size if size > lanes[i] else lanes[i]
    return lanes.max()


def _number(stored: Any) -> Any:
    """The number whose fp32 (uint32) or bf16 (uint16) bits are stored."""
    raise NotImplementedError("compiled code alone calls it")


@overload(_number, inline="always")
def _(stored):
    if stored == types.uint32:
        return lambda stored: U32(stored).view(np.float32)
    return lambda stored: U32(U32(stored) << U32(16)).view(np.float32)


def _stored(value: Any, out: Any) -> Any:
    """An fp32 number as `out` holds it: as it is, or as its bf16 bits."""
    raise NotImplementedError("compiled code alone calls it")


@overload(_stored, inline="always")
def _(value, out):
    if isinstance(out.dtype, types.Float):
        return lambda value, out: value
    return lambda value, out: U16(_bf16(value) >> U32(16))


# ---------------------------------------------------------------- INT4: the grid


@_compiled
def _tops(x_I, tops, group):
    """The largest of every group of bf16 numbers, their signs dropped, in the front of `tops` (uint16, half a row): by halving,
    so that each step compares neighbours. A NaN is the largest of all."""
    num = x_I.size // 2
    for i in range(num):
        one, other = x_I[2 * i] & U16(0x7FFF), x_I[2 * i + 1] & U16(0x7FFF)
        tops[i] = one if one > other else other
    left = group // 2
    while left % 2 == 0:
        num, left = num // 2, left // 2
        for i in range(num):
            one, other = tops[2 * i], tops[2 * i + 1]
            tops[i] = one if one > other else other
    if left > 1:
        for n in range(num // left):
            top = tops[n * left]
            for i in range(1, left):
                top = max(top, tops[n * left + i])
            tops[n] = top


@_compiled
def _scales(tops, scales_G, wide_G):
    """Scales as bf16 bits and as fp32 from the largest numbers; NaN where these are not finite."""
    for n in range(scales_G.size):
        top = tops[n]
        unfinite = top >= U16(0x7F80)
        bits = _bf16(U32(U32(0) if unfinite else U32(top) << U32(16)).view(np.float32) / SEVEN)
        bits = bits if bits > INT4_LOWEST else INT4_LOWEST
        bits = bits if bits < INT4_HIGHEST else INT4_HIGHEST
        bits = U32(0x7FC00000) if unfinite else bits
        wide_G[n] = U32(bits).view(np.float32)
        scales_G[n] = U16(bits >> U32(16))


@_compiled
def _code(stored, scale):
    """The code of a number. No quotient is farther from 0 than 7.04 (a scale lies at most half a bf16 step below max|w| / 7, or
    is the largest), so that there is nothing to clamp."""
    quotient = U32(U32(stored) << U32(16)).view(np.float32) / scale
    return I8(F32(quotient + MAGIC).view(np.int32) - MAGIC_BITS)


@_compiled
def _row_codes(x_I, wide_G, out_I, group):
    """Codes int8; 0 where the scale is NaN."""
    if group == 32:  # a number that the compiler knows gives whole vectors
        for n in range(wide_G.size):
            scale = wide_G[n]
            for i in range(32):
                out_I[n * 32 + i] = _code(x_I[n * 32 + i], scale)
    else:
        for n in range(wide_G.size):
            scale = wide_G[n]
            for i in range(group):
                out_I[n * group + i] = _code(x_I[n * group + i], scale)
    for n in range(wide_G.size):
        if wide_G[n] != wide_G[n]:
            out_I[n * group : (n + 1) * group] = 0


@_compiled
def _row_products(codes_I, wide_G, out_I, group):
    """bf16(code x scale)."""
    if group == 32:
        for n in range(wide_G.size):
            scale = wide_G[n]
            for i in range(32):
                out_I[n * 32 + i] = U16(_bf16(F32(codes_I[n * 32 + i]) * scale) >> U32(16))
    else:
        for n in range(wide_G.size):
            scale = wide_G[n]
            for i in range(group):
                out_I[n * group + i] = U16(_bf16(F32(codes_I[n * group + i]) * scale) >> U32(16))


@_compiled
def int4_codes(x, codes, scales, num, columns, group):
    """`num` rows of bf16 numbers -> codes int8 and scales."""
    groups = columns // group
    tops, wide_G = np.empty(columns // 2, np.uint16), np.empty(groups, np.float32)
    for row in range(num):
        x_I = x[row * columns : (row + 1) * columns]
        _tops(x_I, tops, group)
        _scales(tops, scales[row * groups : (row + 1) * groups], wide_G)
        _row_codes(x_I, wide_G, codes[row * columns : (row + 1) * columns], group)


@_compiled
def int4_packed(x, packed, scales, num, columns, group):
    """`num` rows of bf16 numbers -> packed codes, two in a byte, and scales."""
    groups, half = columns // group, columns // 2
    tops, wide_G, codes_I = np.empty(half, np.uint16), np.empty(groups, np.float32), np.empty(columns, np.int8)
    for row in range(num):
        x_I = x[row * columns : (row + 1) * columns]
        _tops(x_I, tops, group)
        _scales(tops, scales[row * groups : (row + 1) * groups], wide_G)
        _row_codes(x_I, wide_G, codes_I, group)
        _pack(codes_I, packed[row * half : (row + 1) * half])


@_compiled
def int4_values(x, out, num, columns, group):
    """`num` rows of bf16 numbers -> those on the grid."""
    groups = columns // group
    tops, wide_G, scales_G = np.empty(columns // 2, np.uint16), np.empty(groups, np.float32), np.empty(groups, np.uint16)
    codes_I = np.empty(columns, np.int8)
    for row in range(num):
        x_I = x[row * columns : (row + 1) * columns]
        _tops(x_I, tops, group)
        _scales(tops, scales_G, wide_G)
        _row_codes(x_I, wide_G, codes_I, group)
        _row_products(codes_I, wide_G, out[row * columns : (row + 1) * columns], group)


# ---------------------------------------------------------------- INT4: packing


@_compiled
def _pack(codes, packed):
    """Codes -> bytes of two, the first in the lower half; returns bits from 4 on that are set if a code is not -8 to 7."""
    seen = U8(0)
    for i in range(packed.size):
        low, high = U8(U8(codes[2 * i]) + U8(8)), U8(U8(codes[2 * i + 1]) + U8(8))
        seen |= low | high
        packed[i] = U8((low & U8(15)) | (high << U8(4)))
    return seen


@_compiled
def int4_pack(codes, packed):
    """Codes int8 -> bytes; False if a code is not -8 to 7."""
    return _pack(codes, packed) < 16


@_compiled
def int4_unpack(packed, codes):
    """Bytes -> codes int8."""
    for i in range(packed.size):
        byte = packed[i]
        codes[2 * i] = I8(byte & U8(15)) - I8(8)
        codes[2 * i + 1] = I8(byte >> U8(4)) - I8(8)


@_compiled
def int4_dequantise(packed, scales, out, num, columns, groups):
    """`num` rows of bytes and bf16 scales -> bf16(code x scale)."""
    half = columns // 2
    codes_I, wide_G = np.empty(columns, np.int8), np.empty(groups, np.float32)
    for row in range(num):
        int4_unpack(packed[row * half : (row + 1) * half], codes_I)
        for n in range(groups):
            wide_G[n] = U32(U32(scales[row * groups + n]) << U32(16)).view(np.float32)
        _row_products(codes_I, wide_G, out[row * columns : (row + 1) * columns], columns // groups)


# ---------------------------------------------------------------- FP8


@_compiled
def _e4m3(value):
    """The code of a number between -464 and 464, where codes of finite numbers end, ties to even."""
    bits = F32(value).view(np.uint32)
    size = U32(bits & SIZE)
    # Normal codes are the upper bits with another exponent. For others, below 2^-6, the sum with 2^14 ends in whole 2^-9.
    normal = U32(size + U32(0x7FFFF) + ((size >> U32(20)) & U32(1)) - U32(120 << 23)) >> U32(20)
    small = U32(F32(size.view(np.float32) + F32(16384.0)).view(np.uint32) - U32(0x46800000))
    return U8((small if size < U32(121 << 23) else normal) | ((bits & SIGN) >> U32(24)))


@_compiled
def fp8_band(x, mask, codes, scales_b, num, columns, block):
    """`num` rows, at most a block, of numbers -> codes as bytes and a scale per block. `x` are the bits of fp32 (uint32) or bf16
    (uint16), `mask` all of them but the sign."""
    tops_I = np.zeros(columns, x.dtype)
    for row in range(num):
        x_I = x[row * columns : (row + 1) * columns]
        for i in range(columns):
            size = x_I[i] & mask  # as whole numbers, a NaN is the largest of all
            tops_I[i] = size if size > tops_I[i] else tops_I[i]
    for b in range(scales_b.size):
        amax = F32(_number(tops_I[b * block : (b + 1) * block].max()))
        scale = F32(amax / LARGEST)
        scale = min(max(scale, FP8_LOWEST), FP8_HIGHEST)
        scales_b[b] = F32(np.nan) if not amax < F32(np.inf) else F32(1.0) if amax == F32(0.0) else scale
    for row in range(num):
        x_I, codes_I = x[row * columns : (row + 1) * columns], codes[row * columns : (row + 1) * columns]
        for b in range(scales_b.size):
            x_B, codes_B, scale = x_I[b * block : (b + 1) * block], codes_I[b * block : (b + 1) * block], scales_b[b]
            if scale != scale:
                codes_B[:] = 0
            else:
                for i in range(x_B.size):
                    # never farther than a rounding beyond 448, which is still the code of 448: nothing to clamp
                    codes_B[i] = _e4m3(_number(x_B[i]) / scale)


@_compiled
def _decoded(code):
    """The value of a code. Codes 0 to 7 without sign, which have no leading one, are read as 2^-6 more."""
    size = U32(code) & U32(0x7F)
    small = size < U32(8)
    value = U32(U32(size << U32(20)) + (U32(121 << 23) if small else U32(120 << 23))).view(np.float32)
    value = F32(value - (F32(2.0**-6) if small else F32(0.0)))
    bits = U32(0x7FC00000) if size == U32(0x7F) else F32(value).view(np.uint32)
    return U32(bits | (U32(code) & U32(0x80)) << U32(24)).view(np.float32)


@_compiled
def fp8_dequantise(codes, scales_b, out, num, columns, block):
    """`num` rows of one row of blocks: code x scale in fp32, stored as fp32 or bf16."""
    for row in range(num):
        codes_I, out_I = codes[row * columns : (row + 1) * columns], out[row * columns : (row + 1) * columns]
        for b in range(scales_b.size):
            codes_B, out_B, scale = codes_I[b * block : (b + 1) * block], out_I[b * block : (b + 1) * block], scales_b[b]
            scale = F32(np.nan) if scale != scale else scale  # of all NaN the one that `_bf16` knows
            for i in range(codes_B.size):
                out_B[i] = _stored(_decoded(codes_B[i]) * scale, out_B)
