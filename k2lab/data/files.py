"""Finding and reading users' files, with errors that name file, line and what is wrong there."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from k2lab.core.errors import DataError


def expand(path: str | tuple[str, ...] | list[str]) -> list[tuple[str, Path]]:
    """The files that a path, a glob (`**` allowed) or a list of those names, each once, as sorted (name, path).

    `name` is relative to the folder that all files share, so keys made of it do not change when the data set moves.
    Raises DataError for a path or glob without any file.
    """
    patterns = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not patterns:
        raise DataError("no path was given", where="path", next="Give a file, a glob, or a list of those")
    found: set[str] = set()
    for pattern in map(os.path.expanduser, map(str, patterns)):
        matched = [pattern] if os.path.isfile(pattern) else [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not matched:
            raise DataError("no file matches", where=pattern, next=f"Paths are relative to {os.getcwd()}; give one that exists")
        found.update(os.path.abspath(p) for p in matched)
    root = os.path.commonpath([os.path.dirname(p) for p in found])
    return [(Path(p).relative_to(root).as_posix(), Path(p)) for p in sorted(found)]


def digest_files(files: list[tuple[str, Path]], *settings: object) -> str:
    """sha256 hex over `settings` and every file's name and bytes."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"\n{name}\0{content}".encode())
    return digest.hexdigest()


def read_jsonl(path: Path, name: str | None = None) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank; `.gz` files are unpacked.

    Raises DataError `file:line: what` for a line that is not UTF-8 or not JSON; `name` is how errors call the file.
    """
    called = name or str(path)
    with _open_bytes(path) as file:
        number = 0
        try:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, _parse(line, f"{called}:{number}")
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"the gzip file is damaged: {error}", where=f"{called}:{number + 1}") from None


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse(line: bytes, where: str) -> Any:
    try:
        value = json.loads(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise DataError("the line holds half of a character (a lone \\ud800 to \\udfff escape)", where=where) from None
    except UnicodeDecodeError as error:
        raise DataError(f"the line is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}", where=where) from None
    except ValueError as error:
        shown = line.decode("utf-8", errors="replace").strip()
        got = shown if len(shown) <= 80 else shown[:77] + "..."
        is_array = line.lstrip().startswith(b"[")
        hint = (
            "If the file is one JSON array, turn it into lines: jq -c '.[]' FILE" if is_array else "Correct or remove that line"
        )
        raise DataError(f"the line is not JSON: {error}", where=where, got=got, next=hint) from None
    except RecursionError:
        raise DataError("the line is nested too deeply", where=where) from None
