"""Sections about what the models can do: the table of gains, the comparison with baselines, samples."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView
from k2lab.report.markup import esc, section, shorten, tip
from k2lab.report.measures import Evaluation, ModelView
from k2lab.report.rows import interval, shown
from k2lab.report.words import metric_help, metric_label, stage_help, stop_words

MAX_PROMPTS = 12
MAX_CHARACTERS = 1500  # of a prompt or completion

_SYMBOLS = {
    "better": ("\u25b2", "better"),
    "worse": ("\u25bc", "worse"),
    "unclear": ("\u2248", "no clear change"),
    "unknown": ("", ""),
}


def gains(run: RunView, table: list[dict[str, Any]]) -> str:
    """The table \u201cWhat each stage bought\u201d."""
    measured = [row for row in table if row["metric"] is not None]
    if not measured:
        return ""
    body, last = [], None
    for row in measured:
        if row["stage"] != last:
            last = row["stage"]
            body.append(_group(run, last, row))
        body.append(_gain(row))
    heads = (
        '<th scope="col">Measured</th><th scope="col" class="num">Before</th><th scope="col" class="num">After</th>'
        '<th scope="col" class="plots"><span class="fine">\u25cb before \u25cf after</span></th>'
        '<th scope="col" class="num">Change</th>'
        '<th scope="col" class="num">95&nbsp;% interval of after</th>'
        '<th scope="col" class="num">n</th><th scope="col" class="how">How</th>'
    )
    text = (
        f'<table class="cards gains"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        '<p class="note">\u25b2 better and \u25bc worse are said only if the 95\u00a0% interval of '
        "the change leaves out zero (where no interval of "
        "the change was recorded: if the two models\u2019 own intervals do not overlap). \u2248 means "
        "that chance could explain the change. "
        "n is the number of examples measured.</p>"
    )
    bases = {row["metric"].partition("/")[0]: row["better"] for row in measured}
    words = "".join(
        f"<dt>{esc(metric_label(base))}</dt><dd>{esc(metric_help(base, better))}</dd>" for base, better in bases.items()
    )
    text += f'<details><summary>What these measures mean</summary><dl class="words">{words}</dl></details>'
    intro = "Each row compares the model before and after one training stage, measured in the same way on the same examples."
    return section("gains", "What each stage bought", intro, text)


def _group(run: RunView, name: str, row: dict[str, Any]) -> str:
    stage = run.stage(name)
    parts = [stage_help(stage.type) if stage else "", figures.duration(row["seconds"]) if row["seconds"] is not None else ""]
    text = ", ".join(part for part in parts if part)
    return f'<tr class="group"><th colspan="8" scope="rowgroup">{esc(name)}<span>{esc(text)}</span></th></tr>'


def _gain(row: dict[str, Any]) -> str:
    _, unit = figures.scaled(row["unit"])
    symbol, word = _SYMBOLS[row["verdict"]]
    change = shown(row, "change", sign=True)
    spread = interval(row, "change_low", "change_high", sign=True)
    title = f' title="95 % interval of the change: {esc(spread)}"' if spread != figures.DASH else ""
    mark = f'<span class="verdict">{symbol} {word}</span>' if word else ""
    other = row["settings_before"] is not None and row["settings_before"] != row["settings"]
    how = esc(row["settings"]) + (f"<br>before: {esc(row['settings_before'] or 'not recorded')}" if other else "")
    unit_text = f' <span class="unit">{esc(unit)}</span>' if unit else ""
    before = f'<td class="num" data-h="Before">{shown(row, "before")}</td>'
    if row["before"] is None:
        before = '<td class="num" data-h="Before"><span class="unit">not measured</span></td>'
    name = tip(metric_label(row["metric"]), metric_help(row["metric"], row["better"]))
    return (
        f'<tr><th scope="row">{name}{unit_text}</th>{before}'
        f'<td class="num" data-h="After"><b>{shown(row, "after")}</b></td><td class="plots">{_plot(row)}</td>'
        f'<td class="num" data-h="Change"><span class="{row["verdict"]}"{title}>{change}{mark}</span></td>'
        f'<td class="num" data-h="95 % interval">{interval(row)}</td>'
        f'<td class="num" data-h="n">{figures.count(row["n"])}</td><td class="set" data-h="How"><span>{how}</span></td></tr>'
    )


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
    body = "".join(_bars(found, metric, better) for metric, better in metrics.items())
    text = "Baselines need no neural network; they only count. A model that does not beat them has learnt no more than that."
    return section("baselines", "Beside simple baselines", text, body)


def _bars(found: Evaluation, metric: str, better: str) -> str:
    entries: list[tuple[float, str, str, Any, bool]] = []
    unit = ""
    for model in found.ordered():
        measure = next((m for (name, _), m in model.measures.items() if name == metric), None)
        if measure:
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


# ---------------------------------------------------------------- samples


def samples(found: Evaluation) -> str:
    """The same prompts put to every model, side by side."""
    models = [model for model in found.ordered() if model.samples]
    prompts = list(dict.fromkeys(prompt for model in models for prompt in model.samples))
    body = []
    for prompt in prompts[:MAX_PROMPTS]:
        cells = "".join(_say(model, model.samples.get(prompt)) for model in models)
        body.append(
            f'<div class="prompt"><b>Prompt</b><pre>{shorten(prompt, MAX_CHARACTERS)}</pre></div><div class="says">{cells}</div>'
        )
    if len(prompts) > MAX_PROMPTS:
        body.append(f'<p class="note">{len(prompts) - MAX_PROMPTS} more prompts are in results.json of the evaluate stage.</p>')
    text = "The same prompts, continued by each model in turn. Unedited; chosen by the recipe, not for their looks."
    return section("samples", "In the models\u2019 own words", text, "".join(body))


def _say(model: ModelView, sample: dict[str, Any] | None) -> str:
    head = f"<b>{esc(model.label)}</b>"
    if sample is None:
        return f'<div class="say"><p class="by">{head}</p><p class="none">not asked</p></div>'
    words, help_text = stop_words(sample["stop"])
    style = ' class="cut"' if sample["stop"] in ("length", "context", "aborted", "error") else ""
    stop = f'<span{style} title="{esc(help_text)}">{esc(words)}</span>' if words else ""
    text = shorten(sample["completion"], MAX_CHARACTERS)
    said = f"<pre>{text}</pre>" if sample["completion"].strip() else '<p class="none">(nothing)</p>'
    return f'<div class="say"><p class="by">{head}{stop}</p>{said}</div>'
