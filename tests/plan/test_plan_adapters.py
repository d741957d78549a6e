"""Plans of stages that train adapters: what is frozen, what is trained, and Kimi K2 in INT4 on eight H200."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2lab import cli, specs
from k2lab.core.errors import RecipeError
from k2lab.plan import adapters, compute, machines, memory
from k2lab.plan.adapters import AdapterInput

ALL = ("attention", "shared_experts", "dense_mlp", "routed_experts")


def planned(**more) -> AdapterInput:
    settings = {"stage": "sft", "type": "sft", "kind": "train", "model": specs.get("kimi-k2"), "seq_len": 2048,
                "per_device_batch": 1, "grad_acc": 1, "gpus": 8, "steps": 10, "optimizer": "adamw", "precision": "bf16",
                "rank": 8, "targets": ALL, "packed": True}  # fmt: skip
    return AdapterInput(**{**settings, **more})


def terms(inp, machine: str = "h200-x8") -> dict[str, float]:
    return {term.key: term.bytes for term in memory.training_memory(inp, machines.get(machine)).terms}


def test_kimi_k2_in_int4_fits_on_eight_h200(capsys):
    assert cli.main(["plan", "k2/lora_sft", "--machine", "h200-x8", "--json"]) == 0
    stages = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    numbers = {key: row for table in stages["sft"]["sections"] for key, row in table["numbers"].items()}
    assert numbers["weights"]["shown"] == "594 GB"
    state = sum(numbers[key]["value"] for key in ("adapters", "gradients", "master", "optimizer"))
    assert state == 16 * 5_140_478_464
    assert numbers["sharded"]["value"] < numbers["available"]["value"]
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "594 GB" in page and f"{state / 1e9:.1f} GB for adapters" in page and f"{numbers['sharded']['shown']} per GPU" in page


def test_counts_are_those_of_the_factors():
    k2 = specs.get("kimi-k2")
    found = adapters.parameters(planned(), k2)
    D, F = k2.hidden_size, k2.moe_intermediate_size
    assert found["routed_experts"] == 60 * 384 * 3 * 8 * (D + F)
    assert found["shared_experts"] == 60 * 3 * 8 * (D + F)
    assert found["dense_mlp"] == 3 * 8 * (D + k2.intermediate_size)
    assert adapters.active(planned(targets=("routed_experts",)), k2) == 60 * 8 * 3 * 8 * (D + F)


def test_what_the_planner_counts_is_what_training_makes():
    import torch

    from k2lab.models import build, lora

    for name in ("tiny-k2", "tiny-linear", "tiny-qwen2"):
        spec = specs.get(name)
        model = build.from_spec(spec, seed=1, dtype=torch.float32)
        lora.attach(model, lora.Settings(rank=8, alpha=8.0), ALL, seed=1)
        made = sum(tensor.numel() for tensor in model.state().values())
        assert made == sum(adapters.parameters(planned(model=spec, packed=False), spec).values()), name


def test_frozen_weights_are_packed_or_whole():
    k2 = specs.get("kimi-k2")
    assert terms(planned())["weights"] == k2.bytes("int4_group")
    assert terms(planned(packed=False))["weights"] == k2.bytes("bf16")
    assert "decoded" in terms(planned()) and "decoded" not in terms(planned(packed=False))
    assert terms(planned(precision="fp32"))["gradients"] == 4 * sum(adapters.parameters(planned(), k2).values())
    assert "master" not in terms(planned(precision="fp32"))


def test_a_step_costs_two_thirds_of_the_matrix_work():
    low, full = planned(), memory_input_of(planned())
    one, two = compute.model_flops(low), compute.model_flops(full)
    assert one["matmul"] == pytest.approx(two["matmul"] * 2 / 3) and one["mla"] == two["mla"]
    assert one["adapters"] == 6 * adapters.active(low, low.model)
    assert compute.optimizer_flops(planned(optimizer="muonclip"), machines.get("h200-x8")) == (0.0, "")


def memory_input_of(inp: AdapterInput):
    from dataclasses import fields

    from k2lab.core.types import PlanInput

    return PlanInput(**{item.name: getattr(inp, item.name) for item in fields(PlanInput)})


def test_targets_that_a_model_lacks_are_told():
    with pytest.raises(RecipeError, match="none of the adapters' targets"):
        memory.training_memory(planned(model=specs.get("qwen2.5-7b"), targets=("routed_experts",), packed=False),
                               machines.get("h200-x8"))  # fmt: skip


def test_the_planner_and_the_meter_of_a_run_count_the_same_flops():
    from k2lab.models import build, lora

    for name in ("tiny-k2", "tiny-linear"):
        spec = specs.get(name)
        model = build.from_spec(spec, seed=1)
        lora.attach(model, lora.Settings(rank=8, alpha=8.0), ALL, seed=1)
        inp = planned(model=spec, packed=False, seq_len=256)
        assert model.flops_per_token(256) == pytest.approx(sum(compute.model_flops(inp).values()))
