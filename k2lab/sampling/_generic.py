"""Decoding with a transformers model's own forward and cache: for models that bring no decoder of their own.

Axes: B rows, P prompts, T tokens, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class GenericDecoder:
    """The interface of `models.decode.Decoder` for any transformers causal language model. Rows can only be started together:
    the cache is padded on the left, one length for all."""

    refills = False

    def __init__(self, hf: Any, pad_id: int) -> None:
        self.hf, self.pad_id = hf, pad_id
        self.device = next(hf.parameters()).device

    def start(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> torch.Tensor:
        """Runs the prompts and makes `counts[p]` rows of prompt p; logits f32[P, W] after each prompt."""
        from transformers import DynamicCache

        longest = max(map(len, prompts))
        tokens_PT = np.full((len(prompts), longest), self.pad_id, dtype=np.int64)
        mask_PT = np.zeros((len(prompts), longest), dtype=np.int64)
        for p, prompt in enumerate(prompts):
            tokens_PT[p, longest - len(prompt) :] = prompt
            mask_PT[p, longest - len(prompt) :] = 1
        positions_PT = np.maximum(mask_PT.cumsum(axis=1) - 1, 0)
        self.cache = DynamicCache(config=self.hf.config)
        self.mask_BT = None if mask_PT.all() else torch.from_numpy(mask_PT).to(self.device)
        self.positions_B1 = torch.from_numpy(positions_PT).to(self.device)
        logits_PW = self._forward(torch.from_numpy(tokens_PT).to(self.device))
        self.positions_B1 = self.positions_B1[:, -1:]
        owner = np.repeat(np.arange(len(prompts)), counts)
        if len(owner) > len(prompts):
            self.keep(owner.tolist())
        return logits_PW

    def step(self, tokens: Any) -> torch.Tensor:
        """Appends `tokens[i]` to row i; logits f32[B, W] after it."""
        self.positions_B1 = self.positions_B1 + 1
        if self.mask_BT is not None:
            self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        return self._forward(torch.as_tensor(tokens).to(self.device)[:, None])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drops all rows but these; their new order is the given one."""
        kept_B = torch.tensor(rows, device=self.device)
        self.cache.reorder_cache(kept_B)
        self.positions_B1 = self.positions_B1[kept_B]
        self.mask_BT = None if self.mask_BT is None else self.mask_BT[kept_B]
        return list(rows)

    def _forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        output = self.hf(
            input_ids=tokens_BT,
            attention_mask=self.mask_BT,
            position_ids=self.positions_B1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()
