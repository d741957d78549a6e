"""How long decoding takes: seconds per generated token, with everything but the model held equal.

Axes: B rows of a batch, N generated tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import SampleParams, StopReason
from k2lab.eval.stats import Estimate

REPEATS = 6


def decode_times(
    samplers: Sequence[Any], prompts: Sequence[Sequence[Sequence[int]]], tokens: int, repeats: int = REPEATS
) -> list[list[float]]:
    """Seconds per generated token of each sampler, one figure per repeat.

    Sampler i decodes its B prompts (`prompts[i]`: the same texts for all, in its model's tokens) greedily as one batch, without
    a token that ends the turn: exactly `tokens` = N each. A figure is (time of N tokens - time of 1 token) / (B x (N - 1)), so
    that running the prompts and setting up a decoder are no part of it. The samplers take turns, after a warm-up of each, so
    that what else the machine does meets all of them. Samplers (`sampling.local.LocalSampler`) must have been made without
    `eos_id`, and with a `max_batch` of at least B. Raises RecipeError for fewer than 2 tokens or no repeat, DataError if a
    model's window ends before N tokens.
    """
    if tokens < 2 or repeats < 1:
        raise RecipeError("timing needs at least 2 tokens and 1 repeat", got=f"tokens={tokens}, repeats={repeats}")
    found: list[list[float]] = [[] for _ in samplers]
    for repeat in range(-1, repeats):  # the first time is the warm-up
        for sampler, rows, times in zip(samplers, prompts, found, strict=True):
            short = _seconds(sampler, rows, 1)
            long = _seconds(sampler, rows, tokens)
            if repeat >= 0:
                times.append(max(0.0, long - short) / (len(rows) * (tokens - 1)))
    return found


def _seconds(sampler: Any, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    params = replace(SampleParams(), max_tokens=tokens, temperature=0.0, stop_tokens=())
    keys = [str(row) for row in range(len(prompts))]
    began = time.perf_counter()
    done = sampler.sample(prompts, params, keys)
    seconds = time.perf_counter() - began
    short = [each for each in done if len(each.tokens) != tokens or each.stop is not StopReason.LENGTH]
    if short:
        raise DataError(
            f"decoding ended after {len(short[0].tokens)} of {tokens} tokens ({short[0].stop.value}): times cannot be compared",
            next="Measure fewer tokens, or shorter prompts",
        )
    return seconds


def middle(times: Sequence[float]) -> Estimate:
    """The median of repeats, between the smallest and the largest of them: an interval that holds the true median in 1 - 2^(1-n)
    of n repeats, 96.9 % for 6, whatever their distribution."""
    return Estimate(median(times), min(times), max(times), None, len(times), f"range of {len(times)} repeats")
