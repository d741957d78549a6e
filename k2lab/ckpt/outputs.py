"""What a conversion will write: every tensor's stored form, shard by shard, and the files beside the weights.

The plan follows from the source, the target and the bytes per shard alone, so that any number of processes, or the same command
after a kill, work on the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from k2lab.ckpt import dcp, formats, layout
from k2lab.ckpt.safefile import itemsize
from k2lab.core.errors import CheckpointError
from k2lab.specs import ModelSpec
from k2lab.specs._tensors import Tensor

SHARD_BYTES = 5 << 30
# What can be asked for: the format of the quantised tensors.
TARGETS = {"bf16": "plain", "fp32": "plain", "fp8": "fp8_block", "int4": "int4_group", "dcp": "plain"}
# Keys by which transformers 5 says what the keys of releases say in other words; engines know only the latter.
_MODERN = ("rope_parameters", "transformers_version", "dtype", "layer_types", "mlp_layer_types")

Entries = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Item:
    """One tensor to be written: its logical name (its stored one, if it is no tensor of the text model), `how` it comes about,
    and `entries` {stored name: (dtype, shape)} in the order in which they lie in the file.

    how: "copy" the source's bytes; "plain" decoded values in the entry's type; "fp8_block", "int4_group" put on the grid.
    """

    name: str
    how: str
    entries: Entries

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return sum(math.prod(shape) * itemsize(dtype) for dtype, shape in self.entries.values())


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name and its tensors in order."""

    file: str
    items: tuple[Item, ...]

    @cached_property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True)
class Plan:
    """`to` one of TARGETS; `shards`; `dropped` stored tensors of the source that are not written: left-over tensors that no model
    of ours has and that lie in another format than the target's."""

    to: str
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.size for shard in self.shards)

    def digest(self) -> str:
        """sha256 of everything that the plan says."""
        table = [[s.file, [[i.name, i.how, i.entries] for i in s.items]] for s in self.shards]
        return hashlib.sha256(json.dumps([self.to, table], separators=(",", ":")).encode()).hexdigest()


def make(source: Any, to: str, shard_bytes: int, template: Any = None, merged: frozenset[str] = frozenset()) -> Plan:
    """The plan for writing `source` (a `Folder`, or what `dcp.open_dcp` gives) as `to`.

    `template` is an opened checkpoint in the target's format whose choice of tensors and types is followed (the original);
    `merged` names tensors that an adapter changes, whose bytes are therefore never copied. Raises CheckpointError if the model
    has nothing that the target's format quantises, or rows that are no whole groups.
    """
    format = TARGETS[to]
    kinds = _kinds(source.spec)
    if format != "plain":
        template = source if source.format == format else template
        _require_quantisable(source.spec, format, template)
    items = [_item(source, name, kinds[name], to, template, name in merged) for name in source.names()]
    items += [_copy(source, name) for name in source.apart]
    leftovers = list(source.leftovers)
    if leftovers and source.format == format and to != "dcp":
        items += [_copy(source, name) for name in leftovers]
        leftovers = []
    return Plan(to, _shards(items, to, shard_bytes), tuple(leftovers))


def _kinds(spec: ModelSpec) -> dict[str, Tensor]:
    found = {}
    for tensor in spec.tensors():
        names = [tensor.name] if tensor.count == 1 else [tensor.name.replace("{e}", str(n)) for n in range(tensor.count)]
        found |= dict.fromkeys(names, tensor)
    return found


def _require_quantisable(spec: ModelSpec, format: str, template: Any) -> None:
    if template is not None:
        return
    wide = [tensor for tensor in spec.tensors() if tensor.kind == "expert"]
    odd = [tensor for tensor in wide if tensor.shape[-1] % formats.INT4_GROUP]
    if format == "int4_group" and odd:
        raise CheckpointError(
            "the rows of an expert's matrix are no whole groups, and engines cannot serve experts of which a part is INT4",
            where=odd[0].name,
            got=f"rows of {odd[0].shape[-1]}",
            allowed=f"multiples of {formats.INT4_GROUP}",
        )
    if not any(formats.quantises(format, tensor) for tensor in spec.tensors()):
        raise CheckpointError(f"{spec.name} has no tensor that {format} quantises", allowed="--to bf16, fp32, fp8 or dcp")


def _copy(source: Any, name: str) -> Item:
    return Item(name, "copy", {stored: (dtype, shape) for stored, (dtype, shape, _) in source.raw(name).items()})


def _item(source: Any, name: str, tensor: Tensor, to: str, template: Any, merged: bool) -> Item:
    format, info = TARGETS[to], source.info(name)
    stored = source.prefix + name
    if to == "dcp":
        return Item(name, "plain", {name: (info.dtype, info.shape)})
    if to == "fp32":
        dtype = "F32"
    elif tensor.kind == "fp32_vector":
        dtype = info.dtype if info.format == "plain" else "F32"
    else:
        dtype = "BF16"
    if format != "plain":
        quantised = template.info(name).format == format if template is not None else formats.quantises(format, tensor)
        if quantised:
            if info.format == format and not merged:
                return _copy(source, name)
            return Item(name, format, _packed_entries(source, name, info.shape, format, template))
        if template is not None:
            dtype = template.info(name).dtype
    if info.format == "plain" and info.dtype == dtype and not merged:
        return Item(name, "copy", {stored: (dtype, info.shape)})
    return Item(name, "plain", {stored: (dtype, info.shape)})


def _packed_entries(source: Any, name: str, shape: tuple[int, ...], format: str, template: Any) -> Entries:
    """Stored parts of a quantised tensor; weight_shape has the template's integer type, so that its bytes can take this place."""
    out, width = shape
    names = [source.prefix + part for part in layout.stored_names(name, format)]
    if format == "fp8_block":
        blocks = (-(-out // formats.FP8_BLOCK), -(-width // formats.FP8_BLOCK))
        return {names[0]: ("F8_E4M3", shape), names[1]: ("F32", blocks)}
    integer = "I32"
    if template is not None:
        integer = list(template.raw(name).values())[2][0]
    return {
        names[0]: ("I32", (out, width // 8)),
        names[1]: ("BF16", (out, width // formats.INT4_GROUP)),
        names[2]: (integer, (2,)),
    }


def _shards(items: Iterable[Item], to: str, shard_bytes: int) -> tuple[Shard, ...]:
    groups: list[list[Item]] = [[]]
    room = shard_bytes
    for item in items:
        if item.size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(item)
        room -= item.size
    if to == "dcp":
        names = [dcp.file_name(number) for number in range(len(groups))]
    elif len(groups) == 1:
        names = [layout.SINGLE]
    else:
        names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    return tuple(Shard(file, tuple(group)) for file, group in zip(names, groups))


# ---------------------------------------------------------------- config.json


def config_of(source: Any, plan: Plan, template: Any = None) -> dict[str, Any]:
    """The config.json to write: the source's keys kept; those that serving engines need added in their released form; the
    quantisation and the type as the weights are."""
    format = TARGETS[plan.to]
    table: dict[str, Any] = source.config()
    place = table["text_config"] if isinstance(table.get("text_config"), dict) else table
    for part in (table, place):
        part.pop("quantization_config", None)
        part.pop("dtype", None)
    _legacy(place, source.spec)
    if format != "plain":
        table.pop(formats.QAT_KEY, None)
        vision = tuple(dict.fromkeys(name.split(".", 1)[0] for name in source.apart))
        known = next((one for one in (source, template) if one is not None and one.format == format), None)
        place["quantization_config"] = (
            formats.table_of(known.config()) if known is not None else formats.quantization_config(format, source.spec, vision)
        )
    kind = {"fp32": "float32", "dcp": _type_of(source)}.get(plan.to, "bfloat16")
    for part in (table, place):
        if part is place or "torch_dtype" in part:
            part["torch_dtype"] = kind
    if any(".layers." in name for name in plan.dropped):
        place["num_nextn_predict_layers"] = 0
    return table


def _legacy(table: dict[str, Any], spec: ModelSpec) -> None:
    ours = spec.config()
    if any(key in table for key in _MODERN[:1]) or table.get("model_type") is None:
        for key in _MODERN:
            table.pop(key, None)
        table.update(ours)
    for key, value in ours.items():
        table.setdefault(key, value)


def _type_of(source: Any) -> str:
    names = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
    return names[source.info("model.embed_tokens.weight").dtype]


def index_of(shards: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """model.safetensors.index.json for {file: {stored name: bytes}}."""
    where = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(size for tensors in shards.values() for size in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
