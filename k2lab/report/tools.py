"""What tools are worth: the same tasks with and without them, how tools were used, in what they ran, whole conversations."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.figures import number
from k2lab.report.headlines import is_ability
from k2lab.report.markup import esc, section, shorten, tip
from k2lab.report.measures import Evaluation, Measure, ModelView
from k2lab.report.results import conversation
from k2lab.report.words import metric_help, metric_label

TYPE = "agent"
MAX_PROMPTS = 8
OPEN_PROMPTS = 2
MAX_FAMILIES = 12
_RAN_IN = "tools run in "


def stages(run: RunView) -> tuple[str, ...]:
    """Names of the stages that measured tools."""
    return tuple(stage.name for stage in run.stages if stage.type == TYPE)


def sandboxes(run: RunView) -> dict[str, list[str]]:
    """{what tools ran in: stages that said so}."""
    found: dict[str, list[str]] = {}
    for stage in run.stages:
        for note in stage.notes:
            if note.startswith(_RAN_IN):
                found.setdefault(note.removeprefix(_RAN_IN), []).append(stage.name)
    return found


def tools(run: RunView, found: Evaluation) -> str:
    """The section: per stage that measured tools, figures, use and conversations; or why it was not run."""
    body = ""
    for stage in run.stages:
        if stage.type != TYPE:
            continue
        if stage.status == "skipped":
            body += f'<div class="banner"><p><b>{esc(stage.name)} was not run.</b> {shorten(stage.error, 600)}</p></div>'
        elif stage.status == "done":
            models = [model for model in found.ordered() if stage.name in model.sources]
            body += f"<h3>{esc(stage.name)}</h3>{_compared(found, models)}{_use(stage)}{_conversations(models)}"
    where = "".join(f'<p class="note">The sandbox: {esc(text)}.</p>' for text in sandboxes(run))
    text = (
        "The same model does the same tasks twice: from its head, and with a tool that it may call. A call is a piece of program "
        "that the model writes; it runs in a sandbox, and what it prints comes back as the next thing the model reads."
    )
    return section("tools", "With a tool, and without", text, body + where if body else "")


def _compared(found: Evaluation, models: list[ModelView]) -> str:
    """Bars of right answers, with the tool beside without."""
    last = next((model for model in reversed(models) if model.name in found.before), None)
    first = found.models.get(found.before.get(last.name, "")) if last is not None else None
    if last is None or first is None:
        return ""
    rows = ""
    scores = [
        measure for measure in last.measures.values() if is_ability({"metric": measure.metric}) and measure.unit == "fraction"
    ]
    for measure in scores[:MAX_FAMILIES]:
        before = first.find(measure.metric, measure.settings)
        name = tip(metric_label(measure.metric), metric_help(measure.metric, measure.better))
        rows += f'<h4>{name} <span class="unit">n = {figures.count(measure.n)}</span></h4><div class="bars">'
        rows += _bar("without tools", before, " base") + _bar("with tools", measure, "") + "</div>"
    return rows


def _bar(who: str, measure: Measure | None, style: str) -> str:
    if measure is None:
        return f'<div class="who">{who}</div><div class="unit">not measured</div>'
    width = (measure.high - measure.low) * 100 if measure.low is not None and measure.high is not None else None
    value = measure.value * 100
    whisker, past = "", value
    if measure.low is not None and measure.high is not None:
        left, past = max(0.0, measure.low * 100), min(100.0, max(value, measure.high * 100))
        whisker = f'<u style="left:{left:.2f}%;width:{max(0.0, past - left):.2f}%"></u>'
    text = figures.fixed(value, figures.decimals(value, width))
    return (
        f'<div class="who">{who}</div><div class="bar{style}"><b style="width:{value:.2f}%"></b>{whisker}'
        f'<em style="left:{past:.2f}%">{text} <span>%</span></em></div>'
    )


def _use(stage: StageView) -> str:
    """How often tools were called, how often that failed, and how long it took."""
    counts = stage.manifest.get("tool_use")
    if not isinstance(counts, dict):
        return ""
    get: Any = {key: number(value) for key, value in counts.items()}.get
    facts = []
    rollouts, used, calls, failed = (get(name) for name in ("rollouts", "rollouts_with_calls", "tool_results", "tool_errors"))
    if rollouts and used is not None:
        facts.append(("Answers with a tool", f"{figures.count(used)} of {figures.count(rollouts)}", f"{used / rollouts:.0%}"))
    if calls is not None:
        failures = f"{figures.count(failed)} of them failed" if failed is not None else ""
        facts.append(("Calls in all", figures.count(calls), failures))
    if calls and get("tools_s") is not None:
        facts.append(("Time per call", f"{1000 * get('tools_s') / calls:.0f}{figures.THIN}ms", "on average, in the sandbox"))
    if rollouts and get("response") is not None:
        small = f"and {figures.plain(get('context') / rollouts)} read from tools" if get("context") is not None else ""
        facts.append(("Tokens per answer", f"{figures.plain(get('response') / rollouts)} written", small))
    items = "".join(f"<div><dt>{esc(dt)}</dt><dd>{esc(dd)}<small>{esc(small)}</small></dd></div>" for dt, dd, small in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _conversations(models: list[ModelView]) -> str:
    prompts = list(dict.fromkeys(prompt for model in models for prompt in model.samples))[:MAX_PROMPTS]
    body = "".join(conversation(prompt, models) for prompt in prompts[:OPEN_PROMPTS])
    rest = "".join(conversation(prompt, models) for prompt in prompts[OPEN_PROMPTS:])
    if rest:
        body += f"<details><summary>{len(prompts) - OPEN_PROMPTS} more conversations</summary>{rest}</details>"
    return body
