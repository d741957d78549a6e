"""Exact resume: `kill -9` at any moment of any stage, the same command again, and every file is bit-identical."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from small_run import EVALUATE, k2, weights_of, write

from k2lab.core.events import read
from k2lab.core.rng import rng


def start(recipe: Path, run_dir: Path, *overrides: str) -> forked.Run:
    return forked.Run("run", recipe, *overrides, "--run-dir", run_dir, "--quiet")


def wait_for(run_dir: Path, stage: str, step: int, process: forked.Run) -> None:
    """Returns once `stage` has begun (and, for training stages, has done `step` steps), or the process has ended."""
    folder = run_dir / "events"
    while process.poll() is None:
        for event in read(folder) if folder.is_dir() else ():
            if event["stage"] == stage and (event["kind"] == "stage_start" or event["kind"] == "step") and event["step"] >= step:
                return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["tiny-k2", "tiny-linear"])
def test_killed_and_resumed_equals_never_interrupted(spec, tmp_path):
    recipe = write(tmp_path / "data", spec)
    recipe.write_text(recipe.read_text() + EVALUATE)
    k2("run", str(recipe), "--run-dir", str(tmp_path / "whole"), "--quiet")
    expected = weights_of(tmp_path / "whole")
    assert any(name.endswith("model.safetensors") for name in expected)
    draw = rng(int(time.time()), "kills")  # other moments in every run of the suite; the figure is printed on failure
    kills = attempts = 0
    while kills < 5 and attempts < 5:  # beside other work a run may be over before the kill reaches it: then again, from nothing
        kills += killed_and_finished(recipe, tmp_path / f"killed{attempts}", draw, tmp_path / "whole", expected)
        attempts += 1
    assert kills >= 5


def killed_and_finished(recipe: Path, run_dir: Path, draw: Any, whole: Path, expected: dict[str, str]) -> int:
    """Runs a recipe with kills at eight moments, finishes it, and compares it with the run that was never interrupted; the number
    of kills that reached a running process."""
    moments = [("instructions", 0), ("corpus", 0), ("tokenizer", 0), ("tokenize", 0)]
    moments += [("pretrain", int(draw.integers(0, 12))), ("pretrain", 11), ("sft", int(draw.integers(0, 8))), ("evaluate", 0)]
    kills = 0
    for stage, step in moments:
        process = start(recipe, run_dir)
        wait_for(run_dir, stage, step, process)
        time.sleep(float(draw.random()) * 0.15)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    forked.finish("run", recipe, "--run-dir", run_dir, "--quiet")
    assert weights_of(run_dir) == expected, f"killed at {moments}"
    steps, again = ([e for e in read(folder / "events") if e["kind"] == "step"] for folder in (whole, run_dir))
    assert [(e["stage"], e["step"], e["losses"]) for e in steps] == [(e["stage"], e["step"], e["losses"]) for e in again]
    return kills


@pytest.mark.slow
def test_second_run_of_the_same_recipe_reuses_everything_and_an_edit_remakes_from_there(tmp_path):
    recipe = write(tmp_path / "data")
    k2("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--quiet")
    before = weights_of(tmp_path / "run")
    again = k2("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--quiet")
    assert again.stdout.count(": reused") == 6
    assert weights_of(tmp_path / "run") == before
    dry = k2("run", str(recipe), "stage.sft.steps=4", "--run-dir", str(tmp_path / "run"), "--dry-run").stdout
    assert dry.count("reuse ") == 5 and dry.count("new ") == 1
    with (tmp_path / "data" / "texts.jsonl").open("a") as file:
        file.write('{"text": "one more line of text for the corpus", "source": "made"}\n')
    dry = k2("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--dry-run").stdout
    assert dry.count("reuse ") == 1 and dry.count("new ") == 5  # the edited file changes the identity of all that follows
    assert weights_of(tmp_path / "run") == before
