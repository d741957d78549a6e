"""The source and the reward `reasoning_gym`: the allow-list, refusals, and, where the package is installed, live tasks."""

import importlib.util
import sys
from pathlib import Path

import pytest

from k2lab.core import slots
from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.data.records import check_record, kind_of
from k2lab.data.sources import _reasoning_gym as live
from k2lab.data.sources import _reasoning_tasks as shipped
from k2lab.gym.task import check_tasks
from k2lab.gym.tasks.answered import Answered

needs_package = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs the extra k2lab[gym]")
END = "<|im_end|>"


def source(**settings):
    return slots.load("source", "reasoning_gym")(**settings)


def reward(**settings):
    return slots.load("reward", "reasoning_gym")(**settings)


# ---------------------------------------------------------------- without the package


def test_every_family_has_a_verdict_with_its_reason():
    verdicts = live.verdicts()
    assert len(verdicts) == 105
    assert sum(verdict["allowed"] for verdict in verdicts.values()) > 80
    for family, verdict in verdicts.items():
        assert verdict["why"], family
        if verdict["allowed"]:
            assert verdict["reward"] in slots.names("reward") and verdict["distinct"] >= 30
            assert verdict["reward"] == "exact_match" or verdict["nonsense"] < 1


def test_all_shipped_families_are_allowed_and_compared_exactly():
    for family in shipped.LEVELS:
        assert live.require_allowed(family, "x")["reward"] == "exact_match"


def test_known_bad_families_are_refused_with_the_reason():
    for family in ("boxnet", "graph_color", "rush_hour", "rubiks_cube", "propositional_logic"):
        why = live.verdicts()[family]["why"]
        with pytest.raises(RecipeError) as caught:
            source(families={family: 5})
        assert f"the family {family} is not used: {why}" in str(caught.value) and f"families.{family}" in str(caught.value)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"families": {}}, "at least one family"),
        ({"families": {"chain_sums": 3}}, "Did you mean 'chain_sum'"),
        ({"families": {"chain_sum": 0}}, "at least one task"),
        ({"families": {"chain_sum": 1}, "settings": {"gcd": {}}}, "not used"),
        ({"families": {"chain_sum": 1}, "settings": {"chain_sum": {"seed": 3}}}, "the source's own"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, expected):
    with pytest.raises(RecipeError, match=expected):
        source(**settings)


def test_without_the_package_the_extra_is_named(monkeypatch):
    from k2lab.gym.rewards import reasoning_gym as module

    module._dataset.cache_clear()
    module._item.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    own = source(families={"chain_sum": 3})
    for call in (lambda: list(own.records()), own.fingerprint, lambda: reward(family="countdown").score({"answer": "x"}, "x")):
        with pytest.raises(MachineError, match=r"k2lab\[gym\]"):
            call()


def test_a_reward_that_does_not_know_its_task_says_so():
    with pytest.raises(DataError, match="needs the task's family"):
        reward().score({"answer": "x"}, "x")


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({}, None),
        ({"difficulty": 2}, 2),
        ({"difficulty": True}, None),
        ({"difficulty": "hard"}, "hard"),
        ({"difficulty": {"num_terms": (2, 6), "n": (1, 1)}, "num_terms": 3}, "num_terms 3, n 1"),
        ({"difficulty": {"value": [1, 9], "weights": [0.1, 0.2, 0.7], "size": 4}}, "value 1 to 9, size 4"),
        ({"difficulty": {"weights": {"a": 1}}}, None),
    ],
)
def test_difficulty_of_an_item(metadata, expected):
    assert live.difficulty_of(metadata) == expected


# ---------------------------------------------------------------- with the package


@needs_package
def test_live_records_are_tasks_that_can_be_won():
    small = {"max_terms": 3, "max_digits": 2}
    own = source(families={"chain_sum": 30, "countdown": 6, "syllogism": 5}, settings={"chain_sum": small})
    made = list(own.records())
    assert made == list(own.records())
    assert [record["domain"] for record in made] == ["chain_sum"] * 30 + ["countdown"] * 6 + ["syllogism"] * 5
    for record in made:
        assert check_record(record, "x") is record
    assert {kind_of(record) for record in made[:30]} == {"reasoning"} and kind_of(made[-1]) == "task"
    assert made[30]["rewards"] == ["reasoning_gym"] and made[30]["options"]["reasoning_gym"]["family"] == "countdown"
    assert len({record["group"] for record in made}) == len({record["key"] for record in made}) == 41
    assert check_tasks(Answered(limit=0).tasks(made)) == []
    assert own.fingerprint() == own.fingerprint() != source(families={"chain_sum": 30}).fingerprint()


@needs_package
def test_seeds_give_other_tasks_and_traces_can_be_left_out():
    one, other = (list(source(families={"gcd": 10}, seed=seed).records()) for seed in (0, 1000))
    assert {record["prompt"] for record in one}.isdisjoint(record["prompt"] for record in other)
    assert {kind_of(record) for record in source(families={"gcd": 10}, traces=False).records()} == {"task"}
    short = list(source(families={"gcd": 10}, longest_trace=20).records())
    assert all(len(record.get("reasoning", "")) <= 20 for record in short)


@needs_package
def test_settings_that_the_package_refuses_or_that_are_too_narrow():
    with pytest.raises(RecipeError, match="refuses the settings"):
        list(source(families={"chain_sum": 2}, settings={"chain_sum": {"min_terms": 0}}).records())
    with pytest.raises(RecipeError, match="refuses the settings"):
        list(source(families={"chain_sum": 2}, settings={"chain_sum": {"terms": 2}}).records())
    few = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    with pytest.raises(RecipeError, match="only 55 different tasks"):
        list(source(families={"products": 100}, settings={"products": few}).records())


@needs_package
def test_the_scorer_accepts_other_right_answers_and_nothing_else():
    record = next(iter(source(families={"countdown": 1}, traces=False).records()))
    (task,) = Answered().tasks([record])
    assert task.score(f"<think>hm</think>{record['answer']}{END}") == 1
    assert task.score(f"({record['answer']}) + 0{END}") == 0
    assert task.score(f"({record['answer']}){END}") == 1
    for wrong in ("", "1", "banana 17", "__import__('os')", "(" * 2000, "1/0", "9**9**9"[:1]):
        assert task.score(wrong + END) == 0
    record["options"]["reasoning_gym"]["seed"] = 5
    with pytest.raises(DataError, match="makes another task"):
        Answered().tasks([record])[0].score("1")


@needs_package
@pytest.mark.slow
def test_the_allow_list_is_what_its_maker_finds():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import make_reasoning_gym_allowed as maker
    finally:
        sys.path.pop(0)
    for family in ("gcd", "countdown", "graph_color", "game_of_life_halting"):
        found, listed = maker.verdict(family), live.verdicts()[family]
        assert {**found, "ms": 0} == {**listed, "ms": 0}
