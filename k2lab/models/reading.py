"""Filling a transformers model from a checkpoint, tensor by tensor and slice by slice, whatever format the checkpoint has and
however the model is sharded.

A released tensor is a piece of a model's tensor (`specs.pieces`); a rank holds some index ranges of each dim of a model's tensor.
Where the two meet, that part is read, decoded and copied, and nothing else is: a rank never holds a whole tensor that it has a
shard of. Files are read from front to back.

Legend: `E` experts, `D` width, `F` expert hidden width. Fused experts: gate_up [E, 2F, D], down [E, D, F]; packed ones hold 8
columns in a code and have one scale for 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Placement

from k2lab.core.errors import CheckpointError
from k2lab.core.types import TensorInfo, TensorSource
from k2lab.models import packed
from k2lab.models.wrap import ALWAYS_FP32
from k2lab.quant import fp8, int4
from k2lab.specs import ModelSpec, Piece, pieces

__all__ = ["Piece", "cast", "fill", "local_ranges", "materialise", "pieces"]

# Elements that are read, decoded and copied at a time: on a CPU few enough to be in its cache all the way.
AT_ONCE, AT_ONCE_GPU = 1 << 20, 1 << 24
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS = 128  # rows of such a part start at a multiple of this, the height of an fp8 block

Ranges = list[tuple[int, int]]  # index ranges (first, end) of one dim, in the order in which a local tensor holds them


class _Home(NamedTuple):
    """A released tensor and the model's tensor that it belongs in: a weight, or the codes and scales of packed weights. `region`
    is that of the weight, packed or not."""

    released: str
    names: tuple[str, ...]
    region: tuple[int | slice, ...]


def fill(
    hf: Any, spec: ModelSpec, source: TensorSource, dtype: torch.dtype, device: torch.device | str, threads: int = 1
) -> None:
    """Reads every parameter and persistent buffer of `hf` from `source`.

    What is on the meta device is allocated on `device`, plain tensors as `dtype` (`ALWAYS_FP32` at least fp32), DTensors in the
    dtype that they have, only this rank's shards; what has memory is filled in place, in its own dtype. Buffers that no
    checkpoint holds are allocated but not set. Codes and scales of packed experts are taken over as they are stored. `threads` >
    1 reads several tensors at once. Beside the model, memory is needed for `AT_ONCE` elements per thread.

    Raises CheckpointError, before anything is allocated, if the source lacks one of the model's tensors, has one that the model
    lacks, has one of another shape, or has dense experts where the model has packed ones, and for shards of a kind not known.
    """
    homes = _homes(hf, spec, source)
    held = {name: local_ranges(tensor) for name, tensor in _state(hf, spec).items()}
    cast(hf, dtype)
    materialise(hf, device)
    with torch.no_grad():
        state = _state(hf, spec).items()
        local = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state}

        def read(home: _Home) -> None:
            ranges, targets = [held[name] for name in home.names], [local[name] for name in home.names]
            (_read if len(targets) == 1 else _read_packed)(source, home, *ranges, *targets)

        if threads == 1:
            for home in homes:
                read(home)
            return
        pool = ThreadPoolExecutor(threads, initializer=torch.set_grad_enabled, initargs=(False,))
        try:
            for _ in pool.map(read, homes):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def cast(hf: Any, dtype: torch.dtype) -> None:
    """Gives plain floating-point parameters and persistent buffers on the meta device `dtype`, `ALWAYS_FP32` at least fp32;
    scales of packed weights keep theirs."""
    for module in hf.modules():
        buffers = {name: tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is None or not tensor.is_meta or not tensor.is_floating_point() or isinstance(tensor, DTensor):
                continue
            if name not in packed.SCALES:
                tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32) if name in ALWAYS_FP32 else dtype)


def materialise(hf: Any, device: torch.device | str) -> None:
    """Allocates on `device` what is on the meta device, of DTensors this rank's shards."""
    # _apply is how a module lets all its tensors be replaced; FSDP's modules take note of the new ones in it
    hf._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    hf.tie_weights()


def _state(hf: Any, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied head left out."""
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    return {name: tensor for name, tensor in hf.state_dict().items() if name not in tied}


# ---------------------------------------------------------------- what belongs where


def _homes(hf: Any, spec: ModelSpec, source: TensorSource) -> list[_Home]:
    """All tensors of the source with their homes, in the order of the source's files."""
    wanted = {
        piece.name: (_Home(piece.name, names, piece.region), piece.shape)
        for name, shape, names in _weights(_state(hf, spec))
        for piece in pieces(name, shape, spec.family)
    }
    names = source.names()
    have = set(names)
    missing = [name for name in wanted if name not in have]
    extra = [name for name in names if name not in wanted]
    infos = {name: source.info(name) for name in names if name in wanted}
    misshaped = [name for name, info in infos.items() if tuple(info.shape) != wanted[name][1]]
    odd = (("missing", missing), ("unexpected", extra), ("of another shape", misshaped))
    if any(found for _, found in odd):
        counts = ", ".join(f"{len(found)} {word}" for word, found in odd if found)
        shown = [_shown(name, infos.get(name), wanted.get(name)) for _, found in odd for name in found[:3]]
        raise CheckpointError(f"the checkpoint's tensors are not those of its config.json: {counts}", got=", ".join(shown))
    for name, info in infos.items():
        if len(wanted[name][0].names) > 1 and info.format != "int4_group":
            raise CheckpointError(
                "experts are to be held packed, but are not stored so",
                where=f"{name} in {info.file}",
                got=info.format,
                allowed="a checkpoint with INT4 experts",
                next="Convert it with `k2 convert ... --to int4`, or load its experts dense",
            )
    place = {name: number for number, name in enumerate(names)}
    order = sorted(names, key=lambda name: (infos[name].file, place[name]))
    return [wanted[name][0] for name in order]


def _weights(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """(name, shape, names of the tensors that hold it) of every weight; codes and scales of packed experts make one weight."""
    for name, tensor in state.items():
        stem = name.removesuffix("_codes")
        if name.endswith(packed.SCALES) and name.removesuffix("_scales") + "_codes" in state:
            continue
        if stem != name and stem + "_scales" in state:
            yield stem + "_proj", (*tensor.shape[:-1], tensor.shape[-1] * int4.PER_WORD), (name, stem + "_scales")
        else:
            yield name, tuple(tensor.shape), (name,)


def _shown(name: str, info: Any, wanted: Any) -> str:
    if info is None:
        return name
    return f"{name} of shape {list(info.shape)} in {info.file} instead of {list(wanted[1])}"


def local_ranges(tensor: torch.Tensor) -> list[Ranges]:
    """Per dim, the index ranges of the whole tensor that this rank holds, in the order of its local tensor.

    Raises CheckpointError for a DTensor's placements that cannot be filled piece by piece."""
    if not isinstance(tensor, DTensor):
        return [[(0, size)] for size in tensor.shape]
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is no part of the mesh
        return [[] for _ in tensor.shape]
    ranges = placed(tuple(tensor.shape), tuple(mesh.shape), tuple(coordinate), tensor.placements)
    shape, local = tuple(map(_length, ranges)), tuple(tensor.to_local().shape)
    if shape != local and (math.prod(shape) or math.prod(local)):
        got = f"{tensor.placements} of {tuple(tensor.shape)} leaves {local}, not {shape}"
        raise CheckpointError("this sharding is not understood", got=got)
    return ranges


def placed(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Sequence[Placement]
) -> list[Ranges]:
    """`local_ranges` of a tensor of `shape` for the rank at `coordinate` of a mesh of this shape.

    Placements are applied in the order of the mesh's axes: Shard as `torch.chunk` cuts; strided shards, with which FSDP2
    describes tensors that were sharded before, as the same cut of each of their `split_factor` parts.
    """
    ranges: list[Ranges] = [[(0, size)] for size in shape]
    for num, index, placement in zip(mesh, coordinate, placements):
        if placement.is_replicate():
            continue
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise CheckpointError(f"a tensor placed as {placement} cannot be filled", allowed="Shard, Replicate")
        parts, old = int(getattr(placement, "split_factor", 1)), ranges[placement.dim]
        ranges[placement.dim] = [
            piece
            for first, end in (_chunk(_length(old), parts, part) for part in range(parts))
            for low, high in [_chunk(end - first, num, index)]
            for piece in _cut(old, first + low, first + high)
        ]
    return ranges


def _length(ranges: Ranges) -> int:
    return sum(end - first for first, end in ranges)


def _chunk(size: int, num: int, index: int) -> tuple[int, int]:
    """The range of chunk `index` of `num`, as torch.chunk cuts: all of ceil(size / num) but the last ones."""
    each = -(-size // num)
    return min(index * each, size), min((index + 1) * each, size)


def _cut(ranges: Ranges, first: int, end: int) -> Iterator[tuple[int, int]]:
    """What lies from place `first` to `end` if the ranges are laid one behind the other."""
    offset = 0
    for low, high in ranges:
        start, stop = max(first - offset, 0), min(end - offset, high - low)
        if start < stop:
            yield low + start, low + stop
        offset += high - low


# ---------------------------------------------------------------- reading


def _overlaps(part: int | slice, held: Ranges) -> list[tuple[slice, int | slice]]:
    """(where in the released tensor, where in the local tensor) for one dim: `part` is what the released tensor covers of the
    whole tensor's dim, `held` what this rank holds of it. An int part has no dim in the released tensor, nor in the target."""
    first, end = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
    found: list[tuple[slice, int | slice]] = []
    offset = 0
    for low, high in held:
        start, stop = max(first, low), min(end, high)
        if start < stop:
            here = slice(offset + start - low, offset + stop - low)
            found.append((slice(start - first, stop - first), here.start if isinstance(part, int) else here))
        offset += high - low
    return found


def _boxes(home: _Home, held: Sequence[Ranges]) -> Iterator[tuple[list[slice], tuple[int | slice, ...]]]:
    """(a slice per dim of the released tensor, the index of the local tensor) of every part that this rank holds."""
    for boxes in product(*(_overlaps(part, ranges) for part, ranges in zip(home.region, held))):
        wanted = [here for part, (here, _) in zip(home.region, boxes) if isinstance(part, slice)]
        yield wanted, tuple(there for _, there in boxes)


def _read(source: TensorSource, home: _Home, held: Sequence[Ranges], local: torch.Tensor) -> None:
    """Reads what this rank holds of one released tensor into its local tensor."""
    info = source.info(home.released)
    for wanted, there in _boxes(home, held):
        target = local[there]
        if not wanted:
            target.copy_(source.read(info.name))
            continue
        rows = wanted[0]
        columns = wanted[1] if len(wanted) == 2 and wanted[1] != slice(0, info.shape[1]) else None
        rest = (slice(None), *wanted[1:]) if len(wanted) > 2 else ()
        if columns is None and not rest and _lies_as_stored(info, target):
            source.read_into(target, info.name, rows)
            continue
        for part in _row_parts(rows, target):
            value = _decoded(source, info, part, columns, target)
            target[part.start - rows.start : part.stop - rows.start].copy_(value[rest] if rest else value)


def _lies_as_stored(info: TensorInfo, target: torch.Tensor) -> bool:
    """True if the source's bytes can be read right into `target`."""
    same = info.format == "plain" and _DTYPES.get(info.dtype) == target.dtype
    return same and target.device.type == "cpu" and target.is_contiguous()


def _read_packed(
    source: TensorSource, home: _Home, held: list[Ranges], held_scales: list[Ranges], codes: torch.Tensor, scales: torch.Tensor
) -> None:
    """As `_read`, for a weight of which codes and scales are taken over."""
    widths = (int4.PER_WORD, int4.GROUP)
    wide = [[*ranges[:-1], _times(ranges[-1], width)] for ranges, width in zip((held, held_scales), widths)]
    if wide[0] != wide[1]:
        raise CheckpointError("codes and scales of packed experts must be sharded alike", where=home.names[0])
    for wanted, there in _boxes(home, wide[0]):
        last = there[-1]
        assert isinstance(last, slice), "a matrix keeps its columns"
        targets = [
            tensor[(*there[:-1], slice(last.start // width, last.stop // width))]
            for tensor, width in zip((codes, scales), widths)
        ]
        for part in _row_parts(wanted[0], targets[0]):
            for target, found in zip(targets, source.packed(home.released, part, wanted[1])):
                target[part.start - wanted[0].start : part.stop - wanted[0].start].copy_(found)


def _times(ranges: Ranges, factor: int) -> Ranges:
    return [(first * factor, end * factor) for first, end in ranges]


def _decoded(source: TensorSource, info: TensorInfo, rows: slice, columns: slice | None, target: torch.Tensor) -> torch.Tensor:
    """A part of a tensor, decoded where `target` is: on a GPU codes and scales go there instead of values."""
    if info.format == "plain" or not _decodes(target.device):
        whole = rows == slice(0, info.shape[0])
        return source.read(info.name, None if whole else rows, columns)
    last = columns or slice(0, info.shape[1])
    tall, block, grid = (1, int4.GROUP, int4) if info.format == "int4_group" else (fp8.BLOCK, fp8.BLOCK, fp8)
    high, wide = _grown(rows, tall, info.shape[0]), _grown(last, block, info.shape[1])
    codes, scales = (part.to(target.device) for part in source.packed(info.name, high, wide))
    values = grid.dequantise(codes, scales, dtype=target.dtype)
    return values[rows.start - high.start : rows.stop - high.start, last.start - wide.start : last.stop - wide.start]


def _decodes(device: torch.device) -> bool:
    """True if quantised weights are decoded on this device rather than before they are copied to it."""
    return device.type == "cuda"


def _grown(part: slice, block: int, size: int) -> slice:
    """`part` grown to whole blocks, within an axis of `size`."""
    return slice(part.start // block * block, min(-(-part.stop // block) * block, size))


def _row_parts(rows: slice, target: torch.Tensor) -> Iterator[slice]:
    """`rows`, which belong in `target`, in parts of about `AT_ONCE` elements that start at multiples of `ROWS`."""
    width = max(target[:1].numel(), 1)
    step = max((AT_ONCE if target.device.type == "cpu" else AT_ONCE_GPU) // (width * ROWS), 1) * ROWS
    start = rows.start
    while start < rows.stop:
        stop = min((start // step + 1) * step, rows.stop)
        yield slice(start, stop)
        start = stop
