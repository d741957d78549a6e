"""Tokens of one completion as they are decoded: for a person who watches.

Axes: B rows (one here), W vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from k2lab.core.errors import DataError, NumericsError
from k2lab.core.rng import rng
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.sampling._draw import choose
from k2lab.sampling.local import LocalSampler, check_params


def stream(sampler: Any, prompt: Sequence[int], params: SampleParams, key: str) -> Generator[int, None, Completion]:
    """Yields the tokens that `sampler.sample([prompt], params, [key])` would give, each as soon as it is there, and returns the
    completion. A caller that stops early closes the generator and keeps what it has seen.

    A sampler that is not embedded (`LocalSampler`) gives its whole completion at once. Errors as `LocalSampler.sample`.
    """
    if not isinstance(sampler, LocalSampler):
        (completion,) = sampler.sample([prompt], params, [key])
        yield from completion.tokens
        return completion
    check_params(params)
    if not len(prompt):
        raise DataError("a prompt needs at least one token", where=key)
    room = sampler.window - len(prompt)
    budget = min(params.max_tokens, room)
    stop = StopReason.LENGTH if params.max_tokens <= room else StopReason.CONTEXT
    tokens: list[int] = []
    logprobs: list[float] = []
    if budget > 0:
        training = sampler.model.training
        sampler.model.eval()
        try:
            for token, logprob in _decoded(sampler, prompt, params, key, budget):
                tokens.append(token)
                logprobs.append(logprob)
                yield token
                if token in (sampler.eos_ids or params.stop_tokens[:1]):
                    stop = StopReason.EOS
                    break
                if token in params.stop_tokens:
                    stop = StopReason.STOP_TOKEN
                    break
        finally:
            sampler.model.train(training)
    return Completion(tuple(tokens), tuple(logprobs), stop, sampler.policy_version)


def _decoded(
    sampler: LocalSampler, prompt: Sequence[int], params: SampleParams, key: str, budget: int
) -> Generator[tuple[int, float], None, None]:
    """At most `budget` tokens with their log-probabilities."""
    decoder = sampler.new_decoder()
    uniforms = rng(params.seed, "sample", key).random(budget) if params.temperature > 0 else None
    token = -1
    for place in range(budget):
        with torch.inference_mode():  # not around the yield: the caller's own code must not run in this mode
            logits_BW = decoder.start([prompt], [1]) if place == 0 else decoder.step([token])
            uniform_B = None if uniforms is None else torch.tensor(uniforms[place : place + 1], device=logits_BW.device)
            chosen = choose(logits_BW, uniform_B, params.temperature, params.top_p)
            token, logprob = int(chosen.tokens[0]), float(chosen.logprobs[0])
        if not logprob > -float("inf"):
            raise NumericsError("the model's logits are not finite", where=f"sampling, {key}")
        yield token, logprob
