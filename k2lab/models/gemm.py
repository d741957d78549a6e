"""The products of a linear layer.

On the CPU by whichever library is faster: oneDNN's fp32 kernels for y = x W^T and dx = dy W, the BLAS behind `torch.mm` for the
weight gradient dy^T x.
On an AVX-512 EPYC core oneDNN reaches 100-115 GFLOP/s where MKL reaches 85-100 for these two products, and loses the third.
oneDNN compiles and caches a kernel per shape, so it is used for regular numbers of rows only: with packs of ever new lengths and
experts with ever new loads, compiling costs more than it gains, and the cache grows to gigabytes.

On CUDA PyTorch's own, but inside `adding_weight_gradients` the weight gradient is added to `.grad` by the product itself. By
autograd every micro-batch after the first reads both summands and writes the sum: on an H100 4.5 ms per micro-batch for the 2.3 B
bf16 parameters of mini-2b, against 1.1 ms inside the products. The sum is also rounded once less: eight micro-batches leave an
error of 3.5e-3 of the gradient's norm instead of 4.0e-3; one rounding of the exact sum leaves 1.7e-3.

Legend: `T` tokens, `I` in, `O` out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F


def _onednn_works() -> bool:
    """True if this build has oneDNN's linear and it computes what `F.linear` does."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), F.linear(x, weight))
    except RuntimeError:
        return False


ONEDNN = _onednn_works()
ROWS = 128  # oneDNN takes products whose number of rows is a multiple of this


def _regular(x: torch.Tensor) -> bool:
    return ONEDNN and x.shape[0] % ROWS == 0 and x.dtype == torch.float32 and x.device.type == "cpu"


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T -> [T, O]."""
    if _regular(x_TI):
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, None, "none", [], "")
    return F.linear(x_TI, weight_OI)


def grad_input(grad_TO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """dy W -> [T, I]."""
    if _regular(grad_TO):
        return torch.ops.mkldnn._linear_pointwise(grad_TO, weight_OI.t(), None, "none", [], "")
    return grad_TO @ weight_OI


def grad_weight(grad_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """dy^T x -> [O, I]."""
    return grad_TO.t() @ x_TI


class Linear(torch.autograd.Function):
    """x W^T with these products; x [..., I], W [O, I], no bias."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_input(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_w = grad_weight(flat, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


# ---------------------------------------------------------------- weight gradients that are added where they lie

# For the whole process, since autograd runs backward functions in threads of its own.
_adding = False


@contextmanager
def adding_weight_gradients() -> Iterator[None]:
    """Around `backward()` (never around `torch.autograd.grad`, which wants gradients returned): backward functions may add a
    weight's gradient to its `.grad` themselves, see `room`, and return none."""
    global _adding
    before, _adding = _adding, True
    try:
        yield
    finally:
        _adding = before


def room(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight's `.grad`, if its gradient may be added there in place: inside `adding_weight_gradients`, for a leaf that has a
    gradient of its own type and layout and that nobody watches by hooks. Otherwise None: return the gradient to autograd."""
    if not _adding or not weight.is_leaf or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    grad = weight.grad
    fits = grad is not None and grad.dtype == weight.dtype and grad.is_contiguous() and not grad.requires_grad
    return grad if fits else None


def sum_grad_weight(weight_OI: torch.Tensor, grad_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor | None:
    """dy^T x -> [O, I], or None if it was added to the weight's `.grad`."""
    into = room(weight_OI)
    if into is None:
        return grad_TO.t() @ x_TI
    torch.addmm(into, grad_TO.t(), x_TI, out=into)
    return None


class AddingLinear(torch.autograd.Function):
    """x W^T; x [..., I], W [O, I], no bias. Its weight gradient may be added in place."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_w = sum_grad_weight(weight, flat, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


class FastLinear(torch.nn.Linear):
    """A `torch.nn.Linear` without bias with the products above; put in place by `swap`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None or x.dtype != self.weight.dtype or torch.compiler.is_compiling():
            return super().forward(x)
        if x.device.type == "cpu":
            return Linear.apply(x, self.weight)
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return AddingLinear.apply(x, self.weight)
