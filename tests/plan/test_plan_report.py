"""Tokens, time, money, measured throughput and the printed plan."""

import json

import pytest

from k2lab import specs
from k2lab.core.errors import DataError, RecipeError
from k2lab.core.events import EventWriter
from k2lab.core.types import PlanInput
from k2lab.plan import compute, machines
from k2lab.plan.report import plan


def train(model, **changes):
    values = {"stage": "grow", "type": "pretrain", "kind": "train", "optimizer": "muonclip", "precision": "bf16"} | changes
    return PlanInput(model=specs.get(model), **values)


def numbers(result, stage=0):
    """All numbers of one stage by key."""
    tables = result.json()["stages"][stage]["sections"]
    return {key: row["value"] for table in tables for key, row in table["numbers"].items()}


TWO_MILLION = {"seq_len": 2_000_000, "per_device_batch": 1, "grad_acc": 256, "gpus": 2, "steps": 30_000}


def test_token_arithmetic_and_its_inverse():
    inp = train("kimi-k2", seq_len=4096, per_device_batch=2, grad_acc=8, gpus=64, token_target=30_000_000_000)
    per_step = compute.tokens_per_step(inp)
    assert per_step == 64 * 2 * 8 * 4096
    steps = compute.steps_for(30_000_000_000, per_step)
    assert compute.tokens_for(steps - 1, per_step) < 30_000_000_000 <= compute.tokens_for(steps, per_step)
    assert compute.steps_for(per_step, per_step) == 1 and compute.steps_for(per_step + 1, per_step) == 2
    for call in (compute.steps_for, compute.tokens_for):
        with pytest.raises(RecipeError, match="positive"):
            call(0, per_step)


def test_money_counts_whole_machines():
    p5 = machines.get("p5.48xlarge")
    assert compute.money(24 * 3600, 8, p5).dollars == pytest.approx(1320)
    assert compute.money(7 * 24 * 3600, 8, p5).dollars == pytest.approx(9240)
    assert compute.money(3600, 2, p5).dollars == compute.money(3600, 8, p5).dollars == 55
    assert compute.money(3600, 9, p5).machines == 2
    assert compute.money(3600, 2, machines.get("h100-x2")).dollars is None


def test_newton_schulz_flops():
    k2 = specs.get("kimi-k2")
    expert = 5 * (4 * 2048**2 * 7168 + 2 * 2048**3)
    assert expert / 1e12 == pytest.approx(0.69, abs=0.005)
    whole = compute.newton_schulz_flops(k2)
    assert 69_120 * expert / 1e15 == pytest.approx(47.5, abs=0.05)
    assert 69_120 * expert < whole < 69_120 * expert + 8e15


def test_assumed_speed_by_hand():
    p5 = machines.get("p5.48xlarge")
    inp = train("kimi-k2", seq_len=4096, per_device_batch=1, grad_acc=1, gpus=8, steps=1, optimizer="adamw")
    k2, peak = specs.get("kimi-k2"), 8 * 989e12
    matrix, attention = 6 * k2.matmul_active(), 3.5 * 61 * 64 * 320 * 4096
    expected = 8 * 4096 * (matrix / 0.20 + attention / 0.40) / peak
    speed = compute.assumed_speed(inp, p5)
    assert speed.seconds_per_step == pytest.approx(expected)
    assert speed.mfu == pytest.approx(speed.tokens_per_s * sum(k2.flops_per_token(4096).values()) / peak)
    assert compute.assumed_speed(train("kimi-k2", **TWO_MILLION | {"gpus": 8}), p5).tokens_per_s < speed.tokens_per_s


def test_two_million_tokens_on_two_h100():
    result = plan([train("kimi-linear-48b", **TWO_MILLION)], "h100-x2")
    found = numbers(result)
    assert found["tokens_per_step"] == 1_024_000_000
    assert found["attention_forward"] == pytest.approx(2.87e17, rel=1e-3)
    assert 20 * 60 < found["attention_seconds"] < 22 * 60
    assert 26 * 60 < found["attention_seconds_recomputed"] < 28 * 60
    assert found["attention_seconds_per_step"] == pytest.approx(512 * found["attention_seconds"])
    assert found["seconds_per_step"] > 7 * 86400  # nothing like 1.5 steps per second
    assert found["kda_forward"] < 1e-3 * found["attention_forward"]
    assert found["kv_bytes"] == 2_000_000 * 8_064 and round(found["state_bytes"] / 1e6) == 42
    text = result.text()
    for phrase in (
        "must be computed in chunks",
        "checkpointed hidden states",
        "exceed the 1,048,576",
        "More than a year",
        "Does not fit",
    ):
        assert phrase in text


def test_one_million_tokens():
    found = numbers(plan([train("kimi-linear-48b", **TWO_MILLION | {"seq_len": 1_000_000})], "h100-x2"))
    assert found["logits_bytes"] == 1_000_000 * 163_840 * 2  # 328 GB
    assert found["hidden_bytes"] == pytest.approx(4.6e9, rel=0.01)
    assert found["checkpoint_bytes"] == pytest.approx(124e9, rel=0.01)
    assert round(found["kv_bytes"] / 1e9, 1) == 8.1
    assert found["kv_bytes_all_mla"] == 1_000_000 * 27 * 576 * 2


def test_short_context_has_no_long_context_table():
    assert "attention_forward" not in numbers(plan([train("tiny-k2", seq_len=256, per_device_batch=16, steps=10)], "laptop"))


def test_every_number_has_a_formula_and_an_origin():
    result = plan(
        [train("kimi-linear-48b", **TWO_MILLION), train("tiny-k2", seq_len=256, per_device_batch=1, steps=5)], "p5.48xlarge"
    )
    plain = result.json()
    tables = [t for stage in plain["stages"] for t in stage["sections"]] + [t for m in plain["models"].values() for t in m]
    rows = [row for table in [*tables, plain["totals"]] for row in table["numbers"].values()]
    assert len(rows) > 80
    assert all(row["formula"] for row in rows)
    assert {row["origin"] for row in rows} == {"given", "computed", "assumed"}
    assert json.loads(json.dumps(plain)) == plain
    assert "ASSUMED" in result.text() and "$55/h" in result.text()
    assert plain["totals"]["numbers"]["dollars"]["value"] == pytest.approx(sum(s["dollars"] for s in plain["stages"]))


def test_kinds_of_stages():
    stages = [
        PlanInput(stage="corpus", type="corpus", kind="cpu", notes=("two files",)),
        train("tiny-k2", stage="pretrain", seq_len=256, per_device_batch=16, steps=None, notes=("length set by epochs = 2",)),
        PlanInput(stage="chat", type="chat", kind="sample", model=specs.get("tiny-linear"), seq_len=512, per_device_batch=2),
    ]
    result = plan(stages, "laptop")
    text = result.text()
    assert "Stage corpus (corpus): runs on the CPU, not planned" in text and "two files" in text
    assert "length set by epochs = 2" in text and "follows from the data" in text
    assert result.stages[1].seconds is None and "seconds_per_step" in numbers(result, 1) and "dollars" not in numbers(result, 1)
    sampled, tiny = numbers(result, 2), specs.get("tiny-linear")
    assert sampled["kv_bytes"] == 2 * 512 * tiny.kv_bytes_per_token(4) and sampled["state_bytes"] > 2 * tiny.state_bytes()
    assert "Not in these totals: corpus, pretrain, chat" in text
    with pytest.raises(RecipeError, match="kind of stage"):
        plan([PlanInput(stage="x", type="x", kind="gpu", model=specs.get("tiny-k2"))], "laptop")  # type: ignore[arg-type]


def test_unknown_machine():
    with pytest.raises(RecipeError, match="Did you mean 'laptop'"):
        plan([], "labtop")


def test_a_state_too_large_names_the_gpus_it_needs():
    text = plan([train("moonlight-16b", seq_len=1024, per_device_batch=1, steps=1)], "h100-x1").text()
    assert "would need at least" in text
    text = plan([train("moonlight-16b", seq_len=1024, per_device_batch=1, steps=1, gpus=8)], "h200-x8").text()
    assert "fits with the state divided over 8 GPUs" in text


@pytest.fixture
def run_dir(tmp_path):
    writer = EventWriter(tmp_path / "run" / "events")
    for stage, rates in {"pretrain": [10, 20, 30, 900, 1000, 1100, 1000], "note": []}.items():
        writer.stage = stage
        writer.emit("stage_start", step=0, type="pretrain", resumed=False)
        for step, rate in enumerate(rates, 1):
            writer.emit("step", step=step, tokens_per_s=float(rate))
    writer.close()
    return tmp_path / "run"


def test_measured_throughput_replaces_the_assumed(run_dir):
    assert compute.measure(run_dir) == {"pretrain": compute.Throughput(1000.0, 4)}
    stages = [
        train("tiny-k2", stage="pretrain", seq_len=256, per_device_batch=16, steps=100, precision="fp32"),
        train("tiny-k2", stage="sft", seq_len=256, per_device_batch=16, steps=100, precision="fp32"),
    ]
    result = plan(stages, "laptop", measured=run_dir)
    tables = result.json()["stages"]
    first = tables[0]["sections"][2]["numbers"]
    assert first["tokens_per_s"]["origin"] == "measured" and first["tokens_per_s"]["value"] == 1000.0
    assert first["seconds"]["value"] == pytest.approx(100 * 4096 / 1000)
    second = tables[1]["sections"][2]
    assert second["numbers"]["tokens_per_s"]["origin"] == "assumed" and "no stage of this name" in second["remarks"][0]
    assert result.totals.lines[0].origin == "assumed"
    assert plan(stages[:1], "laptop", measured=run_dir).totals.lines[0].origin == "measured"


def test_measured_runs_that_do_not_help(run_dir, tmp_path):
    with pytest.raises(RecipeError, match="none of this recipe's stages"):
        plan([train("tiny-k2", stage="other", seq_len=8, per_device_batch=1, steps=1)], "laptop", measured=run_dir)
    with pytest.raises(DataError, match="not a run directory"):
        compute.measure(tmp_path)
    EventWriter(tmp_path / "empty" / "events").close()
    with pytest.raises(DataError, match="no step events"):
        compute.measure(tmp_path / "empty")
