"""Frozen experts on a CUDA device in bf16, forward and backward, without waiting for the device: `packed.frozen_experts` at the
speed of `experts_gpu`. Weights are bf16 or INT4 codes; low-rank terms of gate, up and down beside them.

Rows are sorted, multiplied and summed as in `experts_gpu`. Frozen weights have no gradient, so a step has two thirds of the
products of full training. A low-rank term is narrow on one side: its inner rows (A x, B^T dy) and the sums that give the
gradients of A and B take as long as reading the rows, and its outer side adds columns to the sum of the large product
(`kernels.packed_gluon`), so that no wide tensor is written twice.

INT4 codes are multiplied in one of two ways, with the same bits: decoded inside the product, tile by tile, with no decoded matrix
in memory; or decoded into a buffer that all layers share, as many experts at a time as fit `SCRATCH` bytes, which costs one pass
over the matrix and then has the bf16 product's speed. The second is taken where an expert has `MANY` rows or more on average: on
an H100 decoding in tiles takes 0.8 to 0.9 times as long at 256 rows and 1.6 times at 4,096, where the decoding warps, and no
longer the tensor cores, set the pace.

On GPUs other than Hopper, and for widths that are no multiples of 128, the layer is decoded and torch's `grouped_mm` multiplies.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` choices, `R` aligned rows, `W` columns of a result, `C`
summed-over columns, `P` columns of a low-rank term, `r` rank. Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from k2lab.models import experts_gpu
from k2lab.models.experts_gpu import ALIGN, Route, combine, route, spread

if TYPE_CHECKING:
    from k2lab.models.packed import Dense, ExpertLoRA, Packed

NT, NN, PAIR = 0, 1, 3  # what is multiplied, as in `kernels.packed_gluon`
GROUP = 32  # weights of a scale that the kernels know
WIDEST = 128  # columns of a low-rank term: 2 r for gate and up together
MANY = 384  # rows per expert from which on decoding a layer beforehand pays
SCRATCH = 1 << 30  # bytes of the shared buffer at most


# ---------------------------------------------------------------- what runs where


def obstacle(x_TD: torch.Tensor, base: Packed | Dense, lora: ExpertLoRA | None) -> str | None:
    """Why `experts` cannot run on these tensors, or None if it can."""
    if not experts_gpu.works(x_TD.device):
        return "they need a CUDA device with triton"
    if torch.cuda.get_device_capability(x_TD.device) < (9, 0):
        return "they need compute capability 9.0 or more"
    if x_TD.dtype != torch.bfloat16:
        return f"they take bfloat16, not {x_TD.dtype}"
    up, down = _matrices(base)
    if not all(tensor.is_contiguous() for tensor in base):
        return "the weights are not contiguous"
    for matrix in (up, down):
        if matrix.scales is None and matrix.data.dtype != torch.bfloat16:
            return f"they take bfloat16 weights, not {matrix.data.dtype}"
        if matrix.scales is not None and matrix.data.shape[2] * 8 != matrix.scales.shape[2] * GROUP:
            return f"they take INT4 in groups of {GROUP}"
        if matrix.rows % 8 or matrix.columns % 8:
            return f"widths must be multiples of 8, and are {matrix.rows} and {matrix.columns}"
    if lora is not None and lora.gate_A.shape[1] + lora.up_A.shape[1] > WIDEST:
        return f"they take ranks to {WIDEST // 2}, not {lora.gate_A.shape[1]}"
    if lora is not None and lora.down_A.shape[1] > WIDEST:
        return f"they take ranks to {WIDEST}, not {lora.down_A.shape[1]}"
    return None


@dataclass(frozen=True)
class _Matrix:
    """bf16 weights [E, rows, columns], or INT4 codes int32 [E, rows, columns / 8] with their scales."""

    data: torch.Tensor
    scales: torch.Tensor | None

    @property
    def rows(self) -> int:
        return self.data.shape[1]

    @property
    def columns(self) -> int:
        return self.data.shape[2] * (1 if self.scales is None else 8)

    def dense(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """bf16 [last - first, rows, columns] of these experts; decoded into the shared buffer, so valid until the next call on
        this stream."""
        part = self.data[first:last]
        if self.scales is None:
            return part
        from k2lab.quant import _int4_triton

        shape = len(part), self.rows, self.columns
        out = _scratch(part.device, math.prod(shape)).view(shape)
        return _int4_triton.dequantise(part, self.scales[first:last], out=out)

    def spans(self, num_slots: int) -> list[tuple[int, int]]:
        """(first expert, last + 1) of the parts that are decoded and multiplied one after the other; none if codes are to be
        decoded inside the product."""
        E = len(self.data)
        if self.scales is None:
            return [(0, E)]
        if num_slots < MANY * E:
            return []
        parts = -(-E // max(1, SCRATCH // (2 * self.rows * self.columns)))
        return [(n * E // parts, (n + 1) * E // parts) for n in range(parts)]


def _matrices(base: Packed | Dense) -> tuple[_Matrix, _Matrix]:
    """Gate and up; down."""
    if len(base) == 4:
        return _Matrix(base[0], base[1]), _Matrix(base[2], base[3])
    return _Matrix(base[0], None), _Matrix(base[1], None)


_buffers: dict[tuple[int, int], torch.Tensor] = {}


def _scratch(device: torch.device, numel: int) -> torch.Tensor:
    """bf16 [numel], the same memory in every call on a stream; what is larger than `SCRATCH` (a whole layer for torch's grouped
    products, or a single expert) is not kept."""
    if 2 * numel > SCRATCH:
        return torch.empty(numel, dtype=torch.bfloat16, device=device)
    key = (torch.cuda.current_device() if device.index is None else device.index, torch.cuda.current_stream(device).cuda_stream)
    held = _buffers.get(key)
    if held is None or len(held) < numel:
        _buffers.pop(key, None)
        held = _buffers[key] = torch.empty(numel, dtype=torch.bfloat16, device=device)
    return held[:numel]


# ---------------------------------------------------------------- low-rank terms


@dataclass(frozen=True)
class _Low:
    """scale B A of every expert with A [E, P, C] and B [E, O, P] in bf16; P is a power of two, columns beyond the rank are 0."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def inner(self, rows: torch.Tensor, at: Route, gather: bool = False) -> torch.Tensor:
        """scale A x of rows [R, C], or of the rows' tokens [T, C]; [R, P]."""
        return _inner(rows, self.A, at, self.scale, along=False, gather=gather)

    def inner_grad(self, grad_RO: torch.Tensor, at: Route) -> torch.Tensor:
        """scale B^T dy, [R, P]."""
        return _inner(grad_RO, self.B, at, self.scale, along=True)


def _terms(factors: tuple[torch.Tensor, ...], scale: float) -> tuple[_Low, _Low]:
    """Of gate and up, whose inner rows lie side by side, and of down."""
    gate_A, gate_B, up_A, up_B, down_A, down_B = (factor.detach() for factor in factors)
    E, g, D = gate_A.shape
    u, d, F = up_A.shape[1], down_A.shape[1], gate_B.shape[1]
    new = {"dtype": torch.bfloat16, "device": gate_A.device}
    P = _columns(g + u)
    A, B = torch.zeros(E, P, D, **new), torch.zeros(E, 2 * F, P, **new)
    A[:, :g], A[:, g : g + u], B[:, :F, :g], B[:, F:, g : g + u] = gate_A, up_A, gate_B, up_B
    P = _columns(d)
    down = torch.zeros(E, P, F, **new), torch.zeros(E, D, P, **new)
    down[0][:, :d], down[1][:, :, :d] = down_A, down_B
    return _Low(A, B, scale), _Low(*down, scale)


def _columns(rank: int) -> int:
    """Columns of a low-rank term: whole steps of the products."""
    return max(64, 1 << (rank - 1).bit_length())


def _inner(rows: torch.Tensor, factors: torch.Tensor, at: Route, scale: float, along: bool, gather: bool = False) -> torch.Tensor:
    from k2lab.models.kernels import packed_triton as kernels

    P, C = (factors.shape[2], factors.shape[1]) if along else factors.shape[1:]
    low_RP = rows.new_empty(at.num_rows, P)
    kernels.inner_kernel[(len(at.expert_M),)](
        rows, factors, low_RP, at.expert_M, at.token_R, scale, C, at.num_experts, P, gather, along, ALIGN, 64,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return low_RP


def _sums(
    low_RP: torch.Tensor, rows: torch.Tensor, at: Route, dtype: torch.dtype, along: bool, gather: bool = False
) -> torch.Tensor:
    """Sum over each expert's rows of low^T row [E, P, C], or (`along`) of row^T low [E, C, P]."""
    from k2lab.models.kernels import packed_triton as kernels

    P, C, E = low_RP.shape[1], rows.shape[1], at.num_experts
    out = torch.empty((E, C, P) if along else (E, P, C), dtype=dtype, device=rows.device)
    kernels.sums_kernel[(E, -(-C // 128))](
        low_RP, rows, out, at.token_R, at.ends_E, C, P, gather, along, 64, 128, num_warps=4, num_stages=4
    )
    return out


# ---------------------------------------------------------------- products


def _product(
    a: torch.Tensor, matrix: _Matrix, at: Route, mode: int, low: torch.Tensor | None, factors: torch.Tensor | None,
    out: torch.Tensor, act: torch.Tensor | None = None, weight_N: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Runs `kernels.packed_gluon.product_kernel`; see there."""
    from k2lab.models.kernels import packed_gluon as kernels

    gather, tiles = mode == PAIR, experts_gpu._tiles
    W, C = {NT: (matrix.rows, matrix.columns), NN: (matrix.columns, matrix.rows), PAIR: (matrix.rows // 2, matrix.columns)}[mode]
    wide = 256 if mode == PAIR or W % 256 == 0 else 128
    shape = {NT: (wide, 64), NN: (64, wide), PAIR: (wide // 2, 64)}[mode]
    # Without a low-rank term its descriptors are of tensors that are never read.
    P = 0 if low is None else low.shape[1]
    out_tiles, sms = tiles(out, 64, 64), experts_gpu._sms(out.device.index)
    low_tiles = tiles(out if low is None else low, 128, 64)
    factor_tiles = tiles(out if factors is None else factors.view(-1, factors.shape[2]), *shape)
    a = a if gather else tiles(a, 128, 64)
    act_tiles, weight_N = out_tiles if act is None else tiles(act, 64, 64), at.slot_R if weight_N is None else weight_N
    spans = matrix.spans(len(at.row_N))
    for first, last in spans or [(0, at.num_experts)]:
        b = tiles(matrix.dense(first, last).view(-1, matrix.columns), *shape) if spans else matrix.data
        scales = at.slot_R if spans else matrix.scales.view(torch.int16)
        kernels.product_kernel[(sms,)](
            a, b, scales, low_tiles, factor_tiles, out_tiles, act_tiles,
            at.expert_M, at.ends_E, at.token_R, at.slot_R, weight_N, W, C, P, first, last,
            8, sms, mode, gather, not spans, wide, 3 if wide == 256 else 4, experts_gpu._layout(), num_warps=4,
        )  # fmt: skip


def _up_swiglu(
    x: torch.Tensor, up: _Matrix, weight_N: torch.Tensor, at: Route, low: torch.Tensor | None, B: torch.Tensor | None, fast: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate and up of the tokens [R, 2F], weight x silu(gate) x up [R, F])."""
    if not fast:
        pre = experts_gpu._grouped_mm(spread(x, at), up.dense().transpose(1, 2), at.ends_E)
        if low is not None:
            pre += experts_gpu._grouped_mm(low, B.transpose(1, 2), at.ends_E)
        return pre, experts_gpu._swiglu(pre, weight_N, at)
    pre, act = x.new_empty(at.num_rows, up.rows), x.new_empty(at.num_rows, up.rows // 2)
    _product(x, up, at, PAIR, low, B, pre, act, weight_N)
    return pre, act


def _rows(
    a: torch.Tensor, matrix: _Matrix, at: Route, transposed: bool, low: torch.Tensor | None, factors: torch.Tensor | None,
    fast: bool,
) -> torch.Tensor:  # fmt: skip
    """W a[r] + factors low[r] with the expert's W [O, C] (`transposed`), else W^T a[r] with W [C, O]; [R, O]."""
    if not fast:
        weights = matrix.dense()
        out = experts_gpu._grouped_mm(a, weights.transpose(1, 2) if transposed else weights, at.ends_E)
        if low is not None:
            out += experts_gpu._grouped_mm(low, factors.transpose(1, 2) if transposed else factors, at.ends_E)
        return out
    out = a.new_empty(at.num_rows, matrix.rows if transposed else matrix.columns)
    _product(a, matrix, at, NT if transposed else NN, low, factors, out)
    return out


# ---------------------------------------------------------------- the layer


class FrozenExpertsGPU(torch.autograd.Function):
    """Sum over a token's chosen experts of weight * expert(token). x [T, D], chosen i64[T, K], weights [T, K] -> [T, D].
    `factors` are those of a `packed.ExpertLoRA`, or none."""

    @staticmethod
    def forward(ctx, x, chosen, weights, base, scale, *factors):
        up, down = _matrices(base)
        at, weight_N, x = route(chosen, len(down.data)), weights.reshape(-1), x.contiguous()
        ctx.fast = experts_gpu.fast(x, torch.empty(0, down.rows, down.columns, device="meta"))
        low, low_down, B, B_down = None, None, None, None
        if factors:
            term, term_down = _terms(factors, scale)
            B, B_down = term.B, term_down.B
            low = term.inner(x, at, gather=True)
        pre, act = _up_swiglu(x, up, weight_N, at, low, B, ctx.fast)
        if factors:
            low_down = term_down.inner(act, at)
        rows = _rows(act, down, at, True, low_down, B_down, ctx.fast)
        kept = (*factors, low, low_down) if factors else ()
        ctx.save_for_backward(x, pre, weights, *at.tensors, *kept)
        ctx.rest = base, scale, at.top_k
        return combine(rows, at)

    @staticmethod
    def backward(ctx, grad):
        base, scale, top_k = ctx.rest
        x, pre, weights, *rest = ctx.saved_tensors
        at, factors, lows = Route(*rest[:6], top_k), rest[6:12], rest[12:]
        up, down = _matrices(base)
        grad_rows = spread(grad.contiguous(), at)
        if not factors:
            grad_act = _rows(grad_rows, down, at, False, None, None, ctx.fast)
            del grad_rows
            grad_pre, _, grad_weight_N = experts_gpu._swiglu_grad(grad_act, pre, weights.reshape(-1), at)
            del grad_act, pre
            grad_x = combine(_rows(grad_pre, up, at, False, None, None, ctx.fast), at) if ctx.needs_input_grad[0] else None
            return grad_x, None, grad_weight_N.to(weights.dtype).view(weights.shape), None, None
        term, term_down = _terms(factors, scale)
        low, low_down = lows
        inner = term_down.inner_grad(grad_rows, at)
        grad_act = _rows(grad_rows, down, at, False, inner, term_down.A, ctx.fast)
        grad_pre, act, grad_weight_N = experts_gpu._swiglu_grad(grad_act, pre, weights.reshape(-1), at)
        del grad_act, pre
        g, u, d, F = factors[0].shape[1], factors[2].shape[1], factors[4].shape[1], down.columns
        grad_down_A = _sums(inner, act, at, factors[4].dtype, along=False)[:, :d]
        grad_down_B = _sums(low_down, grad_rows, at, factors[5].dtype, along=True)[:, :, :d]
        del grad_rows, act, inner
        inner = term.inner_grad(grad_pre, at)
        grad_A = _sums(inner, x, at, factors[0].dtype, along=False, gather=True)
        grad_B = _sums(low, grad_pre, at, factors[1].dtype, along=True)
        grad_x = combine(_rows(grad_pre, up, at, False, inner, term.A, ctx.fast), at) if ctx.needs_input_grad[0] else None
        grads = (
            grad_A[:, :g], grad_B[:, :F, :g], grad_A[:, g : g + u], grad_B[:, F:, g : g + u], grad_down_A, grad_down_B,
        )  # fmt: skip
        return grad_x, None, grad_weight_N.to(weights.dtype).view(weights.shape), None, None, *(q.contiguous() for q in grads)


def experts(
    x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, base: Packed | Dense, lora: ExpertLoRA | None
) -> torch.Tensor:
    """Sum over each token's chosen experts of weight x expert(token), [T, D]; ids outside [0, E) add nothing. See `obstacle`."""
    factors, scale = (lora.factors, lora.scale) if lora is not None else ((), 0.0)
    return FrozenExpertsGPU.apply(x_TD, chosen_TK, weights_TK, base, scale, *factors)
