"""The page's first sentences for a run of many stages: what the model learnt on its way, what it cost, what was not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView
from k2lab.report.headlines import is_ability, strength
from k2lab.report.measures import Evaluation
from k2lab.report.students import kept
from k2lab.report.words import split

LONG = 3  # measured stages up to which each one's own sentence is story enough

# type of stage -> what the model did there, continuing "it ..."
_DID = {
    "pretrain": "learned to predict text",
    "sft": "learned to answer",
    "reasoning_sft": "learned to think before it answers",
    "dpo": "learned to prefer better answers",
    "rl": "practised on its own answers",
    "distill": "was distilled into a smaller model",
    "agent": "was given a tool",
}

Tell = Callable[[dict[str, Any]], str]  # a row as `bits per byte 3.90 -> 2.05`


def lead(run: RunView, found: Evaluation, chief: dict[str, dict[str, Any] | None], tell: Tell) -> str:
    """One or two sentences over all measured stages; `chief` {stage: the row that describes it, None = nothing clear}."""
    gains, nothing = [], []
    for name, row in chief.items():
        stage = run.stage(name)
        did = _DID.get(stage.type if stage else "", f"went through {name}")
        share = kept(run, found, name).get("right") if stage and stage.type == "distill" else None
        if share is not None:
            gains.append(f"{did} that keeps {share * 100:.0f}{figures.THIN}% of its teacher\u2019s right answers")
        elif row is not None and row["verdict"] == "better" and (is_ability(row) or (stage and stage.type == "pretrain")):
            gains.append(f"{did} ({tell(row)})")
        else:
            nothing.append(name)
    trained = sum(bool(stage.steps) or stage.kind == "checkpoint" for stage in run.stages)
    text = ""
    if gains:
        text = f"In {figures.duration(run.total_seconds)} and {trained} stages of training, the model {_joined(gains)}."
    if nothing:
        text += f" No clear gain in what it can do came from {_joined(nothing)}." if text else _no_gain(nothing)
    return text.strip()


def prices(table: list[dict[str, Any]], tell: Tell, limit: int = 3) -> str:
    """What became clearly worse, the most of each stage, the gravest first: abilities before manners."""
    worst: dict[str, dict[str, Any]] = {}
    for row in table:
        if row.get("verdict") == "worse":
            old = worst.get(row["stage"])
            worst[row["stage"]] = row if old is None or _weight(row) > _weight(old) else old
    chosen = sorted(worst.values(), key=_weight, reverse=True)[:limit]
    order = list(dict.fromkeys(row["stage"] for row in table))
    chosen.sort(key=lambda row: order.index(row["stage"]))
    if not chosen:
        return ""
    told = "; ".join(f"in {row['stage']}, {tell(row)}" for row in chosen)
    rest = len(worst) - len(chosen)
    more = f"; {rest} more stage{'s' if rest > 1 else ''} made something worse" if rest else ""
    return f"The price: {told}{more}."


def not_run(run: RunView) -> str:
    """Which stages were left out for want of something on this machine."""
    names = [stage.name for stage in run.stages if stage.status == "skipped"]
    if not names:
        return ""
    return f"Not run: {_joined(names)} (see below). Nothing on this page speaks for {'it' if len(names) == 1 else 'them'}."


def _weight(row: dict[str, Any]) -> tuple[bool, bool, bool, float]:
    language = split(row["metric"])[0] == "bits_per_byte"
    return is_ability(row), language, bool(row.get("headline")), strength(row)


def _no_gain(names: list[str]) -> str:
    return f"None of the measured stages ({_joined(names)}) brought a clear gain in what the model can do."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
