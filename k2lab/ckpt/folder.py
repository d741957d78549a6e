"""A checkpoint folder, opened: config.json, index and every shard proven to fit each other before one value is given out.

Logical names are those of releases in bf16 (`spec.tensors()`), however a tensor is stored:

    plain        X.weight
    fp8_block    X.weight (e4m3) + X.weight_scale_inv (fp32, one per 128 x 128 block)
    int4_group   X.weight_packed (int32, 8 codes) + X.weight_scale (bf16, one per 32 columns) + X.weight_shape (2 integers)

Of a vision-language checkpoint (Kimi K2.5 and later) the text tower is read, under its names without `language_model.`; vision
tensors are listed apart and can be copied, not decoded. What a folder can be refused for: `layout.py`, `integrity.py`,
`values.py`.

Legend: matrices are [out, in]; rows are the first axis, columns the last of a matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from k2lab.ckpt import formats, integrity, layout, values
from k2lab.ckpt.formats import FP8_BLOCK, INT4_GROUP
from k2lab.ckpt.safefile import TORCH, SafeFile, span
from k2lab.ckpt.strict import read_object
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.types import TensorInfo
from k2lab.quant import fp8, int4
from k2lab.specs import ModelSpec

_PLAIN = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


class Folder:
    """An opened checkpoint; a `core.types.TensorSource`. Made by `open_folder`.

    `path`; `spec` its shape; `format` "fp8_block", "int4_group", or for plain weights the type of the embedding ("bf16", "fp32",
    "fp16"); `files` {file name: SafeFile}; `apart` {stored name: file name} of vision tensors; `leftovers` the same of tensors
    that no model of ours has (rotary tables, layers for multi-token prediction, the second copy of a tied head); `prefix` what
    stored names of the text tower begin with; `qat` the format on whose grid experts lie without being packed, or None.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        spec: ModelSpec,
        files: dict[str, SafeFile],
        table: layout.Table,
        format: str,
        qat: str | None = None,
    ) -> None:
        self.path, self.spec, self.files, self.prefix = path, spec, files, table.prefix
        self.apart, self.leftovers = dict(table.apart), dict(table.leftovers)
        self.qat = qat
        self._config, self._tensors, self._where = config, table.tensors, table.where
        embedding = self._tensors["model.embed_tokens.weight"].dtype
        self.format = _PLAIN[embedding] if format == "plain" else format

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r}, format={self.format!r}, tensors={len(self._tensors)}, files={len(self.files)})"

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all files."""
        for file in self.files.values():
            file.close()

    # ------------------------------------------------------------ what there is

    def config(self) -> dict[str, Any]:
        """A copy of config.json."""
        return copy.deepcopy(self._config)

    def names(self) -> list[str]:
        """Logical names in the order of `spec.tensors()`."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, type and format of a tensor. Raises CheckpointError if there is none of this name."""
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError("this checkpoint has no such tensor", where=f"{name} in {self.path}") from None

    def stored(self, name: str) -> list[str]:
        """Names as they are in the files: of a logical tensor one to three, of a vision tensor or leftover its own."""
        if name in self.apart or name in self.leftovers:
            return [name]
        return [self.prefix + part for part in layout.stored_names(name, self.info(name).format)]

    def file_of(self, stored: str) -> SafeFile:
        """The file that holds a tensor by its stored name."""
        return self.files[self._where[stored]]

    def raw(self, name: str) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
        """{stored name: (dtype, shape, bytes)} of a logical, vision or left-over tensor, as they lie in the files: mapped, not
        copied. `release` gives their memory back."""
        found = {}
        for stored in self.stored(name):
            file = self.file_of(stored)
            entry = file.entries[stored]
            found[stored] = (entry.dtype, entry.shape, file.bytes(stored))
        return found

    def release(self) -> None:
        """Gives the memory of mapped pages back to the system."""
        for file in self.files.values():
            file.release()

    # ------------------------------------------------------------ values

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """The decoded tensor or a part of it: int4_group as the bf16 values that engines multiply by, fp8_block as exact fp32
        products, others as stored. Only the bytes of the part are read (INT4: of the groups that it touches)."""
        info = self.info(name)
        if info.format == "plain":
            return self._part(self.prefix + name, rows, columns)
        first, last = span(rows, info.shape[0]), span(columns, info.shape[1])
        if first.start == first.stop or last.start == last.stop:
            return torch.empty((first.stop - first.start, last.stop - last.start), dtype=TORCH[info.dtype])
        if info.format == "int4_group":
            wide = _grown(last, INT4_GROUP, info.shape[1])
            codes, scales = self.packed(name, first, wide)
            found = int4.dequantise(codes, scales)
            return found if wide == last else found[:, last.start - wide.start : last.stop - wide.start].clone()
        return self._read_fp8(name, first, last, info.shape)

    def read_into(self, target: torch.Tensor, name: str, rows: slice | None = None) -> None:
        """Reads rows of a plain tensor right into `target`, a contiguous CPU tensor of the stored type."""
        assert self.info(name).format == "plain", "what is stored in another form is decoded"
        stored = self.prefix + name
        self.file_of(stored).read_into(target, stored, rows)

    def _read_fp8(self, name: str, first: slice, last: slice, shape: tuple[int, ...]) -> torch.Tensor:
        high, wide = _grown(first, FP8_BLOCK, shape[0]), _grown(last, FP8_BLOCK, shape[1])
        weight, scale = self.stored(name)
        scales = self._part(scale, _blocks(high, FP8_BLOCK), _blocks(wide, FP8_BLOCK))
        codes = self._part(weight, first, last)
        if (high, wide) == (first, last):
            return fp8.dequantise(codes, scales)
        # what lies in the same blocks but was not asked for is not read either
        whole = torch.zeros((high.stop - high.start, wide.stop - wide.start), dtype=torch.uint8)
        inner = (
            slice(first.start - high.start, first.stop - high.start),
            slice(last.start - wide.start, last.stop - wide.start),
        )
        whole[inner] = codes.view(torch.uint8)
        return fp8.dequantise(whole.view(codes.dtype), scales)[inner].clone()

    def packed(self, name: str, rows: slice | None = None, columns: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales) as stored. int4_group: int32 [out, in/8] and bf16 [out, in/32], any rows, columns in whole groups of
        32; fp8_block: e4m3 [out, in] and fp32 [out/128, in/128], rows and columns in whole blocks of 128 (or up to the edge).
        Raises CheckpointError for a plain tensor or other parts."""
        info = self.info(name)
        if info.format == "plain":
            raise CheckpointError("this tensor is not quantised", where=f"{name} in {self.path}", got=info.dtype)
        first, last = span(rows, info.shape[0]), span(columns, info.shape[1])
        codes, scales, *_ = self.stored(name)
        if info.format == "int4_group":
            self._aligned(name, last, INT4_GROUP, info.shape[1])
            return self._part(codes, first, _blocks(last, 8)), self._part(scales, first, _blocks(last, INT4_GROUP))
        self._aligned(name, first, FP8_BLOCK, info.shape[0])
        self._aligned(name, last, FP8_BLOCK, info.shape[1])
        return self._part(codes, first, last), self._part(scales, _blocks(first, FP8_BLOCK), _blocks(last, FP8_BLOCK))

    def _aligned(self, name: str, part: slice, block: int, size: int) -> None:
        if part.start % block or (part.stop % block and part.stop != size):
            raise CheckpointError(
                "packed values are read in whole groups or blocks",
                where=f"{name} in {self.path}",
                got=f"{part.start} to {part.stop}",
                allowed=f"multiples of {block}",
            )

    def _part(self, stored: str, rows: slice | None, columns: slice | None) -> torch.Tensor:
        return self.file_of(stored).tensor(stored, rows, columns)


def _grown(part: slice, block: int, size: int) -> slice:
    """`part` grown to whole blocks, within an axis of `size`."""
    return slice(part.start // block * block, min(-(-part.stop // block) * block, size))


def _blocks(part: slice, block: int) -> slice:
    """The blocks that `part`, which begins with one, covers."""
    return slice(part.start // block, -(-part.stop // block))


# ---------------------------------------------------------------- opening


def open_folder(path: Path | str, deep: bool = False) -> Folder:
    """The checkpoint in the folder `path`, proven whole: every tensor of its config.json is there once, of the right shape and
    type, in files that are neither cut off nor longer than their tensors, in a format that is known, with a tokenizer (if any)
    whose ids the embedding has.

    `deep` also reads every value (NaN, infinity, matrices of zeros, scales that are no scales) and verifies the sha256 of files
    where the folder states them; memory stays bounded. Raises CheckpointError naming tensor and file; RecipeError if config.json
    is that of a model which is not built here.
    """
    path = Path(path)
    config = read_object(path / "config.json") if path.is_dir() else _no_folder(path)
    where_config = str(path / "config.json")
    integrity.check_config(config, where_config)
    spec = _spec(config, path)
    integrity.check_positions(config, spec, where_config)
    format, qat = _format(config, path)
    files: dict[str, SafeFile] = {}
    try:
        where = layout.open_files(path, files)
        table = layout.arrange(config, spec, format, files, where)
        folder = Folder(path, config, spec, files, table, format, qat)
        integrity.check_tokenizer(path, spec)
        if deep:
            integrity.check_digests(path)
            values.check_values(folder)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return folder


def _no_folder(path: Path) -> dict[str, Any]:
    raise CheckpointError("there is no such folder", where=str(path), next="Give the folder that holds config.json")


def _format(config: dict[str, Any], path: Path) -> tuple[str, str | None]:
    """(format of the weights, format on whose grid experts lie), errors with the file's path."""
    try:
        return formats.recognise(config), formats.qat(config)
    except CheckpointError as error:
        error.where = str(error.where).replace("config.json", str(path / "config.json"), 1)
        raise


def _spec(config: Mapping[str, Any], path: Path) -> ModelSpec:
    file = path / "config.json"
    try:
        return ModelSpec.from_config(dict(config), name=path.resolve().name)
    except RecipeError as error:
        if error.where is not None and error.where.startswith("model."):  # of our families, but no possible model
            where = f"{file}: {error.where.removeprefix('model.')}"
            raise CheckpointError(error.what, where=where, got=error.got, allowed=error.allowed, next=error.next) from None
        error.where = str(error.where or "config.json").replace("config.json", str(file), 1)
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, IndexError) as error:
        raise CheckpointError(f"config.json describes no model: {error}", where=str(file)) from None
