"""A number with its name, formula and origin, and how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["given", "computed", "assumed", "measured", "published"]


@dataclass(frozen=True)
class Line:
    """One number of a plan. `shown` is its readable form, `formula` how it came about, `origin` how far it can be trusted:
    given (by recipe or table), computed (exact from these), assumed, measured (in a run), published (by others)."""

    key: str
    label: str
    value: float | int | str | None
    shown: str
    origin: Origin
    formula: str = ""


@dataclass
class Section:
    """A titled group of lines, with remarks after them."""

    title: str
    lines: list[Line] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, key: str, label: str, value: float | int | str | None, shown: str, origin: Origin, formula: str = "") -> None:
        """Appends one line."""
        self.lines.append(Line(key, label, value, shown, origin, formula))

    def text(self) -> list[str]:
        """The section as lines of text: label, number, origin, formula. Assumed numbers are marked in capitals."""
        label = max((len(line.label) for line in self.lines), default=0)
        shown = max((len(line.shown) for line in self.lines), default=0)
        rows = [self.title]
        for line in self.lines:
            origin = "ASSUMED" if line.origin == "assumed" else line.origin
            rows.append(f"  {line.label:<{label}}  {line.shown:>{shown}}  {origin:<9}  {line.formula}".rstrip())
        return rows + [f"  ! {remark}" for remark in self.remarks]

    def json(self) -> dict[str, object]:
        """The section as plain data."""
        rows = {
            line.key: {"value": line.value, "shown": line.shown, "origin": line.origin, "formula": line.formula}
            for line in self.lines
        }
        return {"title": self.title, "numbers": rows, "remarks": list(self.remarks)}


def _scaled(value: float, units: tuple[str, ...], base: float, digits: int = 3) -> str:
    power = 0
    while abs(value) >= base * (1 - 0.5 * 10.0**-digits) and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{significant(value, digits)} {units[power]}".strip()


def significant(value: float, digits: int = 3) -> str:
    """`value` with so many significant digits, without exponent: 1234.5 -> 1,234 (never fewer than the integer digits)."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def size(value: float) -> str:
    """Bytes in decimal units: 594 GB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB", "EB"), 1000)


def count(value: float) -> str:
    """A large count: 32.9 B, 1.07 B, 4.30 M."""
    return _scaled(value, ("", "k", "M", "B", "T"), 1000)


def parameters(value: float) -> str:
    """Parameters: thousands of billions stay billions, as the field writes them (1,026.4 B)."""
    return f"{value / 1e9:,.1f} B" if value >= 1e11 else count(value)


def flop(value: float) -> str:
    """Floating point operations in scientific notation with the FLOP suffix."""
    return f"{value:.2e} FLOP"


def duration(seconds: float) -> str:
    """Seconds as the unit that reads best."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h"), (86400 * 730, 86400, "days")):
        if seconds < limit:
            return f"{significant(seconds / unit)} {name}"
    return f"{significant(seconds / (86400 * 365.25))} years"


def money(dollars: float) -> str:
    """Dollars: cents below a hundred, whole above."""
    return f"${dollars:,.2f}" if dollars < 100 else f"${dollars:,.0f}"
