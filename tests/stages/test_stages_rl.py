"""Reinforcement learning as a stage: what it leaves, exact resume after a kill, and what users can get wrong."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import forked
import pytest
from small_life import REWARD
from small_run import WORDS, k2, stage_of, weights_of, write
from test_stages_kill import start, wait_for
from test_stages_torchrun import torchrun

from k2lab import runner
from k2lab.ckpt.folder import open_folder
from k2lab.core import artifacts
from k2lab.core import recipe as recipes
from k2lab.core.errors import DataError, RecipeError
from k2lab.core.events import read
from k2lab.core.rng import rng
from k2lab.core.slots import load
from k2lab.models import build

RL = """
[[stage]]
name = "reasoning"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/reasoning.jsonl", kind = "reasoning" }}]
valid_share = 0.2

[[stage]]
type = "rl"
start = "sft"
tasks = "reasoning"
pass_samples = 4
pass_rate = [0.1, 0.9]
group_size = 4
tasks_per_step = 4
steps = 6
seq_len = 128
per_device_batch = 3
max_tokens = 16
sample_batch = 32
ptx = ["instructions"]
ptx_tokens = 32
temperature = {{ start = 1.2, end = 0.8 }}
budget = {{ penalty = 0.1, tokens = {{ say = 12 }} }}
optim = {{ type = "muonclip", lr = 2e-3, ns_dtype = "fp32" }}
checkpoint_every = 2
"""


def write_rl(folder: Path, spec: str = "tiny-k2", reward: str = REWARD) -> Path:
    """Data and recipe up to RL on questions whose answers are right by chance; the recipe's path."""
    recipe = write(folder, spec)
    (folder / "even.py").write_text(reward, encoding="utf-8")
    with (folder / "reasoning.jsonl").open("w", encoding="utf-8") as file:
        for i in range(60):
            word = WORDS[i % len(WORDS)]
            row = {"prompt": f"Say {word} {i}", "reasoning": word, "final": word, "answer": word, "difficulty": i % 5}
            row |= {"rewards": [f"{folder}/even.py"], "domain": "say" if i % 3 else "tell"}
            print(json.dumps(row), file=file)
    short = recipe.read_text().replace("steps = 12", "steps = 4").replace("steps = 8", "steps = 3")
    recipe.write_text(short + RL.format(folder=folder), encoding="utf-8")
    return recipe


def steps_of(run_dir: Path) -> list[dict]:
    return [e for e in read(run_dir / "events") if e["kind"] == "step" and e["stage"] == "rl"]


@pytest.fixture(scope="module", params=["tiny-k2", "tiny-linear"])
def finished(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_rl(folder / "data", request.param)
    done = k2("run", str(recipe), "--run-dir", str(folder / "run"))
    return recipe, folder / "run", done


def test_the_stage_leaves_a_whole_model_and_says_what_it_used(finished):
    _, run_dir, done = finished
    folder = stage_of(run_dir, "rl")
    manifest = artifacts.open_artifact(folder, kind="checkpoint", verify=True).manifest
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "pass_rates.jsonl"} <= {p.name for p in folder.iterdir()}
    rows = [json.loads(line) for line in (folder / "pass_rates.jsonl").read_text().splitlines()]
    used = [row for row in rows if 0.1 <= row["pass_rate"] <= 0.9]
    assert manifest["tasks"]["measured"] == len(rows) > manifest["tasks"]["used"] == len(used) > 0
    assert sum(manifest["tasks"]["pass_rates"].values()) == len(rows)
    assert "reward 0." in done.stderr and "mismatch" in done.stderr
    (funnel,) = (e for e in read(run_dir / "events") if e["kind"] == "funnel" and e["stage"] == "rl")
    assert (funnel["seen"], funnel["kept"]) == (len(rows), len(used))
    before, after = build.load(open_folder(stage_of(run_dir, "sft"))).state(), build.load(open_folder(folder)).state()
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)


def test_every_step_tells_about_its_rollouts(finished):
    _, run_dir, _ = finished
    steps = steps_of(run_dir)
    assert [round(e["rollout"]["temperature"], 2) for e in steps] == [1.2, 1.12, 1.04, 0.96, 0.88, 0.8]
    for event in steps:
        told = event["rollout"]
        assert told["rollouts"] == 16 and told["groups"] == 4 and told["errors"] == told["lag"] == 0
        assert 0 <= told["pass_rate"] == told["reward"] <= 1 and told["length"] <= told["length_max"] <= 16
        assert event["losses"].keys() == {"kimi", "ptx"}
        # Sampler and trainer are two implementations of one model.
        assert event["metrics"]["mismatch_max"] <= 1e-5
    assert steps[-1]["losses"]["kimi"] != steps[0]["losses"]["kimi"]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_killed_and_resumed_equals_never_interrupted(finished, lag, tmp_path):
    recipe, run_dir, _ = finished
    arguments = [f"stage.rl.max_policy_lag={lag}", "stage.rl.refill_rounds=1"]
    for name in ("whole", "killed"):  # both begin behind the fine-tuning that exists already
        (tmp_path / name / "stages").mkdir(parents=True)
        for path in (run_dir / "stages").iterdir():
            if not path.name.startswith("rl-"):
                (tmp_path / name / "stages" / path.name).symlink_to(path)
    forked.finish("run", recipe, *arguments, "--run-dir", tmp_path / "whole", "--quiet")
    draw = rng(int(time.time()), "kills")
    kills = 0
    for step in (0, int(draw.integers(1, 6)), 5):
        process = start(recipe, tmp_path / "killed", *arguments)
        wait_for(tmp_path / "killed", "rl", step, process)
        time.sleep(float(draw.random()) * 0.3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    forked.finish("run", recipe, *arguments, "--run-dir", tmp_path / "killed", "--quiet")
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "whole")
    whole, killed = steps_of(tmp_path / "whole"), steps_of(tmp_path / "killed")
    assert [(e["step"], e["losses"], e["metrics"]) for e in whole] == [(e["step"], e["losses"], e["metrics"]) for e in killed]
    assert [e["rollout"]["lag"] for e in whole] == ([0] + [lag] * 5)


@pytest.mark.slow
def test_two_processes_draw_and_learn_the_same(finished, tmp_path):
    recipe, run_dir, _ = finished
    (tmp_path / "two" / "stages").mkdir(parents=True)
    for path in (run_dir / "stages").iterdir():
        if not path.name.startswith("rl-"):
            (tmp_path / "two" / "stages" / path.name).symlink_to(path)
    done = torchrun("run", str(recipe), "--device", "cpu", "--run-dir", "two", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = steps_of(run_dir), steps_of(tmp_path / "two")
    assert [e["rollout"]["rollouts"] for e in two] == [16] * 6
    for a, b in zip(one, two, strict=True):
        # Rounding differs with the batch, and a draw that lies on the edge between two tokens may fall to the other side.
        assert (a["rollout"]["reward"], a["tokens"]) == (b["rollout"]["reward"], b["tokens"]), a["step"]
        assert b["losses"] == pytest.approx(a["losses"], rel=1e-4), a["step"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(recipe, run directory) of everything before RL, for what needs no process of its own."""
    folder = tmp_path_factory.mktemp("begun")
    recipe = write_rl(folder / "data")
    runner.run(recipes.load(str(recipe)), folder / "run", only="sft", say=lambda _: None)
    runner.run(recipes.load(str(recipe)), folder / "run", only="reasoning", say=lambda _: None)
    return recipe, folder / "run"


def go(begun, run_dir: Path, *overrides: str, recipe: Path | None = None) -> Path:
    """Runs RL with other settings behind the stages that exist; the run directory."""
    (run_dir / "stages").mkdir(parents=True)
    for path in (begun[1] / "stages").iterdir():
        (run_dir / "stages" / path.name).symlink_to(path)
    runner.run(recipes.load(str(recipe or begun[0]), overrides), run_dir, say=lambda _: None)
    return run_dir


def refused(begun, run_dir: Path, overrides: list[str], *words: str) -> None:
    with pytest.raises(DataError) as caught:
        go(begun, run_dir, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_no_task_of_moderate_difficulty_shows_the_histogram(begun, tmp_path):
    refused(begun, tmp_path, ["stage.rl.pass_rate=[0.45,0.46]"], "stage.rl.pass_rate", "none of", "[0.45, 0.46]", "0.2-0.3: ")


def test_prompts_longer_than_the_window_are_refused_or_left_out(begun, tmp_path):
    words = ("a prompt of", "seq_len = 24", "reasoning.jsonl", "over_length")
    refused(begun, tmp_path / "1", ["stage.rl.seq_len=24", "stage.rl.over_length=error", "stage.rl.ptx=[]"], *words)
    refused(begun, tmp_path / "2", ["stage.rl.seq_len=17", "stage.rl.ptx=[]"], "no task is left", "seq_len = 17")


def test_families_and_difficulties_are_chosen(begun, tmp_path):
    refused(begun, tmp_path / "1", ["stage.rl.domains=['sing']"], "no task is left", "families say, tell")
    overrides = ["stage.rl.domains=['tell']", "stage.rl.min_difficulty=1", "stage.rl.max_difficulty=2", "stage.rl.steps=1"]
    run_dir = go(begun, tmp_path / "2", *overrides, "stage.rl.pass_rate=[0,1]")
    rows = [json.loads(line) for line in (stage_of(run_dir, "rl") / "pass_rates.jsonl").read_text().splitlines()]
    lines = [int(row["key"].rsplit(":", 1)[1]) - 1 for row in rows]
    assert lines and all(line % 3 == 0 and line % 5 in (1, 2) for line in lines)


def test_a_reward_that_raises_is_recorded_and_the_run_goes_on(begun, tmp_path):
    text = begun[0].read_text()
    (tmp_path / "even.py").write_text(
        REWARD.replace(
            "return float(len(response) % 2 == 0)",
            "return {0: 1.0, 1: 0.0, 2: float('nan')}[len(response) % 4]  # and sometimes a KeyError",
        )
    )
    rows = (begun[0].parent / "reasoning.jsonl").read_text().replace(str(begun[0].parent), str(tmp_path))
    (tmp_path / "reasoning.jsonl").write_text(rows)
    changed = tmp_path / "broken.toml"
    changed.write_text(text.replace(f"{begun[0].parent}/reasoning.jsonl", f"{tmp_path}/reasoning.jsonl"))
    run_dir = go(begun, tmp_path / "run", "stage.rl.pass_rate=[0,1]", recipe=changed)
    steps = steps_of(run_dir)
    assert len(steps) == 6 and sum(e["rollout"]["errors"] for e in steps) > 10
    (note,) = (e for e in read(run_dir / "events") if e["kind"] == "note" and e["stage"] == "rl")
    assert "left out" in note["text"] and "even" in note["text"]


def test_pass_rates_of_another_stage_are_used(begun, tmp_path):
    text = begun[0].read_text()
    pairs = '[[stage]]\nname = "pairs"\ntype = "preference_data"\nmodel = "sft"\ntasks = "reasoning"\nk = 4\nmax_tokens = 16\n'
    place = text.index('[[stage]]\ntype = "rl"')
    changed = tmp_path / "with_pairs.toml"
    own = text[place:].replace("pass_samples = 4", 'pass_rates = "pairs"')
    changed.write_text(text[:place] + pairs + "valid_share = 0.5\n\n" + own)
    run_dir = go(begun, tmp_path / "run", "stage.rl.steps=2", recipe=changed)
    asked = {row["key"]: row for row in map(json.loads, (stage_of(run_dir, "pairs") / "pass_rates.jsonl").open())}
    used = [json.loads(line) for line in (stage_of(run_dir, "rl") / "pass_rates.jsonl").open()]
    assert used and all(row == asked[row["key"]] for row in used)


def test_toggle_and_grpo_run(begun, tmp_path):
    changes = ["stage.rl.algorithm={ type = 'grpo' }", "stage.rl.budget={ toggle = { every = 1, accuracy = 0.0 } }"]
    run_dir = go(begun, tmp_path / "run", *changes, "stage.rl.advantages={ divide_by_std = true }", "stage.rl.steps=4")
    steps = steps_of(run_dir)
    assert steps[0]["losses"].keys() == {"grpo", "ptx"}
    # With the lower half of right lengths as budget, some right response of a tight phase is too long.
    assert any(
        e["rollout"]["shaped_reward"] < e["rollout"]["reward"] - 0.25 * e["rollout"]["truncated"] - 1e-6 for e in steps[1::2]
    )
    free = steps[0]["rollout"]
    assert free["shaped_reward"] == pytest.approx(free["reward"] - 0.25 * free["truncated"], abs=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"group_size": 1}, ["group_size", "at least 2"]),
        ({"max_policy_lag": 2}, ["max_policy_lag", "0 or 1"]),
        ({"pass_rate": (0.8, 0.2)}, ["pass_rate", "lower first"]),
        ({"max_tokens": 128}, ["max_tokens", "seq_len"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"top_p": 0.0}, ["top_p"]),
        ({"algorithm": load("objective", "lm")()}, ["algorithm", "does not learn from rollouts"]),
        ({"algorithm": load("objective", "dpo")()}, ["algorithm", "kimi, grpo"]),
    ],
)
def test_settings_that_contradict_each_other(changes, words):
    stage = load("stage", "rl")(**{"optim": load("optimizer", "adamw")(lr=1e-3), "seq_len": 128, **changes})
    with pytest.raises(RecipeError) as caught:
        stage.check("stage.rl")
    assert all(word in str(caught.value) for word in words), caught.value


def test_tasks_that_the_ranks_cannot_share_are_refused():
    stage = load("stage", "rl")(optim=load("optimizer", "adamw")(lr=1e-3), seq_len=128, tasks_per_step=100)
    stage.check_ranks("stage.rl", 4)
    with pytest.raises(RecipeError, match=r"100 tasks x 8 rollouts = 800 samples cannot be dealt to 3 ranks.*102"):
        stage.check_ranks("stage.rl", 3)
    plan = stage.plan_inputs("rl", None, gpus=4)
    assert plan.grad_acc * plan.gpus * plan.per_device_batch == 800 and plan.steps == 100
