"""Schedules: values at every boundary, purity, steps against shares, and annealing from a stable point."""

from __future__ import annotations

import math

import pytest

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load, names
from k2lab.optim.schedules.constant import Constant
from k2lab.optim.schedules.cosine import Cosine
from k2lab.optim.schedules.linear import Linear
from k2lab.optim.schedules.wsd import WSD


def test_names_are_the_files():
    assert names("schedule") == ("constant", "cosine", "linear", "wsd")


@pytest.mark.parametrize("name", names("schedule"))
def test_examples_stay_between_zero_and_one_for_every_length(name):
    for schedule in load("schedule", name).examples():
        for total in (1, 2, 3, 10, 100):
            factors = [schedule.factor(step, total) for step in range(total)]
            assert all(0.0 < factor <= 1.0 for factor in factors), (schedule, total, factors)
            assert factors == [schedule.factor(step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", [Constant(warmup=4), Linear(warmup=4), Cosine(warmup=4), WSD(warmup=4)])
def test_warmup_rises_from_the_first_update_to_one(schedule):
    assert [schedule.factor(step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4, 100) == 1.0


@pytest.mark.parametrize("schedule", [Constant(), Linear(warmup=0), Cosine(warmup=0), WSD(warmup=0)])
def test_no_warmup_starts_at_the_peak(schedule):
    assert schedule.factor(0, 100) == 1.0


def test_constant_never_falls():
    assert Constant(warmup=2).factor(10**9, 10) == 1.0


def test_linear_values():
    schedule = Linear(warmup=10, min_ratio=0.2)
    assert schedule.factor(10, 110) == 1.0
    assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert schedule.factor(109, 110) == pytest.approx(0.2 + 0.8 / 100)
    assert schedule.factor(110, 110) == pytest.approx(0.2)
    assert schedule.factor(500, 110) == pytest.approx(0.2)


def test_cosine_values():
    schedule = Cosine(warmup=10, min_ratio=0.1)
    assert schedule.factor(10, 110) == 1.0
    assert schedule.factor(60, 110) == pytest.approx(0.55)
    assert schedule.factor(35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.factor(110, 110) == pytest.approx(0.1)
    assert schedule.factor(500, 110) == pytest.approx(0.1)


@pytest.mark.parametrize("shape, half", [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_boundaries(shape, half):
    schedule = WSD(warmup=10, decay=20, shape=shape, min_ratio=0.1)
    assert [schedule.factor(step, 100) for step in (9, 10, 50, 79, 80)] == [1.0] * 5
    assert schedule.factor(81, 100) < 1.0
    assert schedule.factor(90, 100) == pytest.approx(0.1 + 0.9 * half)
    assert schedule.factor(99, 100) > 0.1
    assert schedule.factor(100, 100) == pytest.approx(0.1)
    assert schedule.factor(1000, 100) == pytest.approx(0.1)


def test_quarter_of_the_decay_tells_the_shapes_apart():
    at = {shape: WSD(warmup=0, decay=100, shape=shape).factor(25, 100) for shape in ("linear", "cosine", "sqrt")}
    assert at == pytest.approx({"linear": 0.75, "cosine": 0.5 * (1 + math.cos(math.pi / 4)), "sqrt": 0.5})


def test_wsd_without_decay_stays():
    assert WSD(warmup=5, decay=0).factor(99, 100) == 1.0
    assert WSD(warmup=5, decay=0.0).factor(99, 100) == 1.0


def test_shares_are_of_the_whole_run_and_one_is_not_one_point_zero():
    steps, shares = WSD(warmup=10, decay=20), WSD(warmup=0.1, decay=0.2)
    assert [steps.factor(s, 100) for s in range(100)] == [shares.factor(s, 100) for s in range(100)]
    assert Linear(warmup=1).factor(0, 100) == 1.0
    assert Linear(warmup=1.0).factor(0, 100) == 0.01


def test_anneal_from_any_stable_point_continues_the_stable_run():
    stable = WSD(warmup=10, decay=0)
    annealed = WSD(warmup=10, decay=20, anneal_at=60)
    planned = WSD(warmup=10, decay=20)
    assert [annealed.factor(s, 80) for s in range(60)] == [stable.factor(s, 1000) for s in range(60)]
    assert [annealed.factor(s, 80) for s in range(80)] == [planned.factor(s, 80) for s in range(80)]
    assert annealed.factor(60, 200) == 1.0 and annealed.factor(70, 200) == 0.5 and annealed.factor(80, 200) == 0.0


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt"])
def test_an_anneal_of_its_own_makes_the_decay_of_the_stable_run(shape):
    """A stage that starts from the stable checkpoint of step 60 and decays for all of its 20 steps, against one long run."""
    inside = WSD(warmup=10, decay=20, anneal_at=60, shape=shape, min_ratio=0.05)
    alone = WSD(warmup=0, decay=1.0, shape=shape, min_ratio=0.05)
    assert [alone.factor(s, 20) for s in range(21)] == [inside.factor(60 + s, 80) for s in range(21)]
    assert alone.factor(0, 20) == 1.0 and alone.factor(20, 20) == pytest.approx(0.05)


@pytest.mark.parametrize("start", [10, 37, 60, 99])
def test_every_stable_step_can_start_an_anneal_and_the_warmup_cannot(start):
    stable = WSD(warmup=10, decay=0)
    annealed = WSD(warmup=10, decay=5, anneal_at=start)
    assert all(annealed.factor(s, start + 5) == stable.factor(s, 10**6) for s in range(start + 1))
    assert annealed.factor(start + 1, start + 5) == pytest.approx(0.8)
    with pytest.raises(RecipeError, match="inside the warmup"):
        WSD(warmup=10, decay=5, anneal_at=9).factor(0, 100)


def test_a_decay_that_would_start_in_the_warmup_starts_after_it():
    schedule = WSD(warmup=50, decay=80)
    assert [schedule.factor(s, 100) for s in (0, 49, 50, 75, 100)] == pytest.approx([0.02, 1.0, 1.0, 0.5, 0.0])


def test_a_run_shorter_than_its_warmup_is_only_warmup():
    for schedule in (Linear(warmup=100), Cosine(warmup=100), WSD(warmup=100)):
        assert [schedule.factor(s, 2) for s in range(2)] == [0.01, 0.02]


@pytest.mark.parametrize(
    "make",
    [
        lambda: WSD(warmup=-1),
        lambda: WSD(decay=1.5),
        lambda: WSD(min_ratio=2.0),
        lambda: WSD(shape="cubic"),
        lambda: WSD(anneal_at=-3),
        lambda: WSD(anneal_at=3, decay=0),
        lambda: Linear(warmup=True),
        lambda: Cosine(warmup=float("nan")),
        lambda: Constant(warmup="3"),
        lambda: WSD(warmup=10, anneal_at=5, decay=5).factor(0, 100),
    ],
)
def test_impossible_settings_are_recipe_errors(make):
    with pytest.raises(RecipeError):
        make()
