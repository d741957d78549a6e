"""The page's style sheet and its one small script, kept beside this file as `page.css` and `page.js`."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

CSS = (_HERE / "page.css").read_text(encoding="utf-8")
SCRIPT = (_HERE / "page.js").read_text(encoding="utf-8")
