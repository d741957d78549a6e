"""Where a checkpoint's values come from: `origin.json`, so that what training did not change is exported from its original bytes.

Quantising again what was once decoded need not give the same codes and scales (a scale made by another rule, a code -8, FP8
through bf16), so unchanged tensors are never quantised anew. `origin.json` names the quantised checkpoint and, per tensor, the
hash of its decoded bytes as they were written:

    {"v": 1, "source": "/models/kimi-k2-thinking", "format": "int4_group",
     "tensors": {"model.layers.1.mlp.experts.0.up_proj.weight": ["BF16", content hash]}}

It travels with the weights: conversions and training stages carry it along. A tensor whose hash is another one was changed; one
of the same hash, or without any (of a run that read the quantised checkpoint itself), is unchanged if it has the very bits that
the original decodes to. So a hash only spares the look at the original where a tensor was changed, and crc32 (in hex) is enough
for it: it costs a quarter of what sha256 does, and neither a collision nor an original that is not the folder it was can do harm.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2lab.ckpt import formats
from k2lab.ckpt.safefile import NAMES, TORCH
from k2lab.ckpt.strict import read_object
from k2lab.core.artifacts import write_json
from k2lab.core.errors import CheckpointError

ORIGIN = "origin.json"
VERSION = 1


@dataclass(frozen=True)
class Record:
    """One tensor: the type (by safetensors' name) it was decoded to, and the hash of these bytes."""

    dtype: str
    content: str


@dataclass(frozen=True)
class Origin:
    """`source` folder of the quantised checkpoint, its `format`, and `tensors` {logical name: Record}."""

    source: str
    format: str
    tensors: dict[str, Record] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """What origin.json holds."""
        table = {name: [record.dtype, record.content] for name, record in sorted(self.tensors.items())}
        return {"v": VERSION, "source": self.source, "format": self.format, "tensors": table}


def read(folder: Path) -> Origin | None:
    """The origin that a folder states, or None. Raises CheckpointError for a damaged file."""
    path = folder / ORIGIN
    if not path.exists():
        return None
    table = read_object(path)
    entries = table.get("tensors")
    if (
        table.get("v") != VERSION
        or not isinstance(table.get("source"), str)
        or table.get("format") not in ("fp8_block", "int4_group")
        or not isinstance(entries, dict)
        or not all(isinstance(entry, list) and [type(x) for x in entry] == [str, str] for entry in entries.values())
    ):
        raise CheckpointError(
            "this file is damaged or of another version", where=str(path), next="Remove it: then no tensor counts as unchanged"
        )
    return Origin(table["source"], table["format"], {name: Record(*entry) for name, entry in entries.items()})


def carry(start: Path, target: Path) -> None:
    """Takes the origin of the checkpoint in `start` over to the one in `target` that training made of it: its origin.json, or a
    new one without hashes if `start` itself is quantised. Nothing if it has no quantised origin."""
    if (start / ORIGIN).is_file():
        shutil.copyfile(start / ORIGIN, target / ORIGIN)
        return
    try:
        config = json.loads((start / "config.json").read_text(encoding="utf-8"))
        format = formats.recognise(config)
    except (OSError, ValueError):  # a start without a readable config.json was refused before anything was trained
        return
    if format != "plain":
        write_json(target / ORIGIN, Origin(str(start.resolve()), format).json())


class Hash:
    """The hash of bytes that come in pieces."""

    def __init__(self) -> None:
        self._found = 0

    def add(self, piece: Any) -> None:
        """The next bytes."""
        self._found = zlib.crc32(piece, self._found)

    def hex(self) -> str:
        """Eight digits."""
        return f"{self._found:08x}"


def data(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


class Original:
    """An opened original checkpoint, asked tensor by tensor whether a value is still what it decodes to.

    `folder` is the original, quantised; `origin` what the checkpoint in hand says of its descent (or None).
    """

    def __init__(self, folder: Any, origin: Origin | None) -> None:
        self.folder, self.origin = folder, origin

    def has(self, name: str) -> bool:
        """True if the original holds this tensor quantised."""
        return self.folder.info(name).format != "plain"

    def unchanged(self, name: str, tensor: torch.Tensor) -> bool:
        """True if `tensor` is, bit for bit, what the original decodes to: in its own type, or through bf16 (a detour that
        training in fp32 takes)."""
        record = self.origin.tensors.get(name) if self.origin is not None else None
        if record is not None and record.dtype in TORCH and _holds(tensor, record) is False:
            return False
        wanted = self.folder.read(name)
        if _equal(wanted.to(tensor.dtype), tensor):
            return True
        return tensor.dtype == torch.float32 and _equal(wanted.to(torch.bfloat16).float(), tensor)


def _holds(tensor: torch.Tensor, record: Record) -> bool | None:
    """True or False if the hash tells whether `tensor` still has the recorded values; None if its type is too narrow for that."""
    dtype = TORCH[record.dtype]
    if NAMES[tensor.dtype] == record.dtype:
        return _digest(tensor) == record.content
    if dtype.itemsize >= tensor.dtype.itemsize:
        return None
    narrow = tensor.to(dtype)
    return _equal(narrow.to(tensor.dtype), tensor) and _digest(narrow) == record.content


def _digest(tensor: torch.Tensor) -> str:
    found = Hash()
    found.add(data(tensor))
    return found.hex()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two tensors of one type have the same bits."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))
