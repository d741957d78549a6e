"""Batched decoding on a transformers causal language model that lives in this process.

Axes: B rows of a batch, T tokens (prompt plus generated), W vocabulary, K most probable tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from k2lab.core.errors import DataError, NumericsError, RecipeError
from k2lab.core.rng import rng
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.sampling._draw import Chosen, choose, draw
from k2lab.sampling._generic import GenericDecoder

__all__ = ["LocalSampler", "check_params", "draw"]

# Dropping finished rows and starting others copies memory and runs prompts, so it waits until this share of the rows is finished.
COMPACT_SHARE = 1 / 8


class LocalSampler:
    """Greedy, temperature and top-p decoding with a cache (latents for MLA, states for KDA).

    `hf_model` is a transformers causal LM on any device; `pad_id` fills left padding and is masked out; up to `max_batch` rows
    are decoded together, and where rows finish, waiting requests take their places. Requests with equal prompts share them: the
    prompt runs once. `eos_id` is the token (or tokens) that ends a turn: it always stops generation, with `StopReason.EOS`. If it
    is None, the first of a request's `stop_tokens` is taken as the turn's end. The token that stopped generation is part of the
    completion. `window` defaults to the config's `max_position_embeddings`. Set `policy_version` after a weight update. A model
    that brings a decoder (`hf_model.k2_decoder(hf_model)`, see `models.decode`) is decoded by it, others by their own
    forward (`decoder=False`: always so). No other thread may use the model meanwhile."""

    def __init__(
        self,
        hf_model: Any,
        pad_id: int,
        max_batch: int = 128,
        *,
        eos_id: int | Sequence[int] | None = None,
        window: int | None = None,
        policy_version: int = 0,
        decoder: bool = True,
    ) -> None:
        if max_batch < 1:
            raise RecipeError("max_batch must be at least 1", got=max_batch)
        self.model, self.pad_id, self.max_batch, self.decoder = hf_model, pad_id, max_batch, decoder
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
        _check_requests(prompts, params, keys)
        work = _Work(prompts, params, keys, self.window, self.eos_ids or params.stop_tokens[:1])
        with torch.inference_mode(), _evaluating(self.model):
            self._decode(work)
        return work.completions(self.policy_version)

    def new_decoder(self) -> Any:
        """The model's own decoder, or one that runs its forward (`_generic.GenericDecoder` says what decoders do)."""
        make = getattr(self.model, "k2_decoder", None) if self.decoder else None
        found = make(self.model) if make is not None else None
        return found if found is not None else GenericDecoder(self.model, self.pad_id)

    def _decode(self, work: _Work) -> None:
        """Does all requests: rows of a batch, one token per step, new requests in place of finished ones."""
        decoder = self.new_decoder()
        waiting = work.in_order()
        rows = np.zeros(0, np.int64)  # requests under way, in the decoder's order; finished ones wait to be dropped
        tokens = np.zeros(0, np.int64)
        while len(waiting) or len(rows):
            free = self.max_batch - len(rows)
            if len(waiting) and (not len(rows) or (decoder.refills and free >= max(1, self.max_batch * COMPACT_SHARE))):
                new, waiting = waiting[:free], waiting[free:]
                prompts, owner, counts = work.prompts_of(new)
                logits_BW = decoder.start(prompts, counts)
                logits_BW = logits_BW[torch.from_numpy(owner).to(logits_BW.device)]
                rows, tokens = np.concatenate([rows, new]), np.concatenate([tokens, work.take(new, logits_BW)])
            else:
                tokens = work.take(rows, decoder.step(tokens))
            left = np.flatnonzero(work.open[rows])
            if not len(left) and not decoder.refills:
                rows, tokens = rows[:0], tokens[:0]
            elif len(left) <= len(rows) * (1 - COMPACT_SHARE):
                order = decoder.keep(left.tolist())
                rows, tokens = rows[order], tokens[order]


class _Work:
    """Requests and what they have got so far. Arrays are indexed by request."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str], window: int, ends: tuple[int, ...]
    ) -> None:
        self.prompts, self.params, self.keys = prompts, params, keys
        room = np.array([window - len(prompt) for prompt in prompts], dtype=np.int64)
        self.budget = np.minimum(params.max_tokens, room)
        self.full = [StopReason.LENGTH if params.max_tokens <= left else StopReason.CONTEXT for left in room]
        self.stop: list[StopReason | None] = [None if budget > 0 else StopReason.CONTEXT for budget in self.budget]
        self.open = self.budget > 0
        self.length = np.zeros(len(prompts), np.int64)
        self.uniforms: dict[int, np.ndarray] = {}
        self.ends = ends
        self.stops = np.array(sorted({*ends, *params.stop_tokens}), dtype=np.int64)
        top = params.top_k_logprobs
        self.tokens_RT, self.logprobs_RT = np.zeros((len(prompts), 0), np.int64), np.zeros((len(prompts), 0), np.float32)
        self.top_ids_RTK, self.top_logprobs_RTK = np.zeros((len(prompts), 0, top), np.int64), np.zeros((len(prompts), 0, top))

    def in_order(self) -> np.ndarray:
        """Requests to be done: short prompts first, equal prompts together."""
        first: dict[tuple[int, ...], int] = {}
        self.same = np.array([first.setdefault(tuple(prompt), n) for n, prompt in enumerate(self.prompts)], dtype=np.int64)
        found = np.flatnonzero(self.open)
        lengths = np.array([len(self.prompts[n]) for n in found])
        return found[np.lexsort((found, self.same[found], lengths))] if len(found) else found

    def prompts_of(self, requests: np.ndarray) -> tuple[list[Sequence[int]], np.ndarray, list[int]]:
        """The different prompts of neighbouring requests, the number of each request's prompt, and requests per prompt."""
        firsts, places, counts = np.unique(self.same[requests], return_inverse=True, return_counts=True)
        # np.unique sorts by request; the order in which prompts appear is wanted
        appear = np.unique(places, return_index=True)[1].argsort()
        rank = np.empty_like(appear)
        rank[appear] = np.arange(len(appear))
        return [self.prompts[n] for n in firsts[appear]], rank[places], counts[appear].tolist()

    def take(self, requests: np.ndarray, logits_BW: torch.Tensor) -> np.ndarray:
        """Chooses the next token of each request and notes it; i64[B]. Requests that are finished get one that nobody sees."""
        params, device = self.params, logits_BW.device
        uniforms_B = None
        if params.temperature > 0:
            uniforms_B = torch.tensor([self._uniform(n) for n in requests.tolist()], dtype=torch.float64, device=device)
        chosen = choose(logits_BW, uniforms_B, params.temperature, params.top_p, params.top_k_logprobs)
        tokens, logprobs = chosen.tokens.cpu().numpy(), chosen.logprobs.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise NumericsError("the model's logits are not finite", where=f"sampling, {len(requests)} rows")
        self._note(requests, tokens, logprobs, chosen)
        return tokens

    def _uniform(self, request: int) -> float:
        if not self.open[request]:
            return 0.0
        if request not in self.uniforms:
            budget = int(self.budget[request])
            self.uniforms[request] = rng(self.params.seed, "sample", self.keys[request]).random(budget)
        return self.uniforms[request][self.length[request]]

    def _note(self, requests: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, chosen: Chosen) -> None:
        live = np.flatnonzero(self.open[requests])
        rows, at = requests[live], self.length[requests[live]]
        while len(at) and at.max() >= self.tokens_RT.shape[1]:
            self._grow()
        self.tokens_RT[rows, at], self.logprobs_RT[rows, at] = tokens[live], logprobs[live]
        if chosen.top_ids is not None and chosen.top_logprobs is not None:
            self.top_ids_RTK[rows, at] = chosen.top_ids.cpu().numpy()[live]
            self.top_logprobs_RTK[rows, at] = chosen.top_logprobs.cpu().numpy()[live]
        self.length[rows] += 1
        stopped = np.isin(tokens[live], self.stops)
        for place in np.flatnonzero(stopped | (self.length[rows] >= self.budget[rows])):
            request, token = int(rows[place]), int(tokens[live[place]])
            ended = StopReason.EOS if token in self.ends else StopReason.STOP_TOKEN
            self.stop[request] = ended if stopped[place] else self.full[request]
            self.open[request] = False
            self.uniforms.pop(request, None)

    def _grow(self) -> None:
        for name in ("tokens_RT", "logprobs_RT", "top_ids_RTK", "top_logprobs_RTK"):
            old = getattr(self, name)
            more = np.zeros((old.shape[0], max(32, old.shape[1]), *old.shape[2:]), old.dtype)
            setattr(self, name, np.concatenate([old, more], axis=1))

    def completions(self, policy_version: int) -> list[Completion]:
        done = []
        for n, stop in enumerate(self.stop):
            assert stop is not None
            end = int(self.length[n])
            top: tuple = ()
            if self.params.top_k_logprobs:
                pairs = zip(self.top_ids_RTK[n, :end].tolist(), self.top_logprobs_RTK[n, :end].tolist())
                top = tuple((tuple(ids), tuple(values)) for ids, values in pairs)
            tokens, logprobs = tuple(self.tokens_RT[n, :end].tolist()), tuple(self.logprobs_RT[n, :end].tolist())
            done.append(Completion(tokens, logprobs, stop, policy_version, top))
        return done


def _check_requests(prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str]) -> None:
    if len(prompts) != len(keys):
        raise DataError(f"{len(prompts)} prompts came with {len(keys)} keys", allowed="one key per prompt")
    if params.temperature > 0 and len(set(keys)) != len(keys):
        twice = next(key for key in keys if list(keys).count(key) > 1)
        raise DataError(
            "two requests have the same key, so their draws would be equal",
            got=twice,
            next="Put the sample's index into the key",
        )
    for prompt, key in zip(prompts, keys):
        if not len(prompt):
            raise DataError("a prompt needs at least one token", where=key)


def check_params(params: SampleParams) -> None:
    """RecipeError unless the decoding settings make sense."""
    if params.max_tokens < 1:
        raise RecipeError("max_tokens must be at least 1", got=params.max_tokens)
    if not params.temperature >= 0:
        raise RecipeError("temperature must not be negative", got=params.temperature, allowed="0 (greedy) or more")
    if not 0 < params.top_p <= 1:
        raise RecipeError("top_p is a share of probability", got=params.top_p, allowed="more than 0, at most 1")
    if params.top_k_logprobs < 0:
        raise RecipeError("top_k_logprobs must not be negative", got=params.top_k_logprobs, allowed="0 (none) or more")


@contextmanager
def _evaluating(model: Any):
    """The model in evaluation mode; training mode comes back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
