"""Which tensor lies where: index and shards brought together, and every tensor of the model found in its stored form."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab.ckpt.formats import FP8_BLOCK, INT4_GROUP
from k2lab.ckpt.safefile import Entry, SafeFile
from k2lab.ckpt.strict import is_count, read_object
from k2lab.core.errors import CheckpointError
from k2lab.core.types import TensorInfo
from k2lab.specs import ModelSpec
from k2lab.specs._tensors import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Tensors of a vision-language checkpoint (Kimi K2.5 and later, Kimi-VL): the text tower's have this prefix, these others are not
# ours.
TOWER = "language_model."
VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
PLAIN = ("BF16", "F16", "F32")


@dataclass
class Table:
    """`tensors` {logical name: TensorInfo} in the model's order; `where` {stored name: file name} of all; `apart` and `leftovers`
    as in `Folder`."""

    prefix: str
    where: dict[str, str]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    leftovers: dict[str, str] = field(default_factory=dict)


def stored_names(name: str, format: str) -> tuple[str, ...]:
    """The stored names of a logical tensor, without the tower's prefix."""
    if format == "fp8_block":
        return name, name + "_scale_inv"
    if format == "int4_group":
        return name + "_packed", name + "_scale", name + "_shape"
    return (name,)


# ---------------------------------------------------------------- files


def open_files(path: Path, files: dict[str, SafeFile]) -> dict[str, str]:
    """Opens the folder's shards into `files` and returns {stored name: file name}. Raises CheckpointError where index and shards
    disagree in any way."""
    index, single = path / INDEX, path / SINGLE
    if not index.exists():
        if not single.exists():
            raise CheckpointError("this folder has no weights", where=str(path), allowed=f"{INDEX} or {SINGLE}")
        files[SINGLE] = SafeFile(single)
        _no_strays(path, {SINGLE})
        return dict.fromkeys(files[SINGLE].entries, SINGLE)
    table = read_object(index)
    where = _weight_map(table, index)
    named = sorted(set(where.values()))
    for file in named:
        if not (path / file).is_file():
            raise CheckpointError(f"the file {file} is missing although {INDEX} names it", where=str(path))
    _no_strays(path, set(named))
    for file in named:
        files[file] = SafeFile(path / file)
        for name in files[file].entries:
            if where.get(name) != file:
                said = f"in {where[name]}" if name in where else "nowhere"
                raise CheckpointError(f"{INDEX} says that this tensor is {said}", where=f"{name} in {path / file}")
    for name, file in where.items():
        if name not in files[file].entries:
            raise CheckpointError(f"this tensor is missing although {INDEX} names it", where=f"{name} in {path / file}")
    _check_total(table, files, index)
    return where


def _weight_map(table: dict[str, Any], index: Path) -> dict[str, str]:
    where = table.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError("weight_map must map names of tensors to files", where=str(index), got=type(where).__name__)
    for name, file in where.items():
        # a plain name: nothing that leads out of the folder
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}\.safetensors", file):
            raise CheckpointError(
                "weight_map names a file that is no plain name of a safetensors file", where=f"{name[:200]} in {index}", got=file
            )
    return where


def _check_total(table: dict[str, Any], files: dict[str, SafeFile], index: Path) -> None:
    """A total that is wrong harms nobody, and tools are known to leave an old one behind; a total that is no number is damage."""
    metadata = table.get("metadata", {})
    total = metadata.get("total_size", 0) if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():
        total = int(total)
    if not is_count(total):
        raise CheckpointError("metadata.total_size must be a number of bytes", where=str(index), got=metadata)
    found = sum(entry.size for file in files.values() for entry in file.entries.values())
    if total and total != found:
        warnings.warn(f"{index}: total_size says {total} bytes, the tensors have {found}", stacklevel=4)


def _no_strays(path: Path, named: set[str]) -> None:
    """A shard that the index does not name is of another checkpoint, and other loaders would mix it in."""
    for file in sorted(path.glob("model*.safetensors")):
        if file.name not in named:
            raise CheckpointError(
                f"{file.name} is not part of the checkpoint in the same folder",
                where=str(path),
                next="Move it away; other programs would load it",
            )


# ---------------------------------------------------------------- tensors


def arrange(config: dict[str, Any], spec: ModelSpec, format: str, files: dict[str, SafeFile], where: dict[str, str]) -> Table:
    """Every tensor of `spec` found in the files, and every tensor of the files explained. Raises CheckpointError otherwise."""
    tower = isinstance(config.get("text_config"), dict)
    table = Table(TOWER if tower else "", where)
    finder = _Finder(table.prefix, files, where, format)
    used: set[str] = set()
    missing: list[str] = []
    for name, tensor in _logical(spec):
        info = finder.find(name, tensor)
        if info is None:
            missing.append(name)
            if len(missing) > 5:
                break
            continue
        table.tensors[name] = info
        used.update(table.prefix + part for part in stored_names(name, info.format))
    extra = []
    for name, file in where.items():
        if name in used:
            continue
        if tower and name.startswith(VISION):
            table.apart[name] = file
        elif _is_leftover(name, config, spec, table, files):
            table.leftovers[name] = file
        elif not missing:
            extra.append(name)
    _report(missing, extra, files, where)
    if format != "plain" and not any(info.format == format for info in table.tensors.values()):
        raise CheckpointError(f"config.json says {format}, but no tensor is stored so", where=next(iter(where.values())))
    _one_half_type(table, finder)
    if table.apart:
        parts = Counter(name.split(".", 1)[0] for name in table.apart)
        shown = ", ".join(f"{count} of {part}" for part, count in sorted(parts.items()))
        warnings.warn(f"the text tower is read; vision tensors are left where they are: {shown}", stacklevel=3)
    return table


def _one_half_type(table: Table, finder: _Finder) -> None:
    """bf16 and fp16 side by side are one read as the other: no release has both."""
    kinds = Counter(info.dtype for info in table.tensors.values() if info.format == "plain" and info.dtype != "F32")
    if len(kinds) > 1:
        rare = min(kinds, key=lambda kind: kinds[kind])
        name = next(info.name for info in table.tensors.values() if info.format == "plain" and info.dtype == rare)
        raise finder.wrong(name, "this tensor has another type than the others", rare, max(kinds, key=lambda kind: kinds[kind]))


def _logical(spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    for tensor in spec.tensors():
        if tensor.count == 1:
            yield tensor.name, tensor
            continue
        for expert in range(tensor.count):
            yield tensor.name.replace("{e}", str(expert)), tensor


def _report(missing: list[str], extra: list[str], files: dict[str, SafeFile], where: dict[str, str]) -> None:
    folder = next(iter(files.values())).path.parent
    if missing:
        many = "six or more tensors are" if len(missing) > 5 else f"{len(missing)} of config.json's tensors are"
        raise CheckpointError(
            f"{many} missing", where=f"{missing[0]} in {folder}", got=f"no {', '.join(missing[:5])}", next="Fetch the model again"
        )
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors are not those of config.json",
            where=f"{extra[0][:200]} in {folder / where[extra[0]]}",
            got=", ".join(name[:100] for name in sorted(extra)[:5]),
        )


def _is_leftover(name: str, config: dict[str, Any], spec: ModelSpec, table: Table, files: dict[str, SafeFile]) -> bool:
    inner = name.removeprefix(table.prefix)
    if inner.endswith(".inv_freq"):
        return True
    match = re.match(r"model\.layers\.(\d{1,6})\.", inner)
    if match:  # multi-token prediction: layers behind the last, as many as the config says; DeepSeek-V3's is layer 61
        text = config["text_config"] if table.prefix else config
        extra = text.get("num_nextn_predict_layers")
        behind = int(match[1]) - spec.num_layers
        return 0 <= behind < max(extra if is_count(extra) else 0, 1 if spec.num_layers == 61 else 0)
    return inner == "lm_head.weight" and spec.tie_word_embeddings and _same_as_embedding(name, table, files)


def _same_as_embedding(name: str, table: Table, files: dict[str, SafeFile]) -> bool:
    embedding = table.prefix + "model.embed_tokens.weight"
    if embedding not in table.where:
        return False
    one, other = files[table.where[name]], files[table.where[embedding]]
    left, right = one.entries[name], other.entries[embedding]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    equal = one.bytes(name) == other.bytes(embedding)
    one.release(), other.release()
    return equal


class _Finder:
    """Finds a logical tensor among stored ones and proves shapes and types."""

    def __init__(self, prefix: str, files: dict[str, SafeFile], where: dict[str, str], format: str) -> None:
        self.prefix, self.files, self.where, self.format = prefix, files, where, format

    def entry(self, name: str) -> Entry | None:
        file = self.where.get(self.prefix + name)
        return self.files[file].entries[self.prefix + name] if file is not None else None

    def wrong(self, name: str, what: str, got: object, allowed: str) -> CheckpointError:
        stored = self.prefix + name
        file = self.where.get(stored)
        where = f"{stored} in {self.files[file].path if file else next(iter(self.files.values())).path.parent}"
        return CheckpointError(what, where=where, got=got, allowed=allowed)

    def find(self, name: str, tensor: Tensor) -> TensorInfo | None:
        """The tensor, or None if it is not stored in any form."""
        whole, packed = self.entry(name), self.entry(name + "_packed")
        if whole is not None and packed is not None:
            raise self.wrong(name, "this tensor is stored twice, plain and packed", "both", "one of them")
        if packed is not None:
            return self.int4(name, tensor)
        if whole is None:
            return None
        self.same_shape(name, whole, tensor.shape)
        if whole.dtype == "F8_E4M3":
            return self.fp8(name, tensor)
        if whole.dtype not in PLAIN:
            raise self.wrong(name, "weights are not stored as this type", whole.dtype, ", ".join((*PLAIN, "F8_E4M3 with scales")))
        return TensorInfo(name, tensor.shape, whole.dtype, "plain", self.where[self.prefix + name])

    def same_shape(self, name: str, entry: Entry, shape: tuple[int, ...]) -> None:
        if entry.shape == shape:
            return
        if name in ("model.embed_tokens.weight", "lm_head.weight") and entry.shape[1:] == shape[1:]:
            what = f"vocab_size in config.json is {shape[0]}, but this tensor has {entry.shape[0] if entry.shape else 0} rows"
        else:
            what = "this tensor has another shape than config.json says"
        raise self.wrong(name, what, list(entry.shape), str(list(shape)))

    def may_be(self, name: str, tensor: Tensor, format: str) -> None:
        if self.format != format:
            raise self.wrong(name, f"this tensor is stored as {format}, but config.json says {self.format}", format, self.format)
        if tensor.kind not in ("linear", "expert", "head") or len(tensor.shape) != 2:
            raise self.wrong(name, f"a tensor of this kind is not stored as {format}", tensor.kind, "linear layers and experts")

    def part(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Proves the entry `name`, which belongs to a quantised tensor."""
        entry = self.entry(name)
        if entry is None:
            raise self.wrong(name, "a part of a quantised tensor is missing", "nothing", f"{dtypes[0]} {list(shape)}")
        if entry.dtype not in dtypes:
            raise self.wrong(name, "this part of a quantised tensor has another type", entry.dtype, " or ".join(dtypes))
        if entry.shape != shape:
            raise self.wrong(name, "this part of a quantised tensor has another shape", list(entry.shape), str(list(shape)))

    def fp8(self, name: str, tensor: Tensor) -> TensorInfo:
        self.may_be(name, tensor, "fp8_block")
        out, width = tensor.shape
        self.part(name + "_scale_inv", ("F32",), (-(-out // FP8_BLOCK), -(-width // FP8_BLOCK)))
        return TensorInfo(name, tensor.shape, "F32", "fp8_block", self.where[self.prefix + name])

    def int4(self, name: str, tensor: Tensor) -> TensorInfo:
        packed = name + "_packed"
        self.may_be(packed, tensor, "int4_group")
        out, width = tensor.shape
        if width % INT4_GROUP:
            raise self.wrong(packed, "rows of this width are no whole groups", width, f"multiples of {INT4_GROUP}")
        self.part(packed, ("I32",), (out, width // 8))
        self.part(name + "_scale", ("BF16",), (out, width // INT4_GROUP))
        self.part(name + "_shape", ("I32", "I64"), (2,))
        stored = self.prefix + name + "_shape"
        said = tuple(self.files[self.where[stored]].tensor(stored).tolist())
        if said != tensor.shape:
            raise self.wrong(name + "_shape", "weight_shape disagrees with config.json", list(said), str(list(tensor.shape)))
        return TensorInfo(name, tensor.shape, "BF16", "int4_group", self.where[self.prefix + packed])
