"""Small parts of the later stages: choosing pairs, judging them, journals, replay, tokens that stay as they were."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.core.types import Message, Sample
from k2lab.data.samples import preference_unit
from k2lab.stages._asking import made_record, own_tokens, prompt_of, rendered_answer
from k2lab.stages._chats import written
from k2lab.stages._fine_tuning import document_or_conversation, tokens_of, weights_of
from k2lab.stages._journal import Journal
from k2lab.stages._pairs import choose_pairs, distinct
from k2lab.stages._preference import judge_pairs
from k2lab.stages._teacher import Teacher, write_shard
from k2lab.text.chat import Rendered
from k2lab.text.tokenizer import train_bpe

OPTIM = load("optimizer", "adamw")(lr=1e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the model reads text and learns which token comes next"] * 3, 320, 32)


# ---------------------------------------------------------------- pairs


def answer(reward, length, text=None):
    return {
        "reward": reward,
        "tokens": list(range(length)),
        "text": text or f"{reward} {length}",
        "stop": "eos",
        "error": "",
        "logprob": -1.0,
    }


def choose(answers, **changes):
    settings = {
        "per_task": 4,
        "margin": 0.5,
        "match_length": True,
        "length_ratio": None,
        "hard": False,
        "seed": 0,
        "key": "k",
        **changes,
    }
    return choose_pairs(answers, **settings)


def test_pairs_join_right_and_wrong_answers_of_similar_length():
    answers = [answer(1.0, 5), answer(1.0, 20), answer(0.0, 21), answer(0.0, 6), answer(0.9, 9)]
    pairs = choose(answers, per_task=2)
    lengths = [(len(chosen["tokens"]), len(rejected["tokens"])) for chosen, rejected in pairs]
    assert lengths == [(5, 6), (20, 21)] or lengths == [(20, 21), (5, 6)]
    assert all(chosen["reward"] - rejected["reward"] >= 0.5 for chosen, rejected in choose(answers, per_task=99))


def test_each_answer_is_used_before_one_is_used_twice():
    answers = [answer(1.0, 5), answer(0.0, 5, "a"), answer(0.0, 9, "b"), answer(0.0, 30, "c")]
    assert {rejected["text"] for _, rejected in choose(answers, per_task=3)} == {"a", "b", "c"}


def test_pairs_need_a_margin_and_a_bound_on_lengths():
    assert choose([answer(1.0, 5), answer(1.0, 6)]) == []
    assert choose([answer(0.7, 5), answer(0.3, 6)]) == [] != choose([answer(0.7, 5), answer(0.3, 6)], margin=0.3)
    assert choose([answer(1.0, 5), answer(0.0, 6)], length_ratio=1.0) == []
    assert choose([answer(1.0, 6), answer(0.0, 6)], length_ratio=1.0) != []


def test_hard_pairs_are_confident_mistakes():
    answers = [{**answer(float(n < 2), 5, str(n)), "logprob": lp} for n, lp in enumerate((-0.1, -0.9, -0.2, -2.0))]
    assert [(c["text"], r["text"]) for c, r in choose(answers, per_task=1, hard=True)] == [("1", "2")]
    answers[2]["tokens"] = list(range(9))  # this comes before lengths, which may be bounded
    assert [(c["text"], r["text"]) for c, r in choose(answers, per_task=1, hard=True)] == [("1", "2")]
    assert [(c["text"], r["text"]) for c, r in choose(answers, per_task=1, hard=True, length_ratio=1.2)] == [("1", "3")]


def test_choice_depends_on_seed_and_key_alone():
    answers = [answer(float(n < 4), 7, str(n)) for n in range(8)]
    assert choose(answers) == choose(answers)
    assert any(choose(answers, key=str(n)) != choose(answers) for n in range(4))


def test_answers_that_say_the_same_count_once():
    assert [a["text"] for a in distinct([answer(1, 3, "a b"), answer(0, 4, "a  b"), answer(0, 4, "b")])] == ["a b", "b"]


# ---------------------------------------------------------------- judging


def units(lengths):
    made = []
    for n, (chosen, rejected) in enumerate(lengths):
        sides = [Rendered([1, 2, *([10 + n] * k)], [False, False] + [True] * k) for k in (chosen, rejected)]
        sides[1].tokens[-1] = 99
        made.append(preference_unit(*sides, f"p{n}"))
    return made


def test_pairs_are_judged_by_hand():
    pairs = units([(2, 2), (2, 4), (1, 1), (3, 9)])
    sides = [side for unit in pairs for side in unit]
    start = [np.where(side.weight != 0, -1.0, 5.0).astype(np.float32) for side in sides]  # context must not count
    end = [values.copy() for values in start]
    end[0][-1] = -0.5  # chosen of p0 gains 0.5
    end[2][-2:] = -2.0  # chosen of p1 loses 2, its rejected side 0.5 a token
    end[3][-4:] = -1.5
    end[6][-3:] = -0.9  # chosen of p3 gains 0.3; p2 stays a tie
    found = judge_pairs(pairs, start, end, reference=end)
    assert found["pairs"] == 4
    # gains: p0 0.5 > 0, p1 -2 = -2 (tie), p2 0 = 0 (tie), p3 0.3 > 0
    assert found["all"]["reward_accuracy"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert found["all"]["logprob_accuracy_before"]["value"] == 0.5  # equal everywhere
    # per token: p0 -0.75 > -1, p1 -2 < -1.5, p2 tie, p3 -0.9 > -1
    assert found["all"]["logprob_accuracy_after"]["value"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found["all"]["logprob_accuracy_change"]["value"] == pytest.approx(0.125)
    assert found["all"]["reward_accuracy_reference"]["value"] == 0.5
    assert found["all"]["reward_margin"]["value"] == pytest.approx((0.5 + 0 + 0 + 0.3) / 4, abs=1e-6)
    assert found["all"]["mean_length_gap"] == 2.0 and found["length_matched"]["mean_length_gap"] == 0.0
    assert found["length_matched"]["reward_accuracy"] == {**found["length_matched"]["reward_accuracy"], "value": 0.75, "n": 2}
    json.dumps(found, allow_nan=False)


def test_a_single_pair_has_no_interval_that_json_cannot_hold():
    pairs = units([(2, 2)])
    values = [np.zeros(4, np.float32)] * 2
    found = judge_pairs(pairs, values, values)
    assert found["all"]["reward_margin"]["low"] is None and "reward_accuracy_reference" not in found["all"]
    json.dumps(found, allow_nan=False)


# ---------------------------------------------------------------- journal and rows


def test_journal_keeps_whole_lines_and_drops_what_a_kill_left(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.add({"a": "é\n"})
        journal.add([1, 2])
    for torn in (b'{"half": ', b'{"whole": 1}', b"\xff\xfe\n", b'{"half": \n{"later": 1}\n'):
        whole = path.read_bytes()
        path.write_bytes(whole + torn)
        with Journal(path) as journal:
            assert journal.entries == [{"a": "é\n"}, [1, 2]]
        assert path.read_bytes() == whole
    with Journal(path) as journal:
        journal.add("more")
        assert journal.entries[-1] == "more"
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_rows_of_a_shard_come_back_for_their_answer(tmp_path, precision):
    tops = [[((5, 3), (-0.25, -2.0)), ((7,), (-0.5,))], [((1, 2, 9), (-1.0, -1.5, -9.0))]]
    first = write_shard(tmp_path, 2, tops, 2, precision)
    assert first == [0, 2]
    ids, logprobs = Teacher(tmp_path).rows({"key": "x", "top": [2, 0], "response_tokens": [5, 7]})
    assert ids.tolist() == [[5, 3], [7, 0]] and logprobs.tolist() == [[-0.25, -2.0], [-0.5, -math.inf]]
    ids, _ = Teacher(tmp_path).rows({"key": "y", "top": [2, 2], "response_tokens": [2]})
    assert ids.tolist() == [[1, 2]]


# ---------------------------------------------------------------- prompts, tokens, texts


def test_thoughts_are_read_from_the_text_and_nothing_else_is():
    assert written("<think>a</think>b").parts == written(" \n<think>a</think>b").parts
    assert [type(part).__name__ for part in written("<think>a</think>b").parts] == ["Reasoning", "Text"]
    assert written("b <think>a</think>").content == "b <think>a</think>"
    assert written("<think>a").content == "" and written("<|im_end|>").content == "<|im_end|>"


def test_a_models_own_tokens_are_kept_and_others_are_rendered(tokenizer):
    own = [*tokenizer.encode("to"), *tokenizer.encode("ken"), tokenizer.im_end_id]  # not what encoding "token" gives
    assert tokenizer.encode("token") != own[:-1]
    record = {
        "key": "k",
        "prompt": "the model",
        "response": "token",
        "response_tokens": own,
        "tokenizer": tokenizer.fingerprint(),
    }
    assert own_tokens(record, ("response_tokens",), tokenizer)
    kept = rendered_answer(record, "token", own, tokenizer, False)
    fresh = rendered_answer(record, "token", None, tokenizer, False)
    assert kept.tokens[-len(own) :] == own and kept.trained == [False] * (len(kept.tokens) - len(own)) + [True] * len(own)
    assert fresh.tokens[-1] == tokenizer.im_end_id and fresh.tokens != kept.tokens
    head = len(kept.tokens) - len(own)
    assert fresh.tokens[:head] == kept.tokens[:head] and not any(fresh.trained[:head]) and all(fresh.trained[head:])
    assert not own_tokens({**record, "tokenizer": "another"}, ("response_tokens",), tokenizer)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi"},
        {"question": "Hi", "answer": "x"},
        {"instruction": "Hi", "output": "x"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]},
    ],
    ids=["prompt", "question", "instruction", "chat"],
)
def test_prompts_of_all_kinds_of_records(record):
    assert prompt_of({"key": "k", **record}) == (Message.text("user", "Hi"),)


def test_a_conversation_before_the_prompt_goes_along():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    record = {"key": "k", "messages": [*messages, {"role": "assistant", "content": "x"}], "domain": "d", "group": "g"}
    made = made_record(record, "k#0", response="y")
    assert made["prompt"] == "Hi" and made["domain"] == "d" and made["group"] == "g"
    assert prompt_of(made) == prompt_of(record) and len(prompt_of(made)) == 2
    other = made_record(
        {"key": "k", "prompt": "Hi", "answer": "4", "options": {"exact_match": {}}}, "k#0", ["numeric"], response="y"
    )
    assert other["rewards"] == ["numeric"] and other["options"] == {}
    assert "answer" not in made_record({"key": "k", "question": "Hi", "answer": "long text"}, "k#0", response="y")


# ---------------------------------------------------------------- replay


def reasoning_sft(**fields):
    return load("stage", "reasoning_sft")(data=("d",), replay=("r",), optim=OPTIM, steps=1, seq_len=32, **fields)


def sample(length, source):
    return Sample(tokens=np.zeros(length, np.int32), weight=np.ones(length, np.float32), key="k", source=source)


@pytest.mark.parametrize("mixture", [{}, {"a": 0.5, "b": 2.0}, {"replay/x": 3.0}])
def test_replay_makes_its_share_of_the_tokens(mixture):
    samples = [sample(10, "a")] * 7 + [sample(20, "b")] * 3 + [sample(30, "replay/x")] * 50 + [sample(5, "replay/y")] * 9
    weights = weights_of(reasoning_sft(mixture=mixture, replay_share=0.25), SimpleNamespace(name="s"), samples)
    tokens = {
        d: sum(tokens_of(s) for s in samples if s.source == d) * weights.get(d, 1.0) for d in ("a", "b", "replay/x", "replay/y")
    }
    again = tokens["replay/x"] + tokens["replay/y"]
    assert again / sum(tokens.values()) == pytest.approx(0.25)
    assert weights["replay/x"] / weights["replay/y"] == pytest.approx(mixture.get("replay/x", 1.0))
    with pytest.raises(RecipeError, match="no domain 'c'"):
        weights_of(reasoning_sft(mixture={"c": 1.0}), SimpleNamespace(name="s"), samples)


def test_replayed_text_trains_every_token_once(tokenizer):
    text = "the model reads text and learns which token comes next " * 4
    pieces = list(document_or_conversation(reasoning_sft(), tokenizer)({"key": "k", "text": text}))
    whole = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert len(pieces) > 1 and all(len(tokens) <= 32 for tokens, _ in pieces)
    trained = [token for tokens, flags in pieces for token, flag in zip(tokens, flags) if flag]
    assert trained == whole[1:] and pieces[0][0][0] == whole[0]


def test_evaluation_draws_the_same_documents_for_every_model():
    from k2lab.stages.evaluate import Evaluate

    context = SimpleNamespace(seed=1, name="evaluate")
    some = Evaluate(models=("sft",), text_documents=5)
    drawn = some._drawn(context, 40)
    assert drawn == some._drawn(context, 40) == sorted(set(drawn)) and len(drawn) == 5
    assert drawn != some._drawn(SimpleNamespace(seed=2, name="evaluate"), 40)
    assert some._drawn(context, 4) == Evaluate(models=("sft",))._drawn(context, 4) == [0, 1, 2, 3]
    with pytest.raises(RecipeError, match="text_documents"):
        Evaluate(models=("sft",), text_documents=-1).check("stage.evaluate")


def test_a_model_is_compared_with_the_nearest_measured_one_it_was_trained_from(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from k2lab.core import artifacts
    from k2lab.stages.evaluate import _measured_start

    def made(name, identity, start=None):
        parents = {} if start is None else {"start": {"name": start.name, "identity": start.identity}}
        path = tmp_path / f"{name}-{identity[:8]}"
        return SimpleNamespace(name=name, identity=identity, path=path, manifest={"parents": parents})

    first = made("sft", "a" * 64)
    between = made("start", "b" * 64, first)
    last = made("reasoning", "c" * 64, between)
    stored = {each.path: each for each in (first, between, last)}
    monkeypatch.setattr(artifacts, "exists", lambda path: path in stored)
    monkeypatch.setattr(artifacts, "open_artifact", lambda path: stored[path])
    assert _measured_start(last, {first.identity: "sft", last.identity: "reasoning"}) == "sft"
    assert _measured_start(last, {first.identity: "sft", between.identity: "start"}) == "start"
    assert _measured_start(last, {last.identity: "reasoning"}) is None and _measured_start(first, {}) is None
    del stored[between.path]
    assert _measured_start(last, {first.identity: "sft"}) is None
