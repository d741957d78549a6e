"""Teacher and student in the report: paired differences, and times that lie in a file of their own."""

from __future__ import annotations

import json

import life_fixture as life
import pytest
from test_report_life import part, shown
from test_report_page import assert_sound, read

from k2lab.report import rows, students
from k2lab.report.collect import collect
from k2lab.report.measures import evaluation

SETTINGS = "plain prompt, temperature 1, k=4, max 96 tokens"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run whose evaluation compared student and teacher on the same tasks and put the times into timings.json."""
    run_dir = life.make_life(tmp_path_factory.mktemp("runs") / "life")
    path = next(run_dir.glob("stages/evaluate-*/results.json"))
    results = json.loads(path.read_text())
    timings = {**results, "models": [], "chain": [], "changes": [], "baselines": []}
    for model in results["models"]:
        times = [item for item in model["metrics"] if item["metric"] == "decode_time"]
        model["metrics"] = [item for item in model["metrics"] if item["metric"] != "decode_time"]
        timings["models"].append({**model, "metrics": times, "samples": []})
    change = {"metric": "answered/avg@4", "settings": SETTINGS, "teacher": 0.75, "student": 0.69, "change": -0.06}
    change |= {"low": -0.084, "high": -0.036, "n": 240, "ratio": 0.92, "ratio_low": 0.89, "ratio_high": 0.95}
    sizes = {"teacher": 1, "student": 1}
    pair = {"teacher": "rl", "student": "distill", "active_params_non_embedding": sizes, "changes": [change]}
    path.write_text(json.dumps({**results, "students": [pair]}))
    path.with_name("timings.json").write_text(json.dumps(timings))
    return run_dir


def test_difference_on_the_same_tasks_is_said_and_shown(measured):
    text, page = read(measured)
    assert_sound(text, page)
    section = shown(part(text, "students"))
    assert "(69 against 75 %; the difference is \u22128.4 to \u22123.6 points) with" in section
    assert "\u22126.0 (\u22128.4 to \u22123.6) points against the teacher" in section


def test_times_of_their_own_file_are_shown_and_never_judged(measured):
    run = collect(measured)
    found = evaluation(run)
    assert students.kept(run, found, "distill")["time"] == pytest.approx(1.1 / 2.3)
    assert "2.3 1.0 to 2.4 1.1 (48 %)" in shown(part(read(measured)[0], "students"))
    times = [row for row in rows.summary(measured)["rows"] if row["metric"] == "decode_time"]
    assert {row["verdict"] for row in times} <= {"unclear", "unknown"} and len(times) > 3


def test_damaged_times_do_not_stop_the_page(measured):
    path = next(measured.glob("stages/evaluate-*/timings.json"))
    before = path.read_text()
    for broken in ("[]", '{"models": [{"name": "rl"}, 3, {"metrics": []}]}', "{"):
        path.write_text(broken)
        found = evaluation(collect(measured))
        assert "time" not in students.kept(collect(measured), found, "distill") and "distill" in found.models
    path.write_text(before)
