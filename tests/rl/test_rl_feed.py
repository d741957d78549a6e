"""The feed on a scripted sampler: what a task gets does not depend on others, and nothing is lost by stopping."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest

from k2lab.core.types import Completion, Message, Sample, SampleParams, StopReason
from k2lab.gym.task import Task
from k2lab.rl import feed as feeds
from k2lab.rl.feed import PtxStream, RolloutFeed, Settings
from k2lab.rl.shaping import Budget, Temperature

END = 99


class Tokenizer:
    """Ids are letters; what chat rendering needs is faked by `chat_tokens` below."""

    im_end_id, pad_id = END, 0

    def decode(self, tokens, skip_special=False):
        return "".join("<|im_end|>" if token == END else chr(token) for token in tokens)


@dataclass
class Letters:
    """Answers "a" or "b" and the end, by key; remembers what it was asked."""

    policy_version: int = 0

    def __post_init__(self):
        self.asked: list[tuple[str, SampleParams, int]] = []

    def sample(self, prompts, params, keys):
        done = []
        for _, key in zip(prompts, keys, strict=True):
            self.asked.append((key, params, self.policy_version))
            number = sum(map(ord, key))
            letter = ord("a") if number % 3 else ord("b")
            tokens = (letter,) * (number % 4 + 1)
            if len(tokens) >= params.max_tokens:
                tokens, stop = tokens[: params.max_tokens], StopReason.LENGTH
            else:
                tokens, stop = (*tokens, END), StopReason.EOS
            done.append(Completion(tokens, tuple(-0.5 for _ in tokens), stop, self.policy_version))
        return done


@pytest.fixture(autouse=True)
def _rendering(monkeypatch):
    class Rendered:
        def __init__(self, messages):
            self.tokens = [ord(letter) for letter in messages[-1].content]

    from k2lab.text import chat

    monkeypatch.setattr(chat, "render", lambda messages, tokenizer, **_: Rendered(messages))
    monkeypatch.setattr(chat, "parse", lambda tokens, tokenizer, **_: Message.text("assistant", tokenizer.decode(tokens)))


def tasks(count=6, rewards=("contains",), **fields):
    return [
        Task(
            key=f"t{n}", messages=(Message.text("user", "q" * (n + 2)),), answer="a", rewards=rewards, max_tokens=5,
            options={"contains": {"whole_name": False}} if rewards == ("contains",) else {},
            meta={"domain": "x" if n % 2 else "y"}, **fields,
        )
        for n in range(count)
    ]  # fmt: skip


def made(given=None, *, rank=0, world=1, ptx=None, notes=None, **changes):
    table = {
        "name": "rl", "seed": 3, "total_steps": 20, "group_size": 4, "tasks_per_step": 2, "seq_len": 32, "tokens_per_batch": 40,
        "budget": Budget(penalty=0.0),
    }  # fmt: skip
    feed = RolloutFeed(
        given if given is not None else tasks(), Tokenizer(), Settings(**{**table, **changes}), ptx=ptx, rank=rank, world=world,
        note=(notes if notes is not None else []).append,
    )  # fmt: skip
    feed.sampler = Letters()
    return feed


def keys(batches):
    return [key for batch in batches for key in batch.keys]


def flat(batches):
    names = ("tokens_T", "targets_T", "weight_T", "starts_S1")
    return [[getattr(b, name).tolist() for name in names] + [{n: a.tolist() for n, a in b.streams_T.items()}] for b in batches]


def test_advantages_are_reward_less_the_groups_mean_on_the_models_tokens():
    feed = made()
    by_group = {}
    for batch in feed.take():
        for s, key in enumerate(batch.keys):
            part = slice(batch.starts_S1[s], batch.starts_S1[s + 1])
            trained = batch.weight_T[part] != 0
            advantages = batch.streams_T["advantages"][part][trained]
            assert trained.any() and len(set(advantages.tolist())) == 1
            assert (batch.streams_T["logprobs"][part][trained] == -0.5).all()
            assert (batch.streams_T["ptx"][part] == 0).all()
            right = ord("a") in batch.targets_T[part][trained]
            by_group.setdefault(key.split("#")[0], []).append((float(right), float(advantages[0])))
    assert len(by_group) == 2
    for group in by_group.values():
        rewards = np.array([reward for reward, _ in group])
        np.testing.assert_allclose([a for _, a in group], rewards - rewards.mean(), atol=1e-6)
    assert any(a for group in by_group.values() for _, a in group)


def test_micro_batches_hold_whole_samples_and_few_enough_tokens():
    feed = made(tokens_per_batch=20)
    batches = feed.take(7)  # any number: what the step needs follows from its rollouts
    assert len(batches) > 2
    assert all(len(batch.tokens_T) <= 20 for batch in batches)
    assert len(keys(batches)) == 8


def test_responses_share_their_prompt_where_the_model_can():
    def taken(shares, **changes):
        asked = [(Message.text("user", "pq" * 6 + "r" * n),) for n in range(4)]
        long = [dataclasses.replace(task, messages=messages) for task, messages in zip(tasks(4), asked)]
        feed = made(given=long, tasks_per_step=4, **changes)
        feed.shares_stems = shares
        return feed.take()

    def trained(batches):
        found = {}
        for batch in batches:
            for s, key in enumerate(batch.keys):
                part = slice(batch.starts_S1[s], batch.starts_S1[s + 1])
                rows = np.flatnonzero(batch.weight_T[part]) + part.start
                if len(rows):
                    arrays = (batch.targets_T, batch.positions_T, batch.tokens_T, *batch.streams_T.values())
                    found[key] = [array[rows].tolist() for array in arrays]
        return found

    copies, (shared,) = taken(False, tokens_per_batch=1000), taken(True, tokens_per_batch=1000)
    assert trained([shared]) == trained(copies) and len(trained(copies)) == 16
    # contexts of 12, 13, 14 and 15 tokens, all but the last of each once instead of four times
    assert sum(len(batch.tokens_T) for batch in copies) - len(shared.tokens_T) == 3 * (11 + 12 + 13 + 14)
    small = taken(True, tokens_per_batch=35)
    assert len(small) > 1 and all(len(batch.tokens_T) <= 35 for batch in small)
    assert trained(small) == trained(copies)


def test_every_task_comes_once_per_pass_and_later_passes_draw_anew():
    feed = made()
    passes = [[key.split("#")[0] for key in keys(feed.take())] for _ in range(6)]
    first, second = {k for step in passes[:3] for k in step}, {k for step in passes[3:] for k in step}
    assert first == {f"t{n}" for n in range(6)} and second == {f"t{n}@1" for n in range(6)}
    assert feed.epoch == 2.0


def test_draws_depend_on_the_policy_version():
    feed = made(given=tasks(2))
    feed.take()
    feed.take()
    assert [version for _, _, version in feed.sampler.asked] == [0] * 8 + [1] * 8
    assert len({key for key, _, _ in feed.sampler.asked}) == 16


def test_temperature_and_budget_reach_the_sampler():
    feed = made(temperature=Temperature(start=1.5, end=0.5), total_steps=3)
    for wanted in (1.5, 1.0, 0.5):
        feed.take()
        assert feed.facts()["temperature"] == wanted
    temperatures = [params.temperature for _, params, _ in feed.sampler.asked]
    assert sorted(set(temperatures)) == [0.5, 1.0, 1.5]
    assert {params.max_tokens for _, params, _ in feed.sampler.asked} == {5}


@pytest.mark.parametrize("changes", [{}, {"max_policy_lag": 1}, {"refill_rounds": 3, "tasks_per_step": 4}])
@pytest.mark.parametrize("with_ptx", [False, True])
def test_a_feed_continues_from_its_cursor_as_if_never_stopped(changes, with_ptx):
    def fresh():
        return made(ptx=stream() if with_ptx else None, **changes)

    whole = fresh()
    expected = [(flat(whole.take()), {k: v for k, v in whole.facts().items() if k != "sample_seconds"}) for _ in range(5)]
    for stop in (1, 2, 4):
        first = fresh()
        for _ in range(stop):
            first.take()
        cursor = json.loads(json.dumps(first.cursor()))
        second = fresh()
        second.seek(cursor)
        for batches, facts in expected[stop:]:
            assert flat(second.take()) == batches
            assert {k: v for k, v in second.facts().items() if k != "sample_seconds"} == facts


def test_with_a_lag_rollouts_are_those_of_the_step_before():
    feed = made(max_policy_lag=1, total_steps=3)
    lags, versions = [], []
    for _ in range(3):
        feed.take()
        lags.append(feed.facts()["lag"])
        versions.append([version for _, _, version in feed.sampler.asked])
    assert lags == [0, 1, 1]
    assert (
        versions[0] == [0] * 16 and versions[1][16:] == [1] * 8 and len(versions[2]) == 24
    )  # nothing for a step that never comes


@pytest.mark.parametrize("changes", [{}, {"refill_rounds": 3}])
def test_ranks_share_the_tasks_of_one_order(changes, monkeypatch):
    alone = made(tasks_per_step=4)
    expected = sorted(keys(alone.take()))
    ranks = [made(tasks_per_step=4, rank=rank, world=2) for rank in range(2)]
    assert sorted(key for feed in ranks for key in keys(feed.take())) == expected
    assert ranks[0].cursor() == ranks[1].cursor() == alone.cursor()


def test_what_was_drawn_ahead_is_dealt_to_any_number_of_ranks():
    alone = made(max_policy_lag=1, tasks_per_step=4)
    alone.take()
    cursor = json.loads(json.dumps(alone.cursor()))
    ranks = [made(max_policy_lag=1, tasks_per_step=4, rank=rank, world=2) for rank in range(2)]
    for feed in ranks:
        feed.seek(cursor)
    shared = [keys(feed.take()) for feed in ranks]
    assert sorted(shared[0] + shared[1]) == sorted(keys(alone.take()))
    assert not {key.split("#")[0] for key in shared[0]} & {key.split("#")[0] for key in shared[1]}


def test_groups_without_signal_are_replaced_within_the_rounds():
    def silent(batches):
        return [
            key
            for batch in batches
            for s, key in enumerate(batch.keys)
            if not batch.streams_T["advantages"][batch.starts_S1[s] : batch.starts_S1[s + 1]].any()
        ]

    plain = made(tasks_per_step=6, group_size=2)
    assert silent(plain.take()) and plain.facts()["zero_signal"] > 0 and plain.facts()["groups"] == 6
    dropped = made(tasks_per_step=6, group_size=2, drop_zero_signal=True)
    kept = keys(dropped.take())
    assert 0 < len(kept) < 12 and dropped.facts() == {**plain.facts(), "sample_seconds": dropped.facts()["sample_seconds"]}
    filled = made(tasks_per_step=6, group_size=2, refill_rounds=8)
    batches = filled.take()
    assert not silent(batches)
    assert len({key.split("#")[0] for key in keys(batches)}) == 6 and filled.facts()["groups"] > 6
    assert filled.cursor()["position"] == filled.facts()["groups"]


def test_a_step_in_which_nothing_has_signal_keeps_its_rollouts():
    feed = made(group_size=2, refill_rounds=1, tasks_per_step=1)
    feed.sampler.sample = lambda prompts, params, keys: [
        Completion((97, END), (-0.5, -0.5), StopReason.EOS, 0) for _ in keys
    ]  # always right
    batches = feed.take()
    assert len(keys(batches)) == 4 and feed.facts()["zero_signal"] == 1.0 and feed.facts()["pass_rate"] == 1.0


REWARD = '''"""A reward of a test."""
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Broken:
    """Fails on b."""

    def score(self, task, response):
        if "b" in response:
            {what}
        return 0.5 if len(response) % 2 else 1.0

    @staticmethod
    def examples():
        return [Broken()]
'''


@pytest.mark.parametrize("what", ["raise ZeroDivisionError('no')", "return float('nan')", "return 7.0"])
def test_rollouts_whose_reward_fails_are_left_out_and_counted(what, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(REWARD.format(what=what))
    notes = []
    feed = made(given=tasks(rewards=(str(path),)), notes=notes, tasks_per_step=6)
    batches = feed.take()
    found = feed.facts()
    assert found["errors"] > 0 and found["errors"] + found["rollouts"] == 24
    trained = [batch.targets_T[batch.weight_T != 0] for batch in batches]
    assert not any(ord("b") in part for part in trained)
    assert len(notes) == 1 and "left out" in notes[0]
    feed.take()
    assert len(notes) == 1  # said once


def test_a_step_of_nothing_but_errors_still_gives_a_batch(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(REWARD.format(what="pass").replace('"b" in response', "True").replace("pass", "raise ValueError"))
    feed = made(given=tasks(rewards=(str(path),)))
    (batch,) = feed.take()
    assert batch.num_tokens == 0 and set(batch.streams_T) == feeds.GIVES
    assert feed.facts()["errors"] == 8 and feed.facts()["rollouts"] == 0


def test_rollouts_longer_than_a_row_are_left_out():
    feed = made(seq_len=6, tasks_per_step=6)
    batches = feed.take()
    assert feed.facts()["too_long"] > 0
    assert all(np.diff(batch.starts_S1).max() <= 6 for batch in batches)


def stream():
    samples = [Sample(np.arange(n + 3, dtype=np.int32), np.array([0.0] + [1.0] * (n + 2), np.float32), f"p{n}") for n in range(4)]
    return PtxStream(samples, lambda epoch: np.arange(4) if epoch % 2 == 0 else np.arange(4)[::-1], tokens=6)


def test_ptx_samples_stand_beside_the_rollouts():
    feed = made(ptx=stream())
    seen = []
    for _ in range(3):
        for batch in feed.take():
            for s, key in enumerate(batch.keys):
                part = slice(batch.starts_S1[s], batch.starts_S1[s + 1] - 1)
                assert (batch.streams_T["ptx"][part] == key.startswith("p")).all()
                seen += [key] if key.startswith("p") else []
    # at least 6 trained tokens per step: 2 + 3 + 4, then 5 + 5 (the second pass is backwards), then 4 + 3
    assert seen == ["p0", "p1", "p2", "p3", "p3", "p2", "p1"]


def test_ptx_samples_are_dealt_to_ranks():
    feeds_ = [made(ptx=stream(), rank=rank, world=2) for rank in range(2)]
    shares = [[key for key in keys(feed.take()) if key.startswith("p")] for feed in feeds_]
    assert sorted(shares[0] + shares[1]) == ["p0", "p1", "p2"] and shares[0] and shares[1]


def test_facts_by_hand():
    feed = made(given=tasks(2), budget=Budget(penalty=0.5))
    script = iter([((97, END), "eos"), ((98, END), "eos"), ((98,) * 5, "length"), ((97, 97, END), "eos")] * 2)
    feed.sampler.sample = lambda prompts, params, keys: [
        Completion(tokens, (-1.0,) * len(tokens), StopReason(stop), 0) for tokens, stop in (next(script) for _ in keys)
    ]
    feed.take()
    found = feed.facts()
    assert found["reward"] == found["pass_rate"] == 0.5 and found["shaped_reward"] == 0.375
    assert found["length"] == 3.0 and found["length_max"] == 5 and found["truncated"] == 0.25
    assert found["rollouts"] == 8 and found["groups"] == 2 and found["zero_signal"] == 0 and found["errors"] == 0
