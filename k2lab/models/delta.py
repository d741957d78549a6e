"""The Kimi Delta Attention layer: transformers' module with our convolution and chunked recurrence, packs and caches included.

On CUDA a layer that trains keeps what its backward pass needs while that is small; a longer pack is computed in segments, twice,
with a flat memory (`kda_segments`).

Legend: `B` batch, `T` tokens, `H` heads, `D` head width, `X` = H D channels of each convolution.
"""

from __future__ import annotations

from typing import Any

import torch

from k2lab.models import kda_gpu
from k2lab.models.conv import short_conv
from k2lab.models.kda import chunk_kda, decay_gate
from k2lab.models.kda_segments import Cost, InSegments, Segment, initial_states, plan
from k2lab.models.kernels.kda_linear import Projections, Unseen, plain
from k2lab.models.pack import Pack

KEEP_BYTES = 2.0e9  # activations that one layer may keep for its backward pass before it computes them again instead
WORK_BYTES = 4.5e9  # what the backward pass of one segment may take
KEPT_ROWS = 12.0  # rows (H D numbers) per token that a layer in one piece keeps
WORK_ROWS = 26.0  # rows per token at the peak of the backward pass of a segment (measured: 29.5 with the states of its chunks)


class FastKDA(torch.nn.Module):
    """Mixed into transformers' `KimiLinearDeltaAttention` by `swap`. Single-token decoding keeps the class's own forward.

    `k2_keep_bytes` and `k2_work_bytes` decide when a CUDA layer works in segments and how long these are."""

    k2_keep_bytes: float = KEEP_BYTES
    k2_work_bytes: float = WORK_BYTES

    def forward(
        self, hidden_states: torch.Tensor, cache_params: Any = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        pack: Pack | None = kwargs.get("k2_pack")
        B, T, _ = hidden_states.shape
        if cache_params is not None and T == 1:
            return super().forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask)
        if attention_mask is not None:  # padded positions must neither enter the convolution nor the state
            hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
        if cache_params is None and hidden_states.device.type == "cuda":
            rows = pack if pack is not None else Pack.rows(B, T, hidden_states.device)
            return self._packed(hidden_states.reshape(B * T, -1), rows).view(B, T, -1)
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

    @torch.compiler.disable  # kernels that are launched from Python, and a number of segments that differs in every pack
    def _packed(self, x_TD: torch.Tensor, pack: Pack) -> torch.Tensor:
        """The layer over a pack without a cache: in one piece while that is small, else in segments."""
        row = self.num_heads * self.head_dim * x_TD.element_size()
        state = self.num_heads * self.head_dim**2
        # A row is H D numbers. In backward: inputs and outputs of every part and their gradients, some in fp32; per chunk the
        # state and its gradient; per document initial and final states and their gradients in fp32.
        cost = Cost(token=WORK_ROWS * row, chunk=2.0 * state * x_TD.element_size(), document=16.0 * state)
        training = torch.is_grad_enabled() and (x_TD.requires_grad or any(p.requires_grad for p in self.parameters()))
        segments = plan(pack, cost, self.k2_work_bytes, self.conv_kernel_size - 1)
        if training and KEPT_ROWS * row * pack.num_tokens <= self.k2_keep_bytes:
            whole = Segment(0, pack.num_tokens, 0, False, False, pack, pack)
            return self._segment(x_TD, whole, None, False)[0]
        return InSegments.apply(self._segment, segments, x_TD, *self.parameters())

    def _segment(
        self, x: torch.Tensor, segment: Segment, state: torch.Tensor | None, for_backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [reach + tokens, width], state f32[H, D, D] of a document that began before -> (y [tokens, width], state of a
        document that goes on). `for_backward`: the backward pass follows at once, so it may keep all that it can use."""
        H, D = self.num_heads, self.head_dim
        gate, lower_bound = self.forget_gate, getattr(self.forget_gate, "lower_bound", None)
        *mixed, decay, share, beta = self._projected(x, segment.reach)
        weights = self.conv1d.weight.squeeze(1).split(H * D, dim=0)
        query, key, value = (
            short_conv(part, weight, segment.window, segment.reach).view(1, -1, H, D) for part, weight in zip(mixed, weights)
        )
        z = gate.f_b_proj(decay).view(1, -1, H, D)
        beta = beta[None].to(torch.promote_types(beta.dtype, torch.float32)).sigmoid()
        initial = initial_states(state, segment, (H, D, D))
        fast = kda_gpu.takes(query, value)
        more: dict[str, Any] = {"initial_state": initial, "output_final_state": initial is not None, "pack": segment.pack}
        if fast:
            out, final = kda_gpu.gated_kda(
                query, key, value, z, beta, gate.A_log, gate.dt_bias, lower_bound, keep=for_backward, **more
            )
        else:
            g = decay_gate(z, gate.A_log.view(H, 1), gate.dt_bias.view(H, D), lower_bound)
            out, final = chunk_kda(query, key, value, g, beta, use_qk_l2norm_in_kernel=True, **more)
        output_gate = self.g_b_proj(share).view(1, -1, H, D)
        normed = self.o_norm(out, output_gate)
        normed, final = normed.view(-1, H * D), final[-1].clone() if segment.goes_on and final is not None else None
        if for_backward and plain(self.o_proj):  # the output is known
            return Unseen.apply(normed, self.o_proj.weight), final
        return self.o_proj(normed), final

    def _projected(self, x: torch.Tensor, reach: int) -> tuple[torch.Tensor, ...]:
        """What x is projected to: the convolution's inputs; without the first `reach` tokens, those of the gates, and beta."""
        parts = (self.q_proj, self.k_proj, self.v_proj, self.forget_gate.f_a_proj, self.g_a_proj, self.b_proj)
        if plain(*parts):
            return Projections.apply(reach, x, *(part.weight for part in parts))
        late = x[reach:]
        return tuple(part(x if n < 3 else late) for n, part in enumerate(parts))

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
        return chunk_kda(
            query,
            key,
            value,
            g,
            beta,
            initial_state=state,
            output_final_state=want_state,
            use_qk_l2norm_in_kernel=True,
            pack=pack,
        )
