"""Exact resume of the later stages: `kill -9` inside each of them, the same command again, and every file is bit-identical."""

from __future__ import annotations

import shutil
import signal
import time

import forked
import pytest
from small_run import weights_of
from test_stages_kill import start

from k2lab.core.events import read
from k2lab.core.rng import rng

LATER = ("reasoning_sft", "pairs", "dpo", "teacher_data", "distill")


def wait_for(run_dir, stage, count, process):
    """Returns once `stage` has written `count` events, or the process has ended."""
    folder = run_dir / "events"
    while process.poll() is None:
        if folder.is_dir() and sum(event["stage"] == stage for event in read(folder)) >= count:
            return
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_interrupted(life, tmp_path):
    recipe, whole = life
    expected = weights_of(whole)
    assert {name.split("/")[1].rsplit("-", 1)[0] for name in expected} >= set(LATER)
    shutil.copytree(whole / "stages", tmp_path / "killed" / "stages")
    for stage in LATER:
        shutil.rmtree(next((tmp_path / "killed" / "stages").glob(f"{stage}-*")))
    draw = rng(int(time.time()), "kills")  # other moments in every run of the suite; they are printed on failure
    moments = [(stage, int(draw.integers(1, 7))) for stage in LATER for _ in range(2)]
    kills = 0
    for stage, count in moments:
        process = start(recipe, tmp_path / "killed")
        wait_for(tmp_path / "killed", stage, count, process)
        time.sleep(float(draw.random()) * 0.1)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 5, moments
    forked.finish("run", recipe, "--run-dir", tmp_path / "killed", "--quiet")
    found = weights_of(tmp_path / "killed")
    assert found.keys() == expected.keys(), f"killed at {moments}"
    assert [name for name in expected if found[name] != expected[name]] == [], f"killed at {moments}"
