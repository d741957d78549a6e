"""Numbers as people read them: SI prefixes, three significant digits, a real minus sign, durations, dates."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

MINUS = "\u2212"
THIN = "\u202f"  # narrow no-break space: groups digits and stands between a number and its unit
DASH = "\u2013"


def number(value: Any) -> float | None:
    """`value` as a finite float, or None. Events write non-finite floats as strings; those are None too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def decimals(value: float, width: float | None = None) -> int:
    """Digits after the point: 3 significant digits of `value`, or 2 of the interval of `width` around it if there is one."""
    places = 2 if value == 0 else 2 - math.floor(math.log10(abs(value)))
    if width and width > 0:
        fine = 1 - math.floor(math.log10(width))
        places = fine if value == 0 else min(fine, places + 2)
    return max(0, min(places, 8))


def fixed(value: float, places: int, sign: bool = False) -> str:
    """`value` with `places` decimals, digits grouped in threes from 10,000 on; `sign` also writes the plus."""
    text = f"{abs(value):.{places}f}"
    whole, _, rest = text.partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", THIN)
    text = whole + ("." + rest if rest else "")
    if value < 0 and float(f"{abs(value):.{places}f}") != 0:
        return MINUS + text
    return "+" + text if sign and float(f"{abs(value):.{places}f}") != 0 else text


def plain(value: float | None) -> str:
    """Three significant digits: `2.05`, `0.000 312` as `3.12e-4`, `12 300`."""
    if value is None:
        return DASH
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.replace('-', MINUS)}e{int(exponent)}".replace("e-", f"e{MINUS}")
    return fixed(value, decimals(value))


def tick(value: float, step: float) -> str:
    """An axis label: as many decimals as the distance `step` of the ticks needs."""
    if not value:
        return (
            "0" if 0 < step < 1e-3 else fixed(0.0, max(0, min(6, -math.floor(math.log10(step) + 1e-9)))) if step else plain(value)
        )
    if abs(value) >= 1e5 or 0 < step < 1e-5:
        return compact(value)
    return fixed(value, max(0, min(6, -math.floor(math.log10(step) + 1e-9)))) if step else plain(value)


def compact(value: float) -> str:
    """Short axis numbers: `1.5k`, `2M`, `3e-4`."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{letter}".replace("-", MINUS)
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def count(value: float | None) -> str:
    """Counts of things: in full up to 99,999, then with an SI prefix."""
    if value is None:
        return DASH
    if abs(value) < 1e5:
        return fixed(value, 0) if float(value).is_integer() else plain(value)
    for limit, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{plain(value / limit)}{THIN}{word}"
    return plain(value)


def size(num_bytes: float | None) -> str:
    """Bytes with SI prefixes (1 MB = 1,000,000 bytes)."""
    if num_bytes is None:
        return DASH
    for limit, word in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(num_bytes) >= limit:
            return f"{plain(num_bytes / limit)}{THIN}{word}"
    return f"{num_bytes:.0f}{THIN}B"


def duration(seconds: float | None) -> str:
    """`0.42 s`, `42.1 s`, `3 min 42 s`, `1 h 03 min`, `2 d 04 h`."""
    if seconds is None:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f}{THIN}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    whole = round(seconds / 60)
    if whole < 48 * 60:
        return f"{whole // 60}{THIN}h {whole % 60:02d}{THIN}min"
    return f"{whole // 1440}{THIN}d {whole % 1440 // 60:02d}{THIN}h"


def when(moment: Any) -> str:
    """Seconds since 1970 or an ISO text as `22 Nov 2025, 00:41 UTC`; another text is returned as it is."""
    seconds = number(moment)
    try:
        if seconds is not None:
            point = datetime.fromtimestamp(seconds, UTC)
        else:
            point = datetime.fromisoformat(str(moment))
            point = point.astimezone(UTC) if point.tzinfo else point.replace(tzinfo=UTC)
    except (ValueError, OverflowError, OSError):
        return str(moment or "")
    return f"{point.day} {point:%b %Y, %H:%M} UTC"


def scaled(unit: str) -> tuple[float, str]:
    """Factor and shown unit: shares between 0 and 1 are shown in percent."""
    if unit.lower() in ("fraction", "share", "rate", "proportion", "ratio 0-1"):
        return 100.0, "%"
    return 1.0, unit
