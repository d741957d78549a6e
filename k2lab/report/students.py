"""Teacher and student: what a smaller model keeps of the one it learnt from, and what it saves."""

from __future__ import annotations

import json
from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.headlines import is_ability
from k2lab.report.markup import esc, section, tip
from k2lab.report.measures import Evaluation, Measure, ModelView
from k2lab.report.words import metric_help, metric_label

MAX_ROWS = 12


def teachers(run: RunView) -> dict[str, str]:
    """{stage of a student: name of the stage whose answers it learnt from}, through the data set between them."""
    found = {}
    for stage in run.stages:
        if stage.type != "distill":
            continue
        data = next((run.stage(name) for role, name, _ in stage.parents() if role.partition("[")[0] == "data"), None)
        teacher = next((name for role, name, _ in data.parents() if role == "teacher"), None) if data is not None else None
        if teacher is not None:
            found[stage.name] = teacher
    return found


def size_of(stage: StageView | None) -> dict[str, float]:
    """`active` parameters (those that work on one token, embeddings left out) by a checkpoint's config.json, if its shape is one
    of ours, and `total` by its manifest."""
    from k2lab.core.errors import K2Error
    from k2lab.specs import ModelSpec

    if stage is None:
        return {}
    total = figures.number(stage.manifest.get("parameters"))
    sizes = {"total": total} if total else {}
    try:
        config = json.loads((stage.directory / "config.json").read_text(encoding="utf-8")) if stage.directory else None
        if isinstance(config, dict):
            sizes["active"] = float(ModelSpec.from_config(config).active(with_embeddings=False))
    except (OSError, ValueError, TypeError, K2Error):
        return sizes  # a shape of somebody else's: its total is known, its parts are not
    return sizes


def students(run: RunView, found: Evaluation) -> str:
    """The section: one table per teacher, a column per student."""
    classes: dict[str, list[str]] = {}
    for student, teacher in teachers(run).items():
        classes.setdefault(teacher, []).append(student)
    body = "".join(_class(run, found, teacher, names) for teacher, names in classes.items())
    text = "Distillation makes a cheaper model that learns from a larger one. What it kept, and what it saves:"
    return section("students", "Teacher and student", text, body)


def _class(run: RunView, found: Evaluation, teacher: str, names: list[str]) -> str:
    columns = [teacher, *names]
    lines = [_sizes(run, columns, "active"), _sizes(run, columns, "total")]
    first = found.models.get(teacher)
    metrics = list(first.measures.values()) if first is not None else []
    metrics.sort(key=lambda m: (not m.is_time, not _is_overall(m), not is_ability({"metric": m.metric})))
    shown = 0
    for measure in metrics:
        if not measure.is_time and not (is_ability({"metric": measure.metric}) or _is_overall(measure)):
            continue
        line = _measured(found, columns, measure)
        shown += bool(line)
        lines += [line] if shown <= MAX_ROWS else []
    if not any(lines):
        return ""
    heads = "".join(f'<th scope="col" class="num">{esc(name)}</th>' for name in names)
    said = "".join(f'<p class="more">{esc(text)}</p>' for name in names for text in [summary(run, found, name)] if text)
    return (
        f'{said}<table class="cards"><thead><tr><th scope="col">Teacher: {esc(teacher)}</th>'
        f'<th scope="col" class="num">Teacher</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        '<p class="note">In brackets: the student\u2019s figure as a share of its teacher\u2019s. Differences from the teacher '
        "are on the same tasks, with 95 % intervals.</p>"
    )


def _is_overall(measure: Measure) -> bool:
    return measure.metric == "bits_per_byte" or measure.metric.startswith("answered/avg@")


_SIZES = {
    "active": (
        "Parameters at work per token",
        "How many of the model\u2019s numbers take part in computing a token, embeddings left out: what running it costs.",
    ),
    "total": ("Parameters in all", "How many numbers the model consists of, embeddings and all experts included."),
}


def _sizes(run: RunView, columns: list[str], key: str) -> str:
    values = [size_of(run.stage(name)).get(key) for name in columns]
    if values[0] is None or all(value is None for value in values[1:]):
        return ""
    cells = [f"<b>{figures.count(values[0])}</b>"]
    cells += [f"<b>{figures.count(value)}</b>{_share(value, values[0])}" for value in values[1:]]
    return _line(tip(*_SIZES[key]), columns, cells)


def _measured(found: Evaluation, columns: list[str], measure: Measure) -> str:
    own = [_find(found.models.get(name), measure) for name in columns]
    if all(item is None for item in own[1:]):
        return ""
    factor, unit = figures.scaled(measure.unit)
    cells = []
    for name, item in zip(columns, own):
        if item is None:
            cells.append('<span class="unit">not measured</span>')
            continue
        width = (item.high - item.low) * factor if item.low is not None and item.high is not None else None
        places = figures.decimals(item.value * factor, width)
        text = f"<b>{figures.fixed(item.value * factor, places)}</b>"
        text += _share(item.value, measure.value) if item is not own[0] and measure.unit != "bits/byte" else ""
        if width is not None:
            low, high = (figures.fixed(bound * factor, places) for bound in (item.low, item.high) if bound is not None)
            text += f'<br><span class="fine">{low} to {high}</span>'
        change = found.kept(columns[0], name, measure) if name != columns[0] else {}
        if change:
            text += f'<br><span class="fine">{_paired(change, factor, unit)}</span>'
        cells.append(text)
    name = tip(metric_label(measure.metric), metric_help(measure.metric, measure.better))
    label = f'{name} <span class="unit">{esc(unit)}</span><br><span class="fine">{esc(measure.settings)}</span>'
    return _line(label, columns, cells)


def _paired(change: dict[str, Any], factor: float, unit: str) -> str:
    """`-6.2 (-9.1 to -3.4) points`: student - teacher on the same items."""
    value, low, high = (figures.number(change.get(key)) for key in ("change", "low", "high"))
    if value is None:
        return ""
    places = figures.decimals(value * factor, (high - low) * factor if low is not None and high is not None else None)
    text = figures.fixed(value * factor, places, sign=True)
    if low is not None and high is not None:
        text += f" ({figures.fixed(low * factor, places, sign=True)} to {figures.fixed(high * factor, places, sign=True)})"
    return esc(f"{text} {'points' if unit == '%' else unit} against the teacher")


def _find(model: ModelView | None, measure: Measure) -> Measure | None:
    return model.measures.get((measure.metric, measure.settings)) if model is not None else None


def _share(value: float | None, whole: float | None) -> str:
    if value is None or not whole:
        return ""
    return f' <span class="unit">({value / whole * 100:.0f}\u00a0%)</span>'


def _line(head: str, columns: list[str], cells: list[str]) -> str:
    texts = "".join(f'<td class="num" data-h="{esc(name)}"><span>{cell}</span></td>' for name, cell in zip(columns, cells))
    return f'<tr><th scope="row">{head}</th>{texts}</tr>'


def summary(run: RunView, found: Evaluation, student: str) -> str:
    """`The student distill keeps 91 % of its teacher's right answers with 48 % of the parameters at work per token.`, as far as
    it is known; else an empty text."""
    facts = kept(run, found, student)
    if "right" not in facts:
        return ""
    text = f"The student {student} keeps {facts['right'] * 100:.0f}{figures.THIN}% of its teacher\u2019s right answers"
    text += f" ({facts['own'] * 100:.0f} against {facts['theirs'] * 100:.0f}{figures.THIN}%{_difference(run, found, student)})"
    costs = []
    if "active" in facts:
        costs.append(f"{facts['active'] * 100:.0f}{figures.THIN}% of the parameters at work per token")
    if "time" in facts:
        costs.append(f"{facts['time'] * 100:.0f}{figures.THIN}% of the time per token")
    return f"{text} with {' and '.join(costs)}." if costs else f"{text}."


def _difference(run: RunView, found: Evaluation, student: str) -> str:
    """`; the difference is -3.1 to +1.2 points`: the 95 % interval of right answers over all tasks, if
    it was measured in pairs."""
    teacher = teachers(run).get(student, "")
    first = found.models.get(teacher)
    overall = [m for m in (first.measures.values() if first is not None else ()) if _is_overall(m) and m.unit == "fraction"]
    change = found.kept(teacher, student, overall[0]) if overall else {}
    low, high = (figures.number(change.get(key)) for key in ("low", "high"))
    if low is None or high is None:
        return ""
    return f"; the difference is {figures.fixed(100 * low, 1, sign=True)} to {figures.fixed(100 * high, 1, sign=True)} points"


def kept(run: RunView, found: Evaluation, student: str) -> dict[str, float]:
    """Shares of its teacher's figures: `right` answers (over the first group of all tasks if measured, else the mean over
    task families), `active` parameters, `time` per token; `own` and `theirs` are the right answers themselves. What is not known
    is left out."""
    teacher = teachers(run).get(student, "")
    theirs, own = found.models.get(teacher), found.models.get(student)
    shares: dict[str, float] = {}
    sizes = [size_of(run.stage(name)).get("active") for name in (teacher, student)]
    if sizes[0] and sizes[1]:
        shares["active"] = sizes[1] / sizes[0]
    if theirs is None or own is None:
        return shares
    pairs = [(measure, _find(own, measure)) for measure in theirs.measures.values()]
    scores = [(a, b) for a, b in pairs if b is not None and a.unit == "fraction" and _is_right(a)]
    overall = [(a, b) for a, b in scores if _is_overall(a)][:1] or scores
    whole, part = sum(a.value for a, _ in overall), sum(b.value for _, b in overall if b is not None)
    if whole:
        shares |= {"right": part / whole, "own": part / len(overall), "theirs": whole / len(overall)}
    for a, b in pairs:
        if a.is_time and b is not None and a.value:
            shares["time"] = b.value / a.value
    return shares


def _is_right(measure: Measure) -> bool:
    row: dict[str, Any] = {"metric": measure.metric}
    return is_ability(row) and ("avg@" in measure.metric or "exact_match" in measure.metric or "accuracy" in measure.metric)
