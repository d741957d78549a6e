"""RMSNorm on CUDA in Triton: one pass over the data each way, sums in fp32. Optional parts: a sigmoid gate, the sum with a second
input before the norm, and the gradient that reaches the sum by another way. Imported on CUDA only.

The weight's gradient is summed by each program over its own rows and then over programs, always in the same order.

Legend: `T` rows (all leading axes), `D` normalised width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

ELEMENTS = 4096  # of a tile, forward
PROGRAMS = 8 * 132  # of the backward pass: what an H100 holds at once


@triton.jit(do_not_specialize=["T"])
def _forward(
    x,
    other,
    total,
    gate,
    weight,
    y,
    scales,
    T,
    x_stride,
    other_stride,
    gate_stride,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    inside = (rows < T) & (columns < D)
    wide = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(other + rows * other_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + rows * D + columns, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / D + eps)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    unit = wide * scale
    if GATE:
        z = tl.load(gate + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        out = w * unit * tl.sigmoid(z)
    else:
        out = w * unit.to(y.dtype.element_ty).to(tl.float32)  # rounded before the weight, as in transformers
    tl.store(y + rows * D + columns, out.to(y.dtype.element_ty), mask=inside)
    tl.store(scales + rows, scale, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _backward(
    grad,
    grad2,
    grad3,
    extra,
    x,
    gate,
    weight,
    scales,
    grad_x,
    grad_gate,
    sums,
    T,
    grad_stride,
    grad2_stride,
    grad3_stride,
    extra_stride,
    x_stride,
    gate_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRADS: tl.constexpr,
    EXTRA: tl.constexpr,
    GATE: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)[None, :]
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (rows < T) & (columns < D)
        scale = tl.load(scales + rows, mask=rows < T, other=0.0)
        unit = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
        through = tl.load(grad + rows * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 1:
            through += tl.load(grad2 + rows * grad2_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 2:
            through += tl.load(grad3 + rows * grad3_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            share = tl.sigmoid(tl.load(gate + rows * gate_stride + columns, mask=inside, other=0.0).to(tl.float32))
            of_gate = through * w * unit * share * (1 - share)
            tl.store(grad_gate + rows * D + columns, of_gate.to(grad_gate.dtype.element_ty), mask=inside)
            through *= share
        weight_grad += through * unit
        through *= w
        mean = tl.sum(through * unit, 1, keep_dims=True) / D
        out = (through - unit * mean) * scale
        if EXTRA:
            out += tl.load(extra + rows * extra_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + rows * D + columns, out.to(grad_x.dtype.element_ty), mask=inside)
    places = tl.arange(0, WIDTH)
    tl.store(sums + tl.program_id(0) * D + places, tl.sum(weight_grad, 0), mask=places < D)


@triton.jit
def _sum(a, b, c, out, total, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < total
    value = tl.load(a + at, mask=inside).to(tl.float32) + tl.load(b + at, mask=inside).to(tl.float32)
    value += tl.load(c + at, mask=inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def sum_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a + b + c in fp32, rounded once; of one shape, contiguous."""
    out = torch.empty_like(a)
    _sum[(triton.cdiv(a.numel(), 4096),)](a, b, c, out, a.numel(), SIZE=4096, num_warps=8)
    return out


def _shape(D: int, elements: int) -> tuple[int, int, int]:
    """(rows, width, warps) of a tile of about this many elements."""
    width = triton.next_power_of_2(D)
    rows = max(1, elements // width)
    return rows, width, max(1, min(16, rows * width // 512))


def forward(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    other_TD: torch.Tensor | None = None,
    gate_TD: torch.Tensor | None = None,
    elements: int = ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y [T, D], the normalised sum x + other, rounded, or x [T, D], 1 / root mean square [T]); rows may be strided."""
    T, D = x_TD.shape
    y = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    total = x_TD if other_TD is None else torch.empty_like(y)
    scales = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    other, gate = (x_TD if part is None else part for part in (other_TD, gate_TD))
    rows, width, warps = _shape(D, elements)
    _forward[(triton.cdiv(T, rows),)](
        x_TD,
        other,
        total,
        gate,
        weight_D,
        y,
        scales,
        T,
        x_TD.stride(0),
        other.stride(0),
        gate.stride(0),
        eps,
        D=D,
        ROWS=rows,
        WIDTH=width,
        ADD=other_TD is not None,
        GATE=gate_TD is not None,
        num_warps=warps,
    )
    return y, total, scales


def gradients(
    grads_TD: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    scales_T: torch.Tensor,
    gate_TD: torch.Tensor | None = None,
    extra_TD: torch.Tensor | None = None,
    elements: int | None = None,
    programs: int = PROGRAMS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx + extra [T, D], dw [D], dgate [T, D] or None) from dy, the sum of one to three `grads_TD`; `x_TD` is what was
    normalised, `scales_T` as in `forward`."""
    assert 1 <= len(grads_TD) <= 3
    T, D = x_TD.shape
    rows, width, warps = _shape(D, elements or (4096 if D > 1024 else 2048))
    programs = min(programs, triton.cdiv(T, rows))
    grad_x = torch.empty((T, D), dtype=x_TD.dtype, device=x_TD.device)
    grad_gate = None if gate_TD is None else torch.empty((T, D), dtype=gate_TD.dtype, device=x_TD.device)
    sums = torch.empty((programs, D), dtype=torch.float32, device=x_TD.device)
    extra, gate = (x_TD if part is None else part for part in (extra_TD, gate_TD))
    grads = [*grads_TD, *[grads_TD[0]] * (3 - len(grads_TD))]
    _backward[(programs,)](
        *grads,
        extra,
        x_TD,
        gate,
        weight_D,
        scales_T,
        grad_x,
        grad_x if grad_gate is None else grad_gate,
        sums,
        T,
        *(grad.stride(0) for grad in grads),
        extra.stride(0),
        x_TD.stride(0),
        gate.stride(0),
        D=D,
        ROWS=rows,
        WIDTH=width,
        GRADS=len(grads_TD),
        EXTRA=extra_TD is not None,
        GATE=gate_TD is not None,
        num_warps=warps,
    )
    return grad_x, sums.sum(0).to(weight_D.dtype), grad_gate
