"""`fp8_grid` and `dequantise` of `fp8` for tensors on a CPU, equal to them bit for bit, by numba's loops. Needs numba.

Legend: `B` leading axes taken as one, `O` rows, `I` columns, `o` and `b` blocks of rows and of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from k2lab.quant import _blocks, _loops, compiled
from k2lab.quant.fp8 import Band, bands

NATIVE = (torch.bfloat16, torch.float32)  # types that the loops read and write; others pass through fp32, band by band
_BITS = {torch.bfloat16: (np.uint16, np.uint16(0x7FFF)), torch.float32: (np.uint32, np.uint32(0x7FFFFFFF))}


def _stack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, *tensor.shape[-2:])


def fp8_grid(w: torch.Tensor, block: int, out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale_inv, in `out`."""
    codes, scales = out
    w_BOI, codes_BOI, scales_Bob = _stack(w), _stack(codes), _stack(scales)
    columns, num = w.shape[-1], min(block, w.shape[-2])
    dtype = w.dtype if w.dtype in NATIVE else torch.float32

    def worker() -> Callable[[Band], None]:
        room = None if w.dtype == dtype and w_BOI.is_contiguous() else torch.empty(num, columns, dtype=dtype)

        def work(band: Band) -> None:
            batch, rows, index = band
            x = w_BOI[batch, rows]
            x = x if room is None else room[: len(x)].copy_(x)
            codes_to, scales_b = compiled.array(codes_BOI[batch, rows]), compiled.array(scales_Bob[batch, index])
            bits, mask = _BITS[dtype]
            _loops.fp8_band(compiled.array(x).view(bits), mask, codes_to, scales_b, len(x), columns, block)

        return work

    _blocks.each(bands(w.shape, block), worker)
    return codes, scales


def dequantise(codes: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: int, out: torch.Tensor) -> torch.Tensor:
    """code x scale_inv in fp32, then `dtype`, in `out`."""
    codes_BOI, scales_Bob, out_BOI = _stack(codes).contiguous(), _stack(scale_inv).contiguous(), _stack(out)
    columns, num = codes.shape[-1], min(block, codes.shape[-2])

    def worker() -> Callable[[Band], None]:
        room = None if dtype in NATIVE else torch.empty(num, columns, dtype=torch.float32)

        def work(band: Band) -> None:
            batch, rows, index = band
            own = out_BOI[batch, rows]
            to = own if room is None else room[: len(own)]
            taken, scales_b = compiled.array(codes_BOI[batch, rows]), compiled.array(scales_Bob[batch, index])
            _loops.fp8_dequantise(taken, scales_b, compiled.array(to), len(own), columns, block)
            if room is not None:
                own.copy_(to)

        return work

    _blocks.each(bands(codes.shape, block), worker)
    return out
