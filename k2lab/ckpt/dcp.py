"""Folders of torch.distributed.checkpoint (DCP): read as a `TensorSource`, written file by file.

A DCP folder holds `.metadata` (a pickle: which tensor lies in which pieces, each piece's file, offset and length) and `*.distcp`
files in which every piece is one tensor as `torch.save` writes it. What is written here has released tensor names as keys and
every matrix in pieces of whole rows, so that `torch.distributed.checkpoint.load` fills DTensors on any mesh and no rank reads
much more than its part. `config.json` and the tokenizer's files lie beside.

`.metadata` is a pickle by torch's choice. It is read by an unpickler that knows the few classes of that format and nothing else,
and pieces by `torch.load(weights_only=True)`, so a folder from elsewhere cannot run code.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_types
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from k2lab.ckpt import formats, integrity, layout
from k2lab.ckpt.strict import read_object
from k2lab.core.artifacts import disk_errors
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.types import TensorInfo
from k2lab.specs import ModelSpec

METADATA = ".metadata"
PIECE_BYTES = 64 << 20  # rows of a matrix are split into pieces of at most this many bytes
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# All that a .metadata of torch 2.4 to 2.13 is made of. Nothing here runs anything when it is called with any arguments.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
# Integer and byte tensors (step counters of optimisers) may be named in it although no weight has such a type.
_KNOWN["torch"] |= {"int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2"}


def is_dcp(folder: Path | str) -> bool:
    """True if `folder` holds a checkpoint of torch.distributed.checkpoint."""
    return (Path(folder) / METADATA).is_file()


# ---------------------------------------------------------------- reading


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of the format")
        if module.startswith("pathlib"):
            return str_path  # a path of another operating system cannot be made here, and none is needed
        return super().find_class(module, name)


def str_path(*parts: str) -> str:
    """Stands for the path classes that a .metadata may name."""
    return "/".join(map(str, parts))


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: where it begins and how large it is per dim, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def read_metadata(folder: Path) -> dict[str, tuple[str, tuple[int, ...], tuple[Piece, ...]]]:
    """{key: (dtype by safetensors' name, shape, pieces)} of the tensors of a DCP folder.

    Raises CheckpointError for a `.metadata` that is broken or names what is no part of the format, for a tensor whose pieces do
    not cover it exactly once, for a piece beyond its file's end, and for compressed or other extended pieces.
    """
    path = folder / METADATA
    try:
        table = _Reader(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {METADATA}", next="Give a folder of torch.distributed.checkpoint") from None
    except Exception as error:  # a damaged pickle raises anything at all
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}", next=_AGAIN) from None
    if not isinstance(table, dcp_types.Metadata) or not isinstance(getattr(table, "state_dict_metadata", None), dict):
        raise CheckpointError(f"{path} is no table of a DCP folder", next=_AGAIN)
    sizes: dict[str, int] = {}
    found = {}
    for key, entry in table.state_dict_metadata.items():
        try:
            tensor = _tensor_of(key, entry, table.storage_data or {}, folder, sizes)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"the entry is damaged: {type(error).__name__}: {error}", where=f"{key} in {path}") from None
        if tensor is not None:
            found[key] = tensor
    return found


_AGAIN = "Copy the folder anew, or write it again"


def _tensor_of(key: str, entry: Any, storage: dict[Any, Any], folder: Path, sizes: dict[str, int]) -> Any:
    """One value of `read_metadata`; None for what is no tensor. `sizes` remembers the sizes of files."""
    where = f"{key} in {folder / METADATA}"
    if not isinstance(entry, dcp_types.TensorStorageMetadata):
        return None
    shape = tuple(int(size) for size in entry.size)
    pieces = []
    for chunk in entry.chunks:
        info = storage.get(dcp_types.MetadataIndex(key, chunk.offsets))
        if info is None:
            raise CheckpointError(f"no file is named for its piece at {tuple(chunk.offsets)}", where=where, next=_AGAIN)
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                "it is stored through an extension", where=where, got=list(info.transform_descriptors), allowed="plain pieces"
            )
        name = str(info.relative_path)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError("its file lies outside of the folder", where=where, got=name)
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size if (folder / name).is_file() else -1
        if sizes[name] < 0:
            raise CheckpointError(f"the file {name} is missing", where=where, next=_AGAIN)
        if info.offset < 0 or info.length <= 0 or info.offset + info.length > sizes[name]:
            raise CheckpointError(
                f"{name} is cut off", where=where, got=f"{sizes[name]} bytes", allowed=f"{info.offset + info.length} or more"
            )
        pieces.append(Piece(tuple(chunk.offsets), tuple(chunk.sizes), name, int(info.offset), int(info.length)))
    _require_cover(shape, pieces, where)
    return _NAMES.get(entry.properties.dtype, str(entry.properties.dtype)), shape, tuple(pieces)


def _require_cover(shape: tuple[int, ...], pieces: list[Piece], where: str) -> None:
    """Boxes inside the tensor, no two of which meet, and whose volumes add up to the tensor's, cover it exactly once."""
    for piece in pieces:
        if len(piece.offsets) != len(shape) or any(
            start < 0 or size < 0 or start + size > whole for start, size, whole in zip(piece.offsets, piece.sizes, shape)
        ):
            raise CheckpointError("a piece lies outside of the tensor", where=where, got=piece.offsets, next=_AGAIN)
    apart = all(
        any(
            one.offsets[d] + one.sizes[d] <= two.offsets[d] or two.offsets[d] + two.sizes[d] <= one.offsets[d]
            for d in range(len(shape))
        )
        for one, two in combinations(pieces, 2)
    )
    if not apart or sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
        raise CheckpointError("its pieces do not cover it exactly once", where=where, got=f"{len(pieces)} pieces", next=_AGAIN)


class DcpTensors:
    """The tensors of a DCP folder by key: `info`, `read` and `read_into` as a `TensorSource` has them."""

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        self.tensors = read_metadata(self.path)

    def names(self) -> list[str]:
        """The keys of all tensors, in the order of the files that hold them."""
        first = {name: (pieces[0].file, pieces[0].start) for name, (_, _, pieces) in self.tensors.items()}
        return sorted(self.tensors, key=lambda name: first[name])

    def info(self, name: str) -> TensorInfo:
        """What and where `name` is."""
        dtype, shape, pieces = self.tensors[name]
        return TensorInfo(name, shape, dtype, "plain", pieces[0].file)

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        """The tensor, or rows (first axis) and columns (last axis) of it; only pieces that hold a part of these are read."""
        box = self._box(name, rows, columns)
        found = torch.empty([len(part) for part in box], dtype=DTYPES[self.tensors[name][0]])
        self._fill(found, name, box)
        return found

    def read_into(self, target: torch.Tensor, name: str, rows: slice | None = None) -> None:
        """Fills `target`, a tensor of the stored type, with rows of the tensor; only pieces that hold some of them are read."""
        box = self._box(name, rows, None)
        shape, dtype = [len(part) for part in box], DTYPES[self.tensors[name][0]]
        assert list(target.shape) == shape and target.dtype == dtype, "another tensor"
        self._fill(target, name, box)

    def _box(self, name: str, rows: slice | None, columns: slice | None) -> list[range]:
        """What rows and columns are of each axis."""
        shape = self.tensors[name][1]
        return [range(*part.indices(size)) for part, size in zip(_slices(shape, rows, columns), shape)]

    def _fill(self, whole: torch.Tensor, name: str, box: list[range]) -> None:
        dtype, _, pieces = self.tensors[name]
        for piece in pieces:
            here = [
                (max(part.start, start), min(part.stop, start + size))
                for part, start, size in zip(box, piece.offsets, piece.sizes)
            ]
            if any(start >= stop for start, stop in here):
                continue
            tensor = self._load(name, piece, DTYPES[dtype])
            source = tuple(slice(start - first, stop - first) for (start, stop), first in zip(here, piece.offsets))
            target = tuple(slice(start - part.start, stop - part.start) for (start, stop), part in zip(here, box))
            whole[target] = tensor[source]

    def _load(self, name: str, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        where = f"{name} in {self.path / piece.file}"
        with (self.path / piece.file).open("rb") as file:
            file.seek(piece.start)
            blob = io.BytesIO(file.read(piece.length))
        try:
            tensor = torch.load(blob, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"its piece at {piece.offsets} cannot be read: {str(error).splitlines()[0]}", where=where, next=_AGAIN
            ) from None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != piece.sizes or tensor.dtype != dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError("a piece is not what the table says", where=where, got=got, allowed=f"{piece.sizes} {dtype}")
        return tensor


class DcpFolder(DcpTensors):
    """A DCP folder as a checkpoint, with the attributes of `folder.Folder` that a conversion uses. Made by `open_dcp`."""

    def __init__(self, path: Path, config: dict[str, Any], spec: ModelSpec) -> None:
        super().__init__(path)
        self.spec, self._config = spec, config
        tower = isinstance(config.get("text_config"), dict)
        self.prefix = layout.TOWER if tower else ""
        self.apart = {name: self.info(name).file for name in self.tensors if tower and name.startswith(layout.VISION)}
        self.leftovers: dict[str, str] = {}
        self.qat = formats.qat(config)
        self._order = [name for name, _ in spec.tensor_shapes()]
        self._require_model()
        kinds = {"BF16": "bf16", "F32": "fp32", "F16": "fp16"}
        self.format = kinds[self.info("model.embed_tokens.weight").dtype]

    def _require_model(self) -> None:
        """Every tensor of the model is there, of its shape, and no other."""
        wanted = dict(self.spec.tensor_shapes())
        missing = [name for name in wanted if name not in self.tensors]
        extra = [name for name in self.tensors if name not in wanted and name not in self.apart]
        if missing or extra:
            what = (
                f"{len(missing)} of config.json's tensors are missing"
                if missing
                else f"{len(extra)} tensors are not config.json's"
            )
            raise CheckpointError(
                what,
                where=f"{(missing or extra)[0][:200]} in {self.path}",
                got=", ".join(sorted(extra or self.tensors)[:3]) or "no tensor",
                allowed="released names as keys, as `k2 convert --to dcp` writes them",
            )
        for name, shape in wanted.items():
            info = self.info(name)
            if info.shape != shape or info.dtype not in layout.PLAIN:
                raise CheckpointError(
                    "this tensor has another shape or type than config.json says",
                    where=f"{name} in {self.path / info.file}",
                    got=f"{info.dtype} {list(info.shape)}",
                    allowed=f"{' or '.join(layout.PLAIN)} {list(shape)}",
                )

    def config(self) -> dict[str, Any]:
        """A copy of config.json."""
        return copy.deepcopy(self._config)

    def names(self) -> list[str]:
        """Logical names in the order of `spec.tensors()`."""
        return list(self._order)

    def stored(self, name: str) -> list[str]:
        """Its key."""
        return [name]

    def file_of(self, stored: str) -> None:
        """None: nothing is mapped."""

    def paths(self, name: str) -> set[Path]:
        """The files that hold a tensor."""
        return {self.path / piece.file for piece in self.tensors[name][2]}

    def raw(self, name: str) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
        """{key: (dtype, shape, bytes)}, read."""
        dtype, shape, _ = self.tensors[name]
        return {name: (dtype, shape, memoryview(self.read(name).reshape(-1).view(torch.uint8).numpy()))}

    def packed(self, name: str, rows: slice | None = None, columns: slice | None = None) -> tuple[Any, Any]:
        """Nothing in a DCP folder is quantised."""
        raise CheckpointError("this tensor is not quantised", where=f"{name} in {self.path}")

    def release(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing stays open."""


def open_dcp(path: Path | str) -> DcpFolder:
    """The checkpoint in a DCP folder with its config.json beside: every tensor is proven to be there, in pieces that cover it.
    Raises CheckpointError naming tensor and file."""
    path = Path(path)
    file = path / "config.json"
    config = read_object(file)
    integrity.check_config(config, str(file))
    if formats.recognise(config) != "plain":
        raise CheckpointError("a DCP folder holds plain tensors", where=str(file), got="a quantization_config")
    try:
        spec = ModelSpec.from_config(config, name=path.resolve().name)
    except RecipeError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, IndexError) as error:
        raise CheckpointError(f"config.json describes no model: {error}", where=str(file)) from None
    integrity.check_positions(config, spec, str(file))
    integrity.check_tokenizer(path, spec)
    return DcpFolder(path, config, spec)


def _slices(shape: tuple[int, ...], rows: slice | None, columns: slice | None) -> list[slice]:
    parts = [slice(None)] * len(shape)
    if rows is not None:
        parts[0] = rows
    if columns is not None:
        parts[-1] = columns
    return parts


# ---------------------------------------------------------------- writing


def file_name(shard: int) -> str:
    """Name of the file of shard number `shard`, as torch names those of its ranks."""
    return f"__{shard}_0.distcp"


def row_pieces(shape: tuple[int, ...], itemsize: int, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of the pieces of a tensor: whole rows, at most `limit` bytes where one row is not larger."""
    if len(shape) < 2 or not math.prod(shape):
        yield 0, shape[0] if shape else 1
        return
    step = max(1, limit // (math.prod(shape[1:]) * itemsize))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


class PieceWriter:
    """Writes one `.distcp` file: pieces one after the other under `<path>.tmp`, synced and renamed by `close`; leaving the `with`
    block by an error removes it. `sha256` and `size` are known after `close`."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.temporary = path.with_name(path.name + ".tmp")
        self._digest = hashlib.sha256()
        with disk_errors(path):
            self._file = self.temporary.open("wb", buffering=0)

    def __enter__(self) -> PieceWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._file.close()
            self.temporary.unlink(missing_ok=True)

    def write(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(offset, length) of the piece."""
        start = self.size
        write_piece(tensor, self._put)
        return start, self.size - start

    def close(self) -> None:
        """Syncs the file to the disk and gives it its name."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.temporary, self.path)

    @property
    def sha256(self) -> str:
        """sha256 hex of all that was written."""
        return self._digest.hexdigest()

    def _put(self, data: memoryview) -> None:
        with disk_errors(self.path):
            done = 0
            while done < data.nbytes:
                done += self._file.write(data[done : done + (1 << 30)]) or 0
        self._digest.update(data)
        self.size += data.nbytes


def write_piece(tensor: torch.Tensor, write: Callable[[Any], Any]) -> None:
    """Passes the bytes of one piece to `write`, without a copy of the tensor unless it is a view of a larger one."""
    if tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes() or not tensor.is_contiguous():
        tensor = tensor.contiguous().clone()
    torch.save(tensor.detach(), _Stream(write))


class _Stream(io.RawIOBase):
    """What torch.save writes into: every buffer goes straight on."""

    def __init__(self, write: Callable[[Any], Any]) -> None:
        super().__init__()
        self._write = write

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._write(view)
        return view.nbytes


def metadata_bytes(tensors: dict[str, tuple[str, tuple[int, ...], list[Piece]]]) -> bytes:
    """The `.metadata` for these tensors: {key: (dtype by safetensors' name, shape, pieces)}."""
    table, storage = {}, {}
    for key, (dtype, shape, pieces) in tensors.items():
        chunks = [dcp_types.ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)) for piece in pieces]
        table[key] = dcp_types.TensorStorageMetadata(dcp_types.TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape), chunks)
        for number, piece in enumerate(pieces):
            index = dcp_types.MetadataIndex(key, piece.offsets, number)
            storage[index] = _StorageInfo(piece.file, piece.start, piece.length)
    whole = dcp_types.Metadata(
        table,
        planner_data={key: (key,) for key in tensors},
        storage_data=storage,
        storage_meta=dcp_types.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    return pickle.dumps(whole, protocol=4)
