"""SwiGLU feed-forward layers: dense, and the experts of a mixture (registered in transformers as "k2lab").

Tokens are sorted by expert once; each expert then runs its three products on its own rows, and the weighted outputs are added
back in expert order, so the result does not depend on threads. The forward pass keeps only the inputs and the pre-activations.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` chosen experts, `n` rows of one expert.
Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F].
"""

from __future__ import annotations

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from k2lab.models import experts_gpu, qat
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


class ExpertsSwiGLU(torch.autograd.Function):
    """Sum over a token's chosen experts of weight * expert(token). x [T, D], chosen i64[T, K], weights [T, K] -> [T, D].

    `seen` (of `qat`), if given, says what the weights are multiplied as; gradients are those of the weights, straight through."""

    @staticmethod
    def forward(ctx, x, chosen, weights, gate_up, down, seen=None):
        E, K = len(gate_up), chosen.shape[1]
        masters = gate_up, down
        gate_up, down = masters if seen is None else map(seen, masters)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=E).tolist()
        tokens, sorted_weights = order // K, weights.flatten()[order].unsqueeze(1)
        out = torch.zeros_like(x)
        kept, end = [], 0
        for expert, count in enumerate(counts[:E]):
            if not count:
                continue
            first, end = end, end + count
            rows = tokens[first:end]
            pre = linear(x.index_select(0, rows), gate_up[expert])
            kept.append(pre)
            gate, up = pre.chunk(2, dim=1)
            act = torch.nn.functional.silu(gate).mul_(up)
            out.index_add_(0, rows, linear(act, down[expert]).mul_(sorted_weights[first:end]))
        # all through save_for_backward, so that recomputation can drop them
        ctx.save_for_backward(x, tokens, order, sorted_weights, *masters, *kept)
        ctx.counts, ctx.shape, ctx.seen = counts, chosen.shape, seen
        return out

    @staticmethod
    def backward(ctx, grad):
        x, tokens, order, sorted_weights, gate_up, down, *kept = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        if ctx.seen is not None:
            gate_up, down = ctx.seen(gate_up), ctx.seen(down)
        grad_weights, end = sorted_weights.new_zeros(len(order)), 0
        pres = iter(kept)
        for expert, count in enumerate(ctx.counts[: len(gate_up)]):
            if not count:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()
                continue
            first, end = end, end + count
            rows, weight = tokens[first:end], sorted_weights[first:end]
            pre = next(pres)
            gate, up = pre.chunk(2, dim=1)
            grad_out = grad.index_select(0, rows)
            act = torch.nn.functional.silu(gate).mul_(up)
            # With y = down act: d weight = <grad, y> = <down^T grad, act>, so y need not be kept.
            grad_act = grad_input(grad_out, down[expert])
            grad_weights[first:end] = torch.linalg.vecdot(grad_act, act)
            grad_down[expert] = grad_weight(grad_out, act.mul_(weight))
            grad_pre = torch.empty_like(pre)
            swiglu_backward(gate, up, grad_act.mul_(weight), *grad_pre.chunk(2, dim=1))
            grad_gate_up[expert] = grad_weight(grad_pre, x.index_select(0, rows))
            grad_x.index_add_(0, rows, grad_input(grad_pre, gate_up[expert]))
        scattered = torch.empty_like(grad_weights)
        scattered[order] = grad_weights
        return grad_x, None, scattered.view(ctx.shape), grad_gate_up, grad_down, None


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
        experts_gpu.say_slower(f"the fused experts are not used, {obstacle}; transformers' grouped_mm runs, which is slower")
    module = self if seen is None else qat.Standing(self)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(NAME, k2lab_experts)
