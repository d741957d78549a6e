"""A folder of plain text files, one record per file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2lab.core.errors import DataError, RecipeError
from k2lab.data import files
from k2lab.data.records import Record


@dataclass(frozen=True, kw_only=True)
class TextFolder:
    """Plain UTF-8 text files, one record per file.

    Raises DataError naming a file that is binary (holds a NUL byte) or not UTF-8, unless `errors = "skip"`; then one warning
    says how many files were left out.
    """

    path: str | tuple[str, ...]  # a glob such as "notes/**/*.md" (`**` = any depth), a file, a folder, or a list of those
    errors: Literal["raise", "skip"] = "raise"  # what to do with files that are no text
    name: str = "text_folder"  # source of the records and begin of their keys
    domain: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(map(str, self.path)))
        if self.errors not in ("raise", "skip"):
            raise RecipeError("errors must be known", got=self.errors, allowed="raise, skip")

    def records(self) -> Iterator[Record]:
        """Text records in order of file name; the key is `name:file`."""
        tags = {tag: text for tag, text in (("domain", self.domain), ("license", self.license)) if text}
        skipped: list[str] = []
        for name, path in self._files():
            try:
                text = _read(path)
            except DataError as error:
                if self.errors == "raise":
                    raise
                skipped.append(str(error))
                continue
            yield {"key": f"{self.name}:{name}", "text": text, "source": self.name, **tags}
        if skipped:
            warnings.warn(f"{self.name}: {len(skipped)} files were left out, the first: {skipped[0]}", stacklevel=2)

    def _files(self) -> list[tuple[str, Path]]:
        patterns = [self.path] if isinstance(self.path, str) else self.path
        return files.expand([str(Path(p) / "**" / "*") if Path(p).expanduser().is_dir() else p for p in patterns])

    def fingerprint(self) -> str:
        """sha256 hex over the settings but `path`, and every file's name and bytes."""
        return files.digest_files(self._files(), self.errors, self.name, self.domain, self.license)

    @staticmethod
    def examples() -> list[TextFolder]:
        return [TextFolder(path="notes/**/*.md", domain="notes"), TextFolder(path="books", errors="skip")]


def _read(path: Path) -> str:
    raw = path.read_bytes()
    hint = 'Take it out of the glob, convert it to UTF-8, or set errors = "skip"'
    if b"\0" in raw:
        raise DataError(f"the file is binary: byte {raw.index(0) + 1} is NUL", where=str(path), next=hint)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        bad = f"byte {error.start + 1} (line {line}) is {raw[error.start]:#04x}"
        raise DataError(f"the file is not UTF-8: {bad}", where=str(path), next=hint) from None
