import math

import numpy as np
import pytest

from k2lab.core.errors import DataError
from k2lab.core.rng import rng
from k2lab.eval import stats


@pytest.mark.parametrize(
    "freedom, wanted",
    [(1, 12.706204736), (2, 4.302652730), (5, 2.570581836), (10, 2.228138852), (30, 2.042272456), (1000, 1.962339081)],
)
def test_t_quantile_equals_tables(freedom, wanted):
    assert stats.t_quantile(0.975, freedom) == pytest.approx(wanted, abs=1e-8)
    assert stats.t_quantile(0.025, freedom) == pytest.approx(-wanted, abs=1e-8)
    assert stats.t_quantile(0.5, freedom) == 0


@pytest.mark.parametrize(
    "successes, n, low, high",  # Newcombe 1998, Stat. Med. 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0)],
)
def test_wilson_equals_published_intervals(successes, n, low, high):
    found = stats.wilson(successes, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert found.value == successes / n
    assert found.n == n
    outcomes = [1.0] * successes + [0.0] * (n - successes)
    assert found.std == pytest.approx(np.std(outcomes, ddof=1))


def test_mean_equals_a_hand_calculation():
    # 4.3, 4.7, 5.1: mean 4.7, s = 0.4, t(0.975, 2) = 4.30265, half width 4.30265 * 0.4 / sqrt(3)
    found = stats.mean([4.3, 4.7, 5.1])
    assert (found.value, found.std) == (pytest.approx(4.7), pytest.approx(0.4))
    assert found.high - found.value == pytest.approx(0.993655, abs=1e-5)
    assert found.value - found.low == pytest.approx(0.993655, abs=1e-5)


def test_one_item_has_no_interval():
    found = stats.mean([0.5])
    assert (found.low, found.high, found.std) == (-math.inf, math.inf, None)


def test_paired_proportions_equal_newcombe():
    # Newcombe 1998, Stat. Med. 17:2635, table III, (36, 12, 2, 0): difference 0.20, method 10 gives 0.0569 to 0.3404.
    after = [1] * 36 + [1] * 12 + [0] * 2
    before = [1] * 36 + [0] * 12 + [1] * 2
    found = stats.paired_change(before, after)
    assert found.change == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    assert found.clear
    back = stats.paired_change(after, before)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_no_change_seen_is_not_certainty():
    found = stats.paired_change([0] * 50, [0] * 50)
    assert found.change == 0
    assert -0.1 < found.low < 0 < found.high < 0.1
    assert not found.clear


def test_paired_change_uses_the_pairs():
    items = rng(0, "test", "items").normal(size=60) * 10
    noise = rng(0, "test", "noise").normal(size=60) * 0.1
    found = stats.paired_change(items, items + 0.5 + noise)
    assert found.change == pytest.approx(0.5, abs=0.1)
    assert found.high - found.low < 0.1  # the spread of the items themselves cancels
    assert found.clear


def test_avg_at_k_counts_items_not_samples():
    one = stats.avg_at_k([[1], [0], [1], [1]])
    assert one == stats.wilson(3, 4)
    # k equal samples of each item are no more evidence than one sample.
    four = stats.avg_at_k([[1] * 4, [0] * 4, [1] * 4, [1] * 4])
    assert four.value == one.value
    assert four.n == 4
    assert four.high - four.low >= one.high - one.low
    mixed = stats.avg_at_k([[1, 0], [0, 0], [1, 1]])
    assert (mixed.value, mixed.n, mixed.std) == (pytest.approx(0.5), 3, pytest.approx(0.5))
    assert stats.best_of_n([[1, 0], [0, 0], [1, 1]]) == stats.wilson(2, 3)


def test_ratio_is_a_ratio_of_sums():
    found = stats.ratio([10.0, 900.0], [10, 300], seed=0, name="t")
    assert found.value == pytest.approx(910 / 310)
    assert found.value != pytest.approx((1 + 3) / 2)
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(3.0)


def test_bootstrap_is_counter_based_and_covers_as_the_t_interval_does():
    values = rng(0, "test", "boot").normal(3, 2, size=200)
    found = stats.bootstrap_mean(values, seed=1, name="a")
    rng(9, "something else").normal(size=100)
    assert stats.bootstrap_mean(values, seed=1, name="a") == found
    assert stats.bootstrap_mean(values, seed=2, name="a").low != found.low
    assert stats.bootstrap_mean(values, seed=1, name="b").low != found.low
    exact = stats.mean(values)
    assert found.value == exact.value
    assert found.low == pytest.approx(exact.low, abs=0.03)
    assert found.high == pytest.approx(exact.high, abs=0.03)
    same = stats.ratio(values, np.ones(200), seed=1, name="a")
    assert (same.low, same.high) == (pytest.approx(found.low), pytest.approx(found.high))


def test_bootstrap_in_pieces_equals_at_once(monkeypatch):
    values = rng(0, "test", "pieces").normal(size=50)
    found = stats.bootstrap_mean(values, seed=0, name="p", resamples=101)
    monkeypatch.setattr(stats, "_CELLS", 50 * 7)
    assert stats.bootstrap_mean(values, seed=0, name="p", resamples=101) == found


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    trials = 300
    hits = {"t": 0, "wilson": 0, "ratio": 0, "newcombe": 0}
    for trial in range(trials):
        draw = rng(7, "coverage", trial)
        normal = stats.mean(draw.normal(1, 1, size=8))
        hits["t"] += normal.low <= 1 <= normal.high
        share = stats.wilson(int((draw.random(30) < 0.2).sum()), 30)
        hits["wilson"] += share.low <= 0.2 <= share.high
        sizes = draw.integers(10, 200, size=80)
        bits = sizes * (2 + draw.normal(size=80) * 0.5)
        ratio = stats.ratio(bits, sizes, seed=trial, name="c", resamples=400)
        hits["ratio"] += ratio.low <= 2 <= ratio.high
        before = draw.random(40) < 0.3
        after = np.where(draw.random(40) < 0.5, before, draw.random(40) < 0.5)  # true change 0.1
        change = stats.paired_change(before.astype(int), after.astype(int))
        hits["newcombe"] += change.low <= 0.1 <= change.high
    for name, count in hits.items():
        assert 0.90 <= count / trials <= 0.99, (name, count)


def test_paired_ratio_change_resamples_documents_together():
    size = rng(0, "test", "sizes").integers(50, 500, size=100)
    before = size * rng(0, "test", "bits").uniform(1, 6, size=100)
    after = before - 0.2 * size
    found = stats.paired_ratio_change(before, after, size, seed=0, name="bpb")
    assert found.change == pytest.approx(-0.2)
    assert (found.low, found.high) == (pytest.approx(-0.2), pytest.approx(-0.2))
    assert found.clear
    with pytest.raises(DataError, match="same items"):
        stats.paired_ratio_change(before[:-1], after, size, seed=0, name="bpb")


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mean([]),
        lambda: stats.mean([1.0, math.nan]),
        lambda: stats.wilson(3, 2),
        lambda: stats.wilson(0, 0),
        lambda: stats.ratio([1.0], [0.0], 0, "x"),
        lambda: stats.avg_at_k([1, 0]),
        lambda: stats.avg_at_k(np.zeros((3, 0))),
        lambda: stats.paired_change([1], [1, 2]),
    ],
)
def test_impossible_requests_are_refused(call):
    with pytest.raises(DataError):
        call()


def test_pass_at_k_is_the_mean_over_all_subsets_of_k():
    from itertools import combinations

    scores_PK = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0.5, 0.9, 0, 1, 0]])
    for k in (1, 2, 3, 5):
        wanted_P = [np.mean([(row[list(c)] >= 1).any() for c in combinations(range(5), k)]) for row in scores_PK]
        assert stats.passes(scores_PK, k) == pytest.approx(wanted_P)
        found = stats.pass_at_k(scores_PK, k)
        assert found.value == pytest.approx(np.mean(wanted_P)) and found.low <= found.value <= found.high and found.n == 4
    assert stats.pass_at_k(scores_PK, 5).method == "Wilson"  # all 0 or 1
    binary = (scores_PK >= 1).astype(float)
    assert stats.pass_at_k(binary, 1).value == pytest.approx(stats.avg_at_k(binary).value)
    assert stats.pass_at_k(binary, 5).value == stats.best_of_n(binary).value
    for k in (0, 6):
        with pytest.raises(DataError, match=f"pass@{k}"):
            stats.pass_at_k(scores_PK, k)


def test_paired_share_is_the_part_of_a_teachers_score_that_is_kept():
    teacher = np.array([1.0] * 60 + [0.0] * 40)
    student = np.array([1.0] * 45 + [0.0] * 45 + [1.0] * 10)
    found = stats.paired_share(teacher, student, 0, "student")
    assert found.value == pytest.approx(55 / 60) and found.n == 100
    assert 0.7 < found.low < found.value < found.high < 1.15
    same = stats.paired_share(teacher, teacher, 0, "student")  # resampled together: no spread at all
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    rare = stats.paired_share([1, 0, 0, 0], [1, 1, 0, 0], 0, "student")  # many resamples miss the teacher's only point
    assert rare.value == 2 and math.isinf(rare.high) and math.isfinite(rare.low)
    for whole, part in (([0, 0], [0, 1]), ([1, -1], [1, 1]), ([1], [1, 1])):
        with pytest.raises(DataError):
            stats.paired_share(whole, part, 0, "student")
