"""The functions of `int4` for tensors on a CPU, equal to them bit for bit, by numba's loops: every weight, word and scale is read
or written once. Needs numba.

Legend: `N` rows of all leading axes, `I` columns, `W` words of 8 codes, `G` groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from k2lab.quant import _blocks, _loops, compiled, int4

BF16 = torch.bfloat16


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _spans(tensor_NI: torch.Tensor, columns: int, elements: int = compiled.BLOCK) -> list[slice]:
    return _blocks.spans(len(tensor_NI), columns, elements, tensor_NI.device)


def _grid(w: torch.Tensor, group: int, out: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns, packed = w.shape[-1], out.dtype == torch.int32
    w_NI, out_N, scales_NG = _rows(w), _rows(out), _rows(scales)
    spans, loop = _spans(w_NI, columns), _loops.int4_packed if packed else _loops.int4_codes

    def worker() -> Callable[[slice], None]:
        num = spans[0].stop
        read = compiled.reader(w_NI, BF16, num)
        codes_of, scales_of = compiled.reader(out_N, out.dtype, num), compiled.reader(scales_NG, BF16, num)
        return lambda rows: loop(read(rows), codes_of(rows), scales_of(rows), rows.stop - rows.start, columns, group)

    _blocks.each(spans, worker)
    return out, scales


def int4_grid(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 and scales."""
    return _grid(w, group, torch.empty(w.shape, dtype=torch.int8), torch.empty(*w.shape[:-1], w.shape[-1] // group, dtype=BF16))


def quantise(w: torch.Tensor, group: int, out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales, in `out`."""
    return _grid(w, group, *out)


def values(w: torch.Tensor, group: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """The bf16 values on the grid, as `dtype`."""
    out = torch.empty(w.shape, dtype=dtype)
    w_NI, out_NI, columns = _rows(w), _rows(out), w.shape[-1]
    spans = _spans(w_NI, columns)

    def worker() -> Callable[[slice], None]:
        read = compiled.reader(w_NI, BF16, spans[0].stop)
        write, written = compiled.writer(out_NI, BF16, spans[0].stop)

        def work(rows: slice) -> None:
            _loops.int4_values(read(rows), write(rows), rows.stop - rows.start, columns, group)
            written(rows)

        return work

    _blocks.each(spans, worker)
    return out


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 -> int32. Raises CheckpointError for codes that are not -8 to 7."""
    packed = torch.empty(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int32)
    codes_NI, packed_NW = _rows(codes), _rows(packed)
    spans = _spans(codes_NI, codes.shape[-1], int4.PACK_BLOCK)

    def worker() -> Callable[[slice], None]:
        read = compiled.reader(codes_NI, torch.int8, spans[0].stop)
        words_of = compiled.reader(packed_NW, torch.int32, spans[0].stop)

        def work(rows: slice) -> None:
            if not _loops.int4_pack(read(rows), words_of(rows)):
                int4.require_codes(codes_NI[rows])

        return work

    _blocks.each(spans, worker)
    return packed


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """int32 -> codes int8."""
    codes = torch.empty(*packed.shape[:-1], columns, dtype=torch.int8)
    packed_NW, codes_NI = _rows(packed), _rows(codes)
    spans = _spans(packed_NW, columns, int4.PACK_BLOCK)

    def worker() -> Callable[[slice], None]:
        read = compiled.reader(packed_NW, torch.int32, spans[0].stop)
        codes_of = compiled.reader(codes_NI, torch.int8, spans[0].stop)
        return lambda rows: _loops.int4_unpack(read(rows), codes_of(rows))

    _blocks.each(spans, worker)
    return codes


def dequantise(
    packed: torch.Tensor,
    scales: torch.Tensor,
    shape: tuple[int, ...] | torch.Size | None = None,
    dtype: torch.dtype = BF16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The values, as `dtype`, in `out` if it is given."""
    columns = packed.shape[-1] * 8
    out = torch.empty(*packed.shape[:-1], columns, dtype=dtype) if out is None else out
    packed_NW, scales_NG, out_NI = _rows(packed), _rows(scales), _rows(out)
    spans = _spans(packed_NW, columns)

    def worker() -> Callable[[slice], None]:
        num, groups = spans[0].stop, scales.shape[-1]
        words_of, scales_of = compiled.reader(packed_NW, torch.int32, num), compiled.reader(scales_NG, BF16, num)
        write, written = compiled.writer(out_NI, BF16, num)

        def work(rows: slice) -> None:
            _loops.int4_dequantise(words_of(rows), scales_of(rows), write(rows), rows.stop - rows.start, columns, groups)
            written(rows)

        return work

    _blocks.each(spans, worker)
    return out
