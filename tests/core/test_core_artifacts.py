"""Artifacts exist completely or not at all; edited ones are refused; events survive kills."""

from __future__ import annotations

import json
import pickle

import pytest

from k2lab.core import artifacts, errors
from k2lab.core.errors import CheckpointError, MachineError
from k2lab.core.events import EventWriter, read
from k2lab.core.rng import derive, rng


def make(tmp_path, name="a", kind="dataset"):
    partial = tmp_path / f"{name}.partial"
    partial.mkdir()
    (partial / "data.txt").write_text("hello")
    return artifacts.finish(partial, tmp_path / name, {"kind": kind, "name": name, "identity": "0" * 64})


def test_finish_makes_a_whole_artifact_and_removes_the_partial(tmp_path):
    made = make(tmp_path)
    assert artifacts.exists(made.path)
    assert not (tmp_path / "a.partial").exists()
    assert artifacts.open_artifact(made.path, kind="dataset", verify=True).manifest == made.manifest


def test_directory_without_manifest_does_not_exist(tmp_path):
    (tmp_path / "b").mkdir()
    assert not artifacts.exists(tmp_path / "b")
    with pytest.raises(CheckpointError, match="not a finished artifact"):
        artifacts.open_artifact(tmp_path / "b")


def test_edits_are_noticed(tmp_path):
    made = make(tmp_path)
    (made.path / "data.txt").write_text("hallo")  # same size
    artifacts.open_artifact(made.path)
    with pytest.raises(CheckpointError, match="sha256 differs"):
        artifacts.open_artifact(made.path, verify=True)
    (made.path / "data.txt").write_text("longer than before")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        artifacts.open_artifact(made.path)
    (made.path / "data.txt").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        artifacts.open_artifact(made.path)


def test_other_kind_other_format_and_broken_manifest(tmp_path):
    made = make(tmp_path)
    with pytest.raises(CheckpointError, match="is a 'dataset' artifact"):
        artifacts.open_artifact(made.path, kind="checkpoint")
    manifest = json.loads((made.path / "manifest.json").read_text())
    (made.path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="k2 convert"):
        artifacts.open_artifact(made.path)
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        artifacts.open_artifact(made.path)


def test_full_disk_is_one_paragraph(tmp_path):
    with pytest.raises(MachineError, match="is full") as caught, artifacts.disk_errors(tmp_path):
        raise OSError(28, "No space left on device")
    assert caught.value.exit_code == 3


def test_identity_depends_on_everything_that_decides_the_result():
    base = artifacts.identity({"a": 1}, {"p": "x"}, 1, 0)
    others = [
        artifacts.identity({"a": 2}, {"p": "x"}, 1, 0),
        artifacts.identity({"a": 1}, {"p": "y"}, 1, 0),
        artifacts.identity({"a": 1}, {"p": "x"}, 2, 0),
        artifacts.identity({"a": 1}, {"p": "x"}, 1, 1),
    ]
    assert base == artifacts.identity({"a": 1}, {"p": "x"}, 1, 0)
    assert len({base, *others}) == 5


def test_older_attempts_later_steps_are_dropped_and_torn_lines_skipped(tmp_path):
    first = EventWriter(tmp_path, run="r")
    first.stage = "train"
    first.emit("stage_start", step=0, resumed=False)
    for step in (1, 2, 3, 4):
        first.emit("step", step=step, losses={"lm": float(step)})
    first.close()
    with (tmp_path / "rank0.jsonl").open("a") as file:
        file.write('{"v":1,"kind":"step","st')  # a kill in the middle of a line
    second = EventWriter(tmp_path, run="r")
    second.stage = "train"
    assert second.attempt == 2
    second.emit("stage_start", step=2, resumed=True)
    second.emit("step", step=3, losses={"lm": 30.0})
    second.close()
    steps = [(e["step"], e["losses"]["lm"]) for e in read(tmp_path) if e["kind"] == "step"]
    assert steps == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_events_hold_no_bare_infinities(tmp_path):
    writer = EventWriter(tmp_path)
    writer.emit("step", losses={"lm": float("inf")}, more=[float("nan")])
    writer.close()
    line = (tmp_path / "rank0.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda c: pytest.fail(c))["losses"]["lm"] == "inf"


def test_rng_is_a_function_of_its_key_alone():
    assert rng(1, "a", 2).random(3).tolist() == rng(1, "a", 2).random(3).tolist()
    keys = [(1, "a", 2), (1, "a", 3), (2, "a", 2), (1, "a2"), (1, "a", "2"), (12, "a")]
    assert len({derive(*key) for key in keys}) == len(keys)
    with pytest.raises(TypeError):
        derive(1, 2.5)


def test_errors_inherit_builtins_pickle_and_show_the_template():
    error = errors.RecipeError("wrong type", where="stage.a.b", got=3, allowed="a text", next="Write a text")
    assert isinstance(error, ValueError)
    assert str(error) == "stage.a.b: wrong type. Got: 3. Allowed: a text. Write a text."
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and type(again) is errors.RecipeError
