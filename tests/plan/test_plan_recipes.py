"""The shipped recipes for real models: each plans, says what is missing, and its figures follow from published numbers."""

import json
import subprocess
import sys

import pytest

from k2lab import cli
from k2lab.core import recipe as recipes

REAL = [name for name in recipes.shipped() if name.startswith(("k2/", "kimi_linear/"))]


def planned(capsys, name, *more):
    assert cli.main(["plan", name, "--machine", "p5.48xlarge", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def stage(plan, name):
    found = next(item for item in plan["stages"] if item["stage"] == name)
    return {key: row["value"] for table in found["sections"] for key, row in table["numbers"].items()}


def rate(recipe, name, done, total):
    """Learning rate of the stage's update that follows `done` finished ones."""
    optim = recipe.stage(name).config.optim
    return optim.lr * optim.schedule.factor(done, total)


def test_every_step_of_the_classic_chain_has_a_recipe():
    steps = "continual_pretrain pretrain_15t domain_sft lora_sft reasoning_sft dpo rl distill_qwen7b distill_qwen32b evaluate"
    assert {f"k2/{step}" for step in (*steps.split(), "agent")} | {"kimi_linear/2m"} == set(REAL)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("machine", ["laptop", "p5.48xlarge", "h200-x8"])
def test_real_recipes_plan_on_any_machine(name, machine, capsys):
    assert cli.main(["plan", name, "--machine", machine]) == 0
    text = capsys.readouterr().out
    assert "Stage " in text and "All stages" in text


@pytest.mark.parametrize("name", [name for name in REAL if "distill" not in name and "evaluate" not in name])
def test_what_cannot_run_is_said(name, capsys):
    assert cli.main(["plan", name, "--machine", "p5.48xlarge", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "is a plan only" in text or "the embedded sampler divides no model" in text


def test_planning_imports_no_torch():
    program = f"import sys\nfrom k2lab.cli import main\nfor name in {REAL!r}:\n    assert main(['plan', name]) == 0\n"
    program += "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_published_schedule_of_kimi_k2(capsys):
    recipe = recipes.load("k2/pretrain_15t")
    plan = planned(capsys, "k2/pretrain_15t", "--gpus", "2048")
    total, anneal, last = (stage(plan, name)["steps"] for name in ("pretrain_4k", "anneal_4k", "anneal_32k"))
    assert stage(plan, "pretrain_4k")["tokens_per_step"] == 2**26 == stage(plan, "anneal_32k")["tokens_per_step"]
    assert (total, anneal, last) == (230_968, 5_961, 895)  # 15.5 T, 400 B and 60 B over 67,108,864, rounded up
    assert rate(recipe, "pretrain_4k", 499, total) == rate(recipe, "pretrain_4k", 149_000, total) == 2e-4
    assert rate(recipe, "pretrain_4k", 0, total) == pytest.approx(2e-4 / 500)
    ten_trillion = 10e12 / 2**26
    assert abs(total - 81_956 - ten_trillion) < 2  # the decay begins after 10 T tokens
    assert rate(recipe, "pretrain_4k", total - 40_978, total) == pytest.approx(1.1e-4)  # half a cosine: the mean of both ends
    assert rate(recipe, "pretrain_4k", total, total) == pytest.approx(2e-5) == rate(recipe, "anneal_4k", 0, anneal)
    assert rate(recipe, "anneal_4k", anneal, anneal) == pytest.approx(rate(recipe, "anneal_32k", 0, last), rel=1e-4)
    assert rate(recipe, "anneal_32k", last, last) == pytest.approx(7e-6, rel=1e-3)
    assert recipe.stage("anneal_32k").config.seq_len == 32768 and recipe.model["rope"] == "none"


def test_time_and_price_of_continual_pretraining(capsys):
    found = stage(planned(capsys, "k2/continual_pretrain", "--gpus", "256"), "pretrain")
    # 6 x 31.7 B of matrix work at 20 %, 3.5 x 61 layers x 64 heads x (192 + 128) x 4096 of attention at 40 %, Newton-Schulz of
    # 52.6 PFLOP a step divided over the GPUs, on 256 x 989 TFLOP/s
    peak, per_step = 256 * 989e12, 1024 * 4096
    step = per_step * (6 * 31.71e9 / 0.2 + 3.5 * 61 * 64 * 320 * 4096 / 0.4) / peak + 52e15 / (0.2 * peak)
    steps = -(-10_000_000_000 // per_step)
    assert found["steps"] == steps == 2385
    assert found["seconds"] == pytest.approx(steps * step, rel=0.01)
    assert found["dollars"] == pytest.approx(32 * 55 * steps * step / 3600, rel=0.01)
    # weights 2, gradients 2, master 4 and momentum 4 bytes of 1.0264 T parameters
    state = sum(found[key] for key in ("weights", "gradients", "master", "optimizer"))
    assert state == pytest.approx(12 * 1.0264e12, rel=0.002)


def test_lengths_of_two_million(capsys):
    plan = planned(capsys, "kimi_linear/2m")
    lengths = [1_000_000, 1_250_000, 1_500_000, 1_750_000, 2_000_000]
    names = ["context_1m", "context_1_25m", "context_1_5m", "context_1_75m", "context_2m"]
    for name, length in zip(names, lengths, strict=True):
        found = stage(plan, name)
        assert found["tokens_per_step"] == 8 * length
        assert found["steps"] == -(-10_000_000_000 // (8 * length))
        assert found["attention_forward"] == pytest.approx(7 * 32 * (192 + 128) * length**2)
    recipe = recipes.load("kimi_linear/2m")
    starts = [recipe.stage(name).config.start for name in names]
    assert starts == ["models/kimi-linear-48b-base", *names[:-1]]


def test_student_and_teacher(capsys):
    seven, more = (planned(capsys, f"k2/distill_{size}") for size in ("qwen7b", "qwen32b"))
    assert set(seven["models"]) == {"qwen2.5-7b"} and set(more["models"]) == {"qwen2.5-32b"}
    state = sum(stage(seven, "distill")[key] for key in ("weights", "gradients", "master", "optimizer"))
    assert state == 16 * 7_615_616_512
    assert stage(seven, "teacher_data")["tokens"] == 50_000 * 4 * 12_288
    assert recipes.load("k2/distill_qwen32b").stage("distill").config.optim.weight_decay == 0.1  # from its base
    for plan in (seven, more):
        told = json.dumps(plan["stages"])
        assert "across tokenizers it does not exist" in told and "over HTTP" in told


def test_models_are_found_by_their_fetched_names(capsys):
    plan = planned(capsys, "k2/evaluate", 'stage.evaluate.models=["models/qwen2.5-32b", "moonshotai/Kimi-Linear-48B-A3B-Base"]')
    found = stage(plan, "evaluate")
    assert found["weights_models[0]"] == 4 * 32_763_876_352
    assert found["weights"] == found["weights_models[1]"] == pytest.approx(4 * 49.1e9, rel=0.01)
