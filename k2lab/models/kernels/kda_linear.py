"""The linear layers around KDA on a GPU with less traffic: several products of one input whose gradient is summed in the products
themselves, and a product of which only gradients are needed.

Legend: `T` tokens, `I` in, `O` out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k2lab.models.gemm import FastLinear

PLAIN = (torch.nn.Linear.forward, FastLinear.forward)


def plain(*modules: torch.nn.Module) -> bool:
    """True if each computes x W^T and nothing else: no bias, adapter, hook or autocast."""
    if torch.is_autocast_enabled("cuda"):
        return False
    return all(
        isinstance(module, torch.nn.Linear)
        and type(module).forward in PLAIN
        and module.bias is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        for module in modules
    )


class Projections(torch.autograd.Function):
    """x [T, I], weights [O, I] -> x W^T [T, O] of the first three; of the others [T - skip, O], without the first tokens."""

    @staticmethod
    def forward(ctx, skip, x, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.skip = skip
        return tuple(F.linear(x if n < 3 else x[skip:], weight) for n, weight in enumerate(weights))

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        grad_x, grad_weights = None, []
        for n, (grad, weight) in enumerate(zip(grads, weights)):
            skip = 0 if n < 3 else ctx.skip
            grad_weights.append(grad.t() @ x[skip:] if ctx.needs_input_grad[n + 2] else None)
            if not ctx.needs_input_grad[1]:
                continue
            if grad_x is None:
                grad_x = grad @ weight
            else:
                grad_x[skip:].addmm_(grad, weight)
        return None, grad_x, *grad_weights


class Unseen(torch.autograd.Function):
    """x W^T whose value nobody reads: the gradients are right, the values are not computed (one number for all)."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.new_zeros(1, 1).expand(len(x), len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x if ctx.needs_input_grad[1] else None
