"""The INT4 grid of released Kimi checkpoints (K2-Thinking and later), and its packing: compressed-tensors' `pack-quantized`, four
bits, symmetric, one bf16 scale for every 32 weights of a row.

The grid, for a group of weights w that have been rounded to bf16 first (an fp32 master too, in trainer and exporter alike):

    scale = bf16(max|w| / 7)                                   the division in fp32, rounded to fp32 and then to bf16
    code  = clamp(round(w / scale), -7, 7)                     the division in fp32, ties to even
    value = bf16(code * scale)                                 what a forward pass multiplies by, and an engine serves

The scale is kept between 2^-126, the smallest normal number, and 145 x 2^118, the largest for which 7 x scale is finite in
bf16. So a group of zeros, or one so small that max|w| / 7 is no normal number, has scale 2^-126; its codes are w / 2^-126
rounded, which is 0 for all up to 2^-127 and keeps the rest to 2^-127. Values that the grid gives are thus zero or normal: an
engine that flushes subnormal numbers serves the same. A group that holds a NaN or an infinity has scale NaN and codes 0, so all
its values are NaN: nothing hides it. `quantise`, which writes, refuses it.

The grid applied to values that it gave returns the same codes and scales, always: bf16(max|w| / 7) never has one of the 14
mantissas 148, 156, ..., 252 (of 128 to 255) whose sevenfold lies halfway between two bf16 numbers, and for all others
bf16(7 x scale) / 7 rounds back. Not so for codes and scales made by other rules: with one of these 14 mantissas, with a largest
|code| below 7, or with a code -8 (which is read, and never written) the grid may choose another scale. Tensors that were not
changed must therefore be written from their own bytes.

Packing: code + 8 in four bits, the lowest column in the lowest bits of an int32.

On a CPU everything runs over blocks of rows that fit the cache (`_blocks`); beside inputs and outputs only a block per thread is
in memory. What is written out below, in PyTorch's operations, is the reference; with numba, loops of one pass compute the same
bits (`_int4_numba`), and Triton's on a GPU (`_int4_triton`).

Legend: `O` rows (out), `I` columns (in), `G` groups of a row; any number of axes, such as experts, may come before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch

from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import _blocks, compiled

GROUP = 32
LOWEST, HIGHEST = 2.0**-126, 145 * 2.0**118  # of scales
PER_WORD = 8
# Elements that are worked on at once on a CPU. Fewer and PyTorch's operations cost more than their work, more and the second
# (for the grid) or third cache (for packing) is too small; measured on two EPYC cores.
_GRID_BLOCK, PACK_BLOCK = 1 << 18, 1 << 20

assert sys.byteorder == "little", "codes are packed through views of little-endian integers"


def _kernels(tensor: torch.Tensor) -> ModuleType | None:
    """The module with the same functions for CUDA tensors or, where numba is installed, for those on a CPU; None if PyTorch's own
    operations compute."""
    if tensor.device.type == "cuda":
        return compiled.module("_int4_triton")
    return compiled.module("_int4_numba") if compiled.wanted(tensor) else None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """All axes but the last as one; a copy only if the tensor does not lie so."""
    return tensor.reshape(-1, tensor.shape[-1])


def _check_weight(w: torch.Tensor, group: int) -> None:
    if not w.is_floating_point():
        raise CheckpointError("INT4 codes are made of floating-point weights", got=str(w.dtype))
    if w.ndim < 2:
        raise CheckpointError("INT4 codes are made of matrices", got=f"a tensor of shape {list(w.shape)}")
    if group < PER_WORD or group % PER_WORD:
        raise CheckpointError("an INT4 group must be whole words of 8 codes", got=group, allowed="a multiple of 8, as 32")
    if w.shape[-1] % group or not w.numel():
        raise CheckpointError(
            f"rows cannot be split into groups of {group}",
            got=f"shape {list(w.shape)}",
            allowed=f"a last axis that is a multiple of {group}, and no empty axis",
        )


def _check_packed(packed: torch.Tensor, columns: int | None) -> int:
    if packed.dtype != torch.int32 or packed.ndim < 2:
        raise CheckpointError(
            "packed INT4 codes must be int32 with two axes or more", got=f"{packed.dtype}, shape {list(packed.shape)}"
        )
    held = packed.shape[-1] * PER_WORD
    if columns is not None and columns != held:
        raise CheckpointError("packed INT4 codes are of another width", got=f"{held} codes a row", allowed=f"{columns}")
    return held


# ---------------------------------------------------------------- the grid


class _Grid:
    """The rule, block by block of at most `num` rows; with memory that all blocks of a thread share."""

    def __init__(self, w_NI: torch.Tensor, group: int, num: int) -> None:
        self.w_NI, self.group, self.num = w_NI, group, num
        self.codes, self.sizes = self.room(torch.float32), self.room(torch.float32)
        self.rounded = None if w_NI.dtype == torch.bfloat16 else self.room(torch.bfloat16)

    def room(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.num, self.w_NI.shape[1], dtype=dtype, device=self.w_NI.device)

    def __call__(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as fp32 [n, I], which may be -0, in memory that the next block overwrites, and scales bf16 [n, G]."""
        num = rows.stop - rows.start
        x_nI = self.codes[:num]
        x_nI.copy_(self.w_NI[rows] if self.rounded is None else self.rounded[:num].copy_(self.w_NI[rows]))
        x_nGg = x_nI.unflatten(1, (-1, self.group))
        amax = torch.abs(x_nI, out=self.sizes[:num]).unflatten(1, (-1, self.group)).amax(-1)
        # by a tensor: PyTorch's CUDA kernels multiply by the reciprocal of a number, which rounds otherwise
        scales = amax.div(torch.full_like(amax, 7)).to(torch.bfloat16).clamp_(LOWEST, HIGHEST)
        x_nGg.div_(scales.float().unsqueeze(-1))
        x_nI.round_().clamp_(-7, 7)
        unfinite = amax.isfinite().logical_not_()
        # on a GPU asking would wait for it
        if x_nI.device.type != "cpu" or unfinite.any():
            scales.masked_fill_(unfinite, torch.nan)
            x_nGg.masked_fill_(unfinite.unsqueeze(-1), 0)
        return x_nI, scales


def _each(w: torch.Tensor, group: int, then: Callable[[_Grid], Callable[[slice, torch.Tensor, torch.Tensor], None]]) -> None:
    """Puts all rows of w on the grid; what `then` makes of each thread's grid is given rows, codes and scales of every block."""
    w_NI = _rows(w)
    spans = _blocks.spans(len(w_NI), w_NI.shape[1], _GRID_BLOCK, w.device)

    def worker() -> Callable[[slice], None]:
        grid = _Grid(w_NI, group, spans[0].stop)
        take = then(grid)
        return lambda rows: take(rows, *grid(rows))

    _blocks.each(spans, worker)


def _scales_of(w: torch.Tensor, group: int) -> torch.Tensor:
    return torch.empty(*w.shape[:-1], w.shape[-1] // group, dtype=torch.bfloat16, device=w.device)


@torch.no_grad()
def int4_grid(w: torch.Tensor, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [..., O, I] in -7..7 and scales bf16 [..., O, I / group] of weights [..., O, I] of any floating type, by the
    rule above. Raises CheckpointError if rows are no whole groups."""
    _check_weight(w, group)
    if (kernels := _kernels(w)) is not None:
        return kernels.int4_grid(w, group)
    codes, scales = torch.empty(w.shape, dtype=torch.int8, device=w.device), _scales_of(w, group)
    codes_NI, scales_NG = _rows(codes), _rows(scales)

    def then(_: _Grid) -> Callable[[slice, torch.Tensor, torch.Tensor], None]:
        def take(rows: slice, block: torch.Tensor, own: torch.Tensor) -> None:
            codes_NI[rows], scales_NG[rows] = block, own

        return take

    _each(w, group, then)
    return codes, scales


@torch.no_grad()
def values(w: torch.Tensor, group: int = GROUP, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The bf16 values on the grid, as `dtype`, [..., O, I] of weights [..., O, I]: `dequantise(*quantise(w))` without the detour;
    NaN where a group is not finite."""
    _check_weight(w, group)
    if (kernels := _kernels(w)) is not None:
        return kernels.values(w, group, dtype=dtype)
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    out_NI = _rows(out)

    def then(grid: _Grid) -> Callable[[slice, torch.Tensor, torch.Tensor], None]:
        narrow = None if dtype == torch.bfloat16 else grid.room(torch.bfloat16)

        def take(rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
            # + 0 makes -0 a 0, which is all that a code can be
            codes.add_(0.0).unflatten(1, (-1, group)).mul_(scales.float().unsqueeze(-1))
            out_NI[rows] = codes if narrow is None else narrow[: len(codes)].copy_(codes)

        return take

    _each(w, group, then)
    return out


@torch.no_grad()
def quantise(
    w: torch.Tensor, group: int = GROUP, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes int32 [..., O, I / 8] and scales bf16 [..., O, I / group] of weights [..., O, I], in `out` (contiguous) if it
    is given. Raises NumericsError if a weight is not finite, CheckpointError if rows are no whole groups. On a GPU it waits for
    the device."""
    _check_weight(w, group)
    if out is None:
        words = torch.empty(*w.shape[:-1], w.shape[-1] // PER_WORD, dtype=torch.int32, device=w.device)
        out = words, _scales_of(w, group)
    packed, scales = out
    if (kernels := _kernels(w)) is not None:
        kernels.quantise(w, group, out)
    else:
        packed_NW, scales_NG = _rows(packed), _rows(scales)

        def then(grid: _Grid) -> Callable[[slice, torch.Tensor, torch.Tensor], None]:
            codes_nI, pairs = grid.room(torch.int8), _Pairs(grid.num, w.shape[-1], w.device)

            def take(rows: slice, block: torch.Tensor, own: torch.Tensor) -> None:
                pairs.pack(codes_nI[: len(block)].copy_(block), packed_NW[rows])
                scales_NG[rows] = own

            return take

        _each(w, group, then)
    unfinite = scales.isfinite().logical_not_()
    if unfinite.any():
        raise NumericsError(
            "weights that are not finite cannot be written as INT4",
            got=f"{int(unfinite.sum())} groups with NaN or infinity, the first at {unfinite.nonzero()[0].tolist()}",
            next="Go back to a checkpoint from before the weights became NaN or infinite",
        )
    return packed, scales


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, group):
        return values(w, group, w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def fake_quant(w: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """`values` in w's own type, with the straight-through gradient: that of the output, unchanged."""
    return _FakeQuant.apply(w, group)


# ---------------------------------------------------------------- packing


class _Pairs:
    """Packing and unpacking of a block, through int16 that hold two codes each."""

    def __init__(self, num: int, columns: int, device: torch.device) -> None:
        shape = num, columns // 2
        self.first, self.second = (torch.empty(shape, dtype=torch.int16, device=device) for _ in range(2))

    def pack(self, codes_nI: torch.Tensor, out_nW: torch.Tensor) -> None:
        """Codes int8 into words int32."""
        num = len(codes_nI)
        both, high = self.first[:num], self.second[:num]
        torch.bitwise_and(codes_nI.contiguous().view(torch.int16), 0x0F0F, out=both)
        torch.bitwise_right_shift(both, 4, out=high)
        both.bitwise_or_(high)
        # the lower byte now holds both codes in two's complement; + 8 flips the upper bit of each
        out_nW.view(torch.uint8).copy_(both).bitwise_xor_(0x88)

    def unpack(self, packed_nW: torch.Tensor, out_nI: torch.Tensor) -> None:
        """Words int32 into codes int8."""
        pairs = out_nI.view(torch.int16)
        pairs.copy_(packed_nW.contiguous().view(torch.uint8))
        high = torch.bitwise_and(pairs, 0xF0, out=self.first[: len(pairs)])
        pairs.add_(high, alpha=15)  # low + 16 high, and 15 x 16 high more: low + 256 high
        out_nI.sub_(8)


def require_codes(codes: torch.Tensor) -> None:
    """Raises CheckpointError unless all codes are -8 to 7."""
    least, most = codes.aminmax()
    if least < -8 or most > 7:
        raise CheckpointError("INT4 codes must be -8 to 7", got=[int(least), int(most)])


@torch.no_grad()
def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 [..., O, I] in -8..7 -> int32 [..., O, I / 8]. Raises CheckpointError for other widths, and on a CPU for other
    codes; a GPU, which would have to be waited for, takes their four lower bits."""
    if codes.dtype != torch.int8 or codes.ndim < 2 or codes.shape[-1] % PER_WORD or not codes.numel():
        raise CheckpointError(
            "codes to be packed must be int8 with whole words of 8 codes a row", got=f"{codes.dtype}, shape {list(codes.shape)}"
        )
    if (kernels := _kernels(codes)) is not None:
        return kernels.pack(codes)
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // PER_WORD, dtype=torch.int32, device=codes.device)
    codes_NI, packed_NW = _rows(codes), _rows(packed)
    columns, cpu = codes.shape[-1], codes.device.type == "cpu"
    spans = _blocks.spans(len(codes_NI), columns, PACK_BLOCK, codes.device)

    def worker() -> Callable[[slice], None]:
        pairs = _Pairs(spans[0].stop, columns, codes.device)

        def work(rows: slice) -> None:
            if cpu:
                require_codes(codes_NI[rows])
            pairs.pack(codes_NI[rows], packed_NW[rows])

        return work

    _blocks.each(spans, worker)
    return packed


@torch.no_grad()
def unpack(packed: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """int32 [..., O, I / 8] -> codes int8 [..., O, I] in -8..7. Raises CheckpointError if `columns` is given and is not I."""
    columns = _check_packed(packed, columns)
    if (kernels := _kernels(packed)) is not None:
        return kernels.unpack(packed, columns)
    codes = torch.empty(*packed.shape[:-1], columns, dtype=torch.int8, device=packed.device)
    packed_NW, codes_NI = _rows(packed), _rows(codes)
    spans = _blocks.spans(len(packed_NW), columns, PACK_BLOCK, packed.device)

    def worker() -> Callable[[slice], None]:
        pairs = _Pairs(spans[0].stop, columns, packed.device)
        return lambda rows: pairs.unpack(packed_NW[rows], codes_NI[rows])

    _blocks.each(spans, worker)
    return codes


@torch.no_grad()
def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, ...] | torch.Size | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values bf16(code x scale), as `dtype`: packed int32 [..., O, I / 8], scales bf16 [..., O, G] -> [..., O, I], in `out`
    (contiguous, of this type) if it is given.

    `shape` is what the checkpoint says of the whole tensor; CheckpointError if it, or the scales, do not fit the codes.
    """
    columns = _check_packed(packed, None)
    held = (*packed.shape[:-1], columns)
    if shape is not None and tuple(shape) != held:
        raise CheckpointError("packed INT4 codes are of another shape", got=list(held), allowed=str(list(shape)))
    if scales.dtype != torch.bfloat16 or scales.shape[:-1] != packed.shape[:-1] or not scales.shape[-1]:
        raise CheckpointError(
            "INT4 scales do not fit their codes", got=f"{scales.dtype}, shape {list(scales.shape)} for codes of {list(held)}"
        )
    if columns % scales.shape[-1]:
        raise CheckpointError("INT4 groups must be equally long", got=f"{scales.shape[-1]} scales for {columns} codes a row")
    if (kernels := _kernels(packed)) is not None:
        return kernels.dequantise(packed, scales, shape, dtype, out)
    out = torch.empty(held, dtype=dtype, device=packed.device) if out is None else out
    packed_NW, scales_NG, out_NI = _rows(packed), _rows(scales), _rows(out)
    spans = _blocks.spans(len(packed_NW), columns, _GRID_BLOCK, packed.device)

    def worker() -> Callable[[slice], None]:
        shape = spans[0].stop, columns
        pairs, codes = _Pairs(*shape, packed.device), torch.empty(shape, dtype=torch.int8, device=packed.device)
        wide = torch.empty(shape, dtype=torch.float32, device=packed.device)
        narrow = None if dtype == torch.bfloat16 else torch.empty(shape, dtype=torch.bfloat16, device=packed.device)

        def work(rows: slice) -> None:
            num = rows.stop - rows.start
            pairs.unpack(packed_NW[rows], codes[:num])
            x_nI = wide[:num].copy_(codes[:num])
            x_nI.unflatten(1, (scales.shape[-1], -1)).mul_(scales_NG[rows].float().unsqueeze(-1))
            out_NI[rows] = x_nI if narrow is None else narrow[:num].copy_(x_nI)

        return work

    _blocks.each(spans, worker)
    return out
