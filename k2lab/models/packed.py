"""Routed experts that are frozen: dense, or INT4 in memory as released checkpoints hold them, and low-rank terms beside them.

An expert's matrix is decoded when it is multiplied and forgotten after it; the backward pass decodes it again. On a CPU at most
one expert's matrix is decoded at any time, and its products are those of `experts.ExpertsSwiGLU` on the decoded weights, bit for
bit. On a GPU `packed_gpu` decodes inside its products. Frozen weights get no gradient; the input, the router's weights and the
low-rank factors do.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` chosen experts, `r` rank, `n` rows of one expert.
Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F]; packed: eight codes to an int32, one bf16 scale for 32 columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from k2lab.core.errors import RecipeError
from k2lab.models import experts_gpu
from k2lab.models.experts import swiglu_backward
from k2lab.models.gemm import grad_input, grad_weight, linear
from k2lab.quant import int4

SCALES = ("gate_up_scales", "down_scales")  # buffers that stay bf16 whatever the model's dtype: they are part of a format


class Packed(NamedTuple):
    """The four buffers: codes int32 [E, 2F, D / 8] and [E, D, F / 8], scales bf16 [E, 2F, D / 32] and [E, D, F / 32]."""

    gate_up_codes: torch.Tensor
    gate_up_scales: torch.Tensor
    down_codes: torch.Tensor
    down_scales: torch.Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_codes)

    def gate_up(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[2F, D], decoded."""
        return int4.dequantise(self.gate_up_codes[expert], self.gate_up_scales[expert], dtype=dtype)

    def down(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[D, F], decoded."""
        return int4.dequantise(self.down_codes[expert], self.down_scales[expert], dtype=dtype)


class Dense(NamedTuple):
    """Frozen weights as they are: [E, 2F, D] and [E, D, F]."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_proj)

    def gate_up(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.gate_up_proj[expert].to(dtype)

    def down(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        return self.down_proj[expert].to(dtype)


class ExpertLoRA(NamedTuple):
    """Low-rank terms of all experts of a layer: a matrix W [out, in] acts as W + scale B A. A [E, r, in], B [E, out, r]; `in` is
    D for gate and up and F for down, `out` the other."""

    gate_A: torch.Tensor
    gate_B: torch.Tensor
    up_A: torch.Tensor
    up_B: torch.Tensor
    down_A: torch.Tensor
    down_B: torch.Tensor
    scale: float

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        return self[:6]


NAMES = ("gate_lora_A", "gate_lora_B", "up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B")  # parameters of an experts module


def lora_of(module: Any) -> ExpertLoRA | None:
    """The low-rank terms of an experts module (`models.lora` puts them there), or None."""
    if not hasattr(module, NAMES[0]):
        return None
    return ExpertLoRA(*(getattr(module, name) for name in NAMES), module.k2_scale)


# ---------------------------------------------------------------- products


def _low(rows: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, into: torch.Tensor) -> None:
    """into += scale (rows A^T) B^T."""
    into.addmm_(rows @ A.t(), B.t(), alpha=scale)


class _Low:
    """Gradients of y += scale (x A^T) B^T for one expert after the other."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float) -> None:
        self.A, self.B, self.scale = A, B, scale
        self.grad_A, self.grad_B = torch.zeros_like(A), torch.zeros_like(B)

    def at(self, expert: int, grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Keeps the gradients of A and B; that of the inner x A^T, [n, r]."""
        A, B = self.A[expert], self.B[expert]
        inner = (grad_y @ B).mul_(self.scale)
        self.grad_A[expert] = grad_weight(inner, x)
        self.grad_B[expert] = grad_weight(grad_y, x @ A.t()).mul_(self.scale)
        return inner


class FrozenExperts(torch.autograd.Function):
    """Sum over a token's chosen experts of weight * expert(token); x [T, D], chosen i64[T, K], weights [T, K] -> [T, D].

    `base` is a `Packed` or a `Dense`; `factors` those of an `ExpertLoRA`, or none. Experts outside [0, E) add nothing."""

    @staticmethod
    def forward(ctx, x, chosen, weights, base, scale, *factors):
        E, K = base.num_experts, chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=E).tolist()
        tokens, sorted_weights = order // K, weights.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(x)
        keep = any(ctx.needs_input_grad)
        kept, end = [], 0
        for expert, count in enumerate(counts[:E]):
            if not count:
                continue
            first, end = end, end + count
            rows = x.index_select(0, tokens[first:end])
            pre = linear(rows, base.gate_up(expert, x.dtype))
            gate, up = pre.chunk(2, dim=1)
            if factors:
                gate_A, gate_B, up_A, up_B, down_A, down_B = (factor[expert] for factor in factors)
                _low(rows, gate_A, gate_B, scale, gate)
                _low(rows, up_A, up_B, scale, up)
            act = torch.nn.functional.silu(gate).mul_(up)
            y = linear(act, base.down(expert, x.dtype))
            if factors:
                _low(act, down_A, down_B, scale, y)
            out.index_add_(0, tokens[first:end], y.mul_(sorted_weights[first:end]))
            if keep:
                kept.append(pre)
        ctx.save_for_backward(x, tokens, order, sorted_weights, *factors, *kept)
        ctx.rest = base, scale, len(factors), counts, weights.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        base, scale, num, counts, shape = ctx.rest
        x, tokens, order, sorted_weights, *rest = ctx.saved_tensors
        lows = [_Low(A, B, scale) for A, B in zip(rest[0:num:2], rest[1:num:2])]
        pres = iter(rest[num:])
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weights, end = sorted_weights.new_zeros(len(order)), 0
        for expert, count in enumerate(counts[: base.num_experts]):
            if not count:
                continue
            first, end = end, end + count
            rows, weight = tokens[first:end], sorted_weights[first:end]
            pre = next(pres)
            gate, up = pre.chunk(2, dim=1)
            grad_out = grad.index_select(0, rows)
            act = torch.nn.functional.silu(gate).mul_(up)
            grad_act = grad_input(grad_out, base.down(expert, x.dtype))
            if lows:
                # the router's weight lies between: inner gradients are those of the weighted output
                inner = lows[2].at(expert, grad_out * weight, act)
                # With y = down act: d weight = <grad, y> = <down^T grad, act>, so y need not be kept; weighted afterwards.
                low = (grad_out @ lows[2].B[expert]).mul_(scale) @ lows[2].A[expert]
                grad_weights[first:end] = torch.linalg.vecdot(grad_act + low, act)
                grad_act.mul_(weight).addmm_(inner, lows[2].A[expert])
            else:
                grad_weights[first:end] = torch.linalg.vecdot(grad_act, act)
                grad_act.mul_(weight)
            grad_pre = torch.empty_like(pre)
            grad_gate, grad_up = grad_pre.chunk(2, dim=1)
            swiglu_backward(gate, up, grad_act, grad_gate, grad_up)
            if lows:
                tokens_nD = x.index_select(0, rows)
                inner_gate, inner_up = lows[0].at(expert, grad_gate, tokens_nD), lows[1].at(expert, grad_up, tokens_nD)
            if grad_x is not None:
                part = grad_input(grad_pre, base.gate_up(expert, x.dtype))
                if lows:
                    part.addmm_(inner_gate, lows[0].A[expert]).addmm_(inner_up, lows[1].A[expert])
                grad_x.index_add_(0, rows, part)
        scattered = torch.empty_like(grad_weights)
        scattered[order] = grad_weights
        return grad_x, None, scattered.view(shape), None, None, *(g for low in lows for g in (low.grad_A, low.grad_B))


def frozen_experts(
    x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, base: Packed | Dense, lora: ExpertLoRA | None
) -> torch.Tensor:
    """Sum over each token's chosen experts of weight x expert(token), [T, D], of frozen weights with low-rank terms."""
    if x_TD.device.type == "cuda":
        from k2lab.models import packed_gpu

        obstacle = packed_gpu.obstacle(x_TD, base, lora)
        if obstacle is None:
            return packed_gpu.experts(x_TD, chosen_TK, weights_TK, base, lora)
        experts_gpu.say_slower(f"the fused frozen experts are not used, {obstacle}; they run one by one, which is slower")
    factors, scale = (lora.factors, lora.scale) if lora is not None else ((), 0.0)
    return FrozenExperts.apply(x_TD, chosen_TK, weights_TK.to(x_TD.dtype), base, scale, *factors)


# ---------------------------------------------------------------- the module


class PackedExperts(torch.nn.Module):
    """Takes the place of transformers' fused experts (`replace`), with codes and scales as buffers instead of weights.

    Args: `config` the model's, E experts, `width` D, `hidden` F; both multiples of 32. Buffers hold whatever was in memory."""

    def __init__(self, config: Any, experts: int, width: int, hidden: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        for size in (width, hidden):
            if size % int4.GROUP:
                raise RecipeError("experts of this width cannot be packed", got=size, allowed=f"multiples of {int4.GROUP}")
        self.config, self.num_experts, self.hidden_dim, self.intermediate_dim = config, experts, width, hidden
        for name, rows, columns in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
            codes = torch.empty(experts, rows, columns // int4.PER_WORD, dtype=torch.int32, device=device)
            scales = torch.empty(experts, rows, columns // int4.GROUP, dtype=torch.bfloat16, device=device)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales)

    @property
    def packed(self) -> Packed:
        """The four buffers."""
        return Packed(self.gate_up_codes, self.gate_up_scales, self.down_codes, self.down_scales)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return frozen_experts(hidden_states, top_k_index, top_k_weights, self.packed, lora_of(self))

    def dense(self, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """All values of "gate_up_proj" [E, 2F, D] or "down_proj" [E, D, F], decoded."""
        stem = name.removesuffix("_proj")
        return int4.dequantise(getattr(self, f"{stem}_codes"), getattr(self, f"{stem}_scales"), dtype=dtype)


def replace(hf: Any) -> list[str]:
    """Puts a `PackedExperts` in the place of every mixture's fused experts, buffers on the device of the weights before (meta, if
    that is where they are), unset. Returns the modules' names."""
    found = []
    for name, module in list(hf.named_modules()):
        inner = getattr(module, "experts", None)
        if not isinstance(getattr(inner, "gate_up_proj", None), torch.nn.Parameter):
            continue
        E, D, F = inner.down_proj.shape
        module.experts = PackedExperts(inner.config if hasattr(inner, "config") else hf.config, E, D, F, inner.down_proj.device)
        found.append(f"{name}.experts")
    return found


@torch.no_grad()
def pack_(hf: Any) -> list[str]:
    """Packs the experts of a dense model in place by the INT4 grid, layer by layer. Their values change to those of the grid,
    unless they lie on it already. Returns the modules' names."""
    found = []
    for name, module in list(hf.named_modules()):
        inner = getattr(module, "experts", None)
        if not isinstance(getattr(inner, "gate_up_proj", None), torch.nn.Parameter):
            continue
        E, D, F = inner.down_proj.shape
        new = PackedExperts(inner.config if hasattr(inner, "config") else hf.config, E, D, F, inner.down_proj.device)
        for stem in ("gate_up", "down"):
            codes, scales = int4.quantise(getattr(inner, f"{stem}_proj"))
            getattr(new, f"{stem}_codes").copy_(codes)
            getattr(new, f"{stem}_scales").copy_(scales)
        module.experts = new
        found.append(f"{name}.experts")
    return found
