import numpy as np
import pytest

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Completion, Message, StopReason
from k2lab.eval.measured import merge, task_metrics
from k2lab.eval.tasks import ENDS, NO_OTHER_SPECIAL, NON_EMPTY, run_tasks
from k2lab.gym.task import Task
from k2lab.sampling.local import LocalSampler
from k2lab.sampling.scripted import ScriptedSampler


def make_task(key, answer, **changes):
    fields = {"messages": (Message.text("user", f"ask {key}"),), "rewards": ("exact_match",), **changes}
    return Task(key=key, answer=answer, **fields)


def test_scores_shape_and_stops(tokenizer):
    end, user = tokenizer.im_end_id, tokenizer.special_id("<|im_user|>")
    say = tokenizer.encode
    tasks = [make_task(name, "yes") for name in ("right", "wrong", "cut", "empty", "special", "full")]
    replies = {
        "right/0": [*say("yes"), end],
        "wrong/0": [*say("no"), end],
        "cut/0": say("yes" * 30),
        "empty/0": [end],
        "special/0": [*say("yes"), user, end],
        "full/0": Completion((), (), StopReason.CONTEXT),
    }
    run = run_tasks(tasks, ScriptedSampler(replies), tokenizer)
    assert run.scores_PK[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert run.shape_PK[ENDS][:, 0].tolist() == [1, 1, 0, 1, 1, 0]
    assert run.shape_PK[NON_EMPTY][:, 0].tolist() == [1, 1, 1, 0, 1, 0]
    assert run.shape_PK[NO_OTHER_SPECIAL][:, 0].tolist() == [1, 1, 1, 1, 0, 1]
    assert run.stops() == {"eos": 4, "length": 1, "context": 1}
    assert run.avg_at_k().value == pytest.approx(1 / 6)
    assert {name: share.value for name, share in run.shape().items()} == {
        ENDS: pytest.approx(4 / 6),
        NON_EMPTY: pytest.approx(4 / 6),
        NO_OTHER_SPECIAL: pytest.approx(5 / 6),
    }
    assert run.settings == "plain prompt, temperature 0, k=1, max 48 tokens"
    assert [r.response for r in run.groups[0].rollouts] == ["yes<|im_end|>"]
    assert run.samples(1) == [{"prompt": "ask right", "completion": "yes<|im_end|>", "stop": "eos"}]
    assert run.only([0, 4]).scores_PK.tolist() == [[1], [0]]


def test_prompts_end_with_the_assistants_header(tokenizer):
    sampler = ScriptedSampler(lambda prompt, key: [tokenizer.im_end_id])
    run_tasks([make_task("t", "x")], sampler, tokenizer)
    ((prompt, params, key),) = sampler.requests
    text = tokenizer.decode(prompt)
    assert text.endswith("<|im_user|>user<|im_middle|>ask t<|im_end|><|im_assistant|>assistant<|im_middle|>")
    assert text.startswith("<|im_system|>system<|im_middle|>")
    assert params.stop_tokens == (tokenizer.im_end_id,)
    assert key == "t/0"


def test_k_samples_limits_and_rewards(tokenizer):
    end, say = tokenizer.im_end_id, tokenizer.encode
    tasks = [
        make_task("a", "7", rewards=("numeric", "well_formed"), max_tokens=4),
        make_task("b", "yes", max_tokens=8),
    ]
    replies = {
        "a/0": [*say("7"), end],
        "a/1": say("7 it is"),  # cut at 4 tokens: right number, not well formed
        "b/0": [*say("yes"), end],
        "b/1": [*say("yes yes"), end],
    }
    sampler = ScriptedSampler(replies)
    run = run_tasks(tasks, sampler, tokenizer, k=2, temperature=0.7, top_p=0.9, seed=5)
    assert run.scores_PK.tolist() == [[1, 0], [1, 0]]
    assert run.rewards_PK["numeric"][0].tolist() == [1, 1]
    assert run.rewards_PK["well_formed"][0].tolist() == [1, 0]
    assert np.isnan(run.rewards_PK["numeric"][1]).all()
    assert run.avg_at_k().value == 0.5
    assert run.settings == "plain prompt, temperature 0.7, top-p 0.9, k=2, max 4/8 tokens"
    assert {(request[1].max_tokens, request[1].seed, request[1].temperature) for request in sampler.requests} == {
        (4, 5, 0.7),
        (8, 5, 0.7),
    }
    again = run_tasks(tasks, ScriptedSampler(replies), tokenizer, k=2, temperature=0.7, max_tokens=6, thinking=True)
    assert again.settings == "thinking, temperature 0.7, k=2, max 6 tokens"


def answers(run, *places):
    """Tokens of the rollouts of some tasks."""
    return [[tuple(rollout.tokens.tolist()) for rollout in run.groups[place].rollouts] for place in places]


def test_samples_of_a_model_do_not_depend_on_other_tasks(hf, tokenizer):
    tasks = [make_task(f"t{n}", "x", max_tokens=6) for n in range(5)]
    sampler = LocalSampler(hf, pad_id=tokenizer.pad_id, eos_id=tokenizer.im_end_id)
    settings = {"k": 2, "temperature": 1.0, "seed": 3}
    every = run_tasks(tasks, sampler, tokenizer, **settings)
    some = run_tasks(tasks[3:1:-1], sampler, tokenizer, **settings)
    assert answers(some, 0, 1) == answers(every, 3, 2)
    assert len(set(answers(every, 0)[0])) == 2


def test_long_prompts_are_scored_not_raised(hf, tokenizer):
    long = make_task("long", "x", messages=(Message.text("user", "x" * 400),))
    run = run_tasks([long], LocalSampler(hf, pad_id=tokenizer.pad_id), tokenizer)
    assert run.stops() == {"context": 1}
    assert run.scores_PK.tolist() == [[0]]


def test_requests_that_make_no_sense(tokenizer):
    sampler = ScriptedSampler([])
    with pytest.raises(RecipeError, match="k = 2"):
        run_tasks([make_task("a", "x")], sampler, tokenizer, k=2)
    with pytest.raises(DataError, match="no task"):
        run_tasks([], sampler, tokenizer)
    with pytest.raises(DataError, match="same key"):
        run_tasks([make_task("a", "x"), make_task("a", "y")], sampler, tokenizer)


def test_thoughts_in_front_are_no_stray_tokens(tokenizer):
    end, think, done = tokenizer.im_end_id, tokenizer.special_id("<think>"), tokenizer.special_id("</think>")
    say = tokenizer.encode
    replies = {
        "whole/0": [think, *say("hm"), done, *say("yes"), end],
        "nothing behind/0": [think, *say("hm"), done, end],
        "unfinished/0": [think, *say("hm"), end],
        "in the middle/0": [*say("yes"), think, *say("hm"), done, end],
    }
    run = run_tasks([make_task(key[:-2], "yes") for key in replies], ScriptedSampler(replies), tokenizer)
    assert run.scores_PK[:, 0].tolist() == [1, 0, 0, 0]
    assert run.shape_PK[NO_OTHER_SPECIAL][:, 0].tolist() == [1, 1, 0, 0]
    assert run.shape_PK[NON_EMPTY][:, 0].tolist() == [1, 0, 1, 1]


def test_families_errors_and_usage(tokenizer, tmp_path):
    path = tmp_path / "fails.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True, kw_only=True)\nclass Fails:\n"
        "    def score(self, task, response):\n        raise OSError('no judge')\n"
    )
    tasks = [
        make_task("a", "yes", meta={"domain": "sums"}),
        make_task("b", "yes", meta={"domain": "logic"}),
        make_task("c", "yes", meta={"domain": "sums"}, rewards=(str(path),)),
        make_task("d", "yes"),
    ]
    run = run_tasks(tasks, ScriptedSampler(lambda prompt, key: [*tokenizer.encode("yes"), tokenizer.im_end_id]), tokenizer)
    assert run.families() == {"logic": [1], "sums": [0, 2]}
    assert run.scores_PK[:, 0].tolist() == [1, 1, 0, 1]
    assert list(run.errors().values()) == [1] and "no judge" in next(iter(run.errors()))
    assert run.usage_PK("response").tolist() == [[4.0]] * 4
    metrics = task_metrics("mixed", run)
    assert {name: item.estimate.value for name, item in metrics.items() if "avg" in name} == {
        "mixed/avg@1": 0.75,
        "logic/avg@1": 1.0,
        "sums/avg@1": 0.5,
    }
    assert "sums/avg@1" in task_metrics("mixed", run.only([0, 2])) and "mixed/avg@1" in task_metrics("mixed", run.only([3]))


def test_metrics_of_other_settings_stand_side_by_side_and_only_equal_items_are_paired(tokenizer):
    def run(tasks, **settings):
        sampler = ScriptedSampler(lambda prompt, key: [*tokenizer.encode("yes"), tokenizer.im_end_id])
        return run_tasks([make_task(key, "yes") for key in tasks], sampler, tokenizer, **settings)

    found = task_metrics("t", run("abc"))
    merge(found, task_metrics("t", run("abc", temperature=1.0, max_tokens=9)))
    assert {name for name in found if "avg" in name} == {"t/avg@1", "t/avg@1 (temperature 1, max 9 tokens)"}
    other = task_metrics("t", run("abd"))
    assert found["t/avg@1"].change_from(other["t/avg@1"]) is None
    assert found["t/avg@1"].change_from(task_metrics("t", run("abc"))["t/avg@1"]).change == 0
