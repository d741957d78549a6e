"""RMSNorm with a hand-written backward pass: one reduction and two passes over the data each way, no fp32 copies of fp32 inputs.

Legend: `T` tokens (all leading axes), `D` normalised width.
"""

from __future__ import annotations

import torch


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


class FastGatedRMSNorm(torch.nn.Module):
    """Mixed into Kimi Linear's gated RMSNorm by `swap`; on a GPU the class's own forward stays."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu" or self.activation != "sigmoid":
            return super().forward(hidden_states, gate)
        return GatedRMSNormFunction.apply(hidden_states, self.weight, gate, self.variance_epsilon)


class FastRMSNorm(torch.nn.Module):
    """Mixed into transformers' RMSNorm classes by `swap`; on a GPU the class's own forward stays."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.device.type != "cpu":
            return super().forward(hidden_states)
        return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
