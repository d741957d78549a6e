"""What stages need beside the model that they train, by independent arithmetic."""

import pytest

from k2lab import specs
from k2lab.core.types import PlanInput
from k2lab.plan import beside
from k2lab.plan.report import plan


def numbers(result, stage=0):
    tables = result.json()["stages"][stage]["sections"]
    return {key: row["value"] for table in tables for key, row in table["numbers"].items()}


def remarks(result, stage=0):
    return " ".join(text for table in result.json()["stages"][stage]["sections"] for text in table["remarks"])


def train(kind, model, **changes):
    values = {"seq_len": 4096, "per_device_batch": 1, "grad_acc": 4, "gpus": 8, "steps": 10, "precision": "bf16"} | changes
    return PlanInput(stage="s", type=kind, kind="train", model=specs.get(model), optimizer="adamw", **values)


def test_reference_of_dpo():
    policy, reference = specs.get("qwen2.5-7b"), specs.get("qwen2.5-32b")
    told = beside.Recipe({"s": {"reference": "models/other"}}, {"s": {"start": policy, "reference": reference}})
    result = plan([train("dpo", "qwen2.5-7b")], "p5.48xlarge", recipe=told)
    found = numbers(result)
    assert found["reference_weights"] == 2 * 32_763_876_352
    assert found["pairs_per_step"] == 8 * 1 * 4
    assert found["reference_bytes_per_step"] == 4 * 8 * 4 * 4096
    forward = 2 * reference.matmul_active() + 64 * 40 * 2 * 128 * 4096  # causal half of 2 x 2 x tokens x heads x width
    assert found["reference_seconds_per_step"] == pytest.approx(8 * 4 * 4096 * forward / (8 * 989e12 * 0.2), rel=0.01)
    assert "does not fit" not in remarks(result).split("plan only.")[-1]
    same = plan([train("dpo", "qwen2.5-7b")], "p5.48xlarge", recipe=beside.Recipe({"s": {"reference": "none"}}))
    assert numbers(same)["reference_weights"] == 2 * 7_615_616_512 and "the policy's own start" in same.text()


def test_a_reference_too_large_for_one_gpu_is_said():
    told = beside.Recipe({"s": {}}, {"s": {"reference": specs.get("kimi-k2")}})
    text = plan([train("dpo", "kimi-k2")], "p5.48xlarge", recipe=told).text()
    assert "The reference (2.05 TB) does not fit on one GPU" in text


def test_rollouts_of_rl():
    table = {"tasks_per_step": 32, "group_size": 8, "max_tokens": 1024, "sample_batch": 16, "pass_tasks": 100, "pass_samples": 4}
    told = beside.Recipe({"s": table})
    result = plan([train("rl", "kimi-linear-48b", seq_len=1536)], "h200-x8", recipe=told)
    found = numbers(result)
    assert found["rollouts_per_step"] == 256 and found["tokens_drawn"] == 256 * 1024
    assert found["rollout_stream_bytes"] == 12 * 256 * 1536
    # 32 rollouts a GPU, 16 at a time: latents of 7 MLA layers (512 + 64, bf16) and fp32 states and convolutions of 20 KDA layers
    latents, states, convolutions = 7 * 576 * 2, 20 * 32 * 128 * 128 * 4, specs.get("kimi-linear-48b").conv_state_bytes()
    assert found["sampler_cache"] == 16 * (1536 * latents + states + convolutions)
    assert found["sampling_seconds_least"] == pytest.approx(2 * 1024 * 98.2e9 / 4.8e12, rel=0.01)
    assert found["tokens_measured"] == 100 * 4 * 1024
    assert "Without the sampling of s, which takes at least 41.9 s per step" in result.text()
    told = beside.Recipe({"s": table | {"pass_tasks": 0}})
    assert "tokens_measured" not in numbers(plan([train("rl", "kimi-linear-48b")], "h200-x8", recipe=told))


def test_answers_and_stored_top_k():
    table = {"k": 4, "max_tokens": 512, "limit": 1000, "top_k": 16, "top_precision": "fp16"}
    inp = PlanInput(
        stage="s", type="teacher_data", kind="sample", model=specs.get("smollm2-135m"), seq_len=768, per_device_batch=256
    )
    found = numbers(plan([inp], "h100-x1", recipe=beside.Recipe({"s": table})))
    assert found["tokens_per_prompt"] == 2048 and found["tokens"] == 2_048_000
    assert found["top_k_bytes_per_token"] == 16 * (4 + 2) and found["top_k_bytes"] == 2_048_000 * 96
    # 4,000 answers in batches of 256 are 16 batches of 512 positions, each of which reads 134.5 M weights of 4 bytes
    assert found["seconds_least"] == pytest.approx(16 * 512 * 4 * 134_515_008 / 3.35e12)
    wide = numbers(plan([inp], "h100-x1", recipe=beside.Recipe({"s": table | {"top_precision": "fp32", "limit": 0}})))
    assert wide["top_k_bytes_per_token"] == 16 * 8 and "top_k_bytes" not in wide and "seconds_least" not in wide


def test_an_endpoint_is_not_priced():
    table = {"k": 1, "max_tokens": 64, "limit": 10, "top_k": 0, "top_precision": "fp16", "endpoint": {"model": "x"}}
    result = plan([PlanInput(stage="s", type="teacher_data", kind="cpu")], "p5.48xlarge", recipe=beside.Recipe({"s": table}))
    assert numbers(result) == {"tokens_per_prompt": 64, "tokens": 640}
    assert "not in this plan" in remarks(result) and "not planned" not in result.text()


def test_rows_that_a_student_is_taught_by():
    tables = {"s": {"kl_weight": 1.0, "data": "answers"}, "answers": {"top_k": 64}}
    found = numbers(plan([train("distill", "smollm2-135m", per_device_batch=2)], "h100-x8", recipe=beside.Recipe(tables)))
    assert found["teacher_stream_bytes"] == (8 + 4) * 64 * 2 * 4096
    told = beside.Recipe(tables | {"s": {"kl_weight": 0.0, "data": "answers"}})
    result = plan([train("distill", "smollm2-135m")], "h100-x8", recipe=told)
    assert "across tokenizers it does not exist in this version" in remarks(result) and "teacher_stream_bytes" not in numbers(
        result
    )


def test_without_the_recipe_nothing_is_invented():
    assert "reference_weights" not in numbers(plan([train("dpo", "smollm2-135m")], "h100-x8"))


def test_length_in_epochs_gives_time_and_price_per_billion_tokens():
    result = plan([train("sft", "smollm2-135m", steps=None)], "p5.48xlarge")
    found = numbers(result)
    assert "dollars" not in found
    assert found["seconds_per_billion"] == pytest.approx(1e9 / found["tokens_per_s"])
    assert found["dollars_per_billion"] == pytest.approx(found["seconds_per_billion"] / 3600 * 55)


def test_a_state_that_must_be_divided_is_a_plan_only():
    assert "so this stage is a plan only" in remarks(plan([train("sft", "qwen2.5-7b")], "p5.48xlarge"))
    assert "plan only" not in remarks(plan([train("sft", "smollm2-135m")], "p5.48xlarge"))
