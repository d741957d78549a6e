"""The numbers behind the page: one row per trained stage and metric, and the same as a table for a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k2lab.report import figures, headlines, preferences
from k2lab.report.collect import RunView, StageView, collect
from k2lab.report.measures import Evaluation, Measure, ModelView, evaluation, merge

_EMPTY = {"metric": None, "before": None, "after": None, "low": None, "high": None, "n": None}


def summary(run_dir: Path) -> dict[str, Any]:
    """`{"total_seconds", "rows"}` of a run directory.

    Each row has `stage, metric, before, after, low, high, n, seconds, peak_rss_mb`; `low`, `high` are the 95 % interval of
    `after`, `before` is the value of the model that the stage started from (None if it was not measured). A stage without
    metrics has one row with `metric` None. Rows of a metric also have `unit, better, change, change_low, change_high,
    settings, settings_before, model, verdict, headline`; `verdict` is better, worse, unclear or unknown, `headline` says whether
    the row is among the few that lead a stage's part of the table. `seconds` and `peak_rss_mb` belong to the stage and are
    repeated in each of its rows; `total_seconds` counts every stage once.
    """
    run = collect(run_dir)
    return {"total_seconds": run.total_seconds, "rows": rows(run, evaluation(run))}


def rows(run: RunView, found: Evaluation) -> list[dict[str, Any]]:
    """The rows of `summary`, in the recipe's order of stages."""
    by_stage: dict[str, list[ModelView]] = {}
    for model in found.ordered():
        if model.stage is not None:
            by_stage.setdefault(model.stage, []).append(model)
    table: list[dict[str, Any]] = []
    for stage in run.stages:
        cost = {"seconds": stage.seconds, "peak_rss_mb": stage.peak_rss_mb}
        measured = _preference_rows(stage, cost)
        measured += [row for model in by_stage.pop(stage.name, []) for row in _model_rows(stage.name, model, found, cost)]
        table += measured or [{"stage": stage.name, **_EMPTY, **cost}]
    for name, models in by_stage.items():  # models of stages that this recipe does not have
        for model in models:
            table += _model_rows(name, model, found, {"seconds": None, "peak_rss_mb": None})
    headlines.mark(table)
    return table


def _preference_rows(stage: StageView, cost: dict[str, Any]) -> list[dict[str, Any]]:
    table = []
    for found in preferences.measures(stage):
        row = {"stage": stage.name, **{key: found[key] for key in _EMPTY}, **cost, **found}
        table.append({**row, "verdict": _verdict(row) if row["change"] is not None else "unknown"})
    return table


def _model_rows(stage: str, model: ModelView, found: Evaluation, cost: dict[str, Any]) -> list[dict[str, Any]]:
    earlier = found.models.get(found.before.get(model.name, ""))
    table = []
    for measure in model.measures.values():
        start = earlier.find(measure.metric, measure.settings) if earlier else None
        change = found.change(earlier.name, model.name, measure) if earlier else {}
        difference = figures.number(change.get("change"))
        row = {
            "stage": stage,
            "metric": measure.metric,
            "before": start.value if start else None,
            "after": measure.value,
            "low": measure.low,
            "high": measure.high,
            "n": int(measure.n) if measure.n is not None else None,
            **cost,
            "unit": measure.unit,
            "better": measure.better,
            "change": difference if difference is not None else (measure.value - start.value if start else None),
            "change_low": figures.number(change.get("low")),
            "change_high": figures.number(change.get("high")),
            "settings": measure.settings,
            "settings_before": start.settings if start else None,
            "model": model.name,
        }
        row["verdict"] = verdict(row, start, measure)
        table.append(row)
    return table


def verdict(row: dict[str, Any], start: Measure | None, end: Measure) -> str:
    """better or worse if the 95 % interval of the paired change excludes 0 (without one: if the two models' own intervals do
    not overlap); unclear if not, for times, and if there are no intervals; unknown without a value before or a direction."""
    if start is None or row["change"] is None or end.better not in ("lower", "higher"):
        return "unknown"
    if row["change_low"] is not None and row["change_high"] is not None:
        return _verdict(row)
    if not end.is_time and None not in (start.low, start.high, end.low, end.high):
        falls, rises = end.high < start.low, end.low > start.high  # type: ignore[operator]
    else:
        return "unclear"
    return _word(falls, rises, end.better)


def _verdict(row: dict[str, Any]) -> str:
    """The verdict of a row with a paired change."""
    if row["change_low"] is None or row["change_high"] is None:
        return "unclear"
    return _word(row["change_high"] < 0, row["change_low"] > 0, row["better"])


def _word(falls: bool, rises: bool, better: str) -> str:
    if not falls and not rises:
        return "unclear"
    return "better" if falls == (better == "lower") else "worse"


def places(row: dict[str, Any]) -> int:
    """Decimals that suit a row: those of its interval, shared by all its numbers so that they can be compared."""
    factor, _ = figures.scaled(row.get("unit") or "")
    width = (row["high"] - row["low"]) * factor if row["low"] is not None and row["high"] is not None else None
    return figures.decimals(row["after"] * factor, width)


def shown(row: dict[str, Any], key: str, sign: bool = False) -> str:
    """A number of a row as text in the row's shown unit, without the unit; a dash if there is none."""
    if row.get(key) is None:
        return figures.DASH
    factor, _ = figures.scaled(row.get("unit") or "")
    return figures.fixed(row[key] * factor, places(row), sign)


def interval(row: dict[str, Any], low: str = "low", high: str = "high", sign: bool = False) -> str:
    """`2.01 to 2.09`, or a dash."""
    if row.get(low) is None or row.get(high) is None:
        return figures.DASH
    return f"{shown(row, low, sign)} to {shown(row, high, sign)}"


def summary_text(run_dir: Path) -> str:
    """The rows that lead as a table for a terminal; plain ASCII apart from what the run itself contains."""
    run = collect(run_dir)
    heads = ["stage", "metric", "before", "after", "change", "95% interval", "n", "", "time", "memory"]
    lines, last = [], None
    table = rows(run, evaluation(run))
    for row in table:
        if not row["headline"]:
            continue
        first = row["stage"] != last
        last = row["stage"]
        memory = figures.size(row["peak_rss_mb"] * 1e6) if row["peak_rss_mb"] is not None else figures.DASH
        texts = [shown(row, "before"), shown(row, "after"), shown(row, "change", True), interval(row)]
        if row["metric"] is None:
            texts = [figures.DASH] * 4
        cost = [figures.duration(row["seconds"]), memory] if first else ["", ""]
        name = _label(run.stage(row["stage"]), row["stage"]) if first else ""
        lines.append([name, _metric(row), *texts, figures.count(row["n"]), row.get("verdict", ""), *cost])
    text = _table(heads, lines, left={0, 1, 7}) + f"\ntotal: {_ascii(figures.duration(run.total_seconds))}\n"
    hidden = sum(not row["headline"] for row in table)
    if hidden:
        text += f'{hidden} more measures: k2 report {_ascii(str(run_dir))} --json, or "all measures" on the page\n'
    return text


def results_text(results: dict[str, Any]) -> str:
    """A parsed `results.json` as a table for a terminal: every model's metrics, then the baselines."""
    found = merge({"": results})
    lines = []
    for model in found.ordered():
        for n, item in enumerate(model.measures.values()):
            row = {"metric": item.metric, "unit": item.unit, "after": item.value, "low": item.low, "high": item.high}
            values = [shown(row, "after"), interval(row), figures.count(item.n)]
            lines.append([model.label if n == 0 else "", _metric(row), *values, item.settings])
    for baseline in found.baselines:
        row = {"metric": baseline.metric, "unit": baseline.unit, "after": baseline.value, "low": None, "high": None}
        lines.append([baseline.name, _metric(row), shown(row, "after"), figures.DASH, figures.DASH, "baseline"])
    return _table(["model", "metric", "value", "95% interval", "n", "measured with"], lines, left={0, 1, 5})


def _table(heads: list[str], lines: list[list[str]], left: set[int]) -> str:
    table = [[_ascii(text) for text in line] for line in [heads, *lines]]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    table.insert(1, ["-" * width for width in widths])
    rendered = (
        "  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths))).rstrip()
        for line in table
    )
    return "\n".join(rendered) + "\n"


def _metric(row: dict[str, Any]) -> str:
    if row["metric"] is None:
        return figures.DASH
    _, unit = figures.scaled(row.get("unit") or "")
    return f"{row['metric']} ({unit})" if unit else row["metric"]


def _label(stage: StageView | None, name: str) -> str:
    if stage is None or stage.status == "done":
        return name
    words = {"waiting": "not started", "skipped": "not run"}
    return f"{name} ({words.get(stage.status, stage.status)})"


def _ascii(text: str) -> str:
    """Our own special characters in ASCII; control characters, which could command a terminal, as `?`."""
    for special, simple in ((figures.MINUS, "-"), (figures.DASH, "-"), (figures.THIN, " ")):
        text = text.replace(special, simple)
    return "".join(char if char.isprintable() else "?" for char in text)
