"""SwiGLU feed-forward layers: dense, and the experts of a mixture (registered in transformers as "k2lab").

Tokens are sorted by expert once; each expert then runs its three products on its own rows, and the weighted outputs are added
back in expert order, so the result does not depend on threads. The forward pass keeps only the inputs and the pre-activations.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` chosen experts, `n` rows of one expert.
Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from k2lab.models import experts_gpu, qat, slower
from k2lab.models.gemm import grad_input, grad_weight, linear

NAME = "k2lab"


def swiglu_backward(
    gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor, grad_gate: torch.Tensor, grad_up: torch.Tensor
) -> None:
    """Gradients of silu(gate) * up, written into `grad_gate` and `grad_up`."""
    torch.mul(grad, up, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
    torch.mul(torch.nn.functional.silu(gate), grad, out=grad_up)


class DenseSwiGLU(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)); x [T, D], gate and up [F, D], down [D, F]."""

    @staticmethod
    def forward(ctx, x, w_gate, w_up, w_down):
        gate, up = linear(x, w_gate), linear(x, w_up)
        act = torch.nn.functional.silu(gate).mul_(up)
        ctx.save_for_backward(x, gate, up, act, w_gate, w_up, w_down)
        return linear(act, w_down)

    @staticmethod
    def backward(ctx, grad):
        x, gate, up, act, w_gate, w_up, w_down = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]  # not those of frozen weights
        grad_down = grad_weight(grad, act) if wanted[2] else None
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        swiglu_backward(gate, up, grad_input(grad, w_down), grad_gate, grad_up)
        grad_x = grad_input(grad_up, w_up).add_(grad_input(grad_gate, w_gate))
        grads = (grad_weight(grad, x) if want else None for grad, want in zip((grad_gate, grad_up), wanted))
        return grad_x, *grads, grad_down


class FastMLP(torch.nn.Module):
    """Mixed into transformers' gate/up/down MLP classes by `swap`. With low-rank adapters (`k2_adapted`) the class's own forward
    runs, whose three linear layers know them; the functions here multiply by the weights alone."""

    k2_adapted = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.k2_adapted:
            return super().forward(x)
        shape = x.shape
        many = x.numel() >= experts_gpu.MANY * shape[-1]
        if x.device.type == "cpu":
            function: type[torch.autograd.Function] = DenseSwiGLU
        elif many and x.dtype == self.gate_proj.weight.dtype and experts_gpu.works(x.device):
            function = experts_gpu.DenseSwiGLUGPU
        else:
            return super().forward(x)
        out = function.apply(x.reshape(-1, shape[-1]), self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return out.view(shape)


# ---------------------------------------------------------------- experts


class Dense(NamedTuple):
    """Frozen weights as they are: [E, 2F, D] and [E, D, F]."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_proj)

    def gate_up(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        found = self.gate_up_proj[expert]
        return found if found.dtype == dtype else found.to(dtype)  # asking costs less than `to` does for nothing

    def down(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        found = self.down_proj[expert]
        return found if found.dtype == dtype else found.to(dtype)


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


def _low(rows: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, into: torch.Tensor) -> None:
    """into += scale (rows A^T) B^T."""
    into.addmm_(rows @ A.t(), B.t(), alpha=scale)


class ExpertsSwiGLU(torch.autograd.Function):
    """Sum over a token's chosen experts of weight * expert(token). x [T, D], chosen i64[T, K], weights [T, K] -> [T, D]. Experts
    outside [0, E) add nothing.

    Either gate_up and down are given, and `seen` (of `qat`), if given, says what they are multiplied as; their gradients are
    straight through it, and made for those that want one. Or they are None and `base` holds frozen weights: a `Dense` or a
    `packed.Packed`. `factors` are those of a `packed.ExpertLoRA` of this `scale`, or none."""

    @staticmethod
    def forward(ctx, x, chosen, weights, gate_up, down, seen=None, base=None, scale=0.0, *factors):
        ctx.rest = base, seen, scale, len(factors), weights.shape
        base = base or _multiplied(gate_up, down, seen)
        E, K = base.num_experts, chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        ctx.counts = counts = torch.bincount(chosen.flatten(), minlength=E)[:E].tolist()
        tokens, sorted_weights = order // K, weights.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(x)
        keep = any(ctx.needs_input_grad)
        kept, end = [], 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            first, end = end, end + count
            rows = tokens[first:end]
            x_nD = x.index_select(0, rows)
            pre = linear(x_nD, base.gate_up(expert, x.dtype))
            gate, up = pre.chunk(2, dim=1)
            if factors:
                gate_A, gate_B, up_A, up_B, down_A, down_B = (factor[expert] for factor in factors)
                _low(x_nD, gate_A, gate_B, scale, gate)
                _low(x_nD, up_A, up_B, scale, up)
            del x_nD
            act = torch.nn.functional.silu(gate).mul_(up)
            y = linear(act, base.down(expert, x.dtype))
            if factors:
                _low(act, down_A, down_B, scale, y)
            out.index_add_(0, rows, y.mul_(sorted_weights[first:end]))
            del y
            if keep:
                kept.append(pre)
        # all through save_for_backward, so that recomputation can drop them
        ctx.save_for_backward(x, tokens, order, sorted_weights, gate_up, down, *factors, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        base, seen, scale, num, shape = ctx.rest
        x, tokens, order, sorted_weights, gate_up, down, *rest = ctx.saved_tensors
        grads = [torch.empty_like(w) if want else None for w, want in zip((gate_up, down), ctx.needs_input_grad[3:5])]
        base, (grad_gate_up, grad_down) = base or _multiplied(gate_up, down, seen), grads
        lows = [_Low(A, B, scale) for A, B in zip(rest[0:num:2], rest[1:num:2])]
        pres = iter(rest[num:])
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weights, end = sorted_weights.new_zeros(len(order)), 0
        for expert, count in enumerate(ctx.counts):
            if not count:
                for each in grads:
                    if each is not None:
                        each[expert].zero_()
                continue
            first, end = end, end + count
            rows, weight = tokens[first:end], sorted_weights[first:end]
            pre = next(pres)
            gate, up = pre.chunk(2, dim=1)
            grad_out = grad.index_select(0, rows)
            act = torch.nn.functional.silu(gate).mul_(up)
            # With y = down act: d weight = <grad, y> = <down^T grad, act>, so y need not be kept.
            grad_act = grad_input(grad_out, base.down(expert, x.dtype))
            if lows:
                # the router's weight lies between: inner gradients are those of the weighted output
                inner = lows[2].at(expert, grad_out * weight, act)
                low = (grad_out @ lows[2].B[expert]).mul_(scale) @ lows[2].A[expert]
                grad_weights[first:end] = torch.linalg.vecdot(grad_act + low, act)
                grad_act.mul_(weight).addmm_(inner, lows[2].A[expert])
            else:
                grad_weights[first:end] = torch.linalg.vecdot(grad_act, act)
                grad_act.mul_(weight)
            if grad_down is not None:
                grad_down[expert] = grad_weight(grad_out, act.mul_(weight))
            grad_pre = torch.empty_like(pre)
            grad_gate, grad_up = grad_pre.chunk(2, dim=1)
            swiglu_backward(gate, up, grad_act, grad_gate, grad_up)
            if lows:
                x_nD = x.index_select(0, rows)
                inner_gate, inner_up = lows[0].at(expert, grad_gate, x_nD), lows[1].at(expert, grad_up, x_nD)
            if grad_gate_up is not None:
                grad_gate_up[expert] = grad_weight(grad_pre, x.index_select(0, rows))
            if grad_x is not None:
                part = grad_input(grad_pre, base.gate_up(expert, x.dtype))
                if lows:
                    part.addmm_(inner_gate, lows[0].A[expert]).addmm_(inner_up, lows[1].A[expert])
                grad_x.index_add_(0, rows, part)
        scattered = torch.empty_like(grad_weights)
        scattered[order] = grad_weights
        of_factors = [grad for low in lows for grad in (low.grad_A, low.grad_B)]
        return grad_x, None, scattered.view(shape), *grads, None, None, None, *of_factors


def _multiplied(gate_up: torch.Tensor, down: torch.Tensor, seen: qat.Seen | None) -> Dense:
    """What trained weights are multiplied as."""
    return Dense(gate_up, down) if seen is None else Dense(seen(gate_up), seen(down))


def k2lab_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function. On a GPU in bf16 those of `experts_gpu` run; on other devices, in other types, or for
    experts of another build than SwiGLU without biases, transformers' grouped_mm. Frozen experts, and those with low-rank terms,
    are those of `packed`. With quantisation-aware training all of them multiply by values on the grid (`qat`)."""
    from k2lab.models import packed

    # attributes that an older transformers lacks are features that it lacks
    odd = ("has_bias", "is_transposed", "has_post_expert_norm")
    plain = getattr(self, "has_gate", True) and not any(getattr(self, name, False) for name in odd)
    plain = plain and self.config.hidden_act == "silu"
    frozen = not (self.gate_up_proj.requires_grad or self.down_proj.requires_grad)
    if plain and (packed.lora_of(self) is not None or (frozen and hidden_states.device.type == "cpu")):
        base = packed.Dense(*qat.weights(self))
        return packed.frozen_experts(hidden_states, top_k_index, top_k_weights, base, packed.lora_of(self))
    seen = qat.seen_by(self)
    if hidden_states.device.type == "cpu" and plain and not getattr(self, "_is_expert_parallel", False):
        weights = top_k_weights.to(hidden_states.dtype)
        return ExpertsSwiGLU.apply(hidden_states, top_k_index, weights, self.gate_up_proj, self.down_proj, seen)
    if hidden_states.device.type == "cuda" and plain:
        obstacle = experts_gpu.obstacle(hidden_states, self.gate_up_proj, self.down_proj)
        if obstacle is None:
            return experts_gpu.experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, seen)
        slower.say(f"the fused experts are not used, {obstacle}", "transformers' grouped_mm runs, which is slower")
    module = self if seen is None else qat.Standing(self)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, k2lab_experts)
