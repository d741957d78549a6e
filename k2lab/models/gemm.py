"""The products of a linear layer on the CPU, by whichever library is faster: oneDNN's fp32 kernels for y = x W^T and dx = dy W,
the BLAS behind `torch.mm` for the weight gradient dy^T x.

On an AVX-512 EPYC core oneDNN reaches 100-115 GFLOP/s where MKL reaches 85-100 for these two products, and loses the third.
oneDNN compiles and caches a kernel per shape, so it is used for regular numbers of rows only: with packs of ever new lengths and
experts with ever new loads, compiling costs more than it gains, and the cache grows to gigabytes.
Legend: `T` tokens, `I` in, `O` out.
"""

from __future__ import annotations

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


class FastLinear(torch.nn.Linear):
    """A `torch.nn.Linear` without bias whose CPU products are those above; put in place by `swap`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or self.bias is not None or x.dtype != self.weight.dtype:
            return super().forward(x)
        return Linear.apply(x, self.weight)
