"""Every stage runs its shortest form and leaves an artifact that its readers accept; evaluation and report close the chain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_run import EVALUATE, k2, stage_of, write

from k2lab.core import artifacts
from k2lab.core.recipe import load
from k2lab.core.slots import names


@pytest.fixture(scope="module", params=["tiny-k2", "tiny-linear"])
def finished(request, tmp_path_factory):
    """A whole small run with evaluation."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write(folder / "data", request.param)
    recipe.write_text(recipe.read_text().replace("steps = 12", "steps = 4").replace("steps = 8", "steps = 3") + EVALUATE)
    done = k2("run", str(recipe), "--run-dir", str(folder / "run"))
    return folder / "run", done


def test_all_stage_types_are_run_here(finished):
    run_dir, _ = finished
    recipe = load(str(run_dir / "recipe.resolved.toml"))
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
    elsewhere = {name for name in names("stage") if f'type = "{name}"' in written}
    assert {entry.type for entry in recipe.stages} | elsewhere == set(names("stage"))
    for entry in recipe.stages:
        artifacts.open_artifact(stage_of(run_dir, entry.name), kind=type(entry.config).kind, verify=True)


def test_output_ends_with_table_and_where_to_look_next(finished):
    run_dir, done = finished
    assert "pretrain 4/4" in done.stderr and "ETA" in done.stderr and "tok/s" in done.stderr
    tail = done.stdout[-1200:]
    assert "report.html" in tail and "k2 report" in tail
    assert (run_dir / "report.html").stat().st_size > 20_000


def test_summary_rows_have_the_promised_fields(finished):
    run_dir, _ = finished
    summary = json.loads(k2("report", str(run_dir), "--json").stdout)
    assert summary["total_seconds"] > 0
    for row in summary["rows"]:
        assert {"stage", "metric", "before", "after", "low", "high", "n", "seconds", "peak_rss_mb"} <= row.keys()
    row = next(r for r in summary["rows"] if r["stage"] == "pretrain" and r["metric"] == "bits_per_byte")
    assert row["before"] is not None and row["low"] <= row["after"] <= row["high"] and row["n"] > 10


def test_baselines_stand_beside_the_models(finished):
    run_dir, _ = finished
    results = json.loads((stage_of(run_dir, "evaluate") / "results.json").read_text())
    floor = {b["name"].split()[0]: b["value"] for b in results["baselines"] if b["metric"] == "bits_per_byte"}
    assert floor["bigram"] < floor["unigram"]
    assert results["chain"] == [["untrained", "pretrain"], ["pretrain", "sft"]]


def test_model_directory_is_whole_and_evaluates_by_itself(finished, tmp_path):
    run_dir, _ = finished
    sft = stage_of(run_dir, "sft")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in sft.iterdir()}
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Say experts 1"}\n')
    arguments = ["eval", f"{run_dir}/sft", "--prompts-jsonl", str(prompts), "--json", "max_tokens=4", "tasks=[]"]
    before = (run_dir / "recipe.resolved.toml").read_bytes()
    results = json.loads(k2(*arguments).stdout)
    assert [model["name"] for model in results["models"]] == ["sft"]
    assert any(sample["prompt"] == "Say experts 1" for sample in results["models"][0]["samples"])
    assert (run_dir / "recipe.resolved.toml").read_bytes() == before  # evaluating leaves somebody's run as it was


@pytest.mark.parametrize("finished", ["tiny-k2"], indirect=True)
def test_bare_model_directory_is_measured_on_shipped_text(finished, tmp_path):
    run_dir, _ = finished
    bare = shutil.copytree(stage_of(run_dir, "sft"), tmp_path / "model")
    (bare / "manifest.json").unlink()  # somebody's model, not an artifact of ours
    results = json.loads(k2("eval", str(bare), "--json", "tasks=[]", "max_tokens=4", cwd=tmp_path).stdout)
    (model,) = results["models"]
    found = {metric["metric"]: metric["value"] for metric in model["metrics"]}
    assert 0.5 < found["bits_per_byte/reference"] < 9 and found["response_loss/docstring_qa"] > 0
    assert {baseline["metric"] for baseline in results["baselines"]} >= {"bits_per_byte/docstrings"}


def test_folder_without_a_model_is_refused(tmp_path):
    done = k2("eval", str(tmp_path), check=False)
    assert done.returncode == 2 and "config.json" in done.stderr


def test_check_accepts_the_run(finished):
    run_dir, _ = finished
    assert ": ok" in k2("check", str(run_dir)).stdout


def test_parameter_table_is_kept_beside_the_weights(finished):
    run_dir, _ = finished
    text = (stage_of(run_dir, "pretrain") / "parameters.txt").read_text()
    assert "muon" in text and "adamw" in text and "embed_tokens" in text
