"""The page's first sentences, computed from the numbers: what each training stage brought, what it cost, how it compares."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.measures import Baseline, Evaluation
from k2lab.report.rows import places
from k2lab.report.words import doing, metric_label

_PREFERRED = ("bits_per_byte", "loss", "perplexity")  # what the first stage is best described by, in this order
_MINOR = ("eos_rate", "stop_rate", "length", "format", "repetition")  # manners: named only if nothing else changed
_SHARES = (*_MINOR[:2], "exact_match", "token_accuracy", "valid_json", "parses", "syntax", "tool_call", "pass_rate")


def sentences(run: RunView, found: Evaluation, table: list[dict[str, Any]]) -> list[str]:
    """Plain sentences, the most important first; never empty."""
    result = []
    described: set[str] = set()
    for row in table:
        name = row["stage"]
        if row["metric"] is None or name in described:
            continue
        described.add(name)
        mine = [r for r in table if r["stage"] == name and r["metric"] is not None]
        result.append(_about(run, found, name, mine, first=len(described) == 1))
    return result or [_without_measures(run)]


def _about(run: RunView, found: Evaluation, name: str, mine: list[dict[str, Any]], first: bool) -> str:
    stage = run.stage(name)
    subject = doing(name, stage.type if stage else name)
    chief = _chief(mine, first)
    if chief is None:
        if all(row["before"] is None for row in mine):
            reached = f"{_value(mine[0], 'after')} ({_lower(mine[0]['metric'])})"
            return f"{subject} reached {reached}; there is no earlier model to compare it with."
        num = sum(row["before"] is not None for row in mine)
        return f"{subject} changed none of its {num} measured {'figure' if num == 1 else 'figures'} by more than chance would."
    text = subject + (_on_what(run, stage) if first and stage else "")
    moved = "raised" if chief["change"] > 0 else "lowered"
    aside = " (lower is better)" if first and chief["better"] == "lower" else ""
    text += f" {moved} {_lower(chief['metric'])}{aside} from {_value(chief, 'before', unit=False)} to {_value(chief, 'after')}"
    text += ", which is worse" if chief["verdict"] == "worse" else _against(found, chief)
    worse = [row for row in mine if row["verdict"] == "worse" and row is not chief]
    if worse and chief["verdict"] == "better":
        row = max(worse, key=_strength)
        text += f"; the price: {_lower(row['metric'])} went from {_value(row, 'before', unit=False)} to {_value(row, 'after')}"
    return text + "."


def _chief(mine: list[dict[str, Any]], first: bool) -> dict[str, Any] | None:
    """The row that describes a stage best: for the first stage a language-modelling figure, else the clearest change."""
    clear = [row for row in mine if row["verdict"] in ("better", "worse")]
    if first:
        for base in _PREFERRED:
            hit = next((row for row in clear if row["metric"].partition("/")[0] == base), None)
            if hit is not None:
                return hit
    better = [row for row in clear if row["verdict"] == "better"] or clear
    major = [row for row in better if row["metric"].partition("/")[0] not in _MINOR]
    return max(major or better, key=_strength, default=None)


def _strength(row: dict[str, Any]) -> float:
    """A change in units of its interval's half-width."""
    low, high = (row["change_low"], row["change_high"]) if row["change_low"] is not None else (row["low"], row["high"])
    width = (high - low) / 2 if low is not None and high is not None else 0.0
    return abs(row["change"]) / width if width > 0 else abs(row["change"]) * 1e6


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
    if metric.partition("/")[0] in _SHARES or metric.startswith("pass@"):
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
