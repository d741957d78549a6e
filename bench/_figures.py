"""Figures of a benchmark beside what they must reach, and their table over several runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Line:
    """One figure: `value` with its interval over `n` items, and what it must reach: `at_least` or `at_most` (neither: it is only
    shown), on `need_n` items or more, and where `clear` with an interval above 0."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    at_least: float | None = None
    at_most: float | None = None
    need_n: int = 0
    clear: bool = False
    form: str = "{:.1f}"
    detail: str = ""  # what stands behind the figure in this run

    @property
    def reached(self) -> bool | None:
        if self.at_least is None and self.at_most is None:
            return None
        enough = self.n >= self.need_n and (not self.clear or (self.low is not None and self.low > 0))
        within = (self.at_least is None or self.value >= self.at_least) and (self.at_most is None or self.value <= self.at_most)
        return bool(enough and within and np.isfinite(self.value))

    @property
    def must(self) -> str:
        bound, sign = (self.at_least, ">=") if self.at_least is not None else (self.at_most, "<=")
        text = "" if bound is None else f"{sign} {self.form.format(bound)}"
        return text + (", clear" if self.clear else "") + (f", n>={self.need_n}" if self.need_n else "")

    def __str__(self) -> str:
        span = f"[{self.form.format(self.low)}, {self.form.format(self.high)}]" if self.low is not None else ""
        said = {None: "", True: "yes", False: "NO"}[self.reached]
        name = f"{self.name} ({self.detail})" if self.detail else self.name
        return f"  {name:<74}{self.form.format(self.value):>9} {span:>17}{self.n or '':>6}  {self.must:<24}{said}"


def percent(name: str, found: Any, **must: Any) -> Line:
    """A line of an Estimate or a Change of shares, in per cent or points."""
    value = found.value if hasattr(found, "value") else found.change
    return Line(name, 100 * value, 100 * found.low, 100 * found.high, found.n, **must)


def stored(name: str, row: dict[str, Any], **must: Any) -> Line:
    """The same of a {"value" or "change", "low", "high", "n"} that a stage wrote."""
    low, high = (None if row[key] is None else 100 * row[key] for key in ("low", "high"))
    return Line(name, 100 * row.get("value", row.get("change")), low, high, row["n"], **must)


def summary(names: list[str], found: list[list[Line]]) -> None:
    """Every line's figure per run, its mean over runs, and in how many runs it was reached."""
    print(f"\n{'':<52}" + "".join(f"{name[-9:]:>10}" for name in names) + f"{'mean':>10}  {'must':<24}reached")
    by_name: dict[str, dict[int, Line]] = {}
    for place, lines in enumerate(found):
        for line in lines:
            by_name.setdefault(line.name, {})[place] = line
    for name, each in by_name.items():
        cells = "".join(f"{each[n].form.format(each[n].value) if n in each else 'not run':>10}" for n in range(len(found)))
        some = next(iter(each.values()))
        judged = [line.reached for line in each.values() if line.reached is not None]
        mean = some.form.format(float(np.mean([line.value for line in each.values()])))
        print(f"{name:<52}{cells}{mean:>10}  {some.must:<24}" + (f"{sum(judged)} of {len(found)}" if judged else ""))
