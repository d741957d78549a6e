"""Process settings take effect where they can."""

from __future__ import annotations

import os
import sys

from k2lab.models import cpu


def test_memory_is_kept_where_glibc_is() -> None:
    assert cpu.keep_memory() == (sys.platform.startswith("linux") and "glibc" in os.confstr("CS_GNU_LIBC_VERSION").lower())
