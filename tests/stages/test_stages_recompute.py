"""`recompute` in a recipe changes memory only: weights, observations and identity stay as they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from small_run import k2, write


def outcome(run: Path) -> tuple[dict[str, str], list[object]]:
    """({stage's directory: sha256 of its weights}, what every step of training reported, timings aside)."""
    found = sorted((run / "stages").glob("*/model.safetensors"))
    assert len(found) == 2
    weights = {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
    events = [json.loads(line) for line in (run / "events" / "rank0.jsonl").read_text().splitlines()]
    names = ("stage", "step", "losses", "grad_norm", "expert_load", "max_logits")
    return weights, [[event.get(name) for name in names] for event in events if event["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["tiny-k2", "tiny-linear"])
def test_a_run_is_the_same_whatever_is_computed_again(tmp_path: Path, spec: str) -> None:
    recipe = write(tmp_path / "data", spec=spec)
    short = ("stage.pretrain.steps=4", "stage.sft.steps=1", "stage.sft.valid_every=1")
    found = []
    for mode in ("none", "selective", "layers"):
        changed = [f"stage.{stage}.recompute={mode}" for stage in ("pretrain", "sft")]
        k2("run", str(recipe), "--run-dir", str(tmp_path / mode), "--quiet", *changed, *short)
        found.append(outcome(tmp_path / mode))
    assert found[0][1] and found[1] == found[0] and found[2] == found[0]


def test_the_planner_hears_of_it(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data")
    assert "computed again: " in k2("plan", str(recipe), "stage.pretrain.recompute=selective").stdout
    assert "computed again: " not in k2("plan", str(recipe)).stdout
    done = k2("plan", str(recipe), "stage.pretrain.recompute=some", check=False)
    assert done.returncode == 2 and "recompute" in done.stderr and "selective" in done.stderr


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    recipe = str(write(tmp_path / "data"))
    for verb in (("plan",), ("run", "--run-dir", str(tmp_path / "run"), "--quiet")):
        done = k2(verb[0], recipe, *verb[1:], "stage.pretrain.compile=layers", check=False)
        assert done.returncode == 2 and "stage.pretrain.compile" in done.stderr and "fused by hand" in done.stderr
    both = ("stage.sft.compile=layers", "stage.sft.recompute=selective")
    done = k2("plan", str(write(tmp_path / "other", spec="tiny-qwen2")), *both, check=False)
    assert done.returncode == 2 and "stage.sft.compile" in done.stderr and "selective" in done.stderr


@pytest.mark.slow
def test_a_dense_model_trains_compiled(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data", spec="tiny-qwen2")
    short = ("stage.pretrain.steps=4", "stage.sft.steps=1", "stage.sft.valid_every=1")
    found = []
    for mode in ("none", "layers"):
        changed = [f"stage.{stage}.compile={mode}" for stage in ("pretrain", "sft")]
        k2("run", str(recipe), "--run-dir", str(tmp_path / mode), "--quiet", *changed, *short)
        found.append([values[2]["lm"] for values in outcome(tmp_path / mode)[1]])
    assert len(found[0]) == 5 and found[1] == pytest.approx(found[0], rel=1e-4)
