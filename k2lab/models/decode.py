"""Decoding many rows, one token per step, on the weights of a model that `swap` has prepared.

The same function as transformers' forward with a cache, without what that costs per token: modules and hooks, masks, caches that
are concatenated anew. Keys and values of a prompt are stored once for all rows that continue it, and each prompt is one product
for all of its rows; a row's own tokens lie in preallocated memory. Latent attention is absorbed: with k_t = W_k c_t and
v_t = W_v c_t, q . k_t = (W_k^T q) . c_t and sum_t p_t v_t = W_v sum_t p_t c_t (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), so
the cached latents are never expanded. Prompts run as a pack, by the functions that training uses.

Legend: `B` rows, `G` stored prompts, `P` prompts that begin, `T` tokens, `D` width, `W` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from k2lab.models import attention, lora
from k2lab.models.decode_layers import New, Places, Rope, kind_of, linear, mlp_of, plain_mlp, rms
from k2lab.models.pack import Pack

PAD_ROWS = 16  # rows are padded to a multiple of this, so that few shapes of products occur
PACK_TOKENS = 16384  # prompts of at most so many tokens (or one longer prompt) run together
SHARED = 8  # most rows that share one stored prompt
ROPES = ("default", "yarn", "linear", "llama3")  # kinds whose angles depend on the position alone


def supports(hf: Any) -> bool:
    """True if every layer of the transformers model `hf` is one that `Decoder` knows, without hooks, dropout or adapters other
    than those of `lora`."""
    config = hf.config
    layers = getattr(hf.base_model, "layers", None)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if layers is None or rope not in ROPES or getattr(config, "_attn_implementation", "") != attention.NAME:
        return False
    for module in hf.modules():
        known = {"weight", "bias", *lora.FACTORS} if isinstance(module, lora.LoRALinear) else {"weight", "bias"}
        if isinstance(module, torch.nn.Linear) and not {n for n, _ in module.named_parameters()} <= known:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    if (
        hasattr(hf.base_model, "rotary_emb")
        and getattr(config, "kv_lora_rank", None)
        and not getattr(config, "rope_interleave", True)
    ):
        return False
    return all(kind_of(layer.self_attn) and plain_mlp(layer.mlp) for layer in layers)


def decoder(hf: Any) -> Decoder | None:
    """A decoder for `hf`, or None if it does not know all of its layers."""
    return Decoder(hf) if supports(hf) else None


class Decoder:
    """Rows under way. `start` adds rows at the end, `step` gives every row one token, `keep` drops the finished ones.

    Logits are f32. Use inside `torch.inference_mode()`, the model in evaluation mode and its weights unchanged meanwhile.
    """

    refills = True  # rows may be started while others are under way

    def __init__(self, hf: Any) -> None:
        assert supports(hf), "ask `supports` first"
        self.embedding = hf.get_input_embeddings().weight
        self.head = hf.get_output_embeddings()
        self.device = self.embedding.device
        self.final_norm = hf.base_model.norm
        self.layers = [(layer, kind_of(layer.self_attn)(layer.self_attn)) for layer in hf.base_model.layers]
        self.rope = Rope(hf, self.embedding) if hasattr(hf.base_model, "rotary_emb") else None
        self.prompt_B, self.own_B = np.zeros(0, np.int64), np.zeros(0, np.int64)  # stored prompt, own tokens of each row
        self.length_G = np.zeros(0, np.int64)
        self.places = Places()

    def __len__(self) -> int:
        """Rows under way."""
        return len(self.prompt_B)

    # ------------------------------------------------------------ rows come and go

    def start(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """Runs the prompts and adds `counts[p]` rows that continue prompt p; logits f32[P, W] after each prompt."""
        share = max(1, min(SHARED, sum(counts) // len(prompts)))
        found, first, size = [], 0, 0
        for p, prompt in enumerate(prompts):
            if size and size + len(prompt) > PACK_TOKENS:
                found.append(self._start(prompts[first:p], counts[first:p], share))
                first, size = p, 0
            size += len(prompt)
        found.append(self._start(prompts[first:], counts[first:], share))
        return torch.cat(found)

    def _start(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], share: int) -> torch.Tensor:
        """Prompts that run as one pack; up to `share` rows share a stored prompt."""
        lengths = np.array([len(prompt) for prompt in prompts])
        stores = [-(-count // share) for count in counts]
        first = np.cumsum([0, *stores])[:-1]
        stored = np.repeat(np.arange(len(prompts)), stores)
        owner = np.repeat(np.arange(len(prompts)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        old_G, old_B = len(self.length_G), len(self)
        self.prompt_B = np.concatenate([self.prompt_B, old_G + first[owner] + within // share])
        self.own_B = np.concatenate([self.own_B, np.zeros(len(owner), np.int64)])
        self.length_G = np.concatenate([self.length_G, lengths[stored]])
        self.places.forget()
        starts = np.cumsum([0, *lengths])
        places_GT = np.minimum(np.arange(lengths.max()), lengths[stored, None] - 1)
        positions_T = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        new = New(
            pack=Pack(tuple(starts.tolist()), self.device),
            stored_G=torch.from_numpy(stored).to(self.device),
            owner_B=torch.from_numpy(owner).to(self.device),
            at_GT=torch.from_numpy(starts[stored, None] + places_GT).to(self.device),
            groups=slice(old_G, old_G + len(stored)),
            rows=slice(old_B, old_B + len(owner)),
            room=_padded(len(self)),
            turns=self.rope.at(torch.from_numpy(positions_T).to(self.device), int(lengths.max())) if self.rope else None,
        )
        return self._prefill(prompts, new)

    def _prefill(self, prompts: Sequence[Sequence[int]], new: New) -> torch.Tensor:
        """Runs the prompts as one pack; logits f32[P, W] after each."""
        tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        x_TD = self.embedding.index_select(0, tokens_T)
        for layer, part in self.layers:
            x_TD = x_TD + part.prefill(rms(x_TD, layer.input_layernorm), new)
            x_TD = x_TD + mlp_of(rms(x_TD, layer.post_attention_layernorm), layer.mlp)
        last_P = torch.tensor(new.pack.starts[1:], device=self.device) - 1
        return linear(rms(x_TD.index_select(0, last_P), self.final_norm), self.head).float()

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drops all rows but these. Returns the rows in their new order: entry i is the former number of row i."""
        order, moves = _closed_up(len(self), rows)
        groups, group_moves = _closed_up(len(self.length_G), np.unique(self.prompt_B[order]).tolist())
        renamed = np.full(len(self.length_G), -1)
        renamed[groups] = np.arange(len(groups))
        self.prompt_B, self.own_B = renamed[self.prompt_B[order]], self.own_B[order]
        self.length_G = self.length_G[groups]
        longest, own = int(self.length_G.max(initial=0)), int(self.own_B.max(initial=0))
        for _, part in self.layers:
            part.move(moves, group_moves, longest, own)
        self.places.forget()
        return order

    # ------------------------------------------------------------ one token

    def step(self, tokens: Any) -> torch.Tensor:
        """Appends `tokens[i]` to row i; logits f32[rows, W] after it."""
        num, rows = len(self), _padded(len(self))
        tokens_B = torch.zeros(rows, dtype=torch.int64)
        tokens_B[:num] = torch.as_tensor(tokens)
        self.places.prepare(self.prompt_B, self.own_B, self.length_G, rows, self.device, self.rope)
        x_BD = self.embedding.index_select(0, tokens_B.to(self.device))
        for layer, part in self.layers:
            x_BD = x_BD + part.step(rms(x_BD, layer.input_layernorm), self.places)
            x_BD = x_BD + mlp_of(rms(x_BD, layer.post_attention_layernorm), layer.mlp)
        self.own_B = self.own_B + 1
        return linear(rms(x_BD, self.final_norm), self.head)[:num].float()


def _padded(rows: int) -> int:
    return rows if rows < PAD_ROWS // 2 else -(-rows // PAD_ROWS) * PAD_ROWS


def _closed_up(count: int, kept: Sequence[int]) -> tuple[list[int], tuple[list[int], list[int]]]:
    """Keeping `kept` of `count` places with few moves: those beyond the new end fill the holes before it. Returns the former
    number of each place, and the moves (from, to)."""
    keep = set(kept)
    end = len(keep)
    holes = [n for n in range(end) if n not in keep]
    beyond = [n for n in range(end, count) if n in keep]
    order = list(range(end))
    for hole, source in zip(holes, beyond, strict=True):
        order[hole] = source
    return order, (beyond, holes)
