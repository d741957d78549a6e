"""The mixture's experts on a CUDA device in bf16, forward and backward, without waiting for the device.

Slots (token, choice) are sorted by expert by counting; each expert's rows are aligned to `ALIGN`. Gate and up read the tokens
where they lie and end with SwiGLU; the router's weight multiplies the activation before the down product, so that a token's
output is the plain sum of its K rows, and the weight's gradient is <gradient, activation>. The backward pass keeps x, the
pre-activations and the rows' order. All sums run in a fixed order: results are the same in every run.

On Hopper with widths that are multiples of 128 the products are those of `kernels.experts_gluon`, elsewhere torch's `grouped_mm`.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` choices, `R` aligned rows, `N` = T x K slots, `B` blocks
of slots, `M` tiles of rows, `C` summed-over columns. Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from k2lab.models import slower
from k2lab.models.gemm import room, sum_grad_weight

ALIGN = 128  # rows of a tile
MANY = 1024  # tokens from which on an MLP's fused path pays; it copies gate and up into one matrix
NT, NN, TN, PAIR = 0, 1, 2, 3  # what is multiplied, and
STORE, ADD, SWIGLU = 0, 1, 2  # what is done with the result, as in `kernels.experts_gluon`
GROUPED_MM = "torch's grouped_mm multiplies, which is slower"


# ---------------------------------------------------------------- what runs where


@slower.or_none("triton", "experts, router and MLP take slower paths on this GPU")
def _triton() -> ModuleType:
    import triton

    return triton


@cache
def works(device: torch.device) -> bool:
    """True if Triton kernels run on the device; says once on a CUDA device that they do not."""
    return device.type == "cuda" and _triton() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def obstacle(x_TD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> str | None:
    """Why `experts` cannot run on these tensors, or None if it can."""
    if not works(x_TD.device):
        return "they need a CUDA device with triton"
    if torch.cuda.get_device_capability(x_TD.device) < (9, 0):
        return "they need compute capability 9.0 or more"
    if not x_TD.dtype == gate_up.dtype == down.dtype == torch.bfloat16:
        return f"they take bfloat16, not {x_TD.dtype} with {gate_up.dtype} weights"
    if down.shape[1] % 8 or down.shape[2] % 8:
        return f"widths must be multiples of 8, and are {down.shape[1]} and {down.shape[2]}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return "the weights are not contiguous"
    return None


# An older triton lacks what the module names at its import.
@slower.or_none("what the fused experts need of triton", GROUPED_MM, (ImportError, AttributeError))
def _gluon() -> ModuleType:
    from k2lab.models.kernels import experts_gluon

    return experts_gluon


def fast(x_TD: torch.Tensor, down: torch.Tensor) -> bool:
    """True if our own products run: a Hopper GPU, and both widths multiples of 128."""
    if torch.cuda.get_device_capability(x_TD.device)[0] != 9:
        slower.say("the fused experts are written for Hopper GPUs, and this is none", GROUPED_MM)
        return False
    if down.shape[1] % 128 or down.shape[2] % 128:
        slower.say(f"the experts' widths {down.shape[1]} and {down.shape[2]} are not both multiples of 128", GROUPED_MM)
        return False
    return _gluon() is not None


# ---------------------------------------------------------------- sorting and moving rows


@dataclass(frozen=True)
class Route:
    """Where the rows are: slot_R i32 (-1: filled up), token_R i32 (0: filled up), row_N i32 (-1: no expert here), ends_E i32
    aligned ends, expert_M i32 of every tile of ALIGN rows, upto_EB i32 running counts per block of slots."""

    slot_R: torch.Tensor
    token_R: torch.Tensor
    row_N: torch.Tensor
    ends_E: torch.Tensor
    expert_M: torch.Tensor
    upto_EB: torch.Tensor
    top_k: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slot_R, self.token_R, self.row_N, self.ends_E, self.expert_M, self.upto_EB

    @property
    def num_experts(self) -> int:
        return len(self.ends_E)

    @property
    def num_rows(self) -> int:
        return len(self.slot_R)

    def counts(self) -> torch.Tensor:
        """Tokens per expert, i32[E]."""
        return self.upto_EB[:, -1]


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def route(chosen_TK: torch.Tensor, num_experts: int) -> Route:
    """Sorts the slots of i64[T, K] by expert, stably; ids outside [0, num_experts) get no row."""
    from k2lab.models.kernels import experts_triton as kernels

    ids_N, top_k, E = chosen_TK.reshape(-1), chosen_TK.shape[1], num_experts
    num, BE = len(ids_N), max(16, _power(num_experts))
    block = max(16, min(512, 16384 // BE))
    blocks, tiles = -(-num // block), num // ALIGN + E
    new: dict[str, Any] = {"dtype": torch.int32, "device": ids_N.device}
    hist_EB, ends_E, expert_M = torch.empty(E, blocks, **new), torch.empty(E, **new), torch.empty(tiles, **new)
    slot_R, token_R = torch.full((tiles * ALIGN,), -1, **new), torch.zeros(tiles * ALIGN, **new)
    row_N = torch.empty(num, **new)
    kernels.count_kernel[(blocks,)](ids_N, hist_EB, num, blocks, E, BE, block)
    upto_EB = hist_EB.cumsum(1, dtype=torch.int32)
    kernels.place_kernel[(blocks,)](
        ids_N, hist_EB, upto_EB, slot_R, token_R, row_N, ends_E, num, blocks, E, BE, top_k, block, ALIGN
    )
    step = max(16, min(256, 16384 // BE))
    kernels.tile_kernel[(-(-tiles // step),)](ends_E, expert_M, tiles, E, BE, step, ALIGN)
    return Route(slot_R, token_R, row_N, ends_E, expert_M, upto_EB, top_k)


def spread(x_TD: torch.Tensor, at: Route) -> torch.Tensor:
    """Every token at its K rows, [R, D]; rows that fill up an expert are zero, rows after the last expert undefined."""
    from k2lab.models.kernels import experts_triton as kernels

    T, D = x_TD.shape
    out_RD = x_TD.new_empty(at.num_rows, D)
    grid, blocks = (T + at.num_experts,), at.upto_EB.shape[1]
    wide = min(_power(D), 2048)
    kernels.spread_kernel[grid](
        x_TD, at.row_N, at.upto_EB, at.ends_E, out_RD, T, blocks, D, at.top_k, at.num_experts, ALIGN, wide, num_warps=8
    )
    return out_RD


def combine(rows_RD: torch.Tensor, at: Route) -> torch.Tensor:
    """The sum of each token's K rows in fp32, [T, D]."""
    from k2lab.models.kernels import experts_triton as kernels

    T, D = len(at.row_N) // at.top_k, rows_RD.shape[1]
    out_TD, wide = rows_RD.new_empty(T, D), min(_power(D), 1024)
    kernels.combine_kernel[(T, -(-D // wide))](rows_RD, at.row_N, out_TD, D, at.top_k, wide, num_warps=4)
    return out_TD


# ---------------------------------------------------------------- products on Hopper


@cache
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _tiles(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    """A TMA descriptor of a contiguous matrix."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, [rows, columns], _layout())


@cache
def _layout() -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(128, 16, 2)


def _product(
    a: torch.Tensor, b: torch.Tensor, at: Route, mode: int, kind: int, out: torch.Tensor, columns: tuple[int, int], wide: int,
    act: torch.Tensor | None = None, weight_N: torch.Tensor | None = None, side: int = 0, group: int = 8,
) -> None:  # fmt: skip
    """Runs `kernels.experts_gluon.product_kernel`; see there. Tensors are two-dimensional and contiguous, tiles 128 x `wide`."""
    from k2lab.models.kernels import experts_gluon as kernels

    out_tiles, sms = _tiles(out, 64, 64), _sms(out.device.index)
    kernels.product_kernel[(sms,)](
        a if side else _tiles(a, *((64, 128) if mode == TN else (128, 64))),
        _tiles(b, *{NT: (wide, 64), NN: (64, wide), TN: (64, wide), PAIR: (wide // 2, 64)}[mode]),
        out_tiles, out_tiles if act is None else _tiles(act, 64, 64),
        at.expert_M, at.ends_E, at.token_R, at.slot_R, at.slot_R if weight_N is None else weight_N, *columns, at.num_experts,
        group, sms, mode, side, kind, wide, 3 if wide == 256 else 4, _layout(), num_warps=4,
    )  # fmt: skip


def up_swiglu(x_TD: torch.Tensor, gate_up: torch.Tensor, weight_N: torch.Tensor, at: Route) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate and up products [R, 2F], weight x silu(gate) x up [R, F]) of the tokens."""
    F, D = gate_up.shape[1] // 2, gate_up.shape[2]
    pre, act = x_TD.new_empty(at.num_rows, 2 * F), x_TD.new_empty(at.num_rows, F)
    _product(x_TD, gate_up.view(-1, D), at, PAIR, SWIGLU, pre, (F, D), 256, act, weight_N, side=1)
    return pre, act


def rows_product(a_RC: torch.Tensor, weights: torch.Tensor, at: Route, transposed: bool) -> torch.Tensor:
    """a[r] W^T with the expert's W [O, C] (`transposed`), else a[r] W with W [C, O]; [R, O]."""
    columns = (weights.shape[1], weights.shape[2]) if transposed else (weights.shape[2], weights.shape[1])
    out, wide = a_RC.new_empty(at.num_rows, columns[0]), 256 if columns[0] % 256 == 0 else 128
    _product(a_RC, weights.view(-1, weights.shape[2]), at, NT if transposed else NN, STORE, out, columns, wide)
    return out


def weights_product(a_RO: torch.Tensor, b_RC: torch.Tensor, at: Route, into: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over each expert's rows of a[r]^T b[r], [E, O, C]; added to `into` in place if it is given."""
    columns = a_RO.shape[1], b_RC.shape[1]
    wide = 256 if columns[1] % 256 == 0 else 128
    if into is not None and wide == 256:
        flat = into.view(-1, columns[1])
        _product(a_RO, b_RC, at, TN, ADD, flat, columns, wide, group=4)
        return into
    out = a_RO.new_empty(at.num_experts, *columns)
    _product(a_RO, b_RC, at, TN, STORE, out.view(-1, columns[1]), columns, wide, group=4)
    return out if into is None else into.add_(out)


# ---------------------------------------------------------------- the same steps around torch's products


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """a [R, C] with b [E, C, O], or a [O, R] with b [R, C] for a sum over each group's rows."""
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(a, b, offs=ends_E)


def _swiglu(pre_RF2: torch.Tensor, weight_N: torch.Tensor, at: Route) -> torch.Tensor:
    """weight x silu(gate) x up, [R, F]."""
    from k2lab.models.kernels import experts_triton as kernels

    R, F = len(pre_RF2), pre_RF2.shape[1] // 2
    act_RF, rows, wide = pre_RF2.new_empty(R, F), 8, min(_power(F), 1024)
    grid = (R // rows, -(-F // wide))
    kernels.swiglu_kernel[grid](pre_RF2, at.slot_R, weight_N, at.ends_E, act_RF, F, at.num_experts, rows, wide, num_warps=8)
    return act_RF


def _swiglu_grad(
    grad_RF: torch.Tensor, pre_RF2: torch.Tensor, weight_N: torch.Tensor, at: Route
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of pre [R, 2F], weighted act [R, F] in the place of `grad_RF`, gradient of the weights fp32[N])."""
    from k2lab.models.kernels import experts_triton as kernels

    R, F = grad_RF.shape
    grad_pre_RF2, act_RF = torch.empty_like(pre_RF2), grad_RF
    grad_weight_N, rows, wide = torch.zeros(len(weight_N), device=grad_RF.device), 4, min(_power(F), 1024)
    kernels.swiglu_grad_kernel[(R // rows,)](
        grad_RF, pre_RF2, at.slot_R, weight_N, at.ends_E, grad_pre_RF2, act_RF, grad_weight_N,
        F, at.num_experts, rows, wide, num_warps=8,
    )  # fmt: skip
    return grad_pre_RF2, act_RF, grad_weight_N


# ---------------------------------------------------------------- the layer


class ExpertsGPU(torch.autograd.Function):
    """Sum over a token's chosen experts of weight * expert(token). x [T, D], chosen i64[T, K], weights [T, K] -> [T, D].

    `seen` (of `qat`), if given, says what the weights are multiplied as: one weight after the other, again in the backward pass.
    Gradients are those of the weights, straight through."""

    @staticmethod
    def forward(ctx, x, chosen, weights, gate_up, down, seen=None):
        seen = seen or _as_it_is
        at, weight_N = route(chosen, len(gate_up)), weights.reshape(-1)
        x, ctx.fast = x.contiguous(), fast(x, down)
        if ctx.fast:
            pre, act = up_swiglu(x, seen(gate_up), weight_N, at)
            rows = rows_product(act, seen(down), at, transposed=True)
        else:
            pre = _grouped_mm(spread(x, at), seen(gate_up).transpose(1, 2), at.ends_E)
            act = _swiglu(pre, weight_N, at)
            rows = _grouped_mm(act, seen(down).transpose(1, 2), at.ends_E)
        ctx.save_for_backward(x, pre, weights, gate_up, down, *at.tensors)
        ctx.top_k, ctx.seen = at.top_k, seen
        return combine(rows, at)

    @staticmethod
    def backward(ctx, grad):
        x, pre, weights, gate_up, down, *tensors = ctx.saved_tensors
        at, weight_N, seen = Route(*tensors, ctx.top_k), weights.reshape(-1), ctx.seen
        into_up, into_down = room(gate_up), room(down)
        wanted = ctx.needs_input_grad[3:5]  # not those of frozen weights
        grad_rows = spread(grad.contiguous(), at)
        if ctx.fast:
            grad_act = rows_product(grad_rows, seen(down), at, transposed=False)
            grad_pre, act, grad_weight_N = _swiglu_grad(grad_act, pre, weight_N, at)
            del grad_act
            grad_down = weights_product(grad_rows, act, at, into_down) if wanted[1] else None
            del grad_rows, act
            grad_x = combine(rows_product(grad_pre, seen(gate_up), at, transposed=False), at)
            grad_up = weights_product(grad_pre, spread(x, at), at, into_up) if wanted[0] else None
        else:
            grad_pre, act, grad_weight_N = _swiglu_grad(_grouped_mm(grad_rows, seen(down), at.ends_E), pre, weight_N, at)
            grad_down = _grouped_mm(grad_rows.t(), act, at.ends_E) if wanted[1] else None
            del grad_rows, act
            grad_x = combine(_grouped_mm(grad_pre, seen(gate_up), at.ends_E), at)
            grad_up = _grouped_mm(grad_pre.t(), spread(x, at), at.ends_E) if wanted[0] else None
            grad_up, grad_down = (g if i is None else i.add_(g) for g, i in ((grad_up, into_up), (grad_down, into_down)))
        grad_weights = grad_weight_N.to(weights.dtype).view(weights.shape)
        grad_up, grad_down = None if into_up is not None else grad_up, None if into_down is not None else grad_down
        return grad_x, None, grad_weights, grad_up, grad_down, None


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def experts(
    x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sum over each token's chosen experts of weight x expert(token), [T, D]; ids outside [0, E) add nothing. See `obstacle`, and
    `ExpertsGPU` for `seen`."""
    return ExpertsGPU.apply(x_TD, chosen_TK, weights_TK, gate_up, down, seen)


class DenseSwiGLUGPU(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)); x [T, D], gate and up [F, D], down [D, F]. Gate and up are multiplied as one matrix (copying
    both costs less than a second product gains); the activation is computed again for the backward pass, which keeps x and the
    two products only."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        from k2lab.models.kernels import experts_triton as kernels

        pre = x @ torch.cat([w_gate, w_up]).t()
        T, F = len(x), len(w_gate)
        act = pre.new_empty(T, F)
        kernels.dense_kernel[(-(-T // 4), -(-F // 1024))](pre, act, T, F, 4, 1024, num_warps=8)
        ctx.save_for_backward(x, pre, w_gate, w_up, w_down)
        return act @ w_down.t()

    @staticmethod
    def backward(ctx, grad):
        from k2lab.models.kernels import experts_triton as kernels

        x, pre, w_gate, w_up, w_down = ctx.saved_tensors
        T, F = len(x), len(w_gate)
        act, grad_pre = grad @ w_down, torch.empty_like(pre)
        kernels.dense_grad_kernel[(-(-T // 4), -(-F // 1024))](act, pre, grad_pre, T, F, 4, 1024, num_warps=8)
        frozen = not any(ctx.needs_input_grad[1:])
        grad_down = None if frozen else sum_grad_weight(w_down, grad, act)
        del act
        grad_x = grad_pre @ torch.cat([w_gate, w_up])
        if frozen:
            return grad_x, None, None, None
        if room(w_gate) is None and room(w_up) is None:
            grad_gate, grad_up = (grad_pre.t() @ x).chunk(2)
        else:
            grad_gate, grad_up = sum_grad_weight(w_gate, grad_pre[:, :F], x), sum_grad_weight(w_up, grad_pre[:, F:], x)
        return grad_x, grad_gate, grad_up, grad_down
