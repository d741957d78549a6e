"""The page's first sentences, computed from the numbers: what each training stage brought, what it cost, how it compares."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures, story
from k2lab.report.collect import RunView, StageView
from k2lab.report.headlines import is_ability, is_minor, strength, whole
from k2lab.report.measures import Baseline, Evaluation
from k2lab.report.rows import places
from k2lab.report.students import summary
from k2lab.report.words import doing, metric_label, split

DETAIL = "\t"  # begins sentences about a single stage of a run that has a story
_PREFERRED = ("bits_per_byte", "loss", "perplexity")  # what the first stage is best described by, in this order
_SHARES = ("eos_rate", "stop_rate", "non_empty", "no_other_special", "exact_match", "token_accuracy", "valid_json", "parses",
           "syntax", "tool_call", "pass_rate", "logprob_accuracy", "reward_accuracy", "tool_used", "tool_failed")  # fmt: skip


def sentences(run: RunView, found: Evaluation, table: list[dict[str, Any]]) -> list[str]:
    """Plain sentences, the most important first; never empty. A run of many stages begins with its story: gains, then prices."""
    result = []
    chief: dict[str, dict[str, Any] | None] = {}
    for row in table:
        name = row["stage"]
        if row["metric"] is None or name in chief:
            continue
        mine = [r for r in table if r["stage"] == name and r["metric"] is not None]
        chief[name] = _chief(whole(mine), first=not chief)
        result.append(_about(run, found, name, mine, first=len(chief) == 1))
    left_out = story.not_run(run)
    if len(result) > story.LONG:
        begin = [story.lead(run, found, chief, _tell), story.prices(table, _tell), left_out]
        return [text for text in begin if text] + [f"{DETAIL}{text}" for text in result]
    return [*result, left_out] if left_out and result else result or [_without_measures(run)]


def _tell(row: dict[str, Any]) -> str:
    """`bits per byte 3.90 \u2192 2.05`."""
    label = metric_label(row["metric"]).replace(": ", " on ", 1).removesuffix(" on all tasks")
    before = _value(row, "before", unit=False)
    label = label if label[:2].isupper() or label.startswith(("F1", "JSON")) else label[:1].lower() + label[1:]
    return f"{label} {before.removesuffix(f'{figures.THIN}%')} \u2192 {_value(row, 'after')}"


def _about(run: RunView, found: Evaluation, name: str, mine: list[dict[str, Any]], first: bool) -> str:
    stage = run.stage(name)
    subject = doing(name, stage.type if stage else name)
    chief = _chief(whole(mine), first) or _chief(mine, first)
    kept = summary(run, found, name) if stage is not None and stage.type == "distill" else ""
    if kept:
        return f"{subject}: {kept[:1].lower()}{kept[1:]}"
    if chief is None:
        if all(row["before"] is None for row in mine):
            reached = f"{_value(mine[0], 'after')} ({_lower(mine[0]['metric'])})"
            return f"{subject} reached {reached}; there is no earlier model to compare it with."
        num = sum(row["before"] is not None for row in mine)
        return f"{subject} changed none of its {num} measured {'figure' if num == 1 else 'figures'} by more than chance would."
    text = subject + (_on_what(run, stage) if first and stage else "")
    moved = "raised" if chief["change"] > 0 else "lowered"
    aside = " (lower is better)" if first and chief["better"] == "lower" else ""
    if stage is not None and stage.type == "agent":
        text, moved = f"A tool, used by {chief['model'].removesuffix(' with tools')},", moved
    text += f" {moved} {_lower(chief['metric'])}{aside} from {_value(chief, 'before', unit=False)} to {_value(chief, 'after')}"
    text += ", which is worse" if chief["verdict"] == "worse" else _against(found, chief)
    worse = [row for row in mine if row["verdict"] == "worse" and row is not chief]
    if worse and chief["verdict"] == "better":
        row = max(worse, key=lambda each: (bool(each.get("headline")), strength(each)))
        text += f"; the price: {_lower(row['metric'])} went from {_value(row, 'before', unit=False)} to {_value(row, 'after')}"
    return text + "."


def _chief(mine: list[dict[str, Any]], first: bool) -> dict[str, Any] | None:
    """The row that describes a stage best: for the first stage a language-modelling figure, else the clearest change, rather of
    an ability than of manners, and rather of a row that leads than of another."""
    clear = [row for row in mine if row["verdict"] in ("better", "worse")]
    if first:
        for base in _PREFERRED:
            hits = [row for row in clear if split(row["metric"])[0] == base]
            if hits:
                return next((row for row in hits if row.get("headline")), hits[0])
    better = [row for row in clear if row["verdict"] == "better"] or clear
    able = [row for row in better if is_ability(row)]
    major = [row for row in better if not is_minor(row)]
    for group in (able, major, better):
        leading = [row for row in group if row.get("headline")]
        if group:
            return max(leading or group, key=strength)
    return None


def _value(row: dict[str, Any], key: str, unit: bool = True) -> str:
    _, word = figures.scaled(row["unit"])
    factor, _ = figures.scaled(row["unit"])
    text = figures.fixed(row[key] * factor, _short(row))
    if word == "%":
        return f"{text}{figures.THIN}%"
    word = {"bits/byte": "", "bits per byte": ""}.get(word, word)
    return f"{text} {word}".strip() if unit else text


def _short(row: dict[str, Any]) -> int:
    """Decimals for a sentence: 3 significant digits, more only where before and after would look the same."""
    factor, _ = figures.scaled(row["unit"])
    exact, short = places(row), figures.decimals(row["after"] * factor)
    if row["before"] is not None and round(row["before"] * factor, short) == round(row["after"] * factor, short):
        return exact
    return min(exact, short)


def _lower(metric: str) -> str:
    """A metric's label inside a sentence."""
    label = metric_label(metric).replace(": ", " on ", 1)
    base = split(metric)[0]
    if base in _SHARES or base.startswith(("pass@", "avg@")):
        return f"the share of {label[:1].lower()}{label[1:]}"
    keep = label[:2].isupper() or label.startswith(("F1", "JSON"))
    return label if keep else label[:1].lower() + label[1:]


def _on_what(run: RunView, stage: StageView) -> str:
    """` on 2.1 MB of text` from the data sets that the stage was made from, or an empty text."""
    seen: set[str] = set()
    queue, total, exact = [stage], 0.0, True
    while queue:
        for _, parent, _ in queue.pop().parents():
            source = run.stage(parent)
            if source is None or parent in seen or source.kind == "checkpoint":
                continue
            seen.add(parent)
            num = text_bytes(source)
            if num is not None:
                total += num
                continue
            if source.kind == "dataset":
                total, exact = total + source.num_bytes, False
                continue
            queue.append(source)
    if not total:
        return ""
    return f" on {figures.size(total)} of text" if exact else f" on a data set of {figures.size(total)}"


def text_bytes(source: StageView) -> float | None:
    """Bytes of text in the training part of a data set or token file, if its manifest counts them."""
    counts = source.manifest.get("counts")
    for table in (counts.get("train"), counts) if isinstance(counts, dict) else ():
        if isinstance(table, dict) and figures.number(table.get("text_bytes")) is not None:
            return figures.number(table["text_bytes"])
    return None


def _against(found: Evaluation, row: dict[str, Any]) -> str:
    """`, below the trigram table at 2.10`: the row's value among its baselines; says so when a baseline is not beaten."""
    baselines, sure = found.comparable(row["metric"])
    if not baselines or not sure or row["better"] not in ("lower", "higher"):
        return ""
    sign = 1 if row["better"] == "lower" else -1
    ranked = sorted(baselines, key=lambda item: sign * item.value)  # the strongest first
    worst_end = row["high"] if sign > 0 else row["low"]
    best_end = row["low"] if sign > 0 else row["high"]
    worst_end, best_end = (row["after"] if end is None else end for end in (worst_end, best_end))
    past, short = ("below", "above") if sign > 0 else ("above", "below")
    beaten = [item for item in ranked if sign * worst_end < sign * item.value]
    strongest = ranked[0]
    if strongest in beaten:
        every = f"all {len(ranked)} baselines, the strongest being " if len(ranked) > 1 else ""
        return f", {past} {every}{_baseline(strongest, row)}"
    if sign * best_end <= sign * strongest.value:
        return f", level with {_baseline(strongest, row)}"
    text = f", still {short} {_baseline(strongest, row)}"
    return f", {past} {_baseline(beaten[0], row)} but{text[1:]}" if beaten else text


def _baseline(item: Baseline, row: dict[str, Any]) -> str:
    factor, _ = figures.scaled(row["unit"])
    return f"{item.name} at {figures.fixed(item.value * factor, _short(row))}"


def _without_measures(run: RunView) -> str:
    trained = [stage for stage in run.stages if stage.steps]
    done = sum(stage.status == "done" for stage in run.stages)
    if not run.stages:
        return "Nothing has been run here yet."
    text = f"{done} of {len(run.stages)} stages are done; no model has been measured yet."
    for stage in trained[:1]:
        losses = [v for e in stage.steps for v in [_total_loss(e)] if v is not None]
        if len(losses) > 1:
            text += f" In {stage.name}, training loss went from {figures.plain(losses[0])} to {figures.plain(losses[-1])}."
    return text


def _total_loss(event: dict[str, Any]) -> float | None:
    terms = [figures.number(v) for v in (event.get("losses") or {}).values()]
    return sum(v for v in terms if v is not None) if any(v is not None for v in terms) else None
