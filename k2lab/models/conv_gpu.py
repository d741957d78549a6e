"""The short convolution of Kimi Delta Attention on CUDA: one Triton kernel each way over packed documents.

Forward reads x once and writes y once; backward computes the pre-activation again instead of storing it. Documents are told apart
by the first token of each token's document, so a pack is one launch whatever its documents are.

Legend: `T` packed tokens, `X` channels, `J` kernel length.
"""

from __future__ import annotations

from typing import Any

import torch

from k2lab.models import slower
from k2lab.models.pack import Pack


@slower.or_none("triton", "the short convolution takes the slower path of single tensor operations")
def kernels() -> Any:
    """The module of Triton kernels."""
    from k2lab.models.kernels import kda_triton

    return kda_triton


def first_tokens(pack: Pack) -> torch.Tensor:
    """i32[T] the first token of each token's document; kept on the pack."""
    if "_first_tokens" not in pack.__dict__:
        table = torch.tensor([pack.starts[:-1], pack.lengths], dtype=torch.int32)
        if pack.device.type == "cuda":
            table = table.pin_memory().to(pack.device, non_blocking=True)
        pack.__dict__["_first_tokens"] = table[0].repeat_interleave(table[1], output_size=pack.num_tokens)
    return pack.__dict__["_first_tokens"]


class ShortConvGPU(torch.autograd.Function):
    """silu(sum_j w_j x_{t - J + 1 + j}) within documents, for tokens from `skip` on. x [T, X], weight [X, J <= 4], first i32[T]
    -> [T - skip, X]. The weight's gradient is summed in fp32."""

    @staticmethod
    def forward(ctx, x, weight, first, skip):
        found = kernels()
        x = x.contiguous()
        taps = weight.new_zeros(found.TAPS, weight.shape[0])
        taps[found.TAPS - weight.shape[1] :] = weight.t()
        ctx.save_for_backward(x, taps, first)
        ctx.skip, ctx.length = skip, weight.shape[1]
        return found.conv_forward(x, taps, first, skip)

    @staticmethod
    def backward(ctx, grad):
        x, taps, first = ctx.saved_tensors
        grad_x, grad_taps = kernels().conv_backward(x, taps, first, ctx.skip, grad.contiguous())
        return grad_x, grad_taps[len(taps) - ctx.length :].t().to(taps.dtype), None, None


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if the kernels compute this convolution."""
    known = x.device.type == "cuda" and weight.shape[1] <= 4 and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and kernels() is not None
