"""Numbers of a stage's events as points of curves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from k2lab.report import charts
from k2lab.report.charts import Band, Series
from k2lab.report.collect import StageView
from k2lab.report.figures import number

Points = list[tuple[float, float | None]]


def points_of(stage: StageView, pick: Callable[[dict[str, Any]], Any]) -> Points:
    """(step, number or None) of every step."""
    return [(float(event["step"]), number(pick(event))) for event in stage.steps]


def field_points(stage: StageView, table: str, name: str) -> Points:
    """The points of `name` in the table `table` of every step."""
    return points_of(stage, lambda event: table_of(event, table).get(name))


def known(points: Points) -> bool:
    """Whether there is anything to draw."""
    return any(value is not None for _, value in points)


def moments(stage: StageView) -> list[tuple[float, str]]:
    """Where a stage was resumed."""
    return [(float(step), "resumed") for step in stage.resumed_at if step > 0]


def table_of(event: dict[str, Any], name: str) -> dict[str, Any]:
    """A table in an event; empty if there is none."""
    value = event.get(name)
    return value if isinstance(value, dict) else {}


def names_in(stage: StageView, field: str) -> list[str]:
    """All keys that the table `field` has in any step, numbers in numeric order."""
    found = {str(name) for event in stage.steps for name in table_of(event, field)}
    return sorted(found, key=natural)


def natural(name: str) -> list[tuple[str, int]]:
    """Sorts `layer 9` before `layer 10`."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def with_band(name: str, points: Points, colour: int) -> tuple[list[Series], list[Band]]:
    """A line, and the range that it averages over if there are many points."""
    band = charts.envelope(points)
    return [Series(name, points, colour)], [Band(f"range of {name}", band, colour)] if band else []


def smooth(points: Points, width: int) -> Points:
    """Means over about `width` points around each one, fewer at the ends."""
    found: Points = []
    for i, (x, _) in enumerate(points):
        reach = min(width // 2, i, len(points) - 1 - i)  # equally far to both sides, so that a slope stays where it is
        values = [value for _, value in points[i - reach : i + reach + 1] if value is not None]
        found.append((x, sum(values) / len(values) if values else None))
    return found


def is_loss(name: str) -> bool:
    """Validation of a loss term is recorded as `valid/<term>`; other names are metrics with a chart of their own."""
    return name.startswith("valid/") or any(word in name.lower() for word in ("loss", "nll", "cross_entropy"))


def valid_points(stage: StageView) -> dict[str, Points]:
    """{name: points} of everything measured in validation."""
    found: dict[str, Points] = {}
    for event in stage.valid:
        for name, value in table_of(event, "metrics").items():
            found.setdefault(str(name), []).append((float(event["step"]), number(value)))
    return {name: points for name, points in found.items() if known(points)}
