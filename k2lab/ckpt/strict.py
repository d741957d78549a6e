"""Reading JSON that a stranger may have written: bounded size and depth, no double keys, no NaN, one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2lab.core.errors import CheckpointError

MAX_JSON_BYTES = 512 << 20  # the index of Kimi K2 in INT4 (207,000 tensors) has about 25 MB


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError if it is none, has a key twice, is nested too deep or is no UTF-8."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError("the JSON is nested too deep", where=where) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"this is not JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object is needed here", where=where, got=type(value).__name__)
    return value


def read_object(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError if the file cannot be read, is too large or holds none."""
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise CheckpointError("this is no file", where=str(file))
        with file.open("rb") as stream:
            text = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"this file cannot be read: {error.strerror}", where=str(file)) from None
    if len(text) > max_bytes:
        raise CheckpointError("this JSON file is too large", where=str(file), allowed=f"{max_bytes} bytes")
    return parse_object(text, str(file))


def is_count(value: Any) -> bool:
    """True for an integer of 0 or more that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """True for a finite int or float that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:200]!r} occurs twice")
            seen.add(key)
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
