"""Batched decoding on a transformers causal language model that lives in this process.

Axes: B rows of a batch, T tokens (prompt plus generated), W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from k2lab.core.errors import DataError, NumericsError, RecipeError
from k2lab.core.rng import rng
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.sampling._absorb import absorbed_decoding

# Dropping finished rows copies the whole cache, so it waits until this share of the rows is finished.
COMPACT_SHARE = 0.25


@dataclass
class _Row:
    """One request while it is decoded."""

    index: int  # place in the caller's list
    prompt: Sequence[int]
    budget: int  # most tokens that may be generated: the caller's limit or what is left of the window
    uniforms: np.ndarray | None  # one number in [0, 1) per position; None when greedy
    full: StopReason  # why generation ends when the budget is used up
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason | None = None


class LocalSampler:
    """Greedy, temperature and top-p decoding with the model's own cache (latents for MLA, states for KDA).

    `hf_model` is a transformers causal LM on any device; `pad_id` fills left padding and is masked out; `max_batch` rows are
    decoded together. `eos_id` is the token (or tokens) that ends a turn: it always stops generation, with `StopReason.EOS`. If it
    is None, the first of a request's `stop_tokens` is taken as the turn's end. The token that stopped generation is part of the
    completion. `window` defaults to the config's `max_position_embeddings`. Set `policy_version` after a weight update.
    `absorb` folds MLA's key and value expansion into the query and the output during decoding (same function, less work); no
    other thread may use the model meanwhile.
    """

    def __init__(
        self,
        hf_model: Any,
        pad_id: int,
        max_batch: int = 64,
        *,
        eos_id: int | Sequence[int] | None = None,
        window: int | None = None,
        policy_version: int = 0,
        absorb: bool = True,
    ) -> None:
        if max_batch < 1:
            raise RecipeError("max_batch must be at least 1", got=max_batch)
        self.model, self.pad_id, self.max_batch, self.absorb = hf_model, pad_id, max_batch, absorb
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
        self.window = window if window is not None else int(hf_model.config.max_position_embeddings)
        self.policy_version = policy_version

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str]) -> list[Completion]:
        """One completion per prompt, in the given order.

        The draw of request i at position t is a function of (`params.seed`, `keys[i]`, t) alone. A prompt that leaves no room in
        the window yields an empty completion with `StopReason.CONTEXT`; so does, with its tokens, one that fills the window.
        Raises DataError for empty prompts, or for repeated keys when drawing (their draws would be the same);
        NumericsError if the model's logits are not finite.
        """
        check_params(params)
        rows = self._rows(prompts, params, keys)
        ready = sorted((row for row in rows if row.stop is None), key=lambda row: len(row.prompt))
        with torch.inference_mode(), _evaluating(self.model):
            for begin in range(0, len(ready), self.max_batch):
                self._decode(ready[begin : begin + self.max_batch], params)
        done = []
        for row in rows:
            assert row.stop is not None
            done.append(Completion(tuple(row.tokens), tuple(row.logprobs), row.stop, self.policy_version))
        return done

    def _rows(self, prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str]) -> list[_Row]:
        if len(prompts) != len(keys):
            raise DataError(f"{len(prompts)} prompts came with {len(keys)} keys", allowed="one key per prompt")
        if params.temperature > 0 and len(set(keys)) != len(keys):
            twice = next(key for key in keys if list(keys).count(key) > 1)
            raise DataError(
                "two requests have the same key, so their draws would be equal",
                got=twice,
                next="Put the sample's index into the key",
            )
        rows = []
        for index, (prompt, key) in enumerate(zip(prompts, keys)):
            if not len(prompt):
                raise DataError("a prompt needs at least one token", where=key)
            room = self.window - len(prompt)
            budget = min(params.max_tokens, room)
            draws = rng(params.seed, "sample", key).random(budget) if params.temperature > 0 and budget > 0 else None
            full = StopReason.LENGTH if params.max_tokens <= room else StopReason.CONTEXT
            row = _Row(index=index, prompt=prompt, budget=budget, uniforms=draws, full=full)
            if budget < 1:
                row.stop = StopReason.CONTEXT
            rows.append(row)
        return rows

    def _decode(self, rows: list[_Row], params: SampleParams) -> None:
        """Fills `rows` in place: one prefill with left padding, then one token per step for all rows."""
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        tokens_BT, mask_BT, positions_BT = self._padded(rows, device)
        cache = DynamicCache(config=self.model.config)
        ends = self.eos_ids or params.stop_tokens[:1]
        logits_BW = self._forward(tokens_BT, mask_BT, positions_BT, cache)
        alive = rows
        with absorbed_decoding(self.model, enabled=self.absorb):
            while True:
                chosen_B = self._choose(logits_BW, alive, params, ends, device)
                left = [n for n, row in enumerate(alive) if row.stop is None]
                if not left:
                    return
                tokens_BT, positions_BT = chosen_B[:, None], positions_BT[:, -1:] + 1
                if mask_BT is not None:
                    mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
                if len(left) <= len(alive) * (1 - COMPACT_SHARE):
                    kept_B = torch.tensor(left, device=device)
                    cache.reorder_cache(kept_B)
                    tokens_BT, positions_BT = tokens_BT[kept_B], positions_BT[kept_B]
                    mask_BT = mask_BT[kept_B] if mask_BT is not None else None
                    alive = [alive[n] for n in left]
                logits_BW = self._forward(tokens_BT, mask_BT, positions_BT, cache)

    def _forward(
        self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None, positions_BT: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Logits f32[B, W] after the last of the new tokens; the cache grows by them."""
        output = self.model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _padded(self, rows: list[_Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens, mask (None if nothing is padded) and positions of the prompts, padded on the left."""
        longest = max(len(row.prompt) for row in rows)
        tokens_BT = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        mask_BT = np.zeros((len(rows), longest), dtype=np.int64)
        for n, row in enumerate(rows):
            tokens_BT[n, longest - len(row.prompt) :] = row.prompt
            mask_BT[n, longest - len(row.prompt) :] = 1
        positions_BT = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
        mask = None if mask_BT.all() else torch.from_numpy(mask_BT).to(device)
        return torch.from_numpy(tokens_BT).to(device), mask, torch.from_numpy(positions_BT).to(device)

    def _choose(
        self, logits_BW: torch.Tensor, alive: list[_Row], params: SampleParams, ends: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """The next token of each row, i64[B]; rows that are still open get it, its log-probability and, if so, their end."""
        if params.temperature > 0:
            # A finished row that waits for the next compaction still needs some number; its token is thrown away.
            draws = [0.0 if row.stop is not None else row.uniforms[len(row.tokens)] for row in alive]  # type: ignore[index]
            uniforms_B = torch.tensor(draws, dtype=torch.float64, device=device)
            chosen_B = draw(logits_BW, uniforms_B, params.temperature, params.top_p)
        else:
            chosen_B = logits_BW.argmax(dim=-1)
        logprobs_B = logits_BW.gather(1, chosen_B[:, None])[:, 0] - logits_BW.logsumexp(dim=-1)
        if not torch.isfinite(logprobs_B).all():
            raise NumericsError("the model's logits are not finite", where=f"sampling, {len(alive)} rows")
        for row, token, logprob in zip(alive, chosen_B.tolist(), logprobs_B.tolist()):
            if row.stop is not None:
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in ends:
                row.stop = StopReason.EOS
            elif token in params.stop_tokens:
                row.stop = StopReason.STOP_TOKEN
            elif len(row.tokens) == row.budget:
                row.stop = row.full
        return chosen_B


def draw(logits_BW: torch.Tensor, uniforms_B: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Tokens i64[B] by inversion: the first token, in vocabulary order, at which the cumulative probability exceeds the uniform.

    The distribution is softmax(logits / temperature), restricted to the nucleus (the fewest most probable tokens that together
    reach `top_p`; Holtzman et al. 2020, arXiv:1904.09751) and renormalised. Vocabulary order, not order of probability, keeps
    the map from uniform to token continuous in the logits: rounding moves a boundary by an ulp and cannot swap two tokens.
    """
    probs_BW = (logits_BW.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_BW, order_BW = probs_BW.sort(dim=-1, descending=True, stable=True)
        before_BW = sorted_BW.cumsum(dim=-1) - sorted_BW
        kept_BW = torch.zeros_like(probs_BW, dtype=torch.bool).scatter_(1, order_BW, before_BW < top_p)
        probs_BW = probs_BW * kept_BW
    cumulative_BW = probs_BW.cumsum(dim=-1)
    total_B1 = cumulative_BW[:, -1:]
    # u < 1, but u * total may round up to total, beyond which no token lies.
    target_B1 = torch.minimum(uniforms_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BW, target_B1, right=True)[:, 0].clamp(max=logits_BW.shape[-1] - 1)


def check_params(params: SampleParams) -> None:
    """RecipeError unless the decoding settings make sense."""
    if params.max_tokens < 1:
        raise RecipeError("max_tokens must be at least 1", got=params.max_tokens)
    if not params.temperature >= 0:
        raise RecipeError("temperature must not be negative", got=params.temperature, allowed="0 (greedy) or more")
    if not 0 < params.top_p <= 1:
        raise RecipeError("top_p is a share of probability", got=params.top_p, allowed="more than 0, at most 1")


@contextmanager
def _evaluating(model: Any):
    """The model in evaluation mode; training mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
