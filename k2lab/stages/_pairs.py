"""Choosing preference pairs among the judged answers of one task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from k2lab.core.rng import rng


def distinct(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers without repetitions: of equal tokens, and of texts that differ in blanks only, the first stays."""
    found: dict[str, dict[str, Any]] = {}
    for answer in answers:
        found.setdefault(" ".join(answer["text"].split()), answer)
    return list(found.values())


def choose_pairs(
    answers: Sequence[dict[str, Any]],
    *,
    per_task: int,
    margin: float,
    match_length: bool,
    length_ratio: float | None,
    hard: bool,
    seed: int,
    key: str,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """At most `per_task` pairs (chosen, rejected) whose rewards differ by at least `margin`.

    Each next pair is one whose sides were used least, then (with `hard`) whose rejected side was the most likely per token
    against its chosen side, then (with `match_length`) whose lengths in tokens differ least, then as drawn. With `length_ratio`
    pairs whose longer side has more than so many times the tokens of the shorter are left out.
    """
    places = range(len(answers))
    candidates = [(i, j) for i in places for j in places if answers[i]["reward"] - answers[j]["reward"] >= margin]
    lengths = [len(answer["tokens"]) for answer in answers]
    if length_ratio is not None:
        candidates = [(i, j) for i, j in candidates if max(lengths[i], lengths[j]) <= length_ratio * min(lengths[i], lengths[j])]
    rank = rng(seed, "pairs", key).permutation(len(candidates))
    uses = np.zeros(len(answers), dtype=int)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    left = list(range(len(candidates)))
    while left and len(pairs) < per_task:

        def cost(n: int) -> tuple[int, float, int, int]:
            i, j = candidates[n]
            gap = abs(lengths[i] - lengths[j]) if match_length else 0
            ease = answers[i]["logprob"] - answers[j]["logprob"] if hard else 0.0
            return int(uses[i] + uses[j]), ease, gap, int(rank[n])

        best = min(left, key=cost)
        left.remove(best)
        i, j = candidates[best]
        uses[[i, j]] += 1
        pairs.append((answers[i], answers[j]))
    return pairs
