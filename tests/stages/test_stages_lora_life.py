"""One adapter through every kind of training: SFT, DPO, reinforcement learning and distillation, on packed INT4 experts; by two
processes; and on a checkpoint of quantisation-aware training."""

from __future__ import annotations

import json

import pytest
import torch
from made_up_checkpoints import make, spec_of
from small_lora import LORA, recipe, write_lora_life
from small_run import k2, losses, stage_of, write
from test_stages_torchrun import torchrun

from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.peft import Adapter
from k2lab.core.events import read
from k2lab.models import build
from k2lab.stages._models import load_model


@pytest.mark.slow
def test_one_adapter_goes_through_every_kind_of_training(tmp_path) -> None:
    base = make(tmp_path / "base", spec_of("small-k2").replace(vocab_size=320), "int4")  # all ids are tokens: it samples
    k2("run", str(write_lora_life(tmp_path, base)), "--run-dir", str(tmp_path / "run"), "--quiet")
    run_dir = tmp_path / "run"
    folders = {name: stage_of(run_dir, name) for name in ("sft", "dpo", "rl", "distill")}
    adapters = [Adapter.open(folders[name]) for name in ("sft", "dpo", "rl")]
    adapters.append(Adapter.open(folders["distill"] / "adapter"))
    names = [f"{name}.weight" for name in adapters[0].modules()]
    for one, two in zip(adapters, adapters[1:]):
        assert one.modules() == two.modules()
        assert any(not torch.equal(one.delta(name), two.delta(name)) for name in names)
    # the reference is the adapter that DPO began with: at its first step policy and reference are one
    first = next(e for e in read(run_dir / "events") if e["kind"] == "step" and e["stage"] == "dpo")
    assert first["losses"]["dpo"] == pytest.approx(0.6931, abs=1e-3)
    assert json.loads((folders["dpo"] / "preference.json").read_text())
    # the last one is merged: base, decoded, and all that was trained
    whole, source = load_model(folders["distill"]), open_folder(base)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(whole.state()[name], source.read(name).float() + adapters[-1].delta(name))
    assert whole.adapters is None


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(tmp_path) -> None:
    write(tmp_path)
    base = make(tmp_path / "base", "small-k2", "int4")
    path = recipe(tmp_path, base)
    path.write_text(path.read_text().replace("steps = 12", "steps = 4"))
    shared = torchrun("run", str(path), "--device", "cpu", "--run-dir", "two", "--quiet", cwd=tmp_path)
    assert shared.returncode == 0, shared.stderr[-3000:]
    k2("run", str(path), "--device", "cpu", "--run-dir", "one", "--quiet", cwd=tmp_path)
    one, two = losses(tmp_path / "one", "sft"), losses(tmp_path / "two", "sft")
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-4)


def test_on_a_checkpoint_of_quantisation_aware_training_the_base_is_its_grid(tmp_path) -> None:
    write(tmp_path)
    base = make(tmp_path / "base", "small-k2", "bf16", config={"k2_qat": {"format": "int4_group", "group_size": 32}})
    table = LORA.replace("packed", "dense").replace("false", "true")
    path = recipe(tmp_path, base, table)
    path.write_text(path.read_text().replace("steps = 12", "steps = 2"))
    k2("run", str(path), "--run-dir", str(tmp_path / "run"), "--quiet")
    merged = stage_of(tmp_path / "run", "sft")
    assert "k2_qat" not in json.loads((merged / "config.json").read_text())  # W + scale B A lies on no grid
    exact = build.load(open_folder(make(tmp_path / "int4", "small-k2", "int4")))  # the same weights, on the grid
    found, adapter = build.load(open_folder(merged)), Adapter.open(merged / "adapter")
    low = torch.cat([adapter.delta(f"model.layers.1.mlp.experts.2.{part}_proj.weight") for part in ("gate", "up")])
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(found.state()[name][2], exact.state()[name][2] + low)
