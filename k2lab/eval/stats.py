"""Estimates with intervals. All values are per item (document, task); items are what is resampled or counted.

Axes: P items (problems, documents), K samples per item, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.rng import rng

LEVEL = 0.95
RESAMPLES = 2000
_CELLS = 1 << 22  # most indices drawn at once


@dataclass(frozen=True)
class Estimate:
    """`value` with the bounds of its interval, the sample standard deviation over items (None for a single item), the number of
    items, and how the interval was made."""

    value: float
    low: float
    high: float
    std: float | None
    n: int
    method: str


@dataclass(frozen=True)
class Change:
    """Change from before to after on the same items, with its interval. `clear` is True if the interval leaves out 0."""

    change: float
    low: float
    high: float
    n: int
    method: str

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """A proportion with Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    _require(n, "a proportion")
    if not 0 <= successes <= n:
        raise DataError("successes must lie between 0 and the number of items", got=f"{successes} of {n}")
    low, high = _wilson(successes / n, n, level)
    share = successes / n
    std = math.sqrt(n / (n - 1) * share * (1 - share)) if n > 1 else None
    return Estimate(share, low, high, std, n, "Wilson")


def _wilson(share: float, n: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exact bounds at the edges, where rounding would leave 1e-17.
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def mean(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """Mean over items with Student's t interval. One item has no interval: its bounds are infinite."""
    values_P = _finite(values, "a mean")
    n = len(values_P)
    value = float(values_P.mean())
    if n == 1:
        return Estimate(value, -math.inf, math.inf, None, 1, "Student t")
    std = float(values_P.std(ddof=1))
    half = t_quantile((1 + level) / 2, n - 1) * std / math.sqrt(n)
    return Estimate(value, value - half, value + half, std, n, "Student t")


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int, name: str, resamples: int = RESAMPLES, level: float = LEVEL
) -> Estimate:
    """Mean over items with the percentile bootstrap over items (Efron 1979); draws depend on (`seed`, `name`) only."""
    values_P = _finite(values, "a mean")
    means_R = _resampled(len(values_P), seed, name, resamples, lambda picked: values_P[picked].mean(axis=1))
    low, high = _percentiles(means_R, level)
    return Estimate(
        float(values_P.mean()), low, high, _std(values_P), len(values_P), f"bootstrap over items, {resamples} resamples"
    )


def avg_at_k(scores_PK: Any, level: float = LEVEL) -> Estimate:
    """avg@k: the mean over an item's k samples, then over items. The interval is over items, k samples of one item being no
    independent evidence: Wilson for k = 1 and scores that are all 0 or 1, else Student's t on the items' means."""
    scores_PK = _scores(scores_PK)
    if scores_PK.shape[1] == 1 and np.isin(scores_PK, (0, 1)).all():
        return wilson(int(scores_PK.sum()), len(scores_PK), level)
    return _share(mean(scores_PK.mean(axis=1), level))


def _share(found: Estimate) -> Estimate:
    """An estimate of something that lies between 0 and 1: so does its interval."""
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def best_of_n(scores_PK: Any, level: float = LEVEL) -> Estimate:
    """best-of-N: the mean over items of the best of all N samples. Not an accuracy: it needs an oracle that picks. Name it so."""
    best_P = _scores(scores_PK).max(axis=1)
    return avg_at_k(best_P[:, None], level)


def pass_at_k(scores_PK: Any, k: int, level: float = LEVEL) -> Estimate:
    """pass@k: the chance that at least one of k samples is right, from N >= k samples per item without bias (Chen et al. 2021,
    arXiv:2107.03374, equation 1). A sample is right if its score is 1. The interval is as for `avg_at_k`."""
    values_P = passes(scores_PK, k)
    if np.isin(values_P, (0, 1)).all():
        return wilson(int(values_P.sum()), len(values_P), level)
    return _share(mean(values_P, level))


def passes(scores_PK: Any, k: int) -> np.ndarray:
    """The item-wise values of pass@k, f64[P]: 1 - C(N - c, k) / C(N, k) for c right samples among N."""
    scores_PK = _scores(scores_PK)
    num = scores_PK.shape[1]
    if not 1 <= k <= num:
        raise DataError(f"pass@{k} cannot be told from {num} samples per item", allowed=f"k from 1 to {num}")
    wrong_P = num - (scores_PK >= 1).sum(axis=1)
    return np.array([1 - math.comb(int(wrong), k) / math.comb(num, k) for wrong in wrong_P], dtype=np.float64)


def ratio(numerators: Any, denominators: Any, seed: int, name: str, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """sum(numerators) / sum(denominators), such as bits per byte, with the percentile bootstrap over items.

    Never a mean of per-item ratios, which would weigh short documents like long ones. `std` is the sample standard deviation
    of the per-item ratios, for information. Denominators must be positive.
    """
    top_P, bottom_P = _finite(numerators, "a ratio"), _positive(denominators)
    _same(top_P, bottom_P)
    ratios_R = _resampled(
        len(top_P), seed, name, resamples, lambda picked: top_P[picked].sum(axis=1) / bottom_P[picked].sum(axis=1)
    )
    low, high = _percentiles(ratios_R, level)
    value = float(top_P.sum() / bottom_P.sum())
    return Estimate(value, low, high, _std(top_P / bottom_P), len(top_P), f"bootstrap over items, {resamples} resamples")


def paired_change(before: Any, after: Any, level: float = LEVEL) -> Change:
    """mean(after - before) over the same items in the same order.

    If all values are 0 or 1, Newcombe's square-and-add interval for paired proportions (Newcombe 1998, Stat. Med. 17:2635,
    method 10), which stays honest when no item changed; else Student's t on the differences.
    """
    before_P, after_P = _finite(before, "a change"), _finite(after, "a change")
    _same(before_P, after_P)
    change = float((after_P - before_P).mean())
    if np.isin(before_P, (0, 1)).all() and np.isin(after_P, (0, 1)).all():
        low, high = _newcombe(before_P.astype(int), after_P.astype(int), level)
        return Change(change, low, high, len(before_P), "Newcombe, paired")
    found = mean(after_P - before_P, level)
    return Change(change, found.low, found.high, found.n, "Student t, paired")


def paired_ratio_change(
    before: Any, after: Any, denominators: Any, seed: int, name: str, resamples: int = RESAMPLES, level: float = LEVEL
) -> Change:
    """sum(after)/sum(denominators) - sum(before)/sum(denominators) with the percentile bootstrap over items, both models on the
    same resampled items."""
    before_P, after_P, bottom_P = _finite(before, "a change"), _finite(after, "a change"), _positive(denominators)
    _same(before_P, after_P)
    _same(before_P, bottom_P)
    gain_P = after_P - before_P
    changes_R = _resampled(
        len(gain_P), seed, name, resamples, lambda picked: gain_P[picked].sum(axis=1) / bottom_P[picked].sum(axis=1)
    )
    low, high = _percentiles(changes_R, level)
    return Change(float(gain_P.sum() / bottom_P.sum()), low, high, len(gain_P), f"bootstrap over items, {resamples} resamples")


def paired_share(whole: Any, part: Any, seed: int, name: str, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """sum(part) / sum(whole) of two models' scores on the same items in the same order, such as the share of a teacher's accuracy
    that a student keeps, with the percentile bootstrap over items, both models on the same resampled items.

    Scores must not be negative, and `whole` not all 0 (DataError). A resample in which `whole` is all 0 counts as infinite.
    """
    whole_P, part_P = _finite(whole, "a share"), _finite(part, "a share")
    _same(whole_P, part_P)
    if min(whole_P.min(), part_P.min()) < 0 or not whole_P.any():
        raise DataError("a share is taken of scores that are not negative and not all 0", got=f"a sum of {whole_P.sum():g}")

    def share(picked: np.ndarray) -> np.ndarray:
        tops, bottoms = part_P[picked].sum(axis=1), whole_P[picked].sum(axis=1)
        return np.divide(tops, bottoms, out=np.full(len(tops), math.inf), where=bottoms > 0)

    shares_R = np.sort(_resampled(len(whole_P), seed, name, resamples, share))
    low, high = np.quantile(shares_R, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    method = f"bootstrap over items, {resamples} resamples"
    return Estimate(float(part_P.sum() / whole_P.sum()), float(low), float(high), None, len(whole_P), method)


# ---------------------------------------------------------------- parts


def _newcombe(before: np.ndarray, after: np.ndarray, level: float) -> tuple[float, float]:
    n = len(before)
    both = int((before & after).sum())
    lost, won = int(before.sum()) - both, int(after.sum()) - both
    neither = n - both - lost - won
    p1, p2 = after.mean(), before.mean()
    low1, high1 = _wilson(float(p1), n, level)
    low2, high2 = _wilson(float(p2), n, level)
    # Correlation of the two outcomes, with a continuity correction of its numerator when positive.
    margins = math.sqrt(float((both + won) * (lost + neither) * (both + lost) * (won + neither)))
    cross = both * neither - won * lost
    if cross > 0:
        cross = max(cross - n / 2, 0)
    phi = cross / margins if margins else 0.0
    d = float(p1 - p2)
    down = (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2
    up = (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2
    return d - math.sqrt(max(0.0, down)), d + math.sqrt(max(0.0, up))


def _resampled(n: int, seed: int, name: str, resamples: int, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The statistic of `resamples` draws of n items with replacement; `statistic` takes indices [r, P] and gives [r]."""
    generator = rng(seed, "bootstrap", name)
    step = max(1, _CELLS // n)
    parts = [
        statistic(generator.integers(0, n, size=(min(step, resamples - done), n), dtype=np.int64))
        for done in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _percentiles(values_R: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _std(values_P: np.ndarray) -> float | None:
    return float(values_P.std(ddof=1)) if len(values_P) > 1 else None


def _require(n: int, what: str) -> None:
    if n < 1:
        raise DataError(f"{what} needs at least one item", next="Check that the evaluation set is not empty")


def _finite(values: Any, what: str) -> np.ndarray:
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1:
        raise DataError(f"{what} is taken over a list of items", got=f"shape {values_P.shape}")
    _require(len(values_P), what)
    if not np.isfinite(values_P).all():
        raise DataError(f"{what} needs finite values", got=f"{int((~np.isfinite(values_P)).sum())} of {len(values_P)} are not")
    return values_P


def _positive(values: Any) -> np.ndarray:
    values_P = _finite(values, "a ratio")
    if (values_P <= 0).any():
        raise DataError("the denominators of a ratio must be positive", got=float(values_P.min()))
    return values_P


def _scores(scores_PK: Any) -> np.ndarray:
    scores_PK = np.asarray(scores_PK, dtype=np.float64)
    if scores_PK.ndim != 2 or 0 in scores_PK.shape:
        raise DataError("scores must be a table of items x samples", got=f"shape {scores_PK.shape}")
    _finite(scores_PK.ravel(), "a score")
    return scores_PK


def _same(one: np.ndarray, other: np.ndarray) -> None:
    if len(one) != len(other):
        raise DataError("paired values must be of the same items", got=f"{len(one)} and {len(other)} values")


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with `freedom` degrees of freedom, to about 1e-10."""
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _t_cdf(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, through the regularised incomplete beta function."""
    return 1 - _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8), evaluated with Lentz's method."""
    if x <= 0 or x >= 1:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d, fraction = 1.0, 0.0, 1.0
    for step in range(1000):
        m = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 + term * d
        d = 1 / (d if abs(d) > tiny else tiny)
        c = 1 + term / c
        c = c if abs(c) > tiny else tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * (fraction - 1)
