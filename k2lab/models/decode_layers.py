"""The layers of a model while it decodes: one token per row, on the weights of the model's own modules.

Legend: `B` rows, `G` stored prompts, `M` rows of one prompt, `P` prompts that begin, `T` tokens, `D` width, `H` heads, `U`
key-value heads (1 for latent attention), `C` key width, `N` no-position width, `R` rotary width, `V` value width, `L` latent,
`E` experts, `K` chosen experts, `J` convolution kernel, `X` convolution channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from k2lab.models import experts, gemm
from k2lab.models.delta import FastKDA
from k2lab.models.experts import FastMLP
from k2lab.models.kda import decay_gate, unit
from k2lab.models.mla import FastMLA

GROW = 32  # tokens by which a row's memory grows at least
DENSE = ("LlamaAttention", "Qwen2Attention")


def kind_of(part: Any) -> type | None:
    if isinstance(part, FastMLA):
        return Latent
    if isinstance(part, FastKDA):
        return Delta
    dense = any(cls.__name__ in DENSE and cls.__module__.startswith("transformers.") for cls in type(part).__mro__)
    return Dense if dense and getattr(part, "sliding_window", None) is None else None


def plain_mlp(mlp: Any) -> bool:
    if isinstance(mlp, FastMLP):
        return all(getattr(mlp, name).bias is None for name in ("gate_proj", "up_proj", "down_proj"))
    return hasattr(mlp, "gate") and hasattr(mlp, "experts") and isinstance(mlp.shared_experts, FastMLP)


@dataclass(frozen=True)
class New:
    """Rows that begin: the prompt i64 of each new store and of each new row, padding and length of the prompts, where stores and
    rows go, and how many rows there must be room for."""

    stored: torch.Tensor
    owner: torch.Tensor
    padding: torch.Tensor
    lengths: torch.Tensor
    groups: slice
    rows: slice
    rows_padded: int


class Places:
    """Where rows and prompts lie in this step; the same for all layers.

    `rows` B padded; `at_B`, `own_B` i64: each row and where its token goes in its own memory; `num_groups`, `longest`, `own`:
    stored prompts, their longest, most own tokens with the new one; `cos_BR`, `sin_BR`; `bias_B1T` 0 or -inf over prompt and own
    tokens. `members_GM` row numbers of each prompt flattened and `place_B` the inverse; None if row i continues prompt i."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Rows have come or gone."""
        self._begun = False

    def prepare(
        self, prompt_B: np.ndarray, own_B: np.ndarray, length_G: np.ndarray, rows: int, device: torch.device, rope: Any
    ) -> None:
        own = np.zeros(rows, np.int64)
        own[: len(own_B)] = own_B
        if not self._begun:
            self._begin(prompt_B, length_G, rows, device)
            self.own_B = torch.from_numpy(own).to(device)
            self._begun = True
        else:
            self.own_B += 1
        self.own = int(own.max()) + 1
        reach_BT = torch.arange(self.own, device=device) <= self.own_B[:, None]
        seen_BT = torch.cat([self.prompt_seen_BT, reach_BT], dim=1)
        self.bias_B1T = torch.zeros(seen_BT.shape, device=device).masked_fill_(~seen_BT, float("-inf"))[:, None]
        if rope is not None:
            self.cos_BR, self.sin_BR = rope.at(self.base_B + self.own_B, int((self._lengths + own).max()) + 1)

    def _begin(self, prompt_B: np.ndarray, length_G: np.ndarray, rows: int, device: torch.device) -> None:
        owner = np.zeros(rows, np.int64)
        owner[: len(prompt_B)] = prompt_B
        self._lengths = np.where(np.arange(rows) < len(prompt_B), length_G[owner], 0)
        self.rows, self.num_groups, self.longest = rows, len(length_G), int(length_G.max())
        self.at_B = torch.arange(rows, device=device)
        self.base_B = torch.from_numpy(self._lengths).to(device)
        self.prompt_seen_BT = torch.arange(self.longest, device=device) < self.base_B[:, None]
        self.members_GM = self.place_B = None
        if len(length_G) != len(prompt_B) or (prompt_B != np.arange(len(prompt_B))).any():
            order = np.argsort(prompt_B, kind="stable")
            sizes = np.bincount(prompt_B, minlength=len(length_G))
            within = np.concatenate([np.arange(size) for size in sizes])
            members = np.zeros((len(length_G), sizes.max()), np.int64)
            members[prompt_B[order], within] = order
            place = np.zeros(rows, np.int64)
            place[order] = prompt_B[order] * members.shape[1] + within
            self.members_GM = torch.from_numpy(members).to(device)
            self.place_B = torch.from_numpy(place).to(device)


class Rope:
    """Cosines and sines by position, from the model's own rotary module; the second half of the columns repeats the first."""

    def __init__(self, hf: Any, like: torch.Tensor) -> None:
        self.module, self.like = hf.base_model.rotary_emb, like
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None

    def at(self, positions_B: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.table is None or len(self.table[0]) < end:
            known = torch.arange(max(2 * end, 256), device=self.like.device)[None]
            cos, sin = self.module(self.like[:1, None], known)
            self.table = cos[0], sin[0]
        cos, sin = self.table
        return cos.index_select(0, positions_B), sin.index_select(0, positions_B)


# ---------------------------------------------------------------- attention


class Store:
    """Keys or values of stored prompts [G, U, T, C] and of the rows' own tokens [B, U, T, C], with room to grow."""

    def __init__(self) -> None:
        self.prompt: torch.Tensor | None = None
        self.own: torch.Tensor | None = None

    def admit(self, cached_PUTC: torch.Tensor, new: Any) -> None:
        """Takes over prompts from transformers' cache, where they are padded on the left."""
        P, U, T, C = cached_PUTC.shape
        steps = torch.arange(T, device=cached_PUTC.device)
        at_PT = (steps + new.padding[:, None]).clamp_(max=T - 1)
        moved = cached_PUTC.gather(2, at_PT[:, None, :, None].expand(P, U, T, C))
        # Beyond a prompt's end lies what no row looks at, but 0 x infinity would show: all memory holds finite numbers.
        rows = max(new.groups.stop, new.rows_padded)
        self.prompt = _room(self.prompt, (rows, U, T, C), new.groups.start, cached_PUTC)
        self.prompt[new.groups, :, :T] = moved.index_select(0, new.stored)
        self.own = _room(self.own, (new.rows_padded, U, 1, C), new.rows.start, cached_PUTC)

    def append(self, new_BUC: torch.Tensor, places: Places) -> None:
        if self.own.shape[2] < places.own:
            shape = (self.own.shape[0], self.own.shape[1], places.own + max(GROW, places.own // 2), self.own.shape[3])
            self.own = _room(self.own, shape, places.rows, new_BUC)
        self.own[places.at_B, :, places.own_B] = new_BUC

    def move(self, moves: tuple[list[int], list[int]], group_moves: tuple[list[int], list[int]], longest: int, own: int) -> None:
        if moves[0]:
            self.own[moves[1], :, :own] = self.own[moves[0], :, :own]
        if group_moves[0]:
            self.prompt[group_moves[1], :, :longest] = self.prompt[group_moves[0], :, :longest]


def _room(old: torch.Tensor | None, shape: tuple[int, ...], used: int, like: torch.Tensor) -> torch.Tensor:
    """`old` if it is as large as `shape` in every axis, else a larger tensor with its first `used` entries."""
    if old is None:
        return like.new_zeros(shape)
    if all(have >= want for have, want in zip(old.shape, shape)):
        return old
    larger = like.new_zeros([max(have, want) for have, want in zip(old.shape, shape)])
    larger[tuple(slice(size) for size in (used, *old.shape[1:]))] = old[:used]
    return larger


def attend(q_BUHC: torch.Tensor, keys: Store, values: Store, width: int, scale: float, places: Places) -> torch.Tensor:
    """softmax(q k scale) v over the prompt's and the own tokens of each row; values are the first `width` columns.
    q [B, U, H, C] with H query heads per key-value head -> [B, U, H, width]."""
    B, U, H, C = q_BUHC.shape
    G, longest, own = places.num_groups, places.longest, places.own
    shared = places.members_GM is not None
    if not shared:
        G = B

    def by_prompt(x_BUHX: torch.Tensor) -> torch.Tensor:
        """[B, U, H, *] -> [G U, M H, *]."""
        if not shared:
            return x_BUHX.flatten(0, 1)
        x = x_BUHX.index_select(0, places.members_GM.flatten()).view(G, -1, U, H, x_BUHX.shape[-1])
        return x.transpose(1, 2).reshape(G * U, -1, x_BUHX.shape[-1])

    def by_row(x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        if not shared:
            return x.view(B, U, H, -1)
        M = places.members_GM.shape[1]
        return x.view(G, U, M, H, -1).transpose(1, 2).reshape(G * M, U, H, -1).index_select(0, places.place_B)

    scores = torch.empty(B, U, H, longest + own, device=q_BUHC.device, dtype=torch.promote_types(q_BUHC.dtype, torch.float32))
    prompt_keys, own_keys = (x.flatten(0, 1) for x in (keys.prompt[:G, :, :longest], keys.own[:B, :, :own]))
    scores[..., :longest] = by_row(torch.bmm(by_prompt(q_BUHC), prompt_keys.transpose(1, 2)))
    scores[..., longest:] = torch.bmm(q_BUHC.flatten(0, 1), own_keys.transpose(1, 2)).view(B, U, H, own)
    probs = torch.softmax(scores.mul_(scale).add_(places.bias_B1T[:, None]), dim=-1).to(q_BUHC.dtype)
    prompt_values = values.prompt[:G, :, :longest, :width].flatten(0, 1)
    own_values = values.own[:B, :, :own, :width].flatten(0, 1)
    out = by_row(torch.bmm(by_prompt(probs[..., :longest]), prompt_values))
    return out + torch.bmm(probs[..., longest:].flatten(0, 1), own_values).view(B, U, H, width)


class Latent:
    """Multi-head latent attention, absorbed; keys are [latent | rotary part], values the latents."""

    def __init__(self, module: Any) -> None:
        self.module, self.keys = module, Store()
        self.interleaved = getattr(module.config, "rope_interleave", False)

    def admit(self, layer: Any, new: Any) -> None:
        self.keys.admit(torch.cat([layer.keys, layer.values], dim=-1), new)

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        self.keys.move(moves, group_moves, longest, own)

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m = self.module
        H, N, R, V, L = m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim, m.kv_lora_rank
        if m.q_lora_rank is None:
            q_BX = linear(x_BD, m.q_proj)
        else:
            q_BX = linear(rms(linear(x_BD, m.q_a_proj), m.q_a_layernorm), m.q_b_proj)
        B, kv_BX = len(x_BD), linear(x_BD, m.kv_a_proj_with_mqa)
        q_BHC = q_BX.view(B, H, N + R)
        q_rot, k_rot = q_BHC[..., N:], kv_BX[:, L:]
        if hasattr(places, "cos_BR"):
            turn = _turned_pairs if self.interleaved else _turned_halves
            q_rot = turn(q_rot, places.cos_BR[:, None], places.sin_BR[:, None])
            k_rot = turn(k_rot, places.cos_BR, places.sin_BR)
        weight_HCL = m.kv_b_proj.weight.view(H, N + V, L)
        q_BUHC = x_BD.new_empty(B, 1, H, L + R)
        q_BUHC[:, 0, :, :L] = torch.bmm(q_BHC[..., :N].transpose(0, 1), weight_HCL[:, :N]).transpose(0, 1)
        q_BUHC[:, 0, :, L:] = q_rot
        self.keys.append(torch.cat([rms(kv_BX[:, :L], m.kv_a_layernorm), k_rot], dim=-1)[:, None], places)
        mixed_BUHL = attend(q_BUHC, self.keys, self.keys, L, m.scaling, places)
        out_HBV = torch.bmm(mixed_BUHL[:, 0].transpose(0, 1), weight_HCL[:, N:].transpose(1, 2))
        return linear(out_HBV.transpose(0, 1).reshape(B, H * V), m.o_proj)


class Dense:
    """Ordinary attention with rotary positions, several query heads per key-value head."""

    def __init__(self, module: Any) -> None:
        self.module, self.keys, self.values = module, Store(), Store()

    def admit(self, layer: Any, new: Any) -> None:
        self.keys.admit(layer.keys, new)
        self.values.admit(layer.values, new)

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        self.keys.move(moves, group_moves, longest, own)
        self.values.move(moves, group_moves, longest, own)

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        q, k, v = (linear(x_BD, part).view(B, -1, m.head_dim) for part in (m.q_proj, m.k_proj, m.v_proj))
        q, k = (_turned_halves(part, places.cos_BR[:, None], places.sin_BR[:, None]) for part in (q, k))
        self.keys.append(k, places)
        self.values.append(v, places)
        q_BUHC = q.view(B, -1, m.num_key_value_groups, m.head_dim)
        return linear(attend(q_BUHC, self.keys, self.values, m.head_dim, m.scaling, places).view(B, -1), m.o_proj)


def _turned_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs; the result holds all first members, then all second ones, as transformers caches them."""
    half = x.shape[-1] // 2
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _turned_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (x_i, x_{i + half})."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


# ---------------------------------------------------------------- Kimi Delta Attention


class Delta:
    """Kimi Delta Attention with one state [H, D, V] per row, and the last J - 1 inputs of the short convolution.

    With a = exp(g): S' = diag(a) S + k (b (v - S^T (a k)))^T and o = S'^T q = S^T (a q) + (k . q) delta, so S is read once for
    both products.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.past: list[torch.Tensor] = []  # inputs [B, X] of the convolution, the oldest first
        self.state: torch.Tensor | None = None

    def admit(self, layer: Any, new: Any) -> None:
        conv_PXJ, state_PHDV = layer.conv_states[0], layer.recurrent_states[0]
        taps = self.module.conv1d.weight.shape[-1]
        if not self.past:
            self.past = [conv_PXJ.new_zeros(0, conv_PXJ.shape[1])] * (taps - 1)
        for n in range(taps - 1):
            self.past[n] = _room(self.past[n], (new.rows_padded, conv_PXJ.shape[1]), new.rows.start, conv_PXJ)
            self.past[n][new.rows] = conv_PXJ[:, :, n - (taps - 1)].index_select(0, new.owner)
        self.state = _room(self.state, (new.rows_padded, *state_PHDV.shape[1:]), new.rows.start, state_PHDV)
        self.state[new.rows] = state_PHDV.index_select(0, new.owner)

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        if moves[0]:
            for kept in (*self.past, self.state):
                kept[moves[1]] = kept[moves[0]]

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        H, D = m.num_heads, m.head_dim
        q, k, v = self._convolved(x_BD).view(B, 3, H, D).unbind(1)
        q, k, v = unit(q.float(), D**-0.5), unit(k.float()), v.float()
        gate = m.forget_gate
        z = linear(linear(x_BD, gate.f_a_proj), gate.f_b_proj).view(B, H, D)
        decay = decay_gate(z, gate.A_log.view(H, 1), gate.dt_bias.view(H, D)).exp_()
        beta_BH1 = torch.sigmoid(linear(x_BD, m.b_proj)).float().unsqueeze(-1)
        state = self.state[:B].view(B * H, D, -1)
        both = torch.stack([k * decay, q * decay], dim=2).view(B * H, 2, D)
        held, base = torch.bmm(both, state).view(B, H, 2, -1).unbind(2)
        delta = (v - held).mul_(beta_BH1)
        out = torch.addcmul(base, (q * k).sum(-1, keepdim=True), delta).to(x_BD.dtype).float()
        state.mul_(decay.view(B * H, D, 1)).baddbmm_(k.view(B * H, D, 1), delta.view(B * H, 1, -1))
        share = torch.sigmoid(linear(linear(x_BD, m.g_a_proj), m.g_b_proj).view(B, H, D).float())
        mixed = (rms(out, m.o_norm) * share).to(x_BD.dtype)
        return linear(mixed.reshape(B, H * D), m.o_proj)

    def _convolved(self, x_BD: torch.Tensor) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        taps_JX = m.conv1d.weight[:, 0].t()
        oldest = self.past.pop(0)
        new_BX = torch.cat([linear(x_BD, part) for part in (m.q_proj, m.k_proj, m.v_proj)], dim=-1)
        y_BX = new_BX * taps_JX[-1]
        for tap, inputs in zip(taps_JX, [oldest, *self.past]):
            y_BX.addcmul_(inputs[:B], tap)
        oldest[:B] = new_BX  # its memory now holds the newest input
        self.past.append(oldest)
        return F.silu(y_BX, inplace=True)


# ---------------------------------------------------------------- the rest of a layer


def linear(x_BI: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
    return gemm.linear(x_BI, module.weight) if module.bias is None else F.linear(x_BI, module.weight, module.bias)


def rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last axis, in fp32 or wider, rounded to x's dtype before w as in transformers."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * size.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()).to(x.dtype).mul_(norm.weight)


def mlp_of(x_BD: torch.Tensor, mlp: Any) -> torch.Tensor:
    if isinstance(mlp, FastMLP):
        return linear(F.silu(linear(x_BD, mlp.gate_proj), inplace=True).mul_(linear(x_BD, mlp.up_proj)), mlp.down_proj)
    _, weights_BK, chosen_BK = mlp.gate(x_BD)
    if x_BD.device.type == "cpu" and mlp.experts.config._experts_implementation == experts.NAME:
        out_BD = _experts(x_BD, chosen_BK, weights_BK.to(x_BD.dtype), mlp.experts.gate_up_proj, mlp.experts.down_proj)
    else:
        out_BD = mlp.experts(x_BD, chosen_BK, weights_BK)
    return out_BD + mlp_of(x_BD, mlp.shared_experts)


def _experts(
    x_BD: torch.Tensor, chosen_BK: torch.Tensor, weights_BK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """As `experts.ExpertsSwiGLU` forwards, for few rows: only the two products run expert by expert."""
    B, K = chosen_BK.shape
    flat = chosen_BK.flatten()
    order = flat.argsort(stable=True)
    counts = np.bincount(flat.numpy(), minlength=len(gate_up))
    rows = x_BD.index_select(0, order.div(K, rounding_mode="floor"))
    hidden, out = x_BD.new_empty(B * K, gate_up.shape[1]), x_BD.new_empty(B * K, x_BD.shape[1])
    spans = [(e, end - size, end) for e, (size, end) in enumerate(zip(counts.tolist(), counts.cumsum().tolist())) if size]
    for expert, first, end in spans:
        torch.mm(rows[first:end], gate_up[expert].t(), out=hidden[first:end])
    gate, up = hidden.chunk(2, dim=1)
    act = F.silu(gate).mul_(up)
    for expert, first, end in spans:
        torch.mm(act[first:end], down[expert].t(), out=out[first:end])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return torch.bmm(weights_BK[:, None], out.index_select(0, back).view(B, K, -1))[:, 0]
