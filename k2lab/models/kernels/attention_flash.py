"""FlashAttention 2, which PyTorch carries, over packed documents: for devices and machines without cuDNN's packed attention.

It knows one head width only, so values are filled up with zeros to that of keys. It gives the log-sum-exp of every query's
logits, which is above their maximum; where that bound exceeds tau, a kernel that decides on the device finds the maximum itself.

Legend: `T` packed tokens, `H` heads, `C` query and key width, `V` value width, `S` documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k2lab.models.pack import Ragged


def _filled(x_THV: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x_THV, (0, width - x_THV.shape[2])) if x_THV.shape[2] < width else x_THV.contiguous()


def forward(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, ragged: Ragged
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, V] and log-sum-exp fp32 [H, T]. V must not exceed C."""
    V, n, at = v_THV.shape[2], ragged.longest, ragged.cumulative
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THC, k_THC, _filled(v_THV, q_THC.shape[2]), at, at, n, n, 0.0, True, False, scale=scale
    )
    return out[..., :V].contiguous(), lse_HT


def backward(
    grad_THV: torch.Tensor,
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THV: torch.Tensor,
    out_THV: torch.Tensor,
    lse_HT: torch.Tensor,
    scale: float,
    ragged: Ragged,
    grad_v_THV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q and k; that of v is written into `grad_v_THV`."""
    C, V, n, at = q_THC.shape[2], v_THV.shape[2], ragged.longest, ragged.cumulative
    grad, v, out = (_filled(x, C) for x in (grad_THV, v_THV, out_THV))
    state = torch.empty(2, dtype=torch.uint64, device=q_THC.device)  # of the dropout that there is not
    grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
        grad, q_THC, k_THC, v, out, lse_HT, at, at, n, n, 0.0, True, state, state, scale=scale
    )
    grad_v_THV.copy_(grad_v[..., :V])
    return grad_q, grad_k


def maxima(
    q_THC: torch.Tensor, k_THC: torch.Tensor, lse_HT: torch.Tensor, scale: float, ragged: Ragged, tau: float | None
) -> torch.Tensor:
    """Upper bounds [H] of the largest scaled logit per head; the maximum itself for heads whose bound exceeds tau."""
    bound_H = lse_HT.amax(1)
    if tau is None:
        return bound_H
    from k2lab.models.kernels import attention_triton

    return attention_triton.maxima(q_THC, k_THC, bound_H, scale, ragged, tau)
