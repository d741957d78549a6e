"""`fp8_grid` and `dequantise` of `fp8` for CUDA tensors, equal to them bit for bit: one read, one write. Imported on CUDA devices
only, since it needs triton; codes are made on devices of compute capability 8.9 or more.

Legend: `B` leading axes taken as one, `O` rows, `I` columns, `o` and `i` blocks of rows and of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST, HIGHEST = tl.constexpr(2.0**-126), tl.constexpr(9586980 * 2.0**96)  # of scales
LARGEST = tl.constexpr(448.0)
ROWS = 32  # that a program makes values of


def obstacle(tensor: torch.Tensor, block: int) -> str | None:
    """Why the kernels cannot run, or None if they can."""
    if torch.cuda.get_device_capability(tensor.device) < (8, 9):
        return "they need compute capability 8.9 or more"
    if block % ROWS or block & (block - 1) or block > 256:
        return f"they take blocks of 32, 64, 128 or 256, not {block}"
    return None


@triton.jit
def grid_kernel(w_BOI, codes_BOI, scales_Boi, rows, columns, blocks_o, blocks_i, BLOCK: tl.constexpr):
    """A block a program."""
    pid = tl.program_id(0)
    i, o, b = pid % blocks_i, pid // blocks_i % blocks_o, (pid // blocks_i // blocks_o).to(tl.int64)
    row, column = o * BLOCK + tl.arange(0, BLOCK), i * BLOCK + tl.arange(0, BLOCK)
    at = (b * rows + row.to(tl.int64)[:, None]) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(w_BOI + at, mask=mask, other=0.0).to(tl.float32)
    top = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)  # a NaN is the largest of all
    unfinite = top >= 0x7F800000
    amax = tl.full([1], 0.0, tl.float32) + tl.where(unfinite, 0, top).to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.maximum(tl.div_rn(amax, tl.full([1], LARGEST, tl.float32)), LOWEST), HIGHEST)
    scale = tl.where(amax == 0, 1.0, scale)
    x = tl.where(unfinite, 0.0, x)
    x = tl.minimum(tl.maximum(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), -LARGEST), LARGEST)
    tl.store(codes_BOI + at, x.to(tl.float8e4nv), mask=mask)
    tl.store(scales_Boi + pid + tl.arange(0, 1), tl.where(unfinite, float("nan"), scale))


@triton.jit
def dequantise_kernel(
    codes_BOI, scales_Boi, out_BOI, rows, columns, tiles_o, blocks_o, blocks_i, BLOCK: tl.constexpr, BO: tl.constexpr
):
    """BO rows of a block a program; code x scale in fp32, stored as out's type."""
    pid = tl.program_id(0)
    i, tile, b = pid % blocks_i, pid // blocks_i % tiles_o, (pid // blocks_i // tiles_o).to(tl.int64)
    row, column = tile * BO + tl.arange(0, BO), i * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scales_Boi + (b * blocks_o + tile * BO // BLOCK) * blocks_i + i)
    at = (b * rows + row.to(tl.int64)[:, None]) * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(codes_BOI + at, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(out_BOI + at, value.to(out_BOI.dtype.element_ty), mask=mask)


def fp8_grid(w: torch.Tensor, block: int, out: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale_inv, in `out`."""
    w = (w if w.dtype in (torch.bfloat16, torch.float16, torch.float32) else w.float()).contiguous()
    rows, columns = w.shape[-2:]
    blocks_o, blocks_i = triton.cdiv(rows, block), triton.cdiv(columns, block)
    codes, scales = out
    with torch.cuda.device_of(w):
        grid_kernel[(scales.numel(),)](w, codes, scales, rows, columns, blocks_o, blocks_i, block, num_warps=16)
    return codes, scales


def dequantise(codes: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: int, out: torch.Tensor) -> torch.Tensor:
    """code x scale_inv in fp32, then `dtype`, in `out`."""
    codes, scale_inv = codes.contiguous(), scale_inv.contiguous()
    rows, columns = codes.shape[-2:]
    blocks_o, blocks_i = scale_inv.shape[-2:]
    tiles_o = triton.cdiv(rows, ROWS)
    with torch.cuda.device_of(codes):
        dequantise_kernel[(codes.shape[:-2].numel() * tiles_o * blocks_i,)](
            codes, scale_inv, out, rows, columns, tiles_o, blocks_o, blocks_i, block, ROWS
        )
    return out
