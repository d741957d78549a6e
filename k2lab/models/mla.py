"""Multi-head latent attention for training on packs: rotation, assembly of keys and attention in one autograd function.

transformers' forward (which also serves decoding with the compressed cache) builds queries and keys through several copies and
as many again in the backward pass; here each is written once. Rotary pairs stay interleaved in place: queries and keys share
the order, and a dot product does not see it.

Legend: `T` packed tokens, `H` heads, `N` no-position width, `R` rotary width, `V` value width, `C` = N + R.
"""

from __future__ import annotations

from typing import Any

import torch

from k2lab.models.attention import LogitStats, attend, attend_backward
from k2lab.models.pack import Pack


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """The last axis as complex numbers (x0 + i x1, x2 + i x3, ...), a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class LatentAttention(torch.autograd.Function):
    """q [T, H C], kv [T, H (N + V)], k_rot [T, R], angles complex [T, R / 2] or None (no positions) -> [T, H V]."""

    @staticmethod
    def forward(ctx, q_TX, kv_TX, k_rot_TR, angles, heads, widths, scale, pack, stats):
        N, R, V = widths
        T = q_TX.shape[0]
        q_in, kv = q_TX.view(T, heads, N + R), kv_TX.view(T, heads, N + V)
        k = kv.new_empty(T, heads, N + R)
        k[..., :N] = kv[..., :N]
        if angles is None:
            q = q_in
            k[..., N:] = k_rot_TR.unsqueeze(1)
        else:
            q = torch.empty_like(q_in)
            q[..., :N] = q_in[..., :N]
            torch.mul(_pairs(q_in[..., N:]), angles.unsqueeze(1), out=_pairs(q[..., N:]))
            k[..., N:] = torch.view_as_real(_pairs(k_rot_TR) * angles).flatten(-2).unsqueeze(1)
        out, kept = attend(q, k, kv[..., N:], scale, pack, stats, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, kv_TX, angles, *kept)
        ctx.rest = (heads, widths, scale, pack)
        return out.view(T, heads * V)

    @staticmethod
    def backward(ctx, grad):
        q, k, kv_TX, angles, *kept = ctx.saved_tensors
        heads, (N, R, V), scale, pack = ctx.rest
        T = q.shape[0]
        kv, grad_kv = kv_TX.view(T, heads, N + V), kv_TX.new_empty(T, heads, N + V)
        grad_q, grad_k = attend_backward(grad.reshape(T, heads, V), q, k, kv[..., N:], scale, pack, kept, grad_kv[..., N:])
        grad_kv[..., :N] = grad_k[..., :N]
        grad_rot = grad_k[..., N:].sum(1)
        if angles is not None:
            back = angles.conj().resolve_conj()
            _pairs(grad_q[..., N:]).mul_(back.unsqueeze(1))
            _pairs(grad_rot).mul_(back)
        return grad_q.view(T, -1), grad_kv.view(T, -1), grad_rot, None, None, None, None, None, None


def _angles(position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """exp(i angle), complex [T, R / 2], from transformers' (cos, sin) of [1, T, R], whose halves are equal."""
    cos, sin = (x[0, :, : x.shape[-1] // 2] for x in position_embeddings)
    return torch.complex(cos.contiguous(), sin.contiguous())


class FastMLA(torch.nn.Module):
    """Mixed into transformers' latent attention classes by `swap`. Packs take `LatentAttention`, on the CPU in full and on GPUs
    in half precision; decoding, masks and everything else take the class's own forward with the "k2lab" attention function."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        pack: Pack | None = kwargs.get("k2_pack")
        rotary = kwargs.get("position_embeddings")
        if (
            pack is None
            or past_key_values is not None
            or (rotary is not None and not self.config.rope_interleave)
            or not self._fused(hidden_states)
        ):
            return super().forward(
                hidden_states=hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        x_TD = hidden_states[0]
        q_TX, kv_TZ = self._down(x_TD)
        if self.q_lora_rank is not None:
            q_TX = self.q_b_proj(self.q_a_layernorm(q_TX))
        kv_TL, k_rot_TR = kv_TZ.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        kv_TX = self.kv_b_proj(self.kv_a_layernorm(kv_TL))
        stats: LogitStats = self.k2_stats
        widths, heads = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim), self.num_heads
        if x_TD.device.type == "cpu":
            angles = None if rotary is None else _angles(rotary)
            out_TX = LatentAttention.apply(q_TX, kv_TX, k_rot_TR, angles, heads, widths, self.scaling, pack, stats)
        else:
            from k2lab.models import attention_gpu

            out_TX = attention_gpu.latent(q_TX, kv_TX, k_rot_TR, rotary, heads, widths, self.scaling, pack, stats)
        return self.o_proj(out_TX)[None], None

    def _down(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two projections of x: queries or their latent, and the latent of keys and values with the rotary key."""
        query = self.q_proj if self.q_lora_rank is None else self.q_a_proj
        if x_TD.device.type == "cuda":
            from k2lab.models.kernels import kda_linear

            if kda_linear.plain(query, self.kv_a_proj_with_mqa):
                return kda_linear.Projections.apply(0, x_TD, query.weight, self.kv_a_proj_with_mqa.weight)
        return query(x_TD), self.kv_a_proj_with_mqa(x_TD)

    def _fused(self, x: torch.Tensor) -> bool:
        """True if `LatentAttention` knows x's device and dtype."""
        if x.device.type == "cpu":
            return x.dtype in (torch.float32, torch.float64)
        from k2lab.models import attention_gpu

        return attention_gpu.takes(x, self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
