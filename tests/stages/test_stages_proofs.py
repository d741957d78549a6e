"""`k2 check`: tasks can be won honestly, and held-out tasks were not trained on."""

import json

import pytest

from k2lab.cli import main
from k2lab.core.artifacts import Artifact
from k2lab.data import shards
from k2lab.data.sources.reasoning_tasks import ReasoningTasks
from k2lab.stages import _proofs


def dataset(folder, train, valid=()):
    for split, records in (("train", train), ("valid", valid)):
        if records:
            shards.write_records(folder, records, split)
    return folder


def task(number, **more):
    return {"key": f"t{number}", "prompt": f"{number} + 1 =", "answer": str(number + 1), "group": f"g{number}", **more}


def artifact(folder, name, kind, **parents):
    manifest = {"kind": kind, "name": name, "identity": name, "parents": {role: {"identity": to} for role, to in parents.items()}}
    return Artifact(folder / name, manifest)


def test_good_tasks_are_proved_and_counted(tmp_path, capsys):
    records = list(ReasoningTasks(families={"chain_sum:1-3": 90}).records())
    folder = dataset(tmp_path / "d", records[:60], [*records[60:], {"key": "other", "text": "no task"}])
    assert _proofs.prove_tasks(folder) == ([], ["all 90 tasks: gold answers score 1, empty and nonsense ones less"])
    problems, proved = _proofs.prove_tasks(folder, limit=20)
    assert not problems and proved[0].startswith("20 (chosen by key) of 90 tasks")
    assert main(["check", str(folder)]) == 0
    assert "all 90 tasks" in capsys.readouterr().out
    assert _proofs.prove_tasks(dataset(tmp_path / "e", [{"key": "a", "text": "b"}])) == ([], [])


def test_a_wrong_solution_and_a_generous_reward_are_found(tmp_path, capsys):
    generous = tmp_path / "generous.py"
    generous.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Generous:\n"
        "    fails: bool = False\n"
        "    def score(self, task, response):\n"
        "        return 1 / 0 if self.fails else 1.0\n"
    )
    name = str(generous)
    bad = [
        {**task(1), "reasoning": "1+1=3", "final": "3"},
        task(2, rewards=[name]),
        task(3, rewards=[name], options={name: {"fails": True}}),
    ]
    folder = dataset(tmp_path / "d", [task(0), *bad])
    problems, _ = _proofs.prove_tasks(folder)
    said = "\n".join(problems)
    assert "answered/t1: its own gold response does not score 1" in said
    assert "answered/t2: the response" in said and "scores 1" in said
    assert "answered/t3: a reward failed: ZeroDivisionError" in said
    assert "answered/t0" not in said
    assert main(["check", str(folder)]) == 2
    assert "answered/t1" in capsys.readouterr().out


def test_many_problems_are_told_in_short(tmp_path):
    folder = dataset(tmp_path / "d", [{**task(n), "reasoning": "r", "final": "wrong"} for n in range(30)])
    problems, proved = _proofs.prove_tasks(folder)
    assert len(problems) == _proofs.SHOWN + 1 and problems[-1] == "... and 25 more tasks with problems"
    assert proved == ["all 30 tasks: 30 problem(s)"]


def test_tasks_that_cannot_be_judged_here_are_said_not_failed(tmp_path):
    pytest.importorskip("k2lab.gym.rewards.reasoning_gym")
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        options = {"reasoning_gym": {"family": "countdown"}}
        folder = dataset(tmp_path / "d", [task(0), task(1, rewards=["reasoning_gym"], options=options)])
        problems, proved = _proofs.prove_tasks(folder)
        assert not problems
        assert proved[0].startswith("1 (chosen by key) of 2 tasks") and "k2lab[gym]" in proved[1]


def chain(tmp_path, test, *, sft, pretrain_extra=()):
    """corpus -> tokens -> pretrain -> sft (on `sft`), evaluated on the held-out part of `test`."""
    dataset(tmp_path / "corpus", [{"key": "c", "text": "c"}, *pretrain_extra])
    dataset(tmp_path / "questions", sft, [task(900)])
    dataset(tmp_path / "tasks", [task(901)], test)
    return [
        artifact(tmp_path, "corpus", "dataset"),
        artifact(tmp_path, "questions", "dataset"),
        artifact(tmp_path, "tasks", "dataset"),
        artifact(tmp_path, "tokens", "tokens", corpus="corpus"),
        artifact(tmp_path, "pretrain", "checkpoint", data="tokens"),
        artifact(tmp_path, "sft", "checkpoint", start="pretrain", data="questions"),
        artifact(tmp_path, "evaluate", "report", **{"models[0]": "sft", "instructions": "tasks"}),
    ]


def test_disjoint_data_is_proved_with_counts(tmp_path):
    artifacts = chain(tmp_path, [task(1), task(2), {**task(3), "group": "g2"}], sft=[task(n) for n in range(10, 15)])
    problems, proved = _proofs.prove_disjoint(artifacts)
    assert problems == []
    (line,) = proved
    assert line.startswith("evaluate: 2 held-out canonical keys (tasks); training data of the models:")
    assert "questions 5" in line and "corpus 1" in line and line.endswith("none is shared")


def test_a_shared_key_is_found_through_every_ancestor(tmp_path):
    same_group = {**task(50), "group": "g1"}
    problems, proved = _proofs.prove_disjoint(chain(tmp_path / "a", [task(1)], sft=[same_group]))
    assert len(problems) == 1 and "1 held-out canonical keys are in the training part of questions, e.g. 'g1'" in problems[0]
    assert "none is shared" not in proved[0]
    problems, _ = _proofs.prove_disjoint(chain(tmp_path / "b", [task(1)], sft=[task(10)], pretrain_extra=[same_group]))
    assert len(problems) == 1 and "training part of corpus" in problems[0]


def test_the_same_question_under_another_key_is_found(tmp_path):
    copy = {**task(1), "key": "copy", "group": "elsewhere", "prompt": "1  + 1 ="}
    problems, _ = _proofs.prove_disjoint(chain(tmp_path, [task(1)], sft=[copy]))
    assert len(problems) == 1 and "1 held-out questions are in the training part of questions" in problems[0]


def test_held_out_records_of_a_training_set_and_models_from_outside(tmp_path):
    artifacts = chain(tmp_path, [task(1)], sft=[task(10)])
    artifacts[5] = artifact(tmp_path, "sft", "checkpoint", start="elsewhere", data="questions")
    problems, proved = _proofs.prove_disjoint(artifacts)
    assert not problems and "1 ancestors lie outside this run" in proved[0] and "corpus" not in proved[0]
    assert _proofs.prove_disjoint(artifacts[:-1]) == ([], [])


def test_check_of_a_run_tells_of_shared_tasks(tmp_path, capsys, monkeypatch):
    from k2lab.core.artifacts import finish

    stages = tmp_path / "run" / "stages"
    for made in chain(tmp_path / "parts", [task(1)], sft=[{**task(5), "group": "g1"}]):
        partial = made.path
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "note.json").write_text(json.dumps({}))
        if made.kind == "tokens":
            with shards.TokenWriter(partial, "train", 10) as out:
                out.add([1, 2], key="c", text_bytes=1)
        stages.mkdir(parents=True, exist_ok=True)
        finish(partial, stages / f"{made.name}-1", {**made.manifest, "type": "x"})
    assert main(["check", str(tmp_path / "run")]) == 2
    out = capsys.readouterr().out
    assert "test tasks and training data: 1 problem(s)" in out and "'g1'" in out
    assert "questions-1: ok" in out and "all 2 tasks" in out
