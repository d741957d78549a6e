"""One tensor from its source to its stored form: copied, decoded, or put on a grid, in pieces of rows that fit a cache.

Order of arithmetic, which decides the bits: the source decodes exactly (INT4 to bf16, FP8 to fp32); an adapter's product is
added in fp32 and the sum rounded to bf16, unless fp32 is written; INT4's grid takes bf16, so FP8 becomes INT4 through fp32 and
bf16; FP8's grid takes what there is, so that fp8 -> fp32 -> fp8 loses nothing.

Legend: matrices are [out, in]; rows are the first axis.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from k2lab.ckpt import dcp, origin
from k2lab.ckpt.outputs import Item
from k2lab.ckpt.safefile import NAMES, TORCH, itemsize
from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import bits, fp8, int4

PIECE = 1 << 20  # elements that are worked on at once
COPY_BYTES = 8 << 20
_ALIGN = fp8.BLOCK  # pieces have whole rows of blocks

Write = Callable[[str, Any], None]  # (stored name, bytes or tensor)
# Of scales by their type: integers of as many bits, and the bits of the largest whose product with the largest code is finite: of
# INT4 below 2^125, of FP8 as `fp8.HIGHEST`.
_SCALES = {torch.bfloat16: (torch.int16, 0x7DFF), torch.float32: (torch.int32, 0x7B124924)}


@dataclass
class Done:
    """What became of the tensors of one shard: how many were copied, taken from the original's bytes, decoded or cast, and put on
    a grid; `records` of what was decoded {logical name: [dtype, content hash]}; bytes read and written."""

    copied: int = 0
    kept: int = 0
    decoded: int = 0
    quantised: int = 0
    merged: int = 0
    read: int = 0
    written: int = 0
    records: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: Done) -> None:
        """Adds the numbers of another shard; not its records."""
        for name in ("copied", "kept", "decoded", "quantised", "merged", "read", "written"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Encoder:
    """Turns items of a plan into bytes; threads may share it. `original` (an `origin.Original`) is asked for bytes of unchanged
    tensors, `adapter` for what it adds (`delta(name)` -> fp32 [out, in] or None). `to_grid` puts experts on the INT4 grid that
    they were trained on before anything else is done with them."""

    def __init__(self, source: Any, original: origin.Original | None, adapter: Any, to_grid: bool = False) -> None:
        self.source, self.original, self.adapter, self.to_grid = source, original, adapter, to_grid
        self._memory = threading.local()
        self._on_grid = {
            tensor.name.replace("{e}", str(expert))
            for tensor in (source.spec.tensors() if to_grid else ())
            if tensor.kind == "expert"
            for expert in range(tensor.count)
        }

    def encode(self, item: Item, write: Write, done: Done) -> None:
        """Writes one item. Raises CheckpointError for values that are not finite, and matrices of zeros."""
        try:
            if item.how == "copy":
                self._copy(item, write, done)
            elif item.how == "plain":
                self._plain(item, write, done)
            else:
                self._grid(item, write, done)
        finally:
            self._release(self.source, item.name)
        done.written += item.size

    # ------------------------------------------------------------ bytes as they are

    def _copy(self, item: Item, write: Write, done: Done) -> None:
        if item.name in self.source.apart or item.name in self.source.leftovers:
            self._raw(self.source, item, write, done)
        elif self.source.info(item.name).format == "plain":
            (stored,) = item.entries
            watch = Watch(self.source, item.name)
            for rows in pieces(item.entries[stored][1]):
                values = self._as_stored(item.name, rows)
                watch.see(values)
                write(stored, values)
            watch.close()
            done.read += item.size
        else:
            watch = Watch(self.source, item.name)
            watch.see_packed(*self.source.packed(item.name))
            watch.close()
            self._raw(self.source, item, write, done)
        done.copied += 1

    def _room(self, use: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in memory of this thread that the next call for the same use gives again: fresh memory costs as much as the
        arithmetic, since the system clears its pages."""
        held, size = self._memory.__dict__, math.prod(shape) * dtype.itemsize
        if use not in held or len(held[use]) < size:
            held[use] = torch.empty(size, dtype=torch.uint8)
        return held[use][:size].view(dtype).view(shape)

    def _rows(self, use: str, stored: str, rows: slice) -> torch.Tensor:
        """Rows of a stored tensor, in this thread's memory."""
        file = self.source.file_of(stored)
        entry = file.entries[stored]
        found = self._room(use, TORCH[entry.dtype], (rows.stop - rows.start, *entry.shape[1:]))
        file.read_into(found, stored, rows)
        return found

    def _as_stored(self, name: str, rows: slice | None) -> torch.Tensor:
        """Rows of a plain tensor, in memory that the next call uses again."""
        (stored,) = self.source.stored(name)
        if rows is None or self.source.file_of(stored) is None:
            return self.source.read(name, rows)
        return self._rows("stored", stored, rows)

    def _packed(self, name: str, rows: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of rows in whole blocks, in memory that the next call uses again."""
        codes, scales, *_ = self.source.stored(name)
        if rows is None or self.source.file_of(codes) is None:
            return self.source.packed(name, rows)
        coarse = rows
        if self.source.info(name).format == "fp8_block":
            coarse = slice(rows.start // fp8.BLOCK, -(-rows.stop // fp8.BLOCK))
        return self._rows("stored", codes, rows), self._rows("scales", scales, coarse)

    def _raw(self, folder: Any, item: Item, write: Write, done: Done) -> None:
        for stored, (_, _, data) in zip(item.entries, folder.raw(item.name).values(), strict=True):
            for start in range(0, len(data), COPY_BYTES):
                write(stored, data[start : start + COPY_BYTES])
        done.read += item.size

    @staticmethod
    def _release(folder: Any, name: str) -> None:
        """Gives back the pages of mapped tensors."""
        for stored in folder.stored(name):
            if (file := folder.file_of(stored)) is not None:
                file.release(stored)

    # ------------------------------------------------------------ values

    def _values(
        self,
        name: str,
        rows: slice | None,
        delta: torch.Tensor | None,
        watch: Watch | None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Rows of the decoded tensor, the adapter's part added in fp32, then as `dtype` (default: as they are). `watch` looks at
        them, at codes and scales if there are such. They lie in memory that the next call uses again."""
        info = self.source.info(name)
        if _in_blocks(info, rows):
            codes, scales = self._packed(name, rows)
            if watch is not None:
                watch.see_packed(codes, scales)
            module: Any = int4 if info.format == "int4_group" else fp8
            shape = info.shape if rows is None else (rows.stop - rows.start, *info.shape[1:])
            if dtype is not None and delta is None and name not in self._on_grid:  # in one go: the same bits
                return module.dequantise(codes, scales, dtype=dtype, out=self._room("values", dtype, shape))
            own = torch.bfloat16 if module is int4 else torch.float32
            values = module.dequantise(codes, scales, dtype=own, out=self._room("values", own, shape))
        else:
            values = self._as_stored(name, rows) if info.format == "plain" else self.source.read(name, rows)
            if watch is not None:
                watch.see(values)
        if delta is not None:
            values = values.float() + (delta if rows is None else delta[rows])
        if name in self._on_grid:
            values = int4.values(values).to(values.dtype)
        return values if dtype is None else values.to(dtype)

    def _delta(self, name: str) -> torch.Tensor | None:
        return self.adapter.delta(name) if self.adapter is not None else None

    def _plain(self, item: Item, write: Write, done: Done) -> None:
        (stored,) = item.entries
        dtype, shape = item.entries[stored]
        for _, values in self._decoded(item, TORCH[dtype], pieces(shape), done):
            write(stored, values)

    def encode_rows(self, item: Item, write: Callable[[int, torch.Tensor], None], done: Done) -> None:
        """As `encode` for a target whose tensors are stored in pieces of whole rows: passes (first row, rows) on."""
        ((dtype, shape),) = item.entries.values()
        try:
            if item.how == "copy":
                ((_, _, data),) = self.source.raw(item.name).values()
                write(0, torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).reshape(shape))
                done.read += item.size
                done.copied += 1
            else:
                spans = (slice(first, first + size) if shape else None for first, size in dcp.row_pieces(shape, itemsize(dtype)))
                for first, values in self._decoded(item, TORCH[dtype], spans, done):
                    write(first, values)
        finally:
            self._release(self.source, item.name)
        done.written += item.size

    def _decoded(
        self, item: Item, dtype: torch.dtype, spans: Iterable[slice | None], done: Done
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows as `dtype`) of a tensor, seen and recorded as they pass."""
        delta = self._delta(item.name)
        # Recorded is what a later export must find again: the bytes of what was quantised and is not any more.
        record = origin.Hash() if self.source.info(item.name).format != "plain" and delta is None else None
        watch = Watch(self.source, item.name)
        for rows in spans:
            values = self._values(item.name, rows, delta, watch, dtype)
            if record is not None:
                record.add(origin.data(values))
            yield rows.start if rows is not None else 0, values
        watch.close()
        if record is not None:
            done.records[item.name] = [NAMES[dtype], record.hex()]
        done.read += stored_bytes(self.source, item.name)
        done.merged += delta is not None
        done.decoded += 1

    def _grid(self, item: Item, write: Write, done: Done) -> None:
        delta = self._delta(item.name)
        done.read += stored_bytes(self.source, item.name)
        if delta is None and self.original is not None and self.original.has(item.name) and self._unchanged(item.name):
            try:
                self._raw(self.original.folder, item, write, done)
            finally:
                self._release(self.original.folder, item.name)
            done.kept += 1
            return
        codes_name, scales_name, *shape_name = item.entries
        shape = self.source.info(item.name).shape
        module: Any = fp8 if item.how == "fp8_block" else int4
        watch = Watch(self.source, item.name)
        (_, wide), (kind, sizes) = item.entries[codes_name], item.entries[scales_name]
        scales = torch.empty(sizes, dtype=TORCH[kind])
        for rows in pieces(shape):
            values = self._values(item.name, rows, delta, None)
            if item.how == "int4_group" or delta is not None:
                values = values.to(torch.bfloat16)
            at = slice(0, shape[0]) if rows is None else rows
            coarse = slice(at.start // fp8.BLOCK, -(-at.stop // fp8.BLOCK)) if module is fp8 else at
            room = self._room("codes", TORCH[item.entries[codes_name][0]], (at.stop - at.start, *wide[1:]))
            try:
                codes, part = module.quantise(values, out=(room, scales[coarse]))
            except NumericsError:
                raise watch.wrong("this tensor has a value that is not finite", "NaN or infinity") from None
            watch.see_packed(codes, part)
            write(codes_name, codes)
        watch.close()
        write(scales_name, scales)
        for name in shape_name:
            write(name, torch.tensor(shape, dtype=TORCH[item.entries[name][0]]))
        done.merged += delta is not None
        done.quantised += 1

    def _unchanged(self, name: str) -> bool:
        assert self.original is not None
        return self.original.unchanged(name, self.source.read(name))


def _in_blocks(info: Any, rows: slice | None) -> bool:
    """True if these rows of a quantised tensor are whole rows of blocks."""
    if info.format == "plain":
        return False
    whole = rows is None or (rows.start % _ALIGN == 0 and (rows.stop % _ALIGN == 0 or rows.stop == info.shape[0]))
    return info.format == "int4_group" or whole


def pieces(shape: tuple[int, ...]) -> Iterator[slice | None]:
    """Spans of rows that hold about PIECE elements, in whole rows of blocks; None for what has no rows."""
    if not shape or not math.prod(shape):
        yield None
        return
    width = math.prod(shape[1:])
    step = max(1, PIECE // width)
    step = max(_ALIGN, step // _ALIGN * _ALIGN) if len(shape) > 1 else step
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def stored_bytes(folder: Any, name: str) -> int:
    """Bytes of a logical tensor as it is stored."""
    info = folder.info(name)
    if info.format == "plain":
        return math.prod(info.shape) * itemsize(info.dtype)
    return sum(len(data) for _, _, data in folder.raw(name).values())


class Watch:
    """Looks at a tensor's values as they pass: none may be NaN or infinite, and a matrix may not be zero all over."""

    def __init__(self, folder: Any, name: str) -> None:
        self.folder, self.name, self._zero = folder, name, True
        self._may_be_zero = len(folder.info(name).shape) < 2 or name.endswith(("bias", "A_log"))

    def see(self, values: torch.Tensor) -> None:
        """The next rows. Raises CheckpointError if one of them is not finite."""
        top, limit = bits.largest(values), bits.LIMITS[values.dtype]
        if top >= limit:
            raise self.wrong("this tensor has a value that is not finite", "NaN" if top > limit else "infinity")
        self._zero = self._zero and top == 0

    def see_packed(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """The next rows of a quantised tensor, as stored."""
        whole, most = _SCALES[scales.dtype]
        # Of bits as whole numbers: those of numbers above 0 are from 1 on and ascend, those of numbers below 0 are below 0.
        low, high = (int(bound) for bound in scales.view(whole).aminmax())
        if low < 1 or high > most:
            lowest = float(scales.float().nan_to_num(0).min())
            raise self.wrong("a scale is zero, negative or not finite, or too large for its codes", f"{lowest} the least")
        if codes.dtype != torch.int32:
            top = bits.largest(codes)
            if top == 0x7F:
                raise self.wrong("this tensor has a value that is not finite", "NaN")
            self._zero = self._zero and top == 0
        elif self._zero:
            self._zero = {int(code) for code in codes.aminmax()} == {-0x77777778}  # the word of eight codes 0, each stored as 8

    def close(self) -> None:
        """Raises CheckpointError if nothing but zeros passed."""
        if self._zero and not self._may_be_zero:
            raise self.wrong("all values of this tensor are zero", "0 everywhere")

    def wrong(self, what: str, got: str) -> CheckpointError:
        info = self.folder.info(self.name)
        return CheckpointError(
            what,
            where=f"{self.name} in {self.folder.path / info.file}",
            got=got,
            next="Fetch the file again, or take an earlier checkpoint",
        )
