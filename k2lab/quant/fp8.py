"""The FP8 grid of released Kimi K2 checkpoints: E4M3 codes in blocks of 128 x 128, each with an fp32 scale (`weight_scale_inv`,
which multiplies the codes, whatever its name says).

For a block of weights w, in fp32 (bf16 weights are exact there; nothing is rounded before):

    scale_inv = max|w| / 448
    code      = e4m3(clamp(w / scale_inv, -448, 448))          ties to even; 448 is the largest E4M3 number
    value     = code * scale_inv                               in fp32, rounded once

A block of zeros has scale_inv 1 (as transformers writes it). Otherwise scale_inv is kept between 2^-126 and the largest number
whose 448-fold is finite. A block that holds a NaN or an infinity has scale_inv NaN and codes 0, so all its values are NaN;
`quantise`, which writes, refuses it. Blocks at the right and lower edge may be smaller.

The grid applied to the fp32 values that it gave returns the same codes and scales (the argument is that of `int4`, with 24 bits
in place of 8); only a block of up to 2^-136, all of whose codes are 0, then has scale_inv 1. Through bf16 the codes survive and
scales are rounded: keep the scales, or detour through fp32.

What is written out below is the reference; with numba, loops of one pass compute the same bits (`_fp8_numba`), and Triton's on a
GPU (`_fp8_triton`).

Legend: `O` rows (out), `I` columns (in); any number of axes, such as experts, may come before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import _blocks, compiled

BLOCK = 128
LARGEST = 448.0  # of E4M3
# of scales: the largest fp32 x with 448 x below infinity after rounding
LOWEST, HIGHEST = 2.0**-126, 9586980 * 2.0**96
E4M3 = torch.float8_e4m3fn
Band = tuple[int, slice, int]


def _kernels(tensor: torch.Tensor, block: int) -> ModuleType | None:
    """The module with the same functions for CUDA tensors or, where numba is installed, for those on a CPU; None if PyTorch's own
    operations compute."""
    if tensor.device.type == "cpu":
        return compiled.module("_fp8_numba") if compiled.wanted(tensor) else None
    kernels = compiled.module("_fp8_triton") if tensor.device.type == "cuda" else None
    return kernels if kernels is not None and kernels.obstacle(tensor, block) is None else None


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int = BLOCK) -> tuple[int, ...]:
    """The shape of the scales of weights of this shape."""
    return (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))


def _room(tensor: torch.Tensor, block: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for one band of a tensor."""
    return torch.empty(min(block, tensor.shape[-2]), tensor.shape[-1], dtype=dtype, device=tensor.device)


def bands(shape: torch.Size, block: int) -> Iterator[Band]:
    """(index into the leading axes taken as one, rows, index of the row of blocks) of every band of blocks."""
    for batch in range(shape[:-2].numel()):
        for band in range(-(-shape[-2] // block)):
            yield batch, slice(band * block, min((band + 1) * block, shape[-2])), band


def _stack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])


def _wide(scales_b: torch.Tensor, columns: int, block: int) -> torch.Tensor:
    """A scale per column, from one per block."""
    return scales_b.repeat_interleave(block)[:columns]


def _check(w: torch.Tensor, what: str) -> None:
    if not w.is_floating_point() or w.ndim < 2 or not w.numel():
        raise CheckpointError(f"{what} must be a floating-point matrix", got=f"{w.dtype}, shape {list(w.shape)}")


@torch.no_grad()
def fp8_grid(
    w: torch.Tensor, block: int = BLOCK, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes float8_e4m3fn [..., O, I] and scale_inv fp32 [..., ceil(O / 128), ceil(I / 128)] of weights [..., O, I], by the rule
    above, in `out` (contiguous) if it is given. Beside inputs and outputs two bands of 128 rows per thread are in memory."""
    _check(w, "weights of FP8 codes")
    if out is None:
        codes = torch.empty(w.shape, dtype=E4M3, device=w.device)
        out = codes, torch.empty(scale_shape(w.shape, block), dtype=torch.float32, device=w.device)
    if (kernels := _kernels(w, block)) is not None:
        return kernels.fp8_grid(w, block, out)
    codes, scales = out
    w_BOI, codes_BOI, scales_Bob = _stack(w), _stack(codes), _stack(scales)
    columns = w.shape[-1]

    def worker() -> Callable[[Band], None]:
        x_nI, sizes_nI = (_room(w, block) for _ in range(2))

        def work(band: Band) -> None:
            batch, rows, index = band
            x = x_nI[: rows.stop - rows.start].copy_(w_BOI[batch, rows])
            top = torch.abs(x, out=sizes_nI[: len(x)]).amax(0)
            amax = torch.nn.functional.pad(top, (0, -columns % block)).view(-1, block).amax(1)
            # by a tensor: PyTorch's CUDA kernels multiply by the reciprocal of a number, which rounds otherwise
            scale = amax.div(torch.full_like(amax, LARGEST)).clamp_(LOWEST, HIGHEST).masked_fill_(amax == 0, 1.0)
            x.div_(_wide(scale, columns, block)).clamp_(-LARGEST, LARGEST)
            unfinite = amax.isfinite().logical_not_()
            # on a GPU asking would wait for it
            if x.device.type != "cpu" or unfinite.any():
                x.masked_fill_(_wide(unfinite, columns, block), 0)
                scale.masked_fill_(unfinite, torch.nan)
            codes_BOI[batch, rows], scales_Bob[batch, index] = x, scale

        return work

    _blocks.each(bands(w.shape, block), worker)
    return codes, scales


def quantise(
    w: torch.Tensor, block: int = BLOCK, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fp8_grid` for writing: raises NumericsError if a weight is not finite. On a GPU it waits for the device."""
    codes, scales = fp8_grid(w, block, out)
    unfinite = scales.isfinite().logical_not_()
    if unfinite.any():
        raise NumericsError(
            "weights that are not finite cannot be written as FP8",
            got=f"{int(unfinite.sum())} blocks with NaN or infinity, the first at {unfinite.nonzero()[0].tolist()}",
            next="Go back to a checkpoint from before the weights became NaN or infinite",
        )
    return codes, scales


@torch.no_grad()
def dequantise(
    codes: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    block: int = BLOCK,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """code x scale_inv in fp32, then cast to `dtype`: codes float8_e4m3fn [..., O, I], scale_inv fp32 as `scale_shape` says; in
    `out` (contiguous, of this type) if it is given. Raises CheckpointError if they do not fit."""
    _check(codes, "FP8 codes")
    if codes.dtype != E4M3 or scale_inv.dtype != torch.float32:
        raise CheckpointError(
            "FP8 weights are float8_e4m3fn codes with float32 scales", got=f"{codes.dtype} with {scale_inv.dtype} scales"
        )
    if tuple(scale_inv.shape) != scale_shape(codes.shape, block):
        raise CheckpointError(
            "FP8 scales do not fit their codes",
            got=f"scales {list(scale_inv.shape)} for codes {list(codes.shape)}",
            allowed=f"scales {list(scale_shape(codes.shape, block))}",
        )
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    if (kernels := _kernels(codes, block)) is not None:
        return kernels.dequantise(codes, scale_inv, dtype, block, out)
    codes_BOI, out_BOI, scales_Bob = _stack(codes), _stack(out), _stack(scale_inv)
    columns = codes.shape[-1]

    def worker() -> Callable[[Band], None]:
        halves, products = _room(codes, block, torch.int16), _room(codes, block)

        def work(band: Band) -> None:
            batch, rows, index = band
            num = rows.stop - rows.start
            x = _widen(codes_BOI[batch, rows], products[:num], halves[:num])
            torch.mul(x, _wide(scales_Bob[batch, index], columns, block), out=out_BOI[batch, rows] if exact else x)
            if not exact:
                out_BOI[batch, rows] = x

        return work

    exact = dtype == torch.float32
    _blocks.each(bands(codes.shape, block), worker)
    return out


def _widen(codes: torch.Tensor, out: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
    """E4M3 codes as fp32. PyTorch converts them one by one on a CPU, ten times slower than this: put into an fp16 number, sign in
    front, a code's seven lower bits from bit 13 on are its value / 256 (subnormal codes too)."""
    if codes.device.type != "cpu":
        return out.copy_(codes)
    signed = codes.view(torch.int8)
    halves.copy_(signed).mul_(128).bitwise_and_(-0x4080)
    out.copy_(halves.view(torch.float16)).mul_(256.0)
    sizes = signed & 0x7F
    # by the largest, which PyTorch finds many times faster than it compares all and asks whether one is equal
    return out.masked_fill_(sizes == 0x7F, torch.nan) if int(sizes.max()) == 0x7F else out
