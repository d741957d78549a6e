"""A whole `k2 run` under torchrun: two processes on one machine share the training stages; the first writes the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import EVALUATE, environment, k2, write

from k2lab.core import events

pytestmark = pytest.mark.slow


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2lab", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=280)


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    return {(e["stage"], e["step"]): e["losses"]["lm"] for e in events.read(run_dir / "events") if e["kind"] == "step"}


def test_two_processes_run_the_whole_recipe_and_learn_the_same(tmp_path):
    recipe = write(tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 12", "steps = 6").replace("steps = 8", "steps = 4") + EVALUATE)
    shared = torchrun("run", str(recipe), "--device", "cpu", "--run-dir", "two", "--quiet", cwd=tmp_path)
    assert shared.returncode == 0, shared.stderr[-3000:]
    assert "report:" in shared.stdout and shared.stdout.count("next:") == 1
    k2("run", str(recipe), "--device", "cpu", "--run-dir", "one", "--quiet", "--only", "sft", cwd=tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 10
    for step, value in one.items():
        assert two[step] == pytest.approx(value, rel=1e-4), step
    k2("check", "two", cwd=tmp_path)


def test_a_batch_that_the_ranks_cannot_share_is_refused_before_anything_runs(tmp_path):
    recipe = write(tmp_path)
    refused = torchrun("run", str(recipe), "--run-dir", "two", "stage.sft.per_device_batch=4", cwd=tmp_path)
    assert refused.returncode != 0
    assert "stage.sft" in refused.stderr and "4" in refused.stderr
    assert not list((tmp_path / "two" / "stages").iterdir())
