"""Which few of a stage's measures lead its part of the table; all others are one click, or `--json`, away."""

from __future__ import annotations

from typing import Any

from k2lab.report.words import split

MAX_LEADING = 6  # rows of a stage
MAX_FAMILIES = 4  # task families that all lead where no figure stands for all of them

# How well a model knows language; one of them leads, the first that was measured.
_LANGUAGE = ("bits_per_byte", "perplexity", "loss", "nll", "bits_per_token")
# Manners and details: they lead only where a stage measured nothing else, or made them clearly worse.
_MINOR = ("eos_rate", "stop_rate", "non_empty", "no_other_special", "length", "format", "repetition", "response_loss",
          "token_accuracy", "tool_failed", "reward_margin", "reward_accuracy_reference", "kl", "ece")  # fmt: skip
_OVERALL = "answered"  # the name of tasks of several families together


def mark(rows: list[dict[str, Any]]) -> None:
    """Sets `headline` of every row: True for those that lead. A stage without measures leads with its one row."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["stage"], []).append(row)
    for group in groups.values():
        chosen = leading([row for row in group if row["metric"] is not None])
        for row in group:
            row["headline"] = row["metric"] is None or any(row is other for other in chosen)


def leading(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one stage that lead: language in one figure, right answers over all tasks (or per family, if they are few) and
    the family that gained and the one that lost most clearly, preferences; and always what became most clearly worse."""
    chosen = [*_language(rows), *_answers(rows)]
    chosen += [row for row in rows if _base(row) in ("logprob_accuracy", "reward_accuracy") and "length" not in row["metric"]]
    used = [row for row in rows if _base(row) == "tool_used"]
    chosen += used if len(used) == 1 else [row for row in used if _where(row) in (_OVERALL, "")]
    chosen += [row for row in rows if not _is_known(row)]  # measures of somebody's own
    known = [row for row in rows if _is_known(row)]
    chosen = (chosen or known)[:MAX_LEADING]
    worse = max((row for row in rows if row["verdict"] == "worse"), key=strength, default=None)
    if worse is not None and not any(row["verdict"] == "worse" for row in chosen):
        chosen.append(worse)
    return [row for row in rows if any(row is other for other in chosen)]


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of single task families where there are rows over all tasks: one family of many that happened to
    gain is no story."""
    if not any(_where(row) == _OVERALL and _is_score(row) for row in rows):
        return rows
    return [row for row in rows if _where(row) in (_OVERALL, "") or not _base(row).startswith(("avg@", "pass@"))]


def is_ability(row: dict[str, Any]) -> bool:
    """Whether a row tells what a model can do, rather than how it does it."""
    return _base(row) not in (*_MINOR, "tool_used", *_LANGUAGE) and not _base(row).startswith(("pass@", "best of"))


def is_minor(row: dict[str, Any]) -> bool:
    """Whether a row tells of manners and details."""
    return _base(row) in (*_MINOR, "tool_used")


def strength(row: dict[str, Any]) -> float:
    """A change in units of its interval's half-width."""
    low, high = (row["change_low"], row["change_high"]) if row["change_low"] is not None else (row["low"], row["high"])
    width = (high - low) / 2 if low is not None and high is not None else 0.0
    return abs(row["change"]) / width if width > 0 else abs(row["change"]) * 1e6


def _base(row: dict[str, Any]) -> str:
    return split(row["metric"])[0]


def _where(row: dict[str, Any]) -> str:
    return split(row["metric"])[1]


def _language(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for base in _LANGUAGE:
        found = [row for row in rows if _base(row) == base]
        if found:
            return [row for row in found if not _where(row)] or found[:2]
    return []


def _answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of answers, by the settings that they were asked with."""
    scores = [row for row in rows if _is_score(row)]
    found: list[dict[str, Any]] = []
    for settings in dict.fromkeys(row["settings"] for row in scores):
        same = [row for row in scores if row["settings"] == settings]
        whole = [row for row in same if _where(row) == _OVERALL]
        parts = [row for row in same if _where(row) != _OVERALL]
        if whole and parts:
            moved = [row for row in parts if row["verdict"] in ("better", "worse")]
            gains = [row for row in moved if row["verdict"] == "better"]
            losses = [row for row in moved if row["verdict"] == "worse"]
            parts = [max(each, key=lambda row: abs(row["change"])) for each in (gains, losses) if each]
        elif len(parts) > MAX_FAMILIES:
            parts = sorted(parts, key=lambda row: -abs(row["change"] or 0))[:MAX_FAMILIES]
        found += whole + parts
    return found


def _is_score(row: dict[str, Any]) -> bool:
    return _base(row).startswith("avg@") or _base(row) in ("exact_match", "accuracy", "pass_rate", "win_rate", "f1", "valid_json")


def _is_known(row: dict[str, Any]) -> bool:
    base = _base(row)
    return (
        _is_score(row)
        or base in (*_LANGUAGE, *_MINOR, "tool_used", "logprob_accuracy", "reward_accuracy")
        or base.startswith(("pass@", "best of"))
        or row["unit"].endswith("/token")
    )
