"""The data set format on disk: records as JSON lines, tokens as flat binary shards, both counted exactly.

    <folder>/<split>/index.json            format, and the sections "records" and "tokens" with counts per shard and per tag
    <folder>/<split>/records-00000.jsonl   one record a line
    <folder>/<split>/tokens-00000.bin      token ids of all documents, u16 (vocabulary of at most 65,536) or u32, little endian
    <folder>/<split>/tokens-00000.idx      npy, i64[documents + 1]: where each document starts in the .bin, in tokens
    <folder>/<split>/tokens-00000.bytes    npy, i64[documents]: UTF-8 bytes of each document's text
    <folder>/<split>/tokens-00000.docs     JSON lines [key, domain, source], one per document

The index is written last and through a rename: a split without it does not exist. Nothing here holds times or machine names,
so the same records give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import DataError
from k2lab.core.rng import derive
from k2lab.data import files
from k2lab.data.records import Record, check_record, group_of, text_of

FORMAT = 1
INDEX = "index.json"
SPLITS = ("train", "valid")
_REMAKE = "Make the data set again"


def split_of(record: Record, valid_share: float, seed: int) -> str:
    """ "train" or "valid": what the record's own `split` says, else by its group (its `group`, else `module`, else `key`):
    groups are held out whole.

    A group's split depends on nothing but the seed, its name and the share; a larger share only adds groups to "valid".
    """
    if not 0.0 <= valid_share < 1.0:
        raise DataError("valid_share must be a share", got=valid_share, allowed="at least 0, under 1")
    if record.get("split"):
        return str(record["split"])
    return "valid" if derive(seed, "split", group_of(record)) < valid_share * 2.0**128 else "train"


# ---------------------------------------------------------------- index


def read_index(folder: Path, split: str, section: str) -> dict[str, Any]:
    """The section "records" or "tokens" of a split's index. Raises DataError if it is missing or of another format."""
    path = folder / split / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        have = sorted(p.parent.name for p in folder.glob(f"*/{INDEX}"))
        raise DataError(f"there is no split {split!r}", where=str(folder), allowed=", ".join(have) or "none yet") from None
    except ValueError as error:
        raise DataError(f"the index is not JSON: {error}", where=str(path), next=_REMAKE) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        got = index.get("format") if isinstance(index, dict) else index
        raise DataError("the data set has a format not read here", where=str(path), got=got, allowed=str(FORMAT))
    if section not in index:
        raise DataError(f"the split holds no {section}", where=str(path), got="sections " + ", ".join(index))
    return index[section]


def _add_section(folder: Path, split: str, section: str, value: dict[str, Any]) -> None:
    path = folder / split / INDEX
    index: dict[str, Any] = {"format": FORMAT}
    if path.exists():
        index = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**index, section: value})


def _clear(folder: Path, split: str, stem: str) -> Path:
    """The split's folder, without shards of `stem` that an earlier attempt left."""
    target = folder / split
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob(f"{stem}-[0-9][0-9][0-9][0-9][0-9].*"):
            old.unlink()
    return target


class _Tally:
    """Sums per tag value: {"records": ..., "chars": ..., ...} per domain and per source."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.by: dict[str, dict[str, dict[str, int]]] = {"domains": {}, "sources": {}}

    def add(self, domain: str, source: str, **counts: int) -> None:
        for table in (self.total, self.by["domains"].setdefault(domain, {}), self.by["sources"].setdefault(source, {})):
            for name, count in counts.items():
                table[name] = table.get(name, 0) + count

    def as_json(self) -> dict[str, Any]:
        return {**self.total, **{tag: dict(sorted(table.items())) for tag, table in self.by.items()}}


# ---------------------------------------------------------------- records


def write_records(folder: Path, records: Iterable[Record], split: str, shard_bytes: int = 1 << 26) -> dict[str, Any]:
    """Writes one split's records in shards of about `shard_bytes`; returns the index's section "records":
    `records`, `chars` and `text_bytes` (of `text_of`), the same per domain and source, and `shards` with `file_bytes` each.

    Raises DataError if there is no record, or one without a key or with a key that occurred before.
    """
    target = _clear(folder, split, "records")
    tally, seen = _Tally(), set[str]()
    shards: list[dict[str, Any]] = []
    out: BinaryIO | None = None
    try:
        with disk_errors(target):
            for record in records:
                key = record.get("key")
                if not isinstance(key, str) or not key:
                    raise DataError("a record has no key", where=f"split {split}", got=repr(record))
                if key in seen:
                    hint = "Give sources of one type different names (`name = ...`), or make the records' own keys unique"
                    raise DataError("two records have the same key", where=f"split {split}", got=key, next=hint)
                seen.add(key)
                counts, line = _measure(record)
                if out is None or shards[-1]["file_bytes"] >= shard_bytes:
                    if out is not None:
                        out.close()
                    shards.append({"file": f"records-{len(shards):05d}.jsonl", **dict.fromkeys(counts, 0), "file_bytes": 0})
                    out = (target / shards[-1]["file"]).open("wb")
                out.write(line)
                tally.add(record.get("domain") or "", record.get("source") or "", **counts)
                for name, count in {**counts, "file_bytes": len(line)}.items():
                    shards[-1][name] += count
    finally:
        if out is not None:
            out.close()
    if not shards:
        raise DataError(f"there is no record for the split {split!r}", where=str(folder))
    section = {**tally.as_json(), "shards": shards}
    _add_section(folder, split, "records", section)
    return section


def _measure(record: Record) -> tuple[dict[str, int], bytes]:
    """A record's counts and its line. Raises DataError for a text that UTF-8 cannot hold or a value that JSON cannot."""
    text = text_of(record)
    try:
        counts = {"records": 1, "chars": len(text), "text_bytes": len(text.encode())}
        return counts, json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise DataError(f"the record cannot be written as JSON: {error}", where=record["key"]) from None


def read_records(folder: Path, split: str) -> Iterator[Record]:
    """The split's records in the order written. Raises DataError `file:line: what` for a damaged line, or a shard that has
    another number of records than the index says."""
    for shard in read_index(folder, split, "records")["shards"]:
        path, count = folder / split / shard["file"], 0
        if not path.is_file():
            raise DataError("the shard is missing although the index lists it", where=str(path), next=_REMAKE)
        for number, value in files.read_jsonl(path):
            if not isinstance(value, dict):
                raise DataError("the line is not a record", where=f"{path}:{number}", got=type(value).__name__, next=_REMAKE)
            count += 1
            yield value
        if count != shard["records"]:
            got = f"{count} records"
            raise DataError("the shard was changed", where=str(path), got=got, allowed=str(shard["records"]), next=_REMAKE)


# ---------------------------------------------------------------- tokens


class TokenWriter:
    """Writes one split's tokenised documents. Use as a context manager; leaving it without an exception writes the index.

    `vocab_size` decides the width (u16 up to 65,536); `shard_tokens` is about how many tokens go into a shard;
    `tokenizer` identifies what made the ids (kept in the index).
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, *, shard_tokens: int = 1 << 27, tokenizer: str = "") -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._target = _clear(folder, split, "tokens")
        self._tally, self._shards = _Tally(), list[dict[str, Any]]()
        self._seen = set[str]()
        self._bin: BinaryIO | None = None
        self._docs: TextIO | None = None
        self._lengths, self._text_bytes = list[int](), list[int]()

    def add(self, tokens: Sequence[int] | np.ndarray, *, key: str, text_bytes: int, domain: str = "", source: str = "") -> None:
        """Appends one document of i[T] token ids; raises DataError for an id outside the vocabulary or a repeated key."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise DataError("a document must be a sequence of at least one token", where=key, got=f"shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            got = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError("a token id lies outside the vocabulary", where=key, got=got, allowed=f"0 to {self._vocab_size - 1}")
        if key in self._seen:
            raise DataError("two documents have the same key", where=f"split {self._split}", got=key)
        self._seen.add(key)
        with disk_errors(self._target):
            if self._bin is None or self._shards[-1]["tokens"] >= self._shard_tokens:
                self._open_shard()
            assert self._bin is not None and self._docs is not None
            self._bin.write(ids.astype(self._dtype).tobytes())
            self._docs.write(json.dumps([key, domain, source], ensure_ascii=False, separators=(",", ":")) + "\n")
        self._lengths.append(len(ids))
        self._text_bytes.append(text_bytes)
        counts = {"documents": 1, "tokens": len(ids), "text_bytes": text_bytes}
        self._tally.add(domain, source, **counts)
        for name, count in counts.items():
            self._shards[-1][name] += count

    def _open_shard(self) -> None:
        self._close_shard()
        stem = f"tokens-{len(self._shards):05d}"
        self._shards.append({"file": f"{stem}.bin", "documents": 0, "tokens": 0, "text_bytes": 0})
        self._bin = (self._target / f"{stem}.bin").open("wb")
        self._docs = (self._target / f"{stem}.docs").open("w", encoding="utf-8", newline="\n")

    def _close_shard(self) -> None:
        if self._bin is None or self._docs is None:
            return
        self._bin.close()
        self._docs.close()
        stem = self._target / self._shards[-1]["file"].removesuffix(".bin")
        for suffix, values in ((".idx", np.cumsum([0, *self._lengths])), (".bytes", np.array(self._text_bytes))):
            with disk_errors(self._target), stem.with_suffix(suffix).open("wb") as file:
                np.save(file, values.astype("<i8"))
        self._bin = self._docs = None
        self._lengths, self._text_bytes = [], []

    def close(self) -> dict[str, Any]:
        """Finishes the split; returns the index's section "tokens". Raises DataError if no document was added."""
        self._close_shard()
        if not self._shards:
            raise DataError(f"there is no document for the split {self._split!r}", where=str(self._folder))
        head = {"dtype": self._dtype.name, "vocab_size": self._vocab_size, "tokenizer": self._tokenizer}
        section = {**head, **self._tally.as_json(), "shards": self._shards}
        _add_section(self._folder, self._split, "tokens", section)
        return section

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close_shard()


class TokenReader:
    """A split's tokenised documents, memory-mapped: `reader[i]` is document i, a read-only array u16[T] or u32[T].

    `lengths` i64[documents], `text_bytes` i64[documents], `num_tokens`, `vocab_size`, `index` (the section "tokens").
    Raises DataError if a shard is missing or has another size than the index says.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.index = read_index(folder, split, "tokens")
        self.vocab_size: int = self.index["vocab_size"]
        self.num_tokens: int = self.index["tokens"]
        self._stems = [folder / split / shard["file"].removesuffix(".bin") for shard in self.index["shards"]]
        dtype = np.dtype(self.index["dtype"]).newbyteorder("<")
        self._tokens, self._offsets, text_bytes = [], [], []
        for stem, shard in zip(self._stems, self.index["shards"]):
            self._offsets.append(_load(stem, ".idx", (shard["documents"] + 1,)))
            text_bytes.append(_load(stem, ".bytes", (shard["documents"],)))
            path = stem.with_suffix(".bin")
            _require_size(path, shard["tokens"] * dtype.itemsize)
            self._tokens.append(np.asarray(np.memmap(path, dtype=dtype, mode="r")))
        self._first = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self.text_bytes = np.concatenate(text_bytes)
        self._names: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = int(i) + (len(self) if i < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        at = i - int(self._first[shard])
        offsets = self._offsets[shard]
        return self._tokens[shard][int(offsets[at]) : int(offsets[at + 1])]

    def _docs(self) -> list[list[str]]:
        if self._names is None:
            names = [value for stem in self._stems for _, value in files.read_jsonl(stem.with_suffix(".docs"))]
            if len(names) != len(self):
                got = f"{len(names)} documents"
                raise DataError("the .docs files were changed", where=str(self._stems[0].parent), got=got, allowed=str(len(self)))
            self._names = names
        return self._names

    def key(self, i: int) -> str:
        """The key of document i's record."""
        return self._docs()[i][0]

    def domain(self, i: int) -> str:
        """The domain tag of document i ("" for none)."""
        return self._docs()[i][1]

    def source(self, i: int) -> str:
        """The source of document i."""
        return self._docs()[i][2]

    @property
    def domains(self) -> list[str]:
        """The domain tags of all documents, in order: what `mixture.epoch_order` takes."""
        return [names[1] for names in self._docs()]


def _require_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DataError("the shard is missing although the index lists it", where=str(path), next=_REMAKE)
    if path.stat().st_size != size:
        got = f"{path.stat().st_size} bytes"
        raise DataError("the shard was changed", where=str(path), got=got, allowed=f"{size} bytes", next=_REMAKE)


def _load(stem: Path, suffix: str, shape: tuple[int, ...]) -> np.ndarray:
    path = stem.with_suffix(suffix)
    try:
        with path.open("rb") as file:
            values = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError("the file is missing although the index lists its shard", where=str(path), next=_REMAKE) from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"the file is not an npy array: {error}", where=str(path), next=_REMAKE) from None
    if values.shape != shape or values.dtype != np.dtype("<i8"):
        got = f"{values.dtype.name}{list(values.shape)}"
        raise DataError("the file was changed", where=str(path), got=got, allowed=f"int64{list(shape)}", next=_REMAKE)
    return values


# ---------------------------------------------------------------- checking


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
                one = {"records": 1, "chars": len(text), "text_bytes": len(text.encode())}
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
