"""The Kimi Delta Attention layer: transformers' module with our convolution and chunked recurrence, packs and caches included.

Legend: `B` batch, `T` tokens, `H` heads, `D` head width, `X` = H D channels of each convolution.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from k2lab.models.conv import short_conv
from k2lab.models.kda import chunk_kda, decay_gate
from k2lab.models.pack import Pack


@cache
def _fla() -> Any:
    """flash-linear-attention's `chunk_kda`, or None where it is not installed."""
    try:
        from fla.ops.kda import chunk_kda as kernel
    except ImportError:
        return None
    return kernel


class FastKDA(torch.nn.Module):
    """Mixed into transformers' `KimiLinearDeltaAttention` by `swap`. Single-token decoding keeps the class's own forward."""

    def forward(
        self, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        pack: Pack | None = kwargs.get("k2_pack")
        B, T, _ = hidden_states.shape
        if cache_params is not None and T == 1:
            return super().forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask)
        if attention_mask is not None:  # padded positions must neither enter the convolution nor the state
            hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
        x = hidden_states
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        begun = cache_params is not None and cache_params.has_previous_state(self.layer_idx)
        state = cache_params.layers[self.layer_idx].recurrent_states[0] if begun else None
        heads = (B, T, self.num_heads, self.head_dim)
        query, key, value = (part.view(heads) for part in self._convolved(projected, cache_params, pack))
        gate = self.forget_gate
        z = gate.f_b_proj(gate.f_a_proj(x)).view(heads)
        g = decay_gate(z, gate.A_log.view(self.num_heads, 1), gate.dt_bias.view(self.num_heads, self.head_dim))
        beta = torch.sigmoid(self.b_proj(x))
        out, final = self._attend(query, key, value, g, beta, state, cache_params is not None, pack)
        if cache_params is not None:
            cache_params.update_recurrent_state(final.float(), self.layer_idx)
        output_gate = self.g_b_proj(self.g_a_proj(x)).view(heads)
        return self.o_proj(self.o_norm(out, output_gate).reshape(B, T, -1))

    def _convolved(self, projected: list[torch.Tensor], cache_params: Any, pack: Pack | None) -> list[torch.Tensor]:
        """The short convolutions of query, key and value; with a cache they continue from the cached inputs and cache the last
        ones."""
        B, T, X = projected[0].shape
        if cache_params is not None:
            both = torch.cat(projected, dim=-1).transpose(1, 2)
            full = cache_params.update_conv_state(both, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
            projected = list(full.transpose(1, 2).split(X, dim=-1))
        length = projected[0].shape[1]
        rows = pack if pack is not None else Pack.rows(B, length, projected[0].device)
        weights = self.conv1d.weight.squeeze(1).split(X, dim=0)
        mixed = [short_conv(part.reshape(-1, X), weight, rows) for part, weight in zip(projected, weights)]
        return [part.view(B, length, X)[:, length - T :].contiguous() for part in mixed]

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        want_state: bool,
        pack: Pack | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kernel = _fla() if query.device.type == "cuda" else None
        arguments: dict[str, Any] = {
            "initial_state": state,
            "output_final_state": want_state,
            "use_qk_l2norm_in_kernel": True,
        }
        if kernel is None:
            return chunk_kda(query, key, value, g, beta, pack=pack, **arguments)
        if pack is not None:
            arguments["cu_seqlens"] = torch.tensor(pack.starts, dtype=torch.int32, device=query.device)
        return kernel(query, key, value, g, beta, **arguments)
