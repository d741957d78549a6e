"""The rule of the router bias that a recipe names: the quantile rule balances within a few steps, the sign rule has a rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import k2, write


def fullest(run: Path) -> list[float]:
    """Load of the fullest expert over the even share, by step of pretraining, mean over routers."""
    steps = [json.loads(line) for line in (run / "events" / "rank0.jsonl").read_text().splitlines()]
    loads = [event["expert_load"].values() for event in steps if event["kind"] == "step" and event["stage"] == "pretrain"]
    return [sum(max(shares) * len(shares) for shares in step) / len(step) for step in loads]


@pytest.mark.slow
def test_the_quantile_rule_balances_a_run_at_once(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data")
    found = {}
    for rule in ("sign", "quantile"):
        short = ("stage.pretrain.steps=6", "stage.sft.steps=1", "stage.sft.valid_every=1")
        k2("run", str(recipe), "--run-dir", str(tmp_path / rule), "--quiet", f"stage.pretrain.router_bias_rule={rule}", *short)
        found[rule] = fullest(tmp_path / rule)
    assert found["sign"][0] == found["quantile"][0]
    assert max(found["quantile"][2:]) < min(found["sign"][2:])


def test_another_rule_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path / "data")
    done = k2("plan", str(recipe), "stage.pretrain.router_bias_rule=median", check=False)
    assert done.returncode == 2 and "router_bias_rule" in done.stderr and "quantile" in done.stderr
