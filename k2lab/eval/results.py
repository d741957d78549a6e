"""results.json: what an evaluation found, in the form that the report reads.

    {"format": 1,
     "models": [{"name", "stage", "label",
                 "metrics": [{"metric", "unit", "better": "lower"|"higher", "value", "low", "high", "std", "n", "settings",
                              "interval"}],
                 "samples": [{"prompt", "completion", "stop"}]}],
     "chain": [[before, after], ...],
     "changes": [{"before", "after", "metric", "change", "low", "high", "n"}],
     "baselines": [{"name", "metric", "value"}],
     "students": [{"teacher", "student", "active_params_non_embedding": {"teacher", "student"},
                   "changes": [{"metric", "settings", "teacher", "student", "change", "low", "high", "n",
                                "ratio", "ratio_low", "ratio_high"}]}]}     (left out where there is none)

Models are named by `name`; an unknown bound (infinite) and an unknown deviation are null. In `students`, `change` is student -
teacher on the same items, `ratio` student / teacher (null for what is no score, or where the teacher has none).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k2lab.core.artifacts import write_json
from k2lab.core.errors import CheckpointError, DataError
from k2lab.eval.stats import Change, Estimate

FORMAT = 1
_METRIC = ("metric", "unit", "better", "value", "low", "high", "std", "n", "settings")
_CHANGE = ("before", "after", "metric", "change", "low", "high", "n")
_SAMPLE = ("prompt", "completion", "stop")


@dataclass
class Results:
    """Collects models, metrics, changes and baselines; every reference is checked when it is made."""

    models: list[dict[str, Any]] = field(default_factory=list)
    chain: list[list[str]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    students: list[dict[str, Any]] = field(default_factory=list)

    def add_model(self, name: str, *, stage: str | None, label: str) -> None:
        """A model that was measured: `name` is unique, `stage` made it (None: none did), `label` what a reader sees."""
        if any(model["name"] == name for model in self.models):
            raise DataError("a model is added twice", got=name)
        self.models.append({"name": name, "stage": stage, "label": label, "metrics": [], "samples": []})

    def add_metric(
        self, model: str, metric: str, estimate: Estimate, *, unit: str, better: Literal["lower", "higher"], settings: str = ""
    ) -> None:
        """One measurement. `settings` are the decoding settings or what else a reader must know to compare: figures of
        one metric are comparable only if their settings are equal."""
        metrics = self._model(model)["metrics"]
        if any((each["metric"], each["settings"]) == (metric, settings) for each in metrics):
            raise DataError("a metric is added twice with the same settings", where=model, got=metric)
        if better not in ("lower", "higher"):
            raise DataError("a metric is better lower or higher", where=f"{model}, {metric}", got=better)
        metrics.append(
            {
                "metric": metric,
                "unit": unit,
                "better": better,
                "value": estimate.value,
                "low": _bound(estimate.low),
                "high": _bound(estimate.high),
                "std": estimate.std,
                "n": estimate.n,
                "settings": settings,
                "interval": f"95 %, {estimate.method}",
            }
        )

    def add_samples(self, model: str, samples: list[dict[str, str]]) -> None:
        """Completions for reading, as `eval.tasks.TaskRun.samples` gives them."""
        self._model(model)["samples"] += [{key: sample[key] for key in _SAMPLE} for sample in samples]

    def add_step(self, before: str, after: str) -> None:
        """A link of the training chain: `after` was trained from `before`."""
        self._model(before)
        self._model(after)
        self.chain.append([before, after])

    def add_change(self, before: str, after: str, metric: str, change: Change) -> None:
        """A paired change of a metric that both models have."""
        for name in (before, after):
            if all(each["metric"] != metric for each in self._model(name)["metrics"]):
                raise DataError(f"the model {name!r} has no metric {metric!r}", where="changes")
        self.changes.append(
            {
                "before": before,
                "after": after,
                "metric": metric,
                "change": change.change,
                "low": _bound(change.low),
                "high": _bound(change.high),
                "n": change.n,
            }
        )

    def add_student(self, teacher: str, student: str, active: tuple[int | None, int | None]) -> None:
        """A student and the teacher that it learnt from, with their parameters at work per token, embeddings left out (None: not
        known)."""
        self._model(teacher)
        self._model(student)
        sizes = dict(zip(("teacher", "student"), active, strict=True))
        self.students.append({"teacher": teacher, "student": student, "active_params_non_embedding": sizes, "changes": []})

    def add_student_change(
        self, metric: str, settings: str, values: tuple[float, float], change: Change, ratio: Estimate | None
    ) -> None:
        """A paired comparison of the student added last with its teacher; `values` are the teacher's and the student's."""
        row: dict[str, Any] = {"metric": metric, "settings": settings, "teacher": values[0], "student": values[1]}
        row |= {"change": change.change, "low": _bound(change.low), "high": _bound(change.high), "n": change.n}
        names = ("ratio", "ratio_low", "ratio_high")
        found = (None, None, None) if ratio is None else (ratio.value, _bound(ratio.low), _bound(ratio.high))
        self.students[-1]["changes"].append(row | dict(zip(names, found)))

    def add_baseline(self, name: str, metric: str, value: float) -> None:
        """What something simple reaches in a metric (a uniform guess, n-grams), for scale."""
        if not math.isfinite(value):
            raise DataError("a baseline must be finite", where=f"{name}, {metric}", got=value)
        self.baselines.append({"name": name, "metric": metric, "value": value})

    def as_json(self) -> dict[str, Any]:
        """The content of results.json."""
        content = {
            "format": FORMAT,
            "models": self.models,
            "chain": self.chain,
            "changes": self.changes,
            "baselines": self.baselines,
        }
        return content | {"students": self.students} if self.students else content

    def write(self, path: Path) -> None:
        """Writes results.json. Raises DataError if `check` finds a problem, MachineError if the disk refuses."""
        problems = check(self.as_json())
        if problems:
            raise DataError(problems[0], where=str(path))
        write_json(path, self.as_json())

    def _model(self, name: str) -> dict[str, Any]:
        for model in self.models:
            if model["name"] == name:
                return model
        raise DataError(f"there is no model {name!r} in the results", allowed=", ".join(model["name"] for model in self.models))


def read(path: Path) -> dict[str, Any]:
    """The content of a results.json. Raises CheckpointError if it is missing, broken, of another format or inconsistent."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the results cannot be read: {error}", where=str(path)) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError("the results have another format", where=str(path), got=found, allowed=str(FORMAT))
    problems = check(content)
    if problems:
        raise CheckpointError(problems[0], where=str(path))
    return content


def check(content: dict[str, Any]) -> list[str]:
    """What is wrong with the content of a results.json, one sentence each."""
    problems = [f"the key {key!r} is missing" for key in ("models", "chain", "changes", "baselines") if key not in content]
    if problems:
        return problems
    names = [model.get("name") for model in content["models"]]
    if len(set(names)) != len(names):
        problems.append("two models have the same name")
    for model in content["models"]:
        for metric in model.get("metrics", []):
            where = f"{model.get('name')}, {metric.get('metric')}"
            missing = [key for key in _METRIC if key not in metric]
            if missing:
                problems.append(f"{where}: {', '.join(missing)} is missing")
                continue
            if not _number(metric["value"]):
                problems.append(f"{where}: the value is not finite")
            elif not _ordered(metric["low"], metric["value"], metric["high"]):
                problems.append(f"{where}: the value lies outside its interval")
        for sample in model.get("samples", []):
            problems += [f"{model.get('name')}: a sample lacks {key}" for key in _SAMPLE if key not in sample]
    for before, after in content["chain"]:
        problems += [f"the chain names {name!r}, which is no model" for name in (before, after) if name not in names]
    for change in content["changes"]:
        missing = [key for key in _CHANGE if key not in change]
        if missing:
            problems.append(f"a change lacks {', '.join(missing)}")
        elif change["before"] not in names or change["after"] not in names:
            problems.append(f"the change {change['before']} -> {change['after']} names what is no model")
        elif not _number(change["change"]) or not _ordered(change["low"], change["change"], change["high"]):
            problems.append(f"the change {change['before']} -> {change['after']} of {change['metric']} lies outside its interval")
    for pair in content.get("students", []):
        problems += [
            f"{name!r}, a teacher or student, is no model" for name in (pair["teacher"], pair["student"]) if name not in names
        ]
        for row in pair["changes"]:
            if not _number(row["change"]) or not _ordered(row["low"], row["change"], row["high"]):
                problems.append(f"the change {pair['teacher']} -> {pair['student']} of {row['metric']} lies outside its interval")
    return problems


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ordered(low: float | None, value: float, high: float | None) -> bool:
    slack = 1e-12 * max(1.0, abs(value))  # bootstrap of identical items: bounds equal the value up to rounding
    return (low is None or low <= value + slack) and (high is None or value <= high + slack)
