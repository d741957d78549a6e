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

from k2lab.models import attention, experts, gemm, lora, packed, qat
from k2lab.models.delta import FastKDA
from k2lab.models.kda import decay_gate, unit
from k2lab.models.mla import FastMLA
from k2lab.models.pack import Pack

GROW = 32  # tokens by which a row's memory grows at least
MANY_KEYS = 48
DENSE = ("LlamaAttention", "Qwen2Attention")


def kind_of(part: Any) -> type | None:
    """The class here that decodes an attention module, or None if there is none."""
    if isinstance(part, FastMLA):
        return Latent
    if isinstance(part, FastKDA):
        return Delta
    dense = any(cls.__name__ in DENSE and cls.__module__.startswith("transformers.") for cls in type(part).__mro__)
    return Dense if dense and getattr(part, "sliding_window", None) is None else None


SWIGLU = ("gate_proj", "up_proj", "down_proj")


def plain_mlp(mlp: Any) -> bool:
    """True for SwiGLU feed-forwards and for mixtures of such experts."""
    if all(hasattr(mlp, name) for name in SWIGLU):
        return mlp.config.hidden_act == "silu" and all(getattr(mlp, name).bias is None for name in SWIGLU)
    return hasattr(mlp, "gate") and hasattr(mlp, "experts") and plain_mlp(mlp.shared_experts)


@dataclass(frozen=True)
class New:
    """Prompts that begin, laid end to end in `pack`, and their rows: `stored_G`, `owner_B` the prompt of each new store and row;
    `at_GT` the token (of all prompts') at each place of each store, the last one again beyond its end; `groups`, `rows` where
    stores and rows go; `room` rows there must be memory for; `turns` the tokens' angles."""

    pack: Pack
    stored_G: torch.Tensor
    owner_B: torch.Tensor
    at_GT: torch.Tensor
    groups: slice
    rows: slice
    room: int
    turns: Turns | None


class Places:
    """Where rows and prompts lie in this step; the same for all layers.

    `rows` B padded; `at_B`, `own_B` i64: each row and where its token goes in its own memory; `num_groups`, `longest`, `own`:
    stored prompts, their longest, most own tokens with the new one; `turns` the new tokens' angles; `bias_B1T` 0 or -inf over
    prompt and own tokens. Each prompt has `per_prompt` M rows: `members` i64[G M] names them (with repeats where a prompt has
    fewer) and `place_B` is the inverse; both are None where the rows are in that order already.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Rows have come or gone."""
        self._begun = False

    def prepare(
        self, prompt_B: np.ndarray, own_B: np.ndarray, length_G: np.ndarray, rows: int, device: torch.device, rope: Rope | None
    ) -> None:
        """Sets everything for a step of rows that have `own_B` tokens of their own so far."""
        own = np.zeros(rows, np.int64)
        own[: len(own_B)] = own_B
        self.own = int(own.max()) + 1
        if self._begun:
            self.own_B += 1
        else:
            self._begin(prompt_B, length_G, rows, device)
            self.own_B = torch.from_numpy(own).to(device)
        if not self._begun or self.longest + self.own > self._bias_BT.shape[1]:
            until = torch.arange(self.own + GROW, device=device) < self.own_B[:, None]
            seen_BT = torch.cat([torch.arange(self.longest, device=device) < self._base_B[:, None], until], dim=1)
            self._bias_BT = torch.zeros(seen_BT.shape, device=device).masked_fill_(~seen_BT, float("-inf"))
        self._begun = True
        self._bias_BT[self.at_B, self.longest + self.own_B] = 0.0
        self.bias_B1T = self._bias_BT[:, None, : self.longest + self.own]
        self.turns = rope.at(self._base_B + self.own_B, int((self._lengths + own).max()) + 1) if rope is not None else None

    def _begin(self, prompt_B: np.ndarray, length_G: np.ndarray, rows: int, device: torch.device) -> None:
        owner = np.zeros(rows, np.int64)
        owner[: len(prompt_B)] = prompt_B
        self._lengths = np.where(np.arange(rows) < len(prompt_B), length_G[owner], 0)
        self._base_B = torch.from_numpy(self._lengths).to(device)
        self.at_B = torch.arange(rows, device=device)
        self.rows, self.num_groups, self.longest = rows, len(length_G), int(length_G.max())
        self.members = self.place_B = None
        self.per_prompt = 1
        if len(length_G) == len(prompt_B) and (prompt_B == np.arange(len(prompt_B))).all():
            self.num_groups = rows  # a store each; those of padded rows hold nothing
            return
        sizes = np.bincount(prompt_B, minlength=len(length_G))
        self.per_prompt = int(sizes.max())
        order = np.argsort(prompt_B, kind="stable")
        within = np.concatenate([np.arange(size) for size in sizes])
        members = np.zeros((len(length_G), self.per_prompt), np.int64)
        members[prompt_B[order], within] = order
        if members.size == rows and (members.ravel() == np.arange(rows)).all():
            return
        place = np.zeros(rows, np.int64)
        place[order] = prompt_B[order] * self.per_prompt + within
        self.members = torch.from_numpy(members.ravel()).to(device)
        self.place_B = torch.from_numpy(place).to(device)


@dataclass(frozen=True)
class Turns:
    """Rotations of some tokens: `cos`, `sin` [n, R], the second half like the first, and `angles` = exp(i angle) [n, R / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor
    angles: torch.Tensor


class Rope:
    """Rotations by position, from the model's own rotary module."""

    def __init__(self, hf: Any, like: torch.Tensor) -> None:
        self.module, self.like = hf.base_model.rotary_emb, like
        self.table: Turns | None = None

    def at(self, positions: torch.Tensor, end: int) -> Turns:
        """Of these positions, all below `end`."""
        if self.table is None or len(self.table.cos) < end:
            known = torch.arange(max(2 * end, 256), device=self.like.device)[None]
            cos, sin = (each[0] for each in self.module(self.like[:1, None], known))
            half = cos.shape[1] // 2
            wide = torch.promote_types(cos.dtype, torch.float32)
            self.table = Turns(cos, sin, torch.complex(cos[:, :half].to(wide), sin[:, :half].to(wide)))
        table = self.table
        return Turns(*(each.index_select(0, positions) for each in (table.cos, table.sin, table.angles)))


def turn_pairs_(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of the last axis in place."""
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(angles)
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles
    return x.copy_(torch.view_as_real(pairs).flatten(-2))


def turn_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (x_i, x_{i + half})."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


# ---------------------------------------------------------------- attention


class Store:
    """Keys or values of stored prompts [G, U, T, C] and of the rows' own tokens [B, U, T, C], with room to grow."""

    def __init__(self) -> None:
        self.prompt: torch.Tensor | None = None
        self.own: torch.Tensor | None = None

    def admit(self, new_TUC: torch.Tensor, new: New) -> None:
        """Takes the keys or values of the tokens of prompts that begin."""
        U, C = new_TUC.shape[1:]
        G, T = new.at_GT.shape
        # Beyond a prompt's end lies what no row looks at, but 0 x infinity would show: all memory holds finite numbers.
        self.prompt = _room(self.prompt, (max(new.groups.stop, new.room), U, T, C), new.groups.start, new_TUC)
        self.prompt[new.groups, :, :T] = new_TUC.index_select(0, new.at_GT.flatten()).view(G, T, U, C).transpose(1, 2)
        self.own = _room(self.own, (new.room, U, 1, C), new.rows.start, new_TUC)

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
    B, U, H, _ = q_BUHC.shape
    G, M, longest, own = places.num_groups, places.per_prompt, places.longest, places.own

    def by_prompt(x_BUHX: torch.Tensor) -> torch.Tensor:
        """[B, U, H, *] -> [G U, M H, *]."""
        x = x_BUHX if places.members is None else x_BUHX.index_select(0, places.members)
        return x.view(G, M, U, H, -1).transpose(1, 2).reshape(G * U, M * H, -1) if U > 1 else x.reshape(G, M * H, -1)

    def by_row(x: torch.Tensor) -> torch.Tensor:
        """The inverse."""
        x = x.view(G, U, M, H, -1).transpose(1, 2).reshape(G * M, U, H, -1)
        return x if places.place_B is None else x.index_select(0, places.place_B)

    scores = torch.empty(B, U, H, longest + own, device=q_BUHC.device, dtype=torch.promote_types(q_BUHC.dtype, torch.float32))
    scores[..., :longest] = by_row(_logits(by_prompt(q_BUHC), keys.prompt[:G, :, :longest].flatten(0, 1)))
    scores[..., longest:] = _logits(q_BUHC.flatten(0, 1), keys.own[:B, :, :own].flatten(0, 1)).view(B, U, H, own)
    probs = torch.softmax(scores.mul_(scale).add_(places.bias_B1T[:, None]), dim=-1).to(q_BUHC.dtype)
    prompt_values = values.prompt[:G, :, :longest, :width].flatten(0, 1)
    own_values = values.own[:B, :, :own, :width].flatten(0, 1)
    out = by_row(torch.bmm(by_prompt(probs[..., :longest]), prompt_values))
    return out + torch.bmm(probs[..., longest:].flatten(0, 1), own_values).view(B, U, H, width)


def _logits(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k^T of a batch; [b, queries, C], [b, keys, C] -> [b, queries, keys]. With few queries and many keys, MKL multiplies the
    other way round twice as fast (measured from 48 keys on)."""
    if k.shape[1] < MANY_KEYS:
        return torch.bmm(q, k.transpose(1, 2))
    return torch.bmm(k, q.transpose(1, 2)).transpose(1, 2).contiguous()


class Latent:
    """Multi-head latent attention, absorbed while decoding; keys are [latent | rotary part], values the latents."""

    def __init__(self, module: Any) -> None:
        self.module, self.keys = module, Store()

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        self.keys.move(moves, group_moves, longest, own)

    def _projected(self, x_BD: torch.Tensor, turns: Turns | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, H, N + R] and keys [B, L + R], rotated."""
        m = self.module
        if m.q_lora_rank is None:
            q_BX = linear(x_BD, m.q_proj)
        else:
            q_BX = linear(rms(linear(x_BD, m.q_a_proj), m.q_a_layernorm), m.q_b_proj)
        q_BHC = q_BX.view(len(x_BD), m.num_heads, -1)
        key_BC = linear(x_BD, m.kv_a_proj_with_mqa)
        key_BC[:, : m.kv_lora_rank] = rms(key_BC[:, : m.kv_lora_rank], m.kv_a_layernorm)
        if turns is not None:
            turn_pairs_(q_BHC[..., m.qk_nope_head_dim :], turns.angles[:, None])
            turn_pairs_(key_BC[:, m.kv_lora_rank :], turns.angles)
        return q_BHC, key_BC

    def prefill(self, x_TD: torch.Tensor, new: New) -> torch.Tensor:
        m, T = self.module, len(x_TD)
        H, N, R, L = m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
        q_THC, key_TC = self._projected(x_TD, new.turns)
        self.keys.admit(key_TC[:, None], new)
        expanded = linear(key_TC[:, :L], m.kv_b_proj).view(T, H, -1)
        k_THC = x_TD.new_empty(T, H, N + R)
        k_THC[..., :N] = expanded[..., :N]
        k_THC[..., N:] = key_TC[:, None, L:]
        out_THV = attention.packed(q_THC, k_THC, expanded[..., N:], m.scaling, new.pack)
        return linear(out_THV.reshape(T, -1), m.o_proj)

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        H, N, R, L = m.num_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.kv_lora_rank
        q_BHC, key_BC = self._projected(x_BD, places.turns)
        self.keys.append(key_BC[:, None], places)
        weight_HCL = m.kv_b_proj.weight.view(H, -1, L)
        q_BUHC = x_BD.new_empty(B, 1, H, L + R)
        q_HBL = torch.bmm(q_BHC[..., :N].transpose(0, 1), weight_HCL[:, :N])
        low = low_rank(m.kv_b_proj)
        if low is not None:
            B_HCr = low.B.view(H, -1, low.B.shape[1])
            q_HBL = q_HBL.add_(torch.bmm(q_BHC[..., :N].transpose(0, 1), B_HCr[:, :N]) @ low.A, alpha=low.scale)
        q_BUHC[:, 0, :, :L] = q_HBL.transpose(0, 1)
        q_BUHC[:, 0, :, L:] = q_BHC[..., N:]
        mixed_BUHL = attend(q_BUHC, self.keys, self.keys, L, m.scaling, places)
        mixed_HBL = mixed_BUHL[:, 0].transpose(0, 1)
        out_HBV = torch.bmm(mixed_HBL, weight_HCL[:, N:].transpose(1, 2))
        if low is not None:
            out_HBV = out_HBV.add_(torch.bmm(mixed_HBL @ low.A.t(), B_HCr[:, N:].transpose(1, 2)), alpha=low.scale)
        return linear(out_HBV.transpose(0, 1).reshape(B, -1), m.o_proj)


class Dense:
    """Ordinary attention with rotary positions, several query heads per key-value head."""

    def __init__(self, module: Any) -> None:
        self.module, self.keys, self.values = module, Store(), Store()

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        self.keys.move(moves, group_moves, longest, own)
        self.values.move(moves, group_moves, longest, own)

    def _projected(self, x_BD: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m = self.module
        q, k, v = (linear(x_BD, part).view(len(x_BD), -1, m.head_dim) for part in (m.q_proj, m.k_proj, m.v_proj))
        q, k = (turn_halves(part, turns.cos[:, None], turns.sin[:, None]) for part in (q, k))
        return q, k, v

    def prefill(self, x_TD: torch.Tensor, new: New) -> torch.Tensor:
        m = self.module
        q, k, v = self._projected(x_TD, new.turns)
        self.keys.admit(k, new)
        self.values.admit(v, new)
        k, v = (part.repeat_interleave(m.num_key_value_groups, dim=1) for part in (k, v))
        return linear(attention.packed(q, k, v, m.scaling, new.pack).reshape(len(x_TD), -1), m.o_proj)

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        q, k, v = self._projected(x_BD, places.turns)
        self.keys.append(k, places)
        self.values.append(v, places)
        q_BUHC = q.view(B, -1, m.num_key_value_groups, m.head_dim)
        return linear(attend(q_BUHC, self.keys, self.values, m.head_dim, m.scaling, places).reshape(B, -1), m.o_proj)


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

    def move(self, moves: Any, group_moves: Any, longest: int, own: int) -> None:
        if moves[0]:
            for kept in (*self.past, self.state):
                kept[moves[1]] = kept[moves[0]]

    def prefill(self, x_TD: torch.Tensor, new: New) -> torch.Tensor:
        m, T = self.module, len(x_TD)
        projected = [linear(x_TD, part)[None] for part in (m.q_proj, m.k_proj, m.v_proj)]
        self._remember(torch.cat(projected, dim=-1)[0], new)
        q, k, v = (part.view(1, T, m.num_heads, m.head_dim) for part in m._convolved(projected, None, new.pack))
        log_decay, beta = self._gates(x_TD)
        out, state_PHDV = m._attend(q, k, v, log_decay[None], beta[None], None, True, new.pack)
        self.state = _room(self.state, (new.room, *state_PHDV.shape[1:]), new.rows.start, state_PHDV.float())
        self.state[new.rows] = state_PHDV.index_select(0, new.owner_B).float()
        return self._gated(out[0], x_TD)

    def _remember(self, inputs_TX: torch.Tensor, new: New) -> None:
        """The last inputs of the convolution of each prompt, 0 before its first token."""
        reach = self.module.conv1d.weight.shape[-1] - 1
        if not self.past:
            self.past = [inputs_TX.new_zeros(0, inputs_TX.shape[1])] * reach
        starts_S1 = torch.tensor(new.pack.starts, device=inputs_TX.device)
        first_B, end_B = starts_S1[:-1][new.owner_B], starts_S1[1:][new.owner_B]
        for n in range(reach):
            at_B = end_B - reach + n
            rows_BX = inputs_TX.index_select(0, at_B.clamp(min=0)).mul_((at_B >= first_B)[:, None])
            self.past[n] = _room(self.past[n], (new.room, inputs_TX.shape[1]), new.rows.start, inputs_TX)
            self.past[n][new.rows] = rows_BX

    def _gates(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-decays [B, H, D] and rates [B, H]."""
        m, gate = self.module, self.module.forget_gate
        z = linear(linear(x_BD, gate.f_a_proj), gate.f_b_proj).view(len(x_BD), m.num_heads, m.head_dim)
        decay = decay_gate(z, gate.A_log.view(m.num_heads, 1), gate.dt_bias.view(m.num_heads, m.head_dim))
        return decay, torch.sigmoid(linear(x_BD, m.b_proj))

    def _gated(self, out_BHD: torch.Tensor, x_BD: torch.Tensor) -> torch.Tensor:
        m = self.module
        share = torch.sigmoid(linear(linear(x_BD, m.g_a_proj), m.g_b_proj).view(out_BHD.shape).float())
        mixed = (rms(out_BHD.to(x_BD.dtype).float(), m.o_norm) * share).to(x_BD.dtype)
        return linear(mixed.reshape(len(x_BD), -1), m.o_proj)

    def step(self, x_BD: torch.Tensor, places: Places) -> torch.Tensor:
        m, B = self.module, len(x_BD)
        H, D = m.num_heads, m.head_dim
        q, k, v = self._convolved(x_BD).view(B, 3, H, D).unbind(1)
        q, k, v = unit(q.float(), D**-0.5), unit(k.float()), v.float()
        log_decay, beta = self._gates(x_BD)
        decay = log_decay.exp_()
        state = self.state[:B].view(B * H, D, -1)
        both = torch.stack([k * decay, q * decay], dim=2).view(B * H, 2, D)
        held, base = torch.bmm(both, state).view(B, H, 2, -1).unbind(2)
        delta = (v - held).mul_(beta.float().unsqueeze(-1))
        out = torch.addcmul(base, (q * k).sum(-1, keepdim=True), delta)
        state.mul_(decay.view(B * H, D, 1)).baddbmm_(k.view(B * H, D, 1), delta.view(B * H, 1, -1))
        return self._gated(out, x_BD)

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
    y = gemm.linear(x_BI, module.weight) if module.bias is None else F.linear(x_BI, module.weight, module.bias)
    low = low_rank(module)
    return y if low is None else y.addmm_(x_BI @ low.A.t(), low.B.t(), alpha=low.scale)


def low_rank(module: Any) -> lora.Pair | None:
    """A linear layer's low-rank adapter, or None."""
    return lora.Pair(module.lora_A, module.lora_B, module.k2_scale) if isinstance(module, lora.LoRALinear) else None


def rms(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """w x / sqrt(mean(x^2) + eps) over the last axis, in fp32 or wider, rounded to x's dtype before w as in transformers."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * size.square_().div_(x.shape[-1]).add_(norm.variance_epsilon).rsqrt_()).to(x.dtype).mul_(norm.weight)


def mlp_of(x_BD: torch.Tensor, mlp: Any) -> torch.Tensor:
    if hasattr(mlp, "gate_proj"):
        return linear(F.silu(linear(x_BD, mlp.gate_proj), inplace=True).mul_(linear(x_BD, mlp.up_proj)), mlp.down_proj)
    _, weights_BK, chosen_BK = mlp.gate(x_BD)
    dense = not isinstance(mlp.experts, packed.PackedExperts) and packed.lora_of(mlp.experts) is None
    if dense and x_BD.device.type == "cpu" and mlp.experts.config._experts_implementation == experts.NAME:
        out_BD = _experts(x_BD, chosen_BK, weights_BK.to(x_BD.dtype), *qat.weights(mlp.experts))
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
