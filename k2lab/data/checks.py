"""Checking a data set on disk against its own index: every count, every offset, every line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from k2lab.core.errors import DataError
from k2lab.data import files
from k2lab.data.records import check_record, text_of
from k2lab.data.shards import FORMAT, INDEX, TokenReader, read_index


def check(folder: Path) -> list[str]:
    """Reads all splits of the data set `folder` and returns what is wrong, in plain words; empty = everything fits.

    Records: each line is a record, keys are unique within and across splits, and counts per shard, domain and source are exact.
    Tokens: file sizes, counts and text bytes are exact, offsets rise, ids lie in the vocabulary, keys are unique.
    """
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
    if not splits:
        return [f"{folder}: no split with an {INDEX}"]
    problems: list[str] = []
    owner: dict[str, dict[str, str]] = {"records": {}, "tokens": {}}
    for split in splits:
        path = folder / split / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{path}: not JSON: {error}")
            continue
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            problems.append(f"{path}: format is not {FORMAT}")
            continue
        for section, run in (("records", _check_records), ("tokens", _check_tokens)):
            if section not in index:
                continue
            try:
                problems += run(folder, split, owner[section])
            except DataError as error:
                problems.append(str(error))
            except (KeyError, TypeError, AttributeError) as error:
                problems.append(f"{path}: the section {section!r} is damaged: {type(error).__name__}: {error}")
    return problems


def _check_records(folder: Path, split: str, owner: dict[str, str]) -> list[str]:
    index = read_index(folder, split, "records")
    problems: list[str] = []
    total = _zeros("records", "chars", "text_bytes")
    by: dict[str, dict[str, dict[str, int]]] = {"domains": {}, "sources": {}}
    for shard in index["shards"]:
        path = folder / split / shard["file"]
        if not path.is_file():
            problems.append(f"{path}: missing although the index lists it")
            continue
        counts = _zeros("records", "chars", "text_bytes")
        try:
            for number, value in files.read_jsonl(path):
                at = f"{path}:{number}"
                record = check_record(value, at)
                _claim(record.get("key"), split, owner, at, problems)
                text = text_of(record)
                one = {"records": 1, "chars": len(text), "text_bytes": len(text.encode("utf-8", "surrogatepass"))}
                tables = [
                    by[t].setdefault(record.get(tag) or "", {}) for t, tag in (("domains", "domain"), ("sources", "source"))
                ]
                _add(one, counts, total, *tables)
        except DataError as error:
            problems.append(str(error))
            continue  # the rest of this shard was not read, so its counts say nothing
        problems += _compare(str(path), {**counts, "file_bytes": path.stat().st_size}, shard)
    if not problems:
        problems += _compare(f"{folder / split / INDEX}, records", {**total, **by}, index)
    return problems


def _check_tokens(folder: Path, split: str, owner: dict[str, str]) -> list[str]:
    reader = TokenReader(folder, split)  # sizes, shapes and number types
    where = f"{folder / split}, tokens"
    problems: list[str] = []
    total = _zeros("documents", "tokens", "text_bytes")
    by: dict[str, dict[str, dict[str, int]]] = {"domains": {}, "sources": {}}
    for stem, offsets, tokens, shard in zip(reader._stems, reader._offsets, reader._tokens, reader.index["shards"]):
        path = stem.with_suffix(".idx")
        if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) <= 0).any():
            problems.append(f"{path}: offsets must rise from 0 to {shard['tokens']}; they go from {offsets[0]} to {offsets[-1]}")
        top = int(tokens.max())
        if top >= reader.vocab_size:
            at = int(np.argmax(tokens >= reader.vocab_size))
            problems.append(f"{stem.with_suffix('.bin')}: token {at} is {int(tokens[at])}, not under {reader.vocab_size}")
        _add({"documents": len(offsets) - 1, "tokens": len(tokens), "text_bytes": 0}, total)
    for i, (length, size) in enumerate(zip(reader.lengths.tolist(), reader.text_bytes.tolist())):
        _claim(reader.key(i), split, owner, f"{where}, document {i}", problems)
        one = {"documents": 1, "tokens": length, "text_bytes": size}
        _add(one, by["domains"].setdefault(reader.domain(i), {}), by["sources"].setdefault(reader.source(i), {}))
    total["text_bytes"] = int(reader.text_bytes.sum())
    if not problems:
        problems += _compare(where, {**total, **by}, reader.index)
        problems += _compare_shards(reader)
    return problems


def _compare_shards(reader: TokenReader) -> list[str]:
    problems, first = [], 0
    for stem, shard in zip(reader._stems, reader.index["shards"]):
        found = int(reader.text_bytes[first : first + shard["documents"]].sum())
        problems += _compare(str(stem.with_suffix(".bytes")), {"text_bytes": found}, shard)
        first += shard["documents"]
    return problems


def _zeros(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def _add(one: dict[str, int], *tables: dict[str, int]) -> None:
    for table in tables:
        for name, count in one.items():
            table[name] = table.get(name, 0) + count


def _claim(key: Any, split: str, owner: dict[str, str], at: str, problems: list[str]) -> None:
    if not isinstance(key, str) or not key:
        problems.append(f"{at}: no key")
    elif key in owner:
        problems.append(f"{at}: the key {key!r} occurs twice (also in {owner[key]})")
    else:
        owner[key] = split


def _compare(where: str, found: dict[str, Any], said: dict[str, Any]) -> list[str]:
    return [
        f"{where}: {name} is {value}, the index says {said.get(name)}" for name, value in found.items() if said.get(name) != value
    ]
