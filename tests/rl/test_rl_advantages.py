import numpy as np
import pytest

from k2lab.core.errors import RecipeError
from k2lab.rl.advantages import Advantages, has_signal
from k2lab.rl.shaping import Budget, Temperature, Toggle

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.5])


def test_mean_baseline_by_hand():
    np.testing.assert_allclose(Advantages().of(REWARDS), [0.5, -0.5, -0.5, 0.5, 0.0])


def test_leave_one_out_compares_with_the_others():
    found = Advantages(baseline="leave_one_out").of(REWARDS)
    for n, reward in enumerate(REWARDS):
        assert found[n] == pytest.approx(reward - np.delete(REWARDS, n).mean())


def test_division_by_the_standard_deviation():
    found = Advantages(divide_by_std=True).of(REWARDS)
    np.testing.assert_allclose(found, (REWARDS - 0.5) / (REWARDS.std() + 1e-4))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1 + 0.2])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_of_equal_rewards_says_nothing(value, baseline):
    rewards = np.array([value, value, value])
    assert not has_signal(rewards)
    assert Advantages(baseline=baseline, divide_by_std=True).of(rewards).tolist() == [0, 0, 0]


def test_rounding_is_no_signal():
    assert not has_signal(np.array([0.3, 0.1 + 0.2]))
    assert has_signal(np.array([0.3, 0.31]))


def test_temperature_goes_from_start_to_end():
    line = Temperature(start=1.2, end=0.8)
    assert [round(line.at(step, 5), 3) for step in range(5)] == [1.2, 1.1, 1.0, 0.9, 0.8]
    wave = Temperature(start=1.2, end=0.8, decay="cosine")
    values = [wave.at(step, 9) for step in range(9)]
    assert values[0] == 1.2 and values[-1] == pytest.approx(0.8) and values[4] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(values, values[1:]))
    assert values[1] > line.at(1, 9)  # a cosine begins slowly
    assert Temperature(start=0.7, end=0.5).at(0, 1) == 0.7
    with pytest.raises(RecipeError, match="temperature above 0"):
        Temperature(end=0.0).check("stage.rl.temperature")


def shaped(budget, rewards, lengths, cut, step=0, limit=20, typical=None):
    return budget.shaped(np.array(rewards), np.array(lengths), np.array(cut), limit, step, typical).tolist()


def test_step_penalty_falls_on_what_was_cut_off():
    budget = Budget(penalty=0.25)
    assert shaped(budget, [1.0, 0.0, 0.0], [5, 20, 20], [False, True, False]) == [1.0, -0.25, 0.0]


def test_linear_penalty_grows_towards_the_edge():
    budget = Budget(penalty=0.4, shape="linear", margin=0.5)  # over the last 10 of 20 tokens
    found = shaped(budget, [1.0] * 5, [3, 10, 15, 20, 20], [False, False, False, False, True])
    np.testing.assert_allclose(found, [1.0, 1.0, 0.8, 0.6, 0.6])


def test_penalty_begins_late():
    budget = Budget(penalty=1.0, begin=3)
    assert shaped(budget, [0.0, 1.0], [20, 5], [True, False], step=2) == [0.0, 1.0]
    assert shaped(budget, [0.0, 1.0], [20, 5], [True, False], step=3) == [-1.0, 1.0]


def test_budget_of_a_family_is_below_the_stages():
    budget = Budget(tokens={"sums": 12, "essays": 500})
    assert [budget.limit(domain, 64) for domain in ("sums", "essays", "other")] == [12, 64, 64]


def test_toggle_by_hand():
    budget = Budget(penalty=0.0, toggle=Toggle(every=2, accuracy=0.5))
    good, bad = ([1.0, 1.0, 0.0], [4, 9, 4], [False] * 3), ([1.0, 0.0, 0.0], [9, 9, 4], [False] * 3)
    assert shaped(budget, *good, step=1, typical=5.0) == [1.0, 1.0, 0.0]  # a free phase
    assert shaped(budget, *good, step=2, typical=5.0) == [1.0, 0.0, 0.0]  # right and long counts nothing
    assert shaped(budget, *bad, step=3, typical=5.0) == [1.0, 0.0, 0.0]  # a weak group keeps its rewards
    assert shaped(budget, *good, step=4, typical=5.0) == [1.0, 1.0, 0.0]
    assert shaped(budget, *good, step=2, typical=None) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "budget",
    [
        Budget(penalty=-1.0),
        Budget(margin=0.0),
        Budget(begin=-1),
        Budget(tokens={"sums": 0}),
        Budget(toggle=Toggle(every=0)),
        Budget(toggle=Toggle(percentile=0.0)),
        Budget(toggle=Toggle(accuracy=2.0)),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budget):
    with pytest.raises(RecipeError, match=r"stage\.rl\.budget"):
        budget.check("stage.rl.budget")
