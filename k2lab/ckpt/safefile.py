"""The safetensors file format, read and written without trust: every byte of the file is accounted for before any is used.

A file is the length of its header (u64, little endian), the header (a JSON object, padded with blanks to a multiple of 8) and the
data. The header maps each name to `{"dtype", "shape", "data_offsets": [start, end]}`, offsets counted from the start of the data;
`__metadata__` maps texts to texts. The tensors cover the data without gap or overlap (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k2lab.ckpt.strict import is_count, parse_object
from k2lab.core.artifacts import disk_errors
from k2lab.core.errors import CheckpointError

MAX_HEADER = 100_000_000  # the safetensors library's own bound
MAX_DIMS = 16
# What safetensors calls a type: torch's type.
TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items()}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # numpy's stand-in for a type of so many bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: `dtype` by safetensors' name, `shape`, its bytes [start, end) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def itemsize(dtype: str) -> int:
    """Bytes of one value of a type by safetensors' name."""
    return TORCH[dtype].itemsize


# ---------------------------------------------------------------- reading


class SafeFile:
    """One safetensors file whose header has been proven to describe exactly the bytes that are there.

    `path`, `entries` {name: Entry} in the order of the data, `metadata` {text: text}, `size` in bytes. The file stays open, so
    that a file of the same name written later cannot be mixed in. Raises CheckpointError for a file that is cut off, has more
    bytes than tensors, or a header that is damaged in any way.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        try:
            if self.path.exists() and not self.path.is_file():  # a pipe would be waited for
                raise CheckpointError("this is no file", where=str(path))
            self._file = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"this file cannot be opened: {error.strerror}", where=str(path)) from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.entries, self.metadata = self._header()
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"this file cannot be read: {error.strerror}", where=str(path)) from None
        except BaseException:
            self._file.close()
            raise

    def __repr__(self) -> str:
        return f"SafeFile({str(self.path)!r}, tensors={len(self.entries)}, bytes={self.size})"

    def __enter__(self) -> SafeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; memory that `bytes` gave out stays valid until it is no longer used."""
        self._file.close()
        self._map = None

    def _wrong(self, what: str, name: str | None = None, **more: Any) -> CheckpointError:
        where = f"{name[:200]} in {self.path}" if name is not None else str(self.path)
        return CheckpointError(what, where=where, **more)

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        length_bytes = self._file.read(8)
        if len(length_bytes) < 8:
            raise self._wrong("this file is cut off: it has no header", got=f"{self.size} bytes")
        length = int.from_bytes(length_bytes, "little")
        if length > MAX_HEADER or length < 2:
            raise self._wrong("this is no safetensors file: the header's length is out of bounds", got=length)
        if 8 + length > self.size:
            raise self._wrong("this file is cut off within its header", got=f"{self.size} bytes", allowed=f"{8 + length} or more")
        text = self._file.read(length)
        if not text.startswith(b"{"):
            raise self._wrong("this is no safetensors file: the header does not begin with {", got=text[:20])
        table = parse_object(text, f"header of {self.path}")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._wrong("__metadata__ must map texts to texts", got=metadata)
        entries = {name: self._entry(name, value, 8 + length) for name, value in table.items()}
        return self._covered(entries, 8 + length), metadata

    def _entry(self, name: str, value: Any, base: int) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._wrong("a tensor of the header has dtype, shape and data_offsets", name, got=value)
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in TORCH:
            raise self._wrong("this type of values is not known", name, got=dtype, allowed=", ".join(TORCH))
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(is_count, shape)):
            raise self._wrong(f"a shape is a list of up to {MAX_DIMS} sizes", name, got=shape)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)) or offsets[0] > offsets[1]:
            raise self._wrong("data_offsets are two ascending positions", name, got=offsets)
        size = math.prod(shape) * itemsize(dtype)
        if offsets[1] - offsets[0] != size:
            raise self._wrong(
                "the tensor's bytes are not those of its shape and type",
                name,
                got=f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}",
                allowed=f"{size} bytes",
            )
        if base + offsets[1] > self.size:
            raise self._wrong(
                "this file is cut off: the tensor ends behind the file's end",
                name,
                got=f"{self.size} bytes",
                allowed=f"{base + offsets[1]} bytes or more",
            )
        return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])

    def _covered(self, entries: dict[str, Entry], base: int) -> dict[str, Entry]:
        """The entries in the order of the data, proven to cover it once."""
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        at = base
        for name, entry in ordered.items():
            if entry.start != at:
                kind = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
                raise self._wrong(f"the tensor {kind}", name, got=f"start {entry.start}", allowed=f"start {at}")
            at = entry.end
        if at != self.size:
            raise self._wrong("this file has more bytes than its tensors", got=f"{self.size} bytes", allowed=f"{at} bytes")
        return ordered

    # ------------------------------------------------------------ values

    def bytes(self, name: str) -> memoryview:
        """The tensor's bytes as stored, mapped, not copied; read-only. Raises CheckpointError if the file has become shorter."""
        entry = self.entries[name]
        self._still_there(name)
        return memoryview(self._mapped())[entry.start : entry.end]

    def tensor(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """The tensor or a part of it as a fresh CPU tensor: `rows` of its first axis, `columns` of a matrix's last. Only these
        bytes are read. Raises CheckpointError if the file has become shorter since it was opened."""
        entry = self.entries[name]
        shape, first, last = entry.shape, *self._part(entry, rows, columns)
        dtype = TORCH[entry.dtype]
        if columns is None or (last.start, last.stop) == (0, shape[-1]):
            row = math.prod(shape[1:]) * dtype.itemsize
            start = entry.start + (first.start * row if shape else 0)
            found = torch.empty((first.stop - first.start, *shape[1:]) if shape else (), dtype=dtype)
            self._fill(found, start, name)
            return found
        if not first.stop - first.start or not last.stop - last.start:
            return torch.empty((first.stop - first.start, last.stop - last.start), dtype=dtype)
        self._still_there(name)
        raw = np.frombuffer(self._mapped(), _RAW[dtype.itemsize], math.prod(shape), entry.start)
        part = raw.reshape(shape)[first, last]
        found = torch.empty(part.shape, dtype=dtype)
        found.view(torch.uint8).numpy().view(raw.dtype)[...] = part
        return found

    def read_into(self, target: torch.Tensor, name: str, rows: slice | None = None) -> None:
        """Fills `target`, a contiguous CPU tensor of the stored type, with rows of the tensor, without a copy in between. Raises
        CheckpointError if the file has become shorter since it was opened."""
        entry = self.entries[name]
        first, _ = self._part(entry, rows, None)
        shape = (first.stop - first.start, *entry.shape[1:]) if entry.shape else ()
        assert tuple(target.shape) == shape and target.dtype == TORCH[entry.dtype] and target.is_contiguous(), "another tensor"
        self._fill(target, entry.start + first.start * math.prod(entry.shape[1:]) * target.element_size(), name)

    def release(self, name: str | None = None) -> None:
        """Gives the memory of mapped pages (of one tensor, or all) back to the system; they are read again when needed."""
        if self._map is None:
            return
        start, end = 0, self.size
        if name is not None:
            start, end = self.entries[name].start // mmap.PAGESIZE * mmap.PAGESIZE, self.entries[name].end
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _still_there(self, name: str) -> None:
        """A mapped page behind the file's end would kill the process."""
        if os.fstat(self._file.fileno()).st_size < self.entries[name].end:
            raise self._wrong("this file became shorter while it was read", name)

    def _part(self, entry: Entry, rows: slice | None, columns: slice | None) -> tuple[slice, slice]:
        shape = entry.shape
        assert rows is None or shape, "a number has no rows"
        assert columns is None or len(shape) == 2, "only a matrix has columns"
        return span(rows, shape[0] if shape else 1), span(columns, shape[-1] if shape else 1)

    def _fill(self, tensor: torch.Tensor, start: int, name: str) -> None:
        if not tensor.numel():
            return
        # the operating system gives at most 2 GiB a call
        buffer = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done : done + (1 << 30)]], start + done)
            if not count:
                raise self._wrong("this file became shorter while it was read", name)
            done += count

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


def span(part: slice | None, size: int) -> slice:
    """`part` of an axis with `size` values as a slice from start to stop, within the axis."""
    if part is None:
        return slice(0, size)
    start, stop, step = part.indices(size)
    assert step == 1, "only contiguous parts are read"
    return slice(start, max(start, stop))


# ---------------------------------------------------------------- writing


class Writer:
    """Writes one safetensors file as a stream: the header first, then the tensors' bytes in the order of `entries`.

    `entries` maps each name to (dtype, shape), or to an `Entry`, whose positions are not used. What is written lies under
    `<path>.tmp` until `close`, which checks that every tensor is complete, syncs and renames; leaving the `with` block by an
    error removes it. With `digest` the file's sha256 is known after `close`.
    """

    def __init__(
        self,
        path: Path | str,
        entries: Mapping[str, Entry | tuple[str, Iterable[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        digest: bool = False,
    ) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self._digest = hashlib.sha256() if digest else None
        header, self.entries = _layout(entries, metadata)
        self.size = next(reversed(self.entries.values())).end if self.entries else len(header)
        self._order = iter(self.entries.items())
        self._name, self._left = "", 0
        with disk_errors(self.path):
            self._file = self.temporary.open("wb", buffering=0)
        self._put(memoryview(header))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # after an error, also one of the sync, nothing stays; a closed file has its own name by then
            self.abort()

    def write(self, name: str, data: Any) -> None:
        """The next bytes of the tensor `name`: a tensor, an array or anything with a buffer; in pieces, if it is long. Tensors
        come in the order of `entries`."""
        if isinstance(data, torch.Tensor):
            data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        piece = memoryview(data)
        piece = piece if piece.ndim == 1 and piece.itemsize == 1 else _flat(data)
        while name != self._name:
            assert not self._left, f"{name} is written while {self._name} lacks {self._left} bytes"
            assert self._next(), f"{name} is written, but it was not announced, or others came after it"
        assert piece.nbytes <= self._left, f"{name} has {piece.nbytes - self._left} bytes too many"
        self._left -= piece.nbytes
        self._put(piece)

    @property
    def sha256(self) -> str:
        """sha256 hex of all bytes written; needs `digest=True`."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def close(self) -> None:
        """Checks that all tensors are complete, syncs the file to the disk and gives it its name."""
        while not self._left and self._next():
            continue
        if self._left:
            self.abort()
            raise AssertionError(f"{self._name} lacks {self._left} bytes")
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.temporary, self.path)

    def abort(self) -> None:
        """Removes what was written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def _next(self) -> bool:
        """Goes on to the next tensor; False if there is none."""
        name, entry = next(self._order, ("", None))
        if entry is None:
            return False
        self._name, self._left = name, entry.size
        return True

    def _put(self, piece: memoryview) -> None:
        with disk_errors(self.path):
            done = 0
            while done < piece.nbytes:
                done += self._file.write(piece[done : done + (1 << 30)]) or 0
        if self._digest is not None:
            self._digest.update(piece)


def _flat(data: Any) -> memoryview:
    view = memoryview(data)
    if view.c_contiguous:
        return view.cast("B")
    return memoryview(np.ascontiguousarray(data)).cast("B")


def _layout(
    entries: Mapping[str, Entry | tuple[str, Iterable[int]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Entry]]:
    """The header's bytes, its length included, and the entries with their positions in the file."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    found: list[tuple[str, str, tuple[int, ...], int, int]] = []
    at = 0
    for name, entry in entries.items():
        dtype, shape = (entry.dtype, entry.shape) if isinstance(entry, Entry) else (entry[0], tuple(entry[1]))
        end = at + math.prod(shape) * itemsize(dtype)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        found.append((name, dtype, shape, at, end))
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER, "too many tensors for one file"
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: Entry(dtype, shape, base + start, base + end) for name, dtype, shape, start, end in found
    }
