"""What `k2 check` proves beyond bytes and counts: that tasks can be won honestly, and that test tasks were never trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from k2lab.core.artifacts import Artifact
from k2lab.core.errors import DataError, MachineError

TASKS = 5000  # checked of one data set; more are sampled
SHOWN = 5  # problems told in full

Said = tuple[list[str], list[str]]  # (problems, what was proved)


def prove_tasks(folder: Path, limit: int = TASKS) -> Said:
    """That the gold answers of a data set's tasks score 1, and empty or nonsense responses less.

    At most `limit` tasks (0 = all) are looked at, chosen by key. Nothing is said of a data set without tasks."""
    from k2lab.data import shards
    from k2lab.data.records import is_task
    from k2lab.gym.tasks._records import choose
    from k2lab.gym.tasks.answered import Answered

    records = []
    for split in shards.SPLITS:
        try:
            records += [record for record in shards.read_records(folder, split) if is_task(record)]
        except DataError:
            continue  # `shards.check` tells of splits that cannot be read; token shards have no records
    if not records:
        return [], []
    chosen = choose(records, limit, 0, "check")
    problems: list[str] = []
    skipped: dict[str, int] = {}
    for task in Answered(limit=0).tasks(chosen):
        found, missing = _problems_of(task)
        problems += found
        if missing:
            skipped[missing] = skipped.get(missing, 0) + 1
    checked = len(chosen) - sum(skipped.values())
    proved = []
    if checked:
        share = f"all {checked:,}" if checked == len(records) else f"{checked:,} (chosen by key) of {len(records):,}"
        what = "gold answers score 1, empty and nonsense ones less"
        proved.append(f"{share} tasks: " + (what if not problems else f"{len(problems)} problem(s)"))
    proved += [f"{count:,} tasks not checked: {why}" for why, count in skipped.items()]
    more = [f"... and {len(problems) - SHOWN} more tasks with problems"] if len(problems) > SHOWN else []
    return [*problems[:SHOWN], *more], proved


def _problems_of(task: Any) -> tuple[list[str], str]:
    """(what is wrong with the task, in one text; why it could not be judged on this machine)."""
    from k2lab.gym.task import check_tasks

    try:
        task.scores(task.answer)
    except MachineError as error:
        return [], str(error)
    except Exception:  # the check below says more
        pass
    try:
        found = check_tasks([task])
        more = f" (and {len(found) - 1} more of this task)" if len(found) > 1 else ""
        return [found[0] + more] if found else [], ""
    except Exception as error:  # a reward may be anybody's code
        return [f"{task.key}: a reward failed: {type(error).__name__}: {error}"], ""


def prove_disjoint(artifacts: Iterable[Artifact]) -> Said:
    """That no held-out task of an evaluation shares its canonical key (`group`), or its very question, with a training record of
    any data set that the evaluated models come from. One line of counts per evaluation."""
    known = {artifact.identity: artifact for artifact in artifacts}
    problems: list[str] = []
    proved: list[str] = []
    for report in known.values():
        parents = [known[identity] for identity in _parents(report) if identity in known]
        tests = [artifact for artifact in parents if artifact.kind == "dataset"]
        models = [artifact for artifact in parents if artifact.kind == "checkpoint"]
        if report.kind == "report" and tests and models:
            found, line = _compare(report.name, tests, *_ancestors(models, known))
            problems += found
            proved.append(line)
    return problems, proved


def _compare(name: str, tests: list[Artifact], ancestors: list[Artifact], outside: int) -> tuple[list[str], str]:
    """(what the held-out part of `tests` shares with the training parts of `ancestors`, a line of counts)."""
    test = _keys(tests, "valid")
    problems, counts = [], []
    for data in ancestors:
        if data.kind != "dataset":
            continue
        trained = _keys([data], "train")
        counts.append(f"{data.name} {len(trained[0]):,}")
        for what, ours, theirs in zip(("canonical key", "question"), test, trained):
            shared = sorted(ours & theirs)
            if shared:
                example = f"e.g. {shared[0][:80]!r}"
                problems.append(f"{name}: {len(shared):,} held-out {what}s are in the training part of {data.name}, {example}")
    line = f"{name}: {len(test[0]):,} held-out canonical keys ({', '.join(artifact.name for artifact in tests)})"
    line += f"; training data of the models: {', '.join(counts)}"
    line += f"; {outside} ancestors lie outside this run and were not looked at" if outside else ""
    return problems, line + ("" if problems else "; none is shared")


def _parents(artifact: Artifact) -> list[str]:
    return [parent["identity"] for parent in artifact.manifest.get("parents", {}).values()]


def _ancestors(models: list[Artifact], known: dict[str, Artifact]) -> tuple[list[Artifact], int]:
    """(everything that the models were made from, in the order met; how many of it are not among `known`)."""
    waiting = [identity for model in models for identity in [model.identity, *_parents(model)]]
    found: dict[str, Artifact] = {}
    unknown: set[str] = set()
    while waiting:
        identity = waiting.pop(0)
        if identity in found or identity in unknown:
            continue
        if identity not in known:
            unknown.add(identity)
            continue
        found[identity] = known[identity]
        waiting += _parents(known[identity])
    return list(found.values()), len(unknown)


def _keys(datasets: list[Artifact], split: str) -> tuple[set[str], set[str]]:
    """(canonical keys, questions in one spelling) of the records of a split."""
    from k2lab.data import shards
    from k2lab.data.records import group_of

    groups: set[str] = set()
    questions: set[str] = set()
    for data in datasets:
        for record in shards.read_records(data.path, split):
            groups.add(group_of(record))
            questions.update(_questions(record))
    return groups, questions


def _questions(record: dict[str, Any]) -> Iterator[str]:
    from k2lab.gym.tasks.answered import prompt_of

    text = record["question"] if "question" in record else "\n".join(message.content for message in prompt_of(record))
    if text.strip():
        yield " ".join(text.casefold().split())
