import copy
import json

import pytest

from k2lab.core.errors import CheckpointError, DataError
from k2lab.eval import results, stats


@pytest.fixture
def filled():
    found = results.Results()
    found.add_model("base", stage="pretrain", label="after pretraining")
    found.add_model("chat", stage="sft", label="after fine-tuning")
    for name, hits in (("base", 1), ("chat", 6)):
        share = stats.wilson(hits, 8)
        found.add_metric(name, "accuracy", share, unit="share", better="higher", settings="temperature 0, k=1")
    found.add_metric("base", "bits_per_byte", stats.mean([2.0]), unit="bits/byte", better="lower")
    found.add_samples("chat", [{"prompt": "p", "completion": "c", "stop": "eos", "extra": "dropped"}])
    found.add_step("base", "chat")
    found.add_change("base", "chat", "accuracy", stats.paired_change([1] + [0] * 7, [1] * 6 + [0] * 2))
    found.add_baseline("uniform", "bits_per_byte", 8.0)
    return found


def test_written_results_are_read_back_in_the_agreed_form(filled, tmp_path):
    path = tmp_path / "results.json"
    filled.write(path)
    content = results.read(path)
    assert content == filled.as_json() == json.loads(path.read_text())
    assert set(content) == {"format", "models", "chain", "changes", "baselines"}
    assert content["format"] == 1
    accuracy = content["models"][0]["metrics"][0]
    assert {key: accuracy[key] for key in ("metric", "unit", "better", "value", "n", "settings")} == {
        "metric": "accuracy",
        "unit": "share",
        "better": "higher",
        "value": 0.125,
        "n": 8,
        "settings": "temperature 0, k=1",
    }
    assert accuracy["low"] < 0.125 < accuracy["high"]
    assert accuracy["interval"] == "95 %, Wilson"
    single = content["models"][0]["metrics"][1]
    assert (single["low"], single["high"], single["std"]) == (None, None, None)  # infinity is no JSON
    assert content["models"][1]["samples"] == [{"prompt": "p", "completion": "c", "stop": "eos"}]
    assert content["chain"] == [["base", "chat"]]
    assert content["changes"][0]["change"] == pytest.approx(5 / 8)
    assert content["baselines"] == [{"name": "uniform", "metric": "bits_per_byte", "value": 8.0}]


def test_references_are_checked_when_made(filled):
    change = stats.paired_change([0, 1], [1, 1])
    for call in (
        lambda: filled.add_model("base", stage="x", label="x"),
        lambda: filled.add_metric("none", "m", stats.wilson(1, 2), unit="", better="higher"),
        lambda: filled.add_metric(
            "base", "accuracy", stats.wilson(1, 2), unit="", better="higher", settings="temperature 0, k=1"
        ),
        lambda: filled.add_metric("base", "m", stats.wilson(1, 2), unit="", better="bigger"),
        lambda: filled.add_step("base", "none"),
        lambda: filled.add_change("base", "chat", "bits_per_byte", change),
        lambda: filled.add_baseline("b", "m", float("nan")),
        lambda: filled.add_samples("none", []),
    ):
        with pytest.raises(DataError):
            call()
    filled.add_metric("base", "accuracy", stats.wilson(1, 2), unit="", better="higher", settings="temperature 1, k=4")


def test_check_names_what_is_wrong(filled):
    good = json.loads(json.dumps(filled.as_json()))
    assert results.check(good) == []

    def broken(change):
        content = copy.deepcopy(good)
        change(content)
        return results.check(content)

    assert broken(lambda c: c.pop("chain")) == ["the key 'chain' is missing"]
    assert "same name" in broken(lambda c: c["models"][1].update(name="base"))[0]
    assert "settings is missing" in broken(lambda c: c["models"][0]["metrics"][0].pop("settings"))[0]
    assert "outside its interval" in broken(lambda c: c["models"][0]["metrics"][0].update(low=0.9))[0]
    assert "not finite" in broken(lambda c: c["models"][0]["metrics"][0].update(value=None))[0]
    assert "no model" in broken(lambda c: c["chain"].append(["base", "x"]))[0]
    assert "lacks n" in broken(lambda c: c["changes"][0].pop("n"))[0]


def test_unreadable_results_are_errors(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        results.read(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        results.read(path)
    path.write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format"):
        results.read(path)


def test_students_stand_beside_their_teachers(filled, tmp_path):
    assert "students" not in filled.as_json()
    before, after = [1, 1, 1, 0], [1, 0, 1, 0]
    change, kept = stats.paired_change(before, after), stats.paired_share(before, after, 0, "student")
    filled.add_student("chat", "base", (1000, None))
    filled.add_student_change("accuracy", "temperature 0, k=1", (0.75, 0.5), change, kept)
    filled.add_student_change("bits_per_byte", "", (2.0, 3.0), stats.paired_change([2.0], [3.0]), None)
    filled.write(tmp_path / "results.json")
    (pair,) = results.read(tmp_path / "results.json")["students"]
    assert pair["active_params_non_embedding"] == {"teacher": 1000, "student": None}
    right, bits = pair["changes"]
    assert (right["teacher"], right["student"], right["change"]) == (0.75, 0.5, -0.25) and right["low"] < -0.25 < right["high"]
    assert right["ratio"] == pytest.approx(2 / 3) and right["ratio_low"] <= right["ratio"] <= right["ratio_high"]
    assert bits["ratio"] is None and bits["low"] is None
    with pytest.raises(DataError, match="no model"):
        filled.add_student("chat", "nobody", (1, 1))
    broken = filled.as_json() | {"students": [{**pair, "student": "nobody", "changes": [{**right, "low": 0.0}]}]}
    problems = results.check(broken)
    assert len(problems) == 2 and "nobody" in problems[0] and "outside its interval" in problems[1]
