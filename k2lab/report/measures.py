"""What the evaluate stages measured, merged into one view: models, their metrics and samples, who came from whom."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from k2lab.report.collect import RunView
from k2lab.report.figures import number

TIME_UNITS = ("ms/token", "s/token", "us/token", "seconds/token", "milliseconds/token")


@dataclass(frozen=True)
class Measure:
    """One metric of one model. `low`, `high`: 95 % interval as the evaluation recorded it; `std`, `n` likewise; `source` is the
    stage that measured it."""

    metric: str
    value: float
    unit: str = ""
    better: str = ""
    low: float | None = None
    high: float | None = None
    std: float | None = None
    n: float | None = None
    settings: str = ""
    source: str = ""

    @property
    def is_time(self) -> bool:
        """Whether it is a time per token: another measurement of the same model gives another value."""
        return self.unit in TIME_UNITS


@dataclass
class ModelView:
    """A measured model: `stage` is the trained stage that made it, None for an untrained or external one; `sources` are the
    stages that measured it."""

    name: str
    stage: str | None
    label: str
    sources: list[str] = field(default_factory=list)
    measures: dict[tuple[str, str], Measure] = field(default_factory=dict)  # by (metric, settings)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)  # by prompt

    def find(self, metric: str, settings: str) -> Measure | None:
        """The measure with these settings; failing that, the only one of this metric, whatever its settings."""
        exact = self.measures.get((metric, settings))
        if exact is not None:
            return exact
        same = [measure for (name, _), measure in self.measures.items() if name == metric]
        return same[0] if len(same) == 1 else None


@dataclass(frozen=True)
class Baseline:
    """A model-free yardstick, such as a table of token counts."""

    name: str
    metric: str
    value: float
    unit: str = ""


@dataclass
class Evaluation:
    """Everything measured. `before` maps a model's name to that of the model it was trained from."""

    models: dict[str, ModelView] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)
    students: list[dict[str, Any]] = field(default_factory=list)  # paired comparisons with teachers, as `eval.results` has them

    def change(self, before: str, after: str, measure: Measure) -> dict[str, Any]:
        """The paired change of a measure between two models as the stage recorded it that made the measure, or an empty table."""
        for change in reversed(self.changes):
            same = change.get("before") == before and change.get("after") == after and change.get("metric") == measure.metric
            if same and change.get("settings") in (None, "", measure.settings) and change["source"] == measure.source:
                return change
        return {}

    def kept(self, teacher: str, student: str, measure: Measure) -> dict[str, Any]:
        """A student's paired comparison with its teacher in a measure, or an empty table."""
        for pair in reversed(self.students):
            if (pair.get("teacher"), pair.get("student")) == (teacher, student):
                for row in _tables(pair.get("changes")):
                    if (row.get("metric"), row.get("settings")) == (measure.metric, measure.settings):
                        return row
        return {}

    def ordered(self) -> list[ModelView]:
        """Models with each after the one it came from; otherwise in the order of the files."""
        done: dict[str, ModelView] = {}

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in done or name in path or name not in self.models:
                return
            if name in self.before:
                visit(self.before[name], (*path, name))
            done[name] = self.models[name]

        for name in self.models:
            visit(name, ())
        return list(done.values())

    def comparable(self, metric: str) -> tuple[list[Baseline], bool]:
        """Baselines for `metric`, and whether they were surely measured on the same text.

        A baseline of `bits_per_byte` stands for `bits_per_byte/docs` only if that is the one slice the models were measured on.
        """
        exact = [item for item in self.baselines if item.metric == metric]
        if exact:
            return exact, True
        base = metric.partition("/")[0]
        loose = [item for item in self.baselines if item.metric == base]
        slices = {name for model in self.models.values() for name, _ in model.measures if name.partition("/")[0] == base}
        return loose, len(slices) == 1


def evaluation(run: RunView) -> Evaluation:
    """What all finished evaluate stages measured; of the same figure measured twice, the later stage's counts."""
    return merge({stage.name: stage.results for stage in run.stages if stage.results})


def merge(results: dict[str, dict[str, Any]]) -> Evaluation:
    """Merges parsed `results.json` files by the stage that wrote them, the later ones over the earlier. Entries without a name
    or a value are left out."""
    merged = Evaluation()
    for source, item in results.items():
        _add(merged, source, item)
    return merged


def _add(merged: Evaluation, source: str, results: dict[str, Any]) -> None:
    for entry in _tables(results.get("models")):
        name = str(entry.get("name") or entry.get("stage") or "model")
        stage = entry.get("stage")
        label = str(entry.get("label") or name)
        model = merged.models.setdefault(name, ModelView(name, None if stage is None else str(stage), label))
        model.sources += [source] if source not in model.sources else []
        for item in _tables(entry.get("metrics")):
            measure = _measure(item, source)
            if measure is not None:
                old = model.measures.get((measure.metric, measure.settings))
                if old is not None and old.source != source and old.n != measure.n:  # the same question about other examples
                    measure = replace(measure, settings=f"{measure.settings}, in {source}".removeprefix(", "))
                model.measures[measure.metric, measure.settings] = measure
        for sample in _tables(entry.get("samples")):
            model.samples[_shown(sample.get("prompt"))] = {
                "completion": _shown(sample.get("completion")),
                "stop": str(sample.get("stop") or ""),
            }
    for edge in results.get("chain") or []:
        if isinstance(edge, list) and len(edge) == 2:
            merged.before[str(edge[1])] = str(edge[0])
    merged.changes += [{**change, "source": source} for change in _tables(results.get("changes"))]
    merged.students += _tables(results.get("students"))
    for item in _tables(results.get("baselines")):
        value = number(item.get("value"))
        if value is not None:
            baseline = Baseline(
                str(item.get("name", "baseline")), str(item.get("metric", "")), value, str(item.get("unit") or "")
            )
            merged.baselines = [b for b in merged.baselines if (b.name, b.metric) != (baseline.name, baseline.metric)]
            merged.baselines.append(baseline)


def _measure(item: dict[str, Any], source: str) -> Measure | None:
    value = number(item.get("value"))
    if value is None or not item.get("metric"):
        return None
    settings = item.get("settings")
    if isinstance(settings, dict):
        settings = ", ".join(f"{key} {value}" for key, value in settings.items())
    return Measure(
        metric=str(item["metric"]),
        value=value,
        unit=str(item.get("unit") or ""),
        better=str(item.get("better") or ""),
        low=number(item.get("low")),
        high=number(item.get("high")),
        std=number(item.get("std")),
        n=number(item.get("n")),
        settings=str(settings or ""),
        source=source,
    )


def _tables(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _shown(value: Any) -> str:
    """A prompt or completion as text; a list of chat messages as `role: content` lines."""
    if isinstance(value, list):
        parts = (f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m) for m in value)
        return "\n".join(parts)
    return "" if value is None else str(value)
