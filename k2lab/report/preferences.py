"""Preference tuning on held-out pairs: rows for the table, and a section that compares all pairs with those of similar length."""

from __future__ import annotations

from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.figures import number
from k2lab.report.markup import esc, section, tip
from k2lab.report.words import metric_help, metric_label

NAME = "preference"
PARTS = {"all": "all pairs", "length_matched": "pairs of similar length"}
_SHARES = ("logprob_accuracy", "reward_accuracy", "reward_accuracy_reference")
_SETTINGS = {
    "logprob_accuracy": "log-probability per token",
    "reward_accuracy": "against the model\u2019s own start, where it is 50 % by definition",
    "reward_accuracy_reference": "against the reference model",
    "reward_margin": "log-probability of whole answers",
}


def measures(stage: StageView) -> list[dict[str, Any]]:
    """Rows (without cost and verdict) of a stage's `preference.json`; empty if it has none."""
    found = []
    for part in PARTS:
        table = stage.preference.get(part)
        for name in (*_SHARES, "reward_margin"):
            row = _row(stage, name, part, table) if isinstance(table, dict) else None
            if row is not None:
                found.append(row)
    return found


def _row(stage: StageView, name: str, part: str, table: dict[str, Any]) -> dict[str, Any] | None:
    paired = name == "logprob_accuracy"
    after = _entry(table, f"{name}_after" if paired else name)
    if after.get("value") is None:
        return None
    before = _entry(table, f"{name}_before") if paired else {}
    change = _entry(table, f"{name}_change") if paired else {}
    settings = f"held-out pairs, {_SETTINGS[name]}"
    num = after.get("n")
    return {
        "metric": f"{NAME}/{name}" + (f"/{part}" if part != "all" else ""),
        "before": before.get("value"),
        "after": after["value"],
        "low": after.get("low"),
        "high": after.get("high"),
        "n": int(num) if num is not None else None,
        "unit": "nats" if name == "reward_margin" else "fraction",
        "better": "higher",
        "change": change.get("value"),
        "change_low": change.get("low"),
        "change_high": change.get("high"),
        "settings": settings,
        "settings_before": settings if before else None,
        "model": stage.name,
    }


def _entry(table: dict[str, Any], name: str) -> dict[str, float | None]:
    entry = table.get(name)
    return {key: number(value) for key, value in entry.items()} if isinstance(entry, dict) else {}


def preferences(run: RunView, table: list[dict[str, Any]]) -> str:
    """The section: per stage, every figure on all pairs and on the half whose sides are closest in length."""
    body = ""
    for stage in run.stages:
        rows = {row["metric"]: row for row in table if row["stage"] == stage.name and str(row["metric"]).startswith(f"{NAME}/")}
        lines = "".join(_line(name, rows) for name in (*_SHARES, "reward_margin"))
        if not lines:
            continue
        heads = "".join(f'<th scope="col" class="num">{text[:1].upper()}{text[1:]}</th>' for text in PARTS.values())
        body += (
            f'<h3>{esc(stage.name)} <span class="unit">{_about(stage)}</span></h3><table class="cards"><thead><tr>'
            f'<th scope="col">On held-out pairs</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
        )
    text = (
        "Each pair holds a better and a worse answer to a question that was not used in training. The half with sides of similar "
        "length shows whether the model learnt what is better, or only what is longer."
    )
    return section("preferences", "Which answer does it prefer?", text, body)


def _about(stage: StageView) -> str:
    parts = [f"{figures.count(number(stage.preference.get('pairs')))} pairs"]
    for part, words in PARTS.items():
        table = stage.preference.get(part)
        gap = number(table.get("mean_length_gap")) if isinstance(table, dict) else None
        if gap is not None:
            parts.append(f"sides differ by {figures.plain(gap)} tokens in {words}")
    return esc(", ".join(parts))


def _line(name: str, rows: dict[str, dict[str, Any]]) -> str:
    from k2lab.report.rows import interval, shown

    cells = []
    for part, words in PARTS.items():
        row = rows.get(f"{NAME}/{name}" + (f"/{part}" if part != "all" else ""))
        if row is None:
            cells.append(f'<td class="num" data-h="{words}">{figures.DASH}</td>')
            continue
        before = f"{shown(row, 'before')} \u2192 " if row["before"] is not None else ""
        _, unit = figures.scaled(row["unit"])
        spread = f'<span class="fine">{interval(row)}, n = {figures.count(row["n"])}</span>'
        cells.append(
            f'<td class="num" data-h="{words}"><span>{before}<b>{shown(row, "after")}</b>{figures.THIN}{esc(unit)}'
            f"<br>{spread}</span></td>"
        )
    if not any(key.split("/")[1] == name for key in rows):
        return ""
    return f'<tr><th scope="row">{tip(metric_label(f"{NAME}/{name}"), metric_help(f"{NAME}/{name}"))}</th>{"".join(cells)}</tr>'
