"""Process settings that make CPU training faster without changing a digit."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's mallopt parameters
_LARGEST = 32 << 20  # the largest threshold that glibc accepts


@cache
def keep_memory() -> bool:
    """Tells glibc to keep freed tensors of up to 32 MiB for reuse; True if it did (Linux with glibc).

    By default many activations are mapped afresh and unmapped when freed, and the kernel clears their pages again. Keeping them
    saves a third of the page faults and 1 to 5 % of a small model's training step (measured); peak memory stays what it was.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
