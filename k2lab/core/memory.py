"""Resident memory of this process, now and at its peak since the last reset."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def _field(name: str) -> float | None:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def rss_mb() -> float:
    """Resident set size in MiB."""
    value = _field("VmRSS:")
    return round(value, 1) if value is not None else peak_rss_mb()


def peak_rss_mb() -> float:
    """Peak resident set size in MiB since the last `reset_peak` (since process start where that is not supported)."""
    value = _field("VmHWM:")
    if value is None:
        unit = 1 if sys.platform == "darwin" else 1024
        value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)
    return round(value, 1)


def reset_peak() -> None:
    """Starts a new peak measurement (Linux; elsewhere the peak stays that of the process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
