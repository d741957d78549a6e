"""Sections about what the models can do: the table of gains, the comparison with baselines, several tries, samples."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures
from k2lab.report.charts import Band, LineChart, Series, line_chart
from k2lab.report.collect import RunView
from k2lab.report.markup import esc, section, shorten, tip
from k2lab.report.measures import Evaluation, ModelView
from k2lab.report.rows import interval, shown
from k2lab.report.students import teachers
from k2lab.report.transcript import show
from k2lab.report.words import metric_help, metric_label, split, stage_help, stop_words

MAX_PROMPTS = 12
OPEN_PROMPTS = 4  # shown at once; the others are one click away
MAX_CHARACTERS = 1500  # of a prompt or completion
MAX_TRIES_CHARTS = 6

_SYMBOLS = {
    "better": ("\u25b2", "better"),
    "worse": ("\u25bc", "worse"),
    "unclear": ("\u2248", "no clear change"),
    "unknown": ("", ""),
}


def gains(run: RunView, found: Evaluation, table: list[dict[str, Any]]) -> str:
    """The table \u201cWhat each stage bought\u201d: the rows that lead, and the others of each stage behind a click."""
    measured = [row for row in table if row["metric"] is not None]
    if not measured:
        return ""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in measured:
        stages.setdefault(row["stage"], []).append(row)
    teacher_of = teachers(run)
    body = []
    for name in [stage.name for stage in run.stages] + [name for name in stages if run.stage(name) is None]:
        stage, rows = run.stage(name), stages.get(name, [])
        if not rows:
            if stage is not None and stage.status == "skipped":
                reason = f'<td colspan="7">Not run. {shorten(stage.error, 300)}</td>'
                body.append(_group(run, name, None) + f'<tr class="not-run"><th scope="row">Not measured</th>{reason}</tr>')
            continue
        body.append(_group(run, name, rows[0]))
        teacher = found.models.get(teacher_of.get(name, ""))
        body += [_gain(row, teacher) for row in rows if row["headline"]]
        rest = "".join(_gain(row, teacher) for row in rows if not row["headline"])
        if rest:
            num = sum(not row["headline"] for row in rows)
            words = f"All measures: {num} more of {esc(name)}"
            body.append(
                f'<tr class="rest"><td colspan="8"><details><summary>{words}</summary><table class="cards gains">'
                f'<thead class="again"><tr>{_HEADS}</tr></thead><tbody>{rest}</tbody></table></details></td></tr>'
            )
    text = (
        f'<table class="cards gains main"><thead><tr>{_HEADS}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        '<p class="note">\u25b2 better and \u25bc worse are said only if the 95\u00a0% interval of '
        "the change leaves out zero (where no interval of "
        "the change was recorded: if the two models\u2019 own intervals do not overlap). \u2248 means "
        "that chance could explain the change. "
        "n is the number of examples measured.</p>"
    )
    bases = {split(row["metric"])[0]: row["better"] for row in measured}
    words = "".join(
        f"<dt>{esc(metric_label(base))}</dt><dd>{esc(metric_help(base, better))}</dd>" for base, better in bases.items()
    )
    text += f'<details><summary>What these measures mean</summary><dl class="words">{words}</dl></details>'
    intro = "Each row compares the model before and after one training stage, measured in the same way on the same examples."
    if any(stage.type == "agent" for stage in run.stages):
        intro += " For tools, before is the same model without them."
    return section("gains", "What each stage bought", intro, text)


_HEADS = (
    '<th scope="col">Measured</th><th scope="col" class="num">Before</th><th scope="col" class="num">After</th>'
    '<th scope="col" class="plots"><span class="fine">\u25cb before \u25cf after</span></th>'
    '<th scope="col" class="num">Change</th>'
    '<th scope="col" class="num">95&nbsp;% interval of after</th>'
    '<th scope="col" class="num">n</th><th scope="col" class="how">How</th>'
)


def _group(run: RunView, name: str, row: dict[str, Any] | None) -> str:
    stage = run.stage(name)
    seconds = row["seconds"] if row else None
    parts = [stage_help(stage.type) if stage else "", figures.duration(seconds) if seconds is not None else ""]
    text = ", ".join(part for part in parts if part)
    return f'<tr class="group"><th colspan="8" scope="rowgroup">{esc(name)}<span>{esc(text)}</span></th></tr>'


def _gain(row: dict[str, Any], teacher: ModelView | None = None) -> str:
    _, unit = figures.scaled(row["unit"])
    symbol, word = _SYMBOLS[row["verdict"]]
    change = shown(row, "change", sign=True)
    spread = interval(row, "change_low", "change_high", sign=True)
    title = f' title="95 % interval of the change: {esc(spread)}"' if spread != figures.DASH else ""
    mark = f'<span class="verdict">{symbol} {word}</span>' if word else ""
    other = row["settings_before"] is not None and row["settings_before"] != row["settings"]
    how = esc(row["settings"]) + (f"<br>before: {esc(row['settings_before'] or 'not recorded')}" if other else "")
    unit_text = f'\u00a0<span class="unit">{esc(unit)}</span>' if unit else ""
    before = f'<td class="num" data-h="Before">{shown(row, "before")}</td>'
    if row["before"] is None:
        before = f'<td class="num" data-h="Before"><span class="unit">{_no_before(row, teacher)}</span></td>'
    name = tip(metric_label(row["metric"]), metric_help(row["metric"], row["better"]))
    return (
        f'<tr><th scope="row">{name}{unit_text}</th>{before}'
        f'<td class="num" data-h="After"><b>{shown(row, "after")}</b></td><td class="plots">{_plot(row)}</td>'
        f'<td class="num" data-h="Change"><span class="{row["verdict"]}"{title}>{change}{mark}</span></td>'
        f'<td class="num" data-h="95 % interval">{interval(row)}</td>'
        f'<td class="num" data-h="n">{figures.count(row["n"])}</td><td class="set" data-h="How"><span>{how}</span></td></tr>'
    )


def _no_before(row: dict[str, Any], teacher: ModelView | None) -> str:
    """What stands in place of a value before; of a student, which is a new model, its teacher's."""
    if split(row["metric"])[0] == "reward_accuracy":
        return "50 by definition"
    theirs = teacher.find(row["metric"], row["settings"]) if teacher is not None else None
    if theirs is None:
        return "not measured"
    return f"teacher: {shown({**row, 'teacher': theirs.value}, 'teacher')}"


def _plot(row: dict[str, Any]) -> str:
    """Before and after on one small scale, with the interval of after. Decoration: the numbers stand beside it."""
    values = [row[key] for key in ("before", "after", "low", "high") if row[key] is not None]
    low, high = min(values), max(values)
    if row["before"] is None or not high > low:
        return ""

    def x(value: float) -> str:
        return f"{8 + (value - low) / (high - low) * 116:.1f}"

    whisker = ""
    if row["low"] is not None and row["high"] is not None:
        whisker = f'<path class="w" d="M{x(row["low"])} 13H{x(row["high"])}M{x(row["low"])} 8v10M{x(row["high"])} 8v10"/>'
    return (
        f'<svg class="plot" viewBox="0 0 132 26" aria-hidden="true"><path class="j" d="M{x(row["before"])} '
        f'13H{x(row["after"])}"/>{whisker}'
        f'<circle class="b" cx="{x(row["before"])}" cy="13" r="4.5"/><circle class="a" cx="{x(row["after"])}" '
        'cy="13" r="4.5"/></svg>'
    )


# ---------------------------------------------------------------- baselines


def baselines(found: Evaluation) -> str:
    """Bars: every model beside the baselines that know nothing but counts, per metric."""
    metrics: dict[str, str] = {}
    for model in found.models.values():
        for measure in model.measures.values():
            if found.comparable(measure.metric)[0]:
                metrics.setdefault(measure.metric, measure.better)
    bases = {metric for metric in metrics if "/" not in metric}
    parts = [metric for metric in metrics if metric not in bases and metric.partition("/")[0] in bases]
    if len(parts) == 1:  # one slice is the whole
        parts, metrics = [], {metric: better for metric, better in metrics.items() if metric not in parts}
    body = "".join(_bars(found, metric, better) for metric, better in metrics.items() if metric not in parts)
    rest = "".join(_bars(found, metric, metrics[metric]) for metric in parts)
    body += f"<details><summary>The same for each part of the text</summary>{rest}</details>" if rest else ""
    text = "Baselines need no neural network; they only count. A model that does not beat them has learnt no more than that."
    return section("baselines", "Beside simple baselines", text, body)


def _bars(found: Evaluation, metric: str, better: str) -> str:
    entries: list[tuple[float, str, str, Any, bool]] = []
    unit = ""
    for model in found.ordered():
        measure = next((m for (name, _), m in model.measures.items() if name == metric), None)
        if measure is not None:
            unit = measure.unit or unit
            entries.append((measure.value, model.label, model.name if model.name != model.label else "", measure, True))
    items, sure = found.comparable(metric)
    entries += [(item.value, item.name, "baseline", None, False) for item in items]
    entries.sort(key=lambda entry: entry[0], reverse=better == "higher")
    factor, unit = figures.scaled(unit)
    top = max((abs(v) for value, _, _, m, _ in entries for v in (value, (m.high or 0) if m else 0)), default=0) or 1.0
    rows = []
    for value, who, small, measure, is_model in entries:
        end = max(0.0, value / top * 100)
        whisker, past = "", end
        width = None
        if measure is not None and measure.low is not None and measure.high is not None:
            left, past = max(0.0, measure.low / top * 100), max(end, measure.high / top * 100)
            width = (measure.high - measure.low) * factor
            whisker = f'<u style="left:{left:.2f}%;width:{max(0.0, past - left):.2f}%"></u>'
        text = figures.fixed(value * factor, figures.decimals(value * factor, width))
        note = f"<small>{esc(small)}</small>" if small else ""
        rows.append(
            f'<div class="who">{esc(who)}{note}</div><div class="bar{"" if is_model else " base"}">'
            f'<b style="width:{end:.2f}%"></b>{whisker}'
            f'<em style="left:{past:.2f}%">{text} <span>{esc(unit)}</span></em></div>'
        )
    head = f"<h3>{tip(metric_label(metric), metric_help(metric, better))}</h3>"
    word = f"{better.capitalize()} is better. " if better in ("lower", "higher") else ""
    doubt = "" if sure else "The baselines do not say on which part of the data they were measured, so compare with care. "
    note = f'<p class="note">{word}Blue: models of this run, with 95\u00a0% interval. Grey: baselines. {doubt}</p>'
    return f'{head}<div class="bars">{"".join(rows)}</div>{note}'


# ---------------------------------------------------------------- several tries


def tries(run: RunView, found: Evaluation) -> str:
    """pass@k: the share of tasks of which at least one of k answers is right, over k, one line per model."""
    curves: dict[tuple[str, str], list[tuple[ModelView, list[tuple[float, Any]]]]] = {}
    for model in found.ordered():
        points: dict[tuple[str, str], dict[float, Any]] = {}
        for measure in model.measures.values():
            base, where, _ = split(measure.metric)
            kind, _, num = base.partition("@")
            if kind in ("pass", "avg") and num.isdigit():
                # The mean over k tries is the chance of a single one.
                at = float(num) if kind == "pass" else 1.0
                points.setdefault((where, measure.settings), {}).setdefault(at, measure)
        for key, by_k in points.items():
            if len(by_k) > 1:
                curves.setdefault(key, []).append((model, sorted(by_k.items())))
    ordered = sorted(curves.items(), key=lambda item: item[0][0] not in ("answered", ""))[:MAX_TRIES_CHARTS]
    charts = "".join(line_chart(_tries_chart(*key, lines), f"tries{i}") for i, (key, lines) in enumerate(ordered))
    text = (
        "How many tasks are solved if a model may answer several times and one right answer is enough. A line that starts low "
        "and rises steeply belongs to a model that can, but not reliably; training with rewards should lift its left end."
    )
    return section("tries", "With several tries", text, f'<div class="grid2">{charts}</div>' if charts else "")


def _tries_chart(where: str, settings: str, lines: list[tuple[ModelView, list[tuple[float, Any]]]]) -> LineChart:
    series, bands = [], []
    for i, (model, points) in enumerate(lines):
        series.append(Series(model.label, [(k, m.value * 100) for k, m in points], i, dots=True))
        if len(lines) <= 2 and all(m.low is not None and m.high is not None for _, m in points):
            bands.append(Band(f"95 % interval of {model.label}", [(k, m.low * 100, m.high * 100) for k, m in points], i))
    label = metric_label(f"{where}/avg@1" if where else "avg@1").partition(": ")[2] or "all tasks"
    num = next((m.n for _, m in lines[0][1] if m.n is not None), None)
    note = f"{settings}; {figures.count(num)} tasks." if num else settings
    note += "" if bands else " Intervals stand in the table above."
    return LineChart(f"Solved: {label}", "% of tasks", series, bands, note=note, x_name="tries (k)", from_zero=True, whole_x=True)


# ---------------------------------------------------------------- samples


def samples(found: Evaluation, apart: tuple[str, ...] = ()) -> str:
    """The same prompts put to every model, side by side; models that only the stages in `apart` measured are shown elsewhere."""
    models = [model for model in found.ordered() if model.samples and not set(model.sources) <= set(apart)]
    prompts = list(dict.fromkeys(prompt for model in models for prompt in model.samples))
    body = [conversation(prompt, models) for prompt in prompts[:OPEN_PROMPTS]]
    rest = [conversation(prompt, models) for prompt in prompts[OPEN_PROMPTS:MAX_PROMPTS]]
    if rest:
        body.append(f"<details><summary>{len(rest)} more prompts</summary>{''.join(rest)}</details>")
    if len(prompts) > MAX_PROMPTS:
        body.append(f'<p class="note">{len(prompts) - MAX_PROMPTS} more prompts are in results.json of the evaluate stage.</p>')
    text = "The same prompts, continued by each model in turn. Unedited; chosen by the recipe, not for their looks."
    if any("<think>" in sample["completion"] for model in models for sample in model.samples.values()):
        text += " Set apart in grey: what a model thinks before it answers."
    return section("samples", "In the models\u2019 own words", text, "".join(body))


def conversation(prompt: str, models: list[ModelView]) -> str:
    """One prompt and what each model made of it; models that were not asked are left out if there are many."""
    if len(models) > 3:
        models = [model for model in models if prompt in model.samples]
    cells = "".join(_say(model, model.samples.get(prompt)) for model in models)
    return f'<div class="prompt"><b>Prompt</b><pre>{shorten(prompt, MAX_CHARACTERS)}</pre></div><div class="says">{cells}</div>'


def _say(model: ModelView, sample: dict[str, Any] | None) -> str:
    head = f"<b>{esc(model.label)}</b>"
    if sample is None:
        return f'<div class="say"><p class="by">{head}</p><p class="none">not asked</p></div>'
    words, help_text = stop_words(sample["stop"])
    style = ' class="cut"' if sample["stop"] in ("length", "context", "aborted", "error") else ""
    stop = f'<span{style} title="{esc(help_text)}">{esc(words)}</span>' if words else ""
    return f'<div class="say"><p class="by">{head}{stop}</p>{show(sample["completion"], MAX_CHARACTERS)}</div>'
