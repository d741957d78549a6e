"""The whole command under torchrun: two gloo processes write one run, and it is the run of one process up to rounding."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small_run import EVALUATE, environment, k2, write

from k2lab.core.events import read


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path):
    recipe = write(tmp_path / "data")
    recipe.write_text(recipe.read_text() + EVALUATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m", "k2lab"]
    arguments = ["run", str(recipe), "--quiet", "--run-dir"]
    done = subprocess.run([*command, *arguments, str(tmp_path / "two")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    k2(*arguments, str(tmp_path / "one"))
    steps = {name: [e for e in read(tmp_path / name / "events") if e["kind"] == "step"] for name in ("one", "two")}
    assert len(steps["one"]) == len(steps["two"]) == 20
    for one, two in zip(steps["one"], steps["two"]):
        assert (one["stage"], one["step"], one["tokens"]) == (two["stage"], two["step"], two["tokens"])
        assert one["losses"]["lm"] == pytest.approx(two["losses"]["lm"], rel=1e-3)
    results = [json.loads(next((tmp_path / n / "stages").glob("evaluate-*/results.json")).read_text()) for n in ("one", "two")]
    bits = [{(m["name"], x["metric"]): x["value"] for m in r["models"] for x in m["metrics"]} for r in results]
    assert bits[0].keys() == bits[1].keys()
    for key, value in bits[0].items():
        if "bits" in key[1] or "loss" in key[1]:
            assert value == pytest.approx(bits[1][key], rel=2e-3)
    assert (tmp_path / "two" / "report.html").stat().st_size > 20_000
