"""An append-only file of finished pieces of work, one JSON line each: what a killed stage had done and need not do again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2lab.core.artifacts import disk_errors


class Journal:
    """Lines of `path`. Opening it drops what a kill left behind: a last line that has no end or is no JSON.

    A line is one whole piece of work; its numbers come out of one batch, so a piece is either there or done again in full.
    Not for several threads at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Any] = []
        end = 0
        with disk_errors(path):
            raw = path.read_bytes() if path.exists() else b""
            for line in raw.splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.entries.append(entry)
                end += len(line)
            if end < len(raw):
                with path.open("rb+") as file:
                    file.truncate(end)
            self._file = path.open("ab")

    def add(self, entry: Any) -> None:
        """Appends one entry; when this returns, a killed process has it (the kernel holds it; power loss is another matter)."""
        line = json.dumps(entry, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with disk_errors(self.path):
            self._file.write(line)
            self._file.flush()
        self.entries.append(entry)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
