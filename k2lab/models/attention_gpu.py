"""Causal attention over packed documents on CUDA devices in half precision: one fused kernel for documents of any lengths.

The kernel reads the documents' boundaries on the device, so nothing waits for the host, nothing is padded and no plan is built
per batch. On Hopper and Blackwell it is cuDNN's (`kernels.attention_cudnn`), which also gives exact maxima of logits; elsewhere,
or where `nvidia-cudnn-frontend` is missing, PyTorch's FlashAttention 2 (`kernels.attention_flash`), about half as fast. What
neither takes (fp32, odd head widths) goes through PyTorch's kernels on padded groups, see `attention`.

Legend: `T` packed tokens, `H` heads, `C` query and key head width, `V` value head width, `N` no-position width, `R` rotary width.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from k2lab.models import slower
from k2lab.models.attention import LogitStats
from k2lab.models.kernels import attention_cudnn, attention_flash
from k2lab.models.pack import Pack, Ragged

HALVES = (torch.bfloat16, torch.float16)
# Head widths: steps and the widest.
CUDNN, FLASH, WIDEST = 16, 8, 256


@torch.compiler.assume_constant_result
def _kernel(device: int, qk: int, v: int) -> str | None:
    return _choice(device, qk, v)


@cache
def _choice(device: int, qk: int, v: int) -> str | None:
    """What takes half-precision documents of these head widths: "cudnn", "flash" or None. Says once if it is not the first."""
    major, minor = torch.cuda.get_device_capability(device)
    why, flash = None, qk % FLASH == 0 and v <= qk and torch.backends.cuda.is_flash_attention_available()
    if torch.version.hip or find_spec("triton") is None or major < 8 or max(qk, v) > WIDEST:
        why, flash = f"they need triton, compute capability 8.0 and heads of up to {WIDEST}", False
    elif major not in (9, 10):
        why = f"cuDNN has none for compute capability {major}.{minor}"
    elif qk % CUDNN or v % CUDNN:
        why = f"head widths {qk} and {v} are no multiples of {CUDNN}"
    elif attention_cudnn.frontend() is None:
        why = "nvidia-cudnn-frontend 1.22 with cuDNN 9.19 or newer is not installed"
    if why is None:
        return "cudnn"
    instead = "FlashAttention 2 is taken" if flash else "documents are padded in groups"
    slower.say(f"the fast kernels of packed attention are not used, {why}", f"{instead}, which is slower")
    return "flash" if flash else None


def takes(x: torch.Tensor, qk: int, v: int) -> bool:
    """True if documents of x's device and dtype with these head widths go through a packed kernel. Says once if it is a slow one
    or none, except for fp32, where digits are the point."""
    return x.device.type == "cuda" and x.dtype in HALVES and _kernel(x.device.index, qk, v) is not None


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself if a kernel can read it where it lies (16 bytes at a time), else a copy."""
    whole = x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16)
    return x if whole else x.contiguous()


def _forward(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, ragged: Ragged, stats: LogitStats | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, V] and what the backward pass needs of the logits; `stats`, while active, sees their maxima."""
    observe = stats is not None and stats.active
    if _kernel(q_THC.device.index, q_THC.shape[2], v_THV.shape[2]) == "cudnn":
        out, lse, max_H = attention_cudnn.forward(q_THC, k_THC, _aligned(v_THV), scale, ragged, observe)
        if max_H is not None:
            stats.see(max_H)
        return out, lse
    out, lse = attention_flash.forward(q_THC, k_THC, v_THV, scale, ragged)
    if observe:
        stats.see(attention_flash.maxima(q_THC, k_THC, lse, scale, ragged, stats.tau))
        stats.exact = False  # heads up to tau were bounded only; which ones, the host does not know
    return out, lse


def _backward(
    grad_THV: torch.Tensor,
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THV: torch.Tensor,
    out_THV: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    ragged: Ragged,
    grad_v_THV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and k, dense; that of v is written into `grad_v_THV`."""
    cudnn = _kernel(q_THC.device.index, q_THC.shape[2], v_THV.shape[2]) == "cudnn"
    backward = attention_cudnn.backward if cudnn else attention_flash.backward
    return backward(grad_THV, q_THC, k_THC, _aligned(v_THV), out_THV, lse, scale, ragged, grad_v_THV)


class RaggedAttention(torch.autograd.Function):
    """q and k [T, H, C], v [T, H, V] -> [T, H, V]."""

    @staticmethod
    def forward(ctx, q_THC, k_THC, v_THV, scale, pack, stats):
        q_THC, k_THC = q_THC.contiguous(), k_THC.contiguous()
        out, lse = _forward(q_THC, k_THC, v_THV, scale, pack.ragged, stats)
        ctx.save_for_backward(q_THC, k_THC, v_THV, out, lse)
        ctx.rest = scale, pack.ragged
        return out

    @staticmethod
    def backward(ctx, grad_THV):
        *saved, out, lse = ctx.saved_tensors
        grad_v = torch.empty_like(saved[2], memory_format=torch.contiguous_format)
        grad_q, grad_k = _backward(grad_THV.contiguous(), *saved, out, lse, *ctx.rest, grad_v)
        return grad_q, grad_k, grad_v, None, None, None


@torch.compiler.disable
def ragged(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, pack: Pack, stats: LogitStats | None
) -> torch.Tensor:
    """Attention within documents, [T, H, V], for inputs that `takes` accepts. A compiled layer breaks its graph here."""
    return RaggedAttention.apply(q_THC, k_THC, v_THV, scale, pack, stats)


class LatentAttention(torch.autograd.Function):
    """q [T, H C], kv [T, H (N + V)], k_rot [T, R], rotary = cosines and sines [T, >= R / 2] or None -> [T, H V].

    Overwrites q: its rotary part is turned in place, which a linear layer's output bears. Queries, keys, kv (its values), output
    and one number per row and head stay for the backward pass; with `recompute` nothing does.
    """

    @staticmethod
    def forward(ctx, q_TX, kv_TX, k_rot_TR, cos, sin, heads, widths, scale, pack, stats):
        from k2lab.models.kernels import mla_triton

        N, R, V = widths
        T, rotary = q_TX.shape[0], None if cos is None else (cos, sin)
        q, kv = q_TX.view(T, heads, N + R), kv_TX.view(T, heads, N + V)
        k = mla_triton.assemble(q, kv, k_rot_TR, rotary, widths)
        out, lse = _forward(q, k, kv[..., N:], scale, pack.ragged, stats)
        ctx.save_for_backward(q_TX, k, kv_TX, cos, sin, out, lse)
        ctx.rest = heads, widths, scale, pack.ragged
        return out.view(T, heads * V)

    @staticmethod
    def backward(ctx, grad_TX):
        from k2lab.models.kernels import mla_triton

        q_TX, k, kv_TX, cos, sin, out, lse = ctx.saved_tensors
        heads, widths, scale, ragged = ctx.rest
        N, R, V = widths
        T, rotary = q_TX.shape[0], None if cos is None else (cos, sin)
        q, kv = q_TX.view(T, heads, N + R), kv_TX.view(T, heads, N + V)
        grad, grad_kv = grad_TX.contiguous().view(T, heads, V), torch.empty_like(kv)
        grad_q, grad_k = _backward(grad, q, k, kv[..., N:], out, lse, scale, ragged, grad_kv[..., N:])
        grad_rot = mla_triton.gradients(grad_q, grad_k, grad_kv, rotary, widths)
        return grad_q.view(T, -1), grad_kv.view(T, -1), grad_rot, *[None] * 7


@torch.compiler.disable
def latent(
    q_TX: torch.Tensor,
    kv_TX: torch.Tensor,
    k_rot_TR: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    heads: int,
    widths: tuple[int, int, int],
    scale: float,
    pack: Pack,
    stats: LogitStats | None,
) -> torch.Tensor:
    """`LatentAttention` for fresh outputs of projections. `rotary` as transformers gives it: cosines and sines [1, T, R]."""
    cos, sin = (None, None) if rotary is None else (x[0] for x in rotary)
    return LatentAttention.apply(q_TX, kv_TX, k_rot_TR, cos, sin, heads, widths, scale, pack, stats)
