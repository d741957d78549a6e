"""RMSNorm with a hand-written backward pass.

CPU: one reduction and two passes over the data each way, no fp32 copies of fp32 inputs. CUDA: Triton kernels that read and write
each tensor once; there a decoder layer's residual sums are part of its norms.

Legend: `T` tokens (all leading axes), `D` normalised width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from k2lab.models import slower
from k2lab.models.recomputing import RecomputingLayer, again

SLOWER = "norms on this GPU take transformers' slower path"
DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 16384  # a row is held in registers


@slower.or_none("triton", SLOWER)
def _kernels() -> ModuleType:
    from k2lab.models.kernels import norm_triton

    return norm_triton


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if the kernels can run: CUDA, bf16 or fp32 throughout, at most `WIDEST` wide, Triton installed. On CUDA it is said
    once why not."""
    if x.device.type != "cuda":
        return False
    if x.dtype != weight.dtype or x.dtype not in DTYPES or x.shape[-1] > WIDEST:
        widest = f"kernels take bfloat16 or float32 to {WIDEST}"
        slower.say(f"inputs are {x.dtype}, weights {weight.dtype}, width {x.shape[-1]}; {widest}", SLOWER)
        return False
    return _kernels() is not None


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[T, D] with neighbouring columns side by side; a copy only if rows are not evenly spaced."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class RMSNormFunction(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), in fp32 (or wider), returned in x's dtype. x [..., D], w [D]."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = wide * scale
        ctx.save_for_backward(unit, scale, weight)
        ctx.dtype = x.dtype
        # transformers rounds to x's dtype before it multiplies by the weight
        return weight * unit.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        unit, scale, weight = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        wide = weight.to(unit.dtype)
        mean = (product @ wide).unsqueeze(-1).div_(-unit.shape[-1])
        # dx = scale (w g - unit mean(w g unit)); `product` is free to be overwritten
        grad_x = torch.addcmul(torch.mul(grad, wide, out=product), unit, mean).mul_(scale)
        return grad_x.to(ctx.dtype), grad_weight, None


class GatedRMSNormFunction(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) sigmoid(gate), in fp32 or wider, returned in x's dtype. x and gate [..., D], w [D]."""

    @staticmethod
    def forward(ctx, x, weight, gate, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.to(wide)
        size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit, share = rows * scale, gate.to(wide).sigmoid()
        ctx.save_for_backward(unit, scale, share, weight)
        ctx.dtypes = x.dtype, gate.dtype
        return (unit * weight.to(wide)).mul_(share).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        unit, scale, share, weight = ctx.saved_tensors
        wide = weight.to(unit.dtype)
        grad = grad.to(unit.dtype)
        through = grad * share  # gradient of w unit
        product = through * unit
        grad_weight = product.flatten(0, -2).sum(0)
        # d gate = grad w unit share (1 - share) = product w (1 - share)
        grad_gate = torch.addcmul(product, product, share, value=-1).mul_(wide)
        mean = (product @ wide).unsqueeze(-1).div_(-unit.shape[-1])
        grad_x = torch.addcmul(through.mul_(wide), unit, mean).mul_(scale)
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(weight.dtype), grad_gate.to(ctx.dtypes[1]), None


class RMSNormCUDA(torch.autograd.Function):
    """`RMSNormFunction` of x + other, in Triton: (y, `copies` times, then x + other rounded to x's dtype, or x itself where
    `other` is None). The kernel sums the gradients of the copies, and adds that of the last output to the norm's. x and other
    [..., D], w [D]."""

    @staticmethod
    def forward(ctx, x, other, weight, eps, copies):
        y, total, scales = _kernels().forward(_rows(x), weight, eps, other_TD=_rows(other))
        ctx.save_for_backward(total, scales, weight)
        ctx.set_materialize_grads(False)
        ctx.alone, ctx.shape = other is None, x.shape
        return *(y.view(x.shape) for _ in range(copies)), x if other is None else total.view(x.shape)

    @staticmethod
    def backward(ctx, *grads):
        total, scales, weight = ctx.saved_tensors
        grads, grad_x, grad_weight = [_rows(grad) for grad in grads[:-1] if grad is not None], grads[-1], None
        if grads:
            grad_x, grad_weight, _ = _kernels().gradients(grads, total, weight, scales, extra_TD=_rows(grad_x))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None if ctx.alone else grad_x, grad_weight, None, None


class Sum(torch.autograd.Function):
    """a + b + c in one pass, rounded once."""

    @staticmethod
    def forward(ctx, *parts):
        return _kernels().sum_of(*(part.contiguous() for part in parts))

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


class GatedRMSNormCUDA(torch.autograd.Function):
    """`GatedRMSNormFunction` in Triton."""

    @staticmethod
    def forward(ctx, x, weight, gate, eps):
        x_TD, gate_TD = _rows(x), _rows(gate)
        y, _, scales = _kernels().forward(x_TD, weight, eps, gate_TD=gate_TD)
        ctx.save_for_backward(x_TD, gate_TD, scales, weight)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x_TD, gate_TD, scales, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_gate = _kernels().gradients([_rows(grad)], x_TD, weight, scales, gate_TD=gate_TD)
        return grad_x.view(grad.shape), grad_weight, grad_gate.view(grad.shape), None


class FastGatedRMSNorm(torch.nn.Module):
    """Mixed into Kimi Linear's gated RMSNorm by `swap`."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if self.activation == "sigmoid":
            if hidden_states.device.type == "cpu":
                return GatedRMSNormFunction.apply(hidden_states, self.weight, gate, self.variance_epsilon)
            if takes(hidden_states, self.weight) and gate.dtype == hidden_states.dtype:
                return GatedRMSNormCUDA.apply(hidden_states, self.weight, gate, self.variance_epsilon)
        return super().forward(hidden_states, gate)


class FastRMSNorm(torch.nn.Module):
    """Mixed into transformers' RMSNorm classes by `swap`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses it with its neighbours
            return super().forward(hidden_states)
        if hidden_states.device.type == "cpu":
            return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
        if takes(hidden_states, self.weight):
            return RMSNormCUDA.apply(hidden_states, None, self.weight, self.variance_epsilon, 1)[0]
        return super().forward(hidden_states)


def _normed(norm: torch.nn.Module, x: torch.Tensor, other: torch.Tensor | None, copies: int) -> tuple[torch.Tensor, ...]:
    return RMSNormCUDA.apply(x, other, norm.weight, norm.variance_epsilon, copies)


MIXTURES = ("DeepseekV3MoE", "KimiLinearMoE")  # their forward is in `FastDecoderLayer._mixture`


class FastDecoderLayer(RecomputingLayer):
    """Mixed into transformers' pre-norm decoder layers by `swap`. On CUDA, without a cache, the residual stream forks and joins
    inside the norms, and the inputs of router, experts and shared experts fork there too: the sum after attention and the sums of
    gradients cost no pass of their own. Otherwise the class's own forward."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first, second = self.input_layernorm, self.post_attention_layernorm
        ours = isinstance(first, FastRMSNorm) and isinstance(second, FastRMSNorm)
        if args or not ours or kwargs.get("past_key_values") is not None or not takes(hidden_states, first.weight):
            return super().forward(hidden_states, *args, **kwargs)

        def mixer(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x, residual = _normed(first, hidden, None, 1)
            return residual, self.k2_mixed(x, kwargs)

        block = self.k2_recomputing
        residual, mixed = again(mixer, hidden_states) if block == "mixer" else mixer(hidden_states)
        return again(self._feed_forward, residual, mixed) if block == "feed_forward" else self._feed_forward(residual, mixed)

    def _feed_forward(self, residual: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The sum after attention, its norm, the feed-forward block, and the sum after it."""
        hooked = self.mlp._forward_hooks or self.mlp._forward_pre_hooks
        if type(self.mlp).__name__ in MIXTURES and not hooked:
            return self._mixture(*_normed(self.post_attention_layernorm, residual, mixed, 3))
        x, residual = _normed(self.post_attention_layernorm, residual, mixed, 1)
        return residual + self.mlp(x)

    def _mixture(
        self, for_router: torch.Tensor, for_experts: torch.Tensor, for_shared: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """residual + routed experts + shared experts of one input, given three times."""
        _, weights, chosen = self.mlp.gate(for_router)
        routed = self.mlp.experts(for_experts.view(-1, for_experts.shape[-1]), chosen, weights)
        return Sum.apply(residual, routed.view(residual.shape), self.mlp.shared_experts(for_shared))
