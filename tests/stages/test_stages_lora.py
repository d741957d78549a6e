"""LoRA in stages: on an INT4 base whose experts stay packed, killed and resumed, merged or as an adapter that others load."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from made_up_checkpoints import make
from safetensors.torch import load_file
from small_lora import AGAIN, LORA, recipe
from small_run import k2, losses, stage_of, weights_of, write
from test_stages_kill import start
from test_stages_life_kill import wait_for

from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.peft import Adapter
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.recipe import load
from k2lab.models import build, lora, packed
from k2lab.quant import int4
from k2lab.stages._models import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(data folder, INT4 base, run directory) of SFT, SFT again on the adapter, full SFT on both, evaluation."""
    folder = tmp_path_factory.mktemp("lora")
    write(folder)
    base = make(folder / "base", "small-k2", "int4")
    k2("run", str(recipe(folder, base, more=AGAIN.format(lora=LORA))), "--run-dir", str(folder / "run"), "--quiet")
    return folder, base, folder / "run"


def test_the_loss_goes_down_and_the_artifact_is_an_adapter(run) -> None:
    _, base, run_dir = run
    found = losses(run_dir, "sft")
    assert found[-1] < found[0] - 0.3
    folder = stage_of(run_dir, "sft")
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json", "config.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    adapter = Adapter.open(folder)
    spec = open_folder(base).spec
    assert len(adapter.modules()) == 2 * 5 + 3 + 3 + 3 * spec.n_routed_experts
    facts = json.loads((folder / "manifest.json").read_text())["lora"]
    assert facts["matrices"] == {"attention": 10, "shared_experts": 3, "dense_mlp": 3, "routed_experts": 12}
    table = (folder / "parameters.txt").read_text()
    assert "frozen" in table and "LoRA factor" in table and "muon:" not in table


def test_the_adapter_is_loaded_on_its_packed_base(run) -> None:
    _, base, run_dir = run
    model = load_model(stage_of(run_dir, "sft"))
    experts = [module for module in model.hf.modules() if isinstance(module, packed.PackedExperts)]
    dense = [t for t in model.spec.tensors() if t.kind == "expert"]
    held = sum(buffer.numel() * buffer.element_size() for module in experts for buffer in module.buffers())
    assert held <= 0.32 * sum(2 * t.numel * t.count for t in dense)
    whole = build.load(open_folder(base))
    lora.load(whole, Adapter.open(stage_of(run_dir, "sft")).of(lora.names(whole)), model.adapters)
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, model.weights()[name]), name


def test_a_stage_goes_on_with_the_adapter_and_with_its_base(run) -> None:
    _, base, run_dir = run
    first, second = (Adapter.open(stage_of(run_dir, name)) for name in ("sft", "again"))
    assert first.modules() == second.modules()
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    change = (second.delta(name) - first.delta(name)).norm() / first.delta(name).norm()
    assert 0 < change < 0.5
    assert Path(json.loads((second.path / "base.json").read_text())["path"]) == base.resolve()
    assert losses(run_dir, "again")[0] < losses(run_dir, "sft")[0] - 0.3


def test_full_training_from_an_adapter_begins_with_merged_weights(run) -> None:
    _, _, run_dir = run
    full, adapted = load_model(stage_of(run_dir, "full")), load_model(stage_of(run_dir, "again"))
    assert full.adapters is None
    for name, tensor in adapted.weights().items():
        torch.testing.assert_close(full.weights()[name], tensor, rtol=0, atol=1e-6)


def test_evaluation_reads_adapters(run) -> None:
    _, _, run_dir = run
    results = json.loads((stage_of(run_dir, "evaluate") / "results.json").read_text())
    text = json.dumps(results)
    assert all(name in text for name in ("sft", "again", "full"))


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(run) -> None:
    folder, base, run_dir = run
    only, killed = recipe(folder, base), folder / "killed"
    (killed / "stages").mkdir(parents=True)
    shutil.copytree(stage_of(run_dir, "instructions"), killed / "stages" / stage_of(run_dir, "instructions").name)
    kills = 0
    for count in (2, 5, 7):
        process = start(only, killed)
        wait_for(killed, "sft", count, process)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    forked.finish("run", only, "--run-dir", killed, "--quiet")
    whole, found = weights_of(run_dir), weights_of(killed)
    names = [name for name in found if "/sft-" in name and name.endswith(".safetensors")]
    assert len(names) == 1 and all(found[name] == whole[name] for name in names)


def test_step_checkpoints_hold_adapters_alone(run, tmp_path) -> None:
    folder, base, _ = run
    seen: dict[str, Any] = {}
    from k2lab.ckpt import step

    save = step.save

    def watched(where: Path, number: int, model: dict, *rest: Any, **more: Any) -> None:
        seen[number] = set(model)
        save(where, number, model, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "save", watched)
        from k2lab.cli import main

        assert main(["run", str(recipe(folder, base)), "--run-dir", str(tmp_path / "run"), "--quiet"]) == 0
    assert seen and all(lora.is_factor(name) for names in seen.values() for name in names)


def test_a_merged_artifact_is_a_whole_model(run) -> None:
    folder, base, run_dir = run
    table = LORA.replace("false", "true")
    k2("run", str(recipe(folder, base, table)), "--run-dir", str(folder / "merged"), "--quiet")
    merged, adapter = stage_of(folder / "merged", "sft"), load_model(stage_of(run_dir, "sft"))
    whole = load_model(merged)
    assert whole.adapters is None
    for name, tensor in adapter.weights().items():
        assert torch.equal(tensor, whole.weights()[name]), name
    beside = load_model(merged / "adapter")
    assert all(torch.equal(tensor, adapter.state()[name]) for name, tensor in beside.state().items())
    one, two = (load_file(path / "adapter_model.safetensors") for path in (merged / "adapter", stage_of(run_dir, "sft")))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_merging_requantises_what_is_adapted_and_copies_the_rest(run, tmp_path) -> None:
    """`k2 convert --adapter`: INT4 experts = the grid of (decoded + scale B A), others = bf16 of the same sum."""
    _, base, run_dir = run
    folder, out = stage_of(run_dir, "sft"), tmp_path / "out"
    k2("convert", str(base), str(out), "--to", "int4", "--adapter", str(folder))
    adapter, old, new = Adapter.open(folder), open_folder(base), open_folder(out)
    adapted = {f"{name}.weight" for name in adapter.modules()}
    for name in old.names():
        if name not in adapted:
            assert all(bytes(new.raw(name)[part][2]) == bytes(raw[2]) for part, raw in old.raw(name).items()), name
            continue
        merged = old.read(name).float() + adapter.delta(name)
        want = int4.values(merged) if old.info(name).format == "int4_group" else merged.to(torch.bfloat16)
        assert new.info(name).format == old.info(name).format and torch.equal(new.read(name), want), name
    assert {old.info(name).format for name in adapted} == {"plain", "int4_group"}
    assert load_model(out).adapters is None


def test_chat_answers_with_an_adapter(run) -> None:
    _, _, run_dir = run
    done = k2("chat", str(run_dir / "sft"), "--max-tokens", "4", input="Say model 3\n")
    assert done.returncode == 0 and done.stdout.strip()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "table, says",
    [
        ("{ rank = 0 }", "rank.*at least 1"),
        ("{ alpha = 0.0 }", "alpha.*positive"),
        ("{ dropout = 0.1 }", "without dropout"),
        ('{ targets = ["experts"] }', "no LoRA target 'experts'"),
        ("{ targets = [] }", "at least one"),
    ],
)
def test_settings_that_cannot_be_trained_with(tmp_path, table, says) -> None:
    write(tmp_path)
    with pytest.raises(RecipeError, match=says):
        load(str(recipe(tmp_path, tmp_path, table)))


@pytest.mark.parametrize(
    "change, says",
    [
        (('type = "adamw", lr = 1e-2, weight_decay = 0.0', 'type = "muonclip", lr = 1e-2'), "QK-Clip scales.*frozen"),
        (("valid_every = 6", 'valid_every = 6\nqat = "int4"'), "keeps frozen"),
    ],
)
def test_other_fields_that_contradict_it(tmp_path, change, says) -> None:
    write(tmp_path)
    path = recipe(tmp_path, tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(RecipeError, match=says):
        load(str(path))


def test_a_base_that_is_not_int4_cannot_stay_packed(tmp_path) -> None:
    write(tmp_path)
    base = make(tmp_path / "base", "small-k2", "bf16")
    done = k2("run", str(recipe(tmp_path, base)), "--run-dir", str(tmp_path / "run"), "--quiet", check=False)
    assert done.returncode == 2 and "only the experts of an INT4 checkpoint can stay packed" in done.stderr


def test_an_adapter_without_its_base_is_told(run, tmp_path) -> None:
    _, _, run_dir = run
    copy = tmp_path / "adapter"
    shutil.copytree(stage_of(run_dir, "sft"), copy)
    table = json.loads((copy / "base.json").read_text())
    for change in ({"path": "/nowhere", "relative": "../nowhere"}, {"format": 2}):
        (copy / "base.json").write_text(json.dumps({**table, **change}))
        with pytest.raises(CheckpointError, match="not here any more|damaged"):
            load_model(copy)
