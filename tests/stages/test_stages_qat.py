"""Quantisation-aware training in a run: what the recipe says, what the checkpoints say, and what later stages multiply by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import k2, stage_of, write

from k2lab.ckpt.folder import open_folder
from k2lab.models import build, qat
from k2lab.quant import int4


@pytest.mark.slow
def test_a_run_with_qat_saves_what_it_multiplied_by(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data")
    short = ("stage.pretrain.steps=3", "stage.sft.steps=2", "stage.pretrain.valid_every=3", "stage.sft.valid_every=2")
    k2("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--quiet", "stage.pretrain.qat=int4", *short)
    last = {}
    for stage in ("pretrain", "sft"):  # the second says nothing of qat: it goes on as its start was trained
        folder = stage_of(tmp_path / "run", stage)
        config = json.loads((folder / "config.json").read_text())
        assert config["k2_qat"] == {"format": "int4_group", "group_size": 32}
        model = build.load(open_folder(folder))
        assert model.qat_format == "int4_group"
        experts = model.hf.model.layers[-1].mlp.experts
        packed, scales = int4.quantise(experts.down_proj)
        values = qat.weights(experts)[1]
        assert torch.equal(int4.dequantise(packed, scales).float(), values) and not torch.equal(values, experts.down_proj)
        last[stage] = values
    assert not torch.equal(last["pretrain"], last["sft"])


def test_models_without_wide_experts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data")
    for change, told in (
        ("model.moe_intermediate_size=48", "moe_intermediate_size = 48"),
        ("model.spec=tiny-qwen2", "no routed experts"),
    ):
        done = k2("plan", str(recipe), "stage.pretrain.qat=int4", change, check=False)
        assert done.returncode == 2 and "stage.pretrain.qat" in done.stderr and told in done.stderr
