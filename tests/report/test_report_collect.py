"""Which artifact is the present one, and what is left of a log after kills, resumes and edited recipes."""

from __future__ import annotations

import json

import report_fixture as fixture

from k2lab.report.collect import collect

SMALL = {"pretrain": 30, "sft": 10}
LONGER = {"sft": {"epochs": 3.0}}
OTHER_TEXT = {"corpus": {"valid_share": 0.1}}


def directories(run):
    return {stage.name: stage.directory.name for stage in run.stages if stage.directory}


def test_resumed_run_reads_like_one_that_never_was(tmp_path):
    plain = collect(fixture.make(tmp_path / "plain"))
    resumed = collect(fixture.make(tmp_path / "resumed", resume_at=120))
    before, after = plain.stage("pretrain"), resumed.stage("pretrain")
    assert [event["step"] for event in after.steps] == list(range(1, 301))
    assert [event["losses"] for event in after.steps] == [event["losses"] for event in before.steps]
    assert [event["metrics"] for event in after.valid] == [event["metrics"] for event in before.valid]
    assert after.resumed_at == [120] and before.resumed_at == []


def test_partial_directory_is_not_an_artifact(tmp_path):
    run = collect(fixture.make(tmp_path / "run", upto="pretrain", cut=70))
    stage = run.stage("pretrain")
    assert (stage.status, stage.directory, stage.reached, stage.total) == ("unfinished", None, 70, 300)
    assert not run.finished
    assert abs(stage.seconds - 141.0 * 70 / 300) < 0.1
    assert [s.status for s in run.stages] == ["done"] * 4 + ["unfinished", "waiting", "waiting"]


def test_edited_recipe_replaces_what_it_changed_and_keeps_the_rest(tmp_path):
    first = directories(collect(fixture.make(tmp_path, steps=SMALL)))
    run = collect(fixture.make(tmp_path, steps=SMALL, stages=LONGER, start=fixture.START + 1000))
    second = directories(run)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"sft", "evaluate"} and run.finished
    assert run.others == sorted(first[name] for name in changed)


def test_going_back_to_an_older_recipe_finds_its_artifacts(tmp_path):
    first = directories(collect(fixture.make(tmp_path, steps=SMALL)))
    fixture.make(tmp_path, steps=SMALL, stages=LONGER, start=fixture.START + 1000)
    run = collect(fixture.make(tmp_path, steps=SMALL, start=fixture.START + 2000))
    assert directories(run) == first
    assert not run.stage("sft").log_matches and run.stage("sft").steps == []  # the log is the other recipe's
    assert run.stage("pretrain").log_matches and len(run.stage("pretrain").steps) == 30


def test_stage_whose_parent_changed_is_not_done(tmp_path):
    fixture.make(tmp_path, steps=SMALL)
    run = collect(fixture.make(tmp_path, steps=SMALL, stages=OTHER_TEXT, upto="tokenize", start=fixture.START + 1000))
    assert [stage.status for stage in run.stages] == ["done"] * 4 + ["waiting"] * 3


def test_planned_identities_of_the_run_decide(tmp_path):
    first = fixture.make(tmp_path, steps=SMALL)
    old = collect(first).stage("sft").identity
    fixture.make(tmp_path, steps=SMALL, stages=LONGER, start=fixture.START + 1000)
    events = tmp_path / "events" / "rank0.jsonl"
    start = {
        "v": 1,
        "run": "tiny",
        "stage": "",
        "attempt": 3,
        "step": 0,
        "seq": 1,
        "t": fixture.START + 3000,
        "kind": "run_start",
    }
    with events.open("a") as file:
        file.write(json.dumps({**start, "stages": {"sft": old}}) + "\n")
    assert collect(tmp_path).stage("sft").identity == old


def test_order_and_names_without_a_recipe(tmp_path):
    run_dir = fixture.make(tmp_path, steps=SMALL)
    (run_dir / "recipe.toml").unlink()
    (run_dir / "recipe.resolved.toml").unlink()
    run = collect(run_dir)
    assert [stage.name for stage in run.stages] == list(fixture.ORDER) and run.finished


def test_newer_results_are_named_and_not_read(tmp_path):
    results = {**fixture.example_results(), "format": 2}
    run = collect(fixture.make(tmp_path, steps=SMALL, results=results))
    assert run.stage("evaluate").results is None
    assert any("format 2" in problem for problem in run.problems)


def test_newer_manifest_is_named_and_not_read(tmp_path):
    run_dir = fixture.make(tmp_path, steps=SMALL)
    path = next(run_dir.glob("stages/sft-*/manifest.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    run = collect(run_dir)
    assert run.stage("sft").status != "done" and any("format 7" in problem for problem in run.problems)
