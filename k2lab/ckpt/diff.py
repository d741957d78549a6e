"""`k2 diff`: two checkpoints of any formats compared tensor by tensor, in little memory.

Values are compared as they decode (INT4 to bf16, FP8 to fp32), so a packed export can be held against what was trained. Distances
count bf16 steps: both values are rounded to bf16, and the number of bf16 numbers between them is taken. Where one of the two is
quantised, the other's share of values on its grid is told (the values that its own scales can express), and the codes that the
grid function gives to the other are compared with those stored.

Legend: matrices are [out, in].
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2lab.ckpt import formats, sources
from k2lab.ckpt.encode import pieces, stored_bytes
from k2lab.quant import fp8, int4

_CHUNK = 16 << 20


@dataclass
class Tensor:
    """How one tensor differs. `state`: "bytes" (stored alike), "bits" (stored otherwise, same values bit for bit), "values"
    (equal but for signs of zero), "differs", or "shape". `unequal` values out of `count`; `ulps` the largest distance in bf16
    steps, -1 if a value that differs is not finite; `max_abs` and `rms` of the difference, the latter relative to the rms of A.
    Equal bits are equal values, NaN too.

    `grid` says whose: "A" or "B", or "" if neither or both are quantised; `on_grid` the share of the other's values on it.
    `codes` stored codes that differ, and `scales` likewise: from those of the other, or from what the grid function gives to the
    other's values; None where nothing is quantised, or in two ways.
    """

    name: str
    formats: tuple[str, str]
    state: str = "bytes"
    count: int = 0
    unequal: int = 0
    ulps: int = 0
    max_abs: float = 0.0
    rms: float = 0.0
    grid: str = ""
    on_grid: float | None = None
    codes: int | None = None
    scales: int | None = None


@dataclass
class Report:
    """`tensors` in the order of A; `only_a`, `only_b` names that the other lacks; `config` {key: [of A, of B]} of differences
    that matter; `files` beside the weights that differ."""

    formats: tuple[str, str]
    tensors: list[Tensor] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    config: dict[str, list[Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def equal(self) -> bool:
        """True if both hold the same tensors with the same values bit for bit, and the same model."""
        same = all(tensor.state in ("bytes", "bits") for tensor in self.tensors)
        return same and not self.only_a and not self.only_b and not self.config

    def states(self) -> dict[str, int]:
        """{state: number of tensors}."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            found[tensor.state] = found.get(tensor.state, 0) + 1
        return found

    def codes(self) -> tuple[int, int] | None:
        """(differing codes, differing scales) over all tensors; None if none is quantised."""
        known = [tensor for tensor in self.tensors if tensor.codes is not None]
        return (sum(t.codes or 0 for t in known), sum(t.scales or 0 for t in known)) if known else None

    def on_grid(self) -> float | None:
        """The share of all values that were held against a grid and lie on it."""
        known = [tensor for tensor in self.tensors if tensor.on_grid is not None]
        total = sum(tensor.count for tensor in known)
        return sum((tensor.on_grid or 0.0) * tensor.count for tensor in known) / total if total else None

    def worst(self, number: int = 10) -> list[Tensor]:
        """The tensors that differ most, by bf16 steps and then by size of the difference."""
        odd = [tensor for tensor in self.tensors if tensor.state in ("differs", "shape")]
        return sorted(odd, key=lambda t: (t.state != "shape", t.ulps != -1, -t.ulps, -t.max_abs))[:number]

    def json(self) -> dict[str, Any]:
        """Everything, for programs: infinite distances are null, and `max_ulps` is -1 if a value that differs is not finite."""
        ulps = [tensor.ulps for tensor in self.tensors]
        return {
            "equal": self.equal(),
            "formats": list(self.formats),
            "states": self.states(),
            "max_ulps": -1 if -1 in ulps else max(ulps, default=0),
            "max_abs": _finite(max((t.max_abs for t in self.tensors), default=0.0)),
            "codes": self.codes(),
            "on_grid": self.on_grid(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "config": self.config,
            "files": self.files,
            "tensors": [
                dataclasses.asdict(tensor) | {"max_abs": _finite(tensor.max_abs), "rms": _finite(tensor.rms)}
                for tensor in self.tensors
            ],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare(a: Path | str, b: Path | str, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Compares the checkpoints in two folders. `progress` hears (bytes compared, bytes in all) of A. Raises CheckpointError for a
    folder that cannot be opened."""
    one = sources.open_source(Path(a))
    try:
        other = sources.open_source(Path(b))
        try:
            return _compare(one, other, progress)
        finally:
            other.close()
    finally:
        one.close()


def _compare(one: Any, other: Any, progress: Callable[[int, int], None]) -> Report:
    report = Report((one.format, other.format))
    ours = [*one.names(), *one.apart]
    theirs = {*other.names(), *other.apart}
    report.only_a = [name for name in ours if name not in theirs]
    report.only_b = [name for name in [*other.names(), *other.apart] if name not in set(ours)]
    shared = [name for name in ours if name in theirs]
    sizes = {name: _size(one, name) for name in shared}
    done, total = 0, sum(sizes.values())
    for name in shared:
        report.tensors.append(_tensor(one, other, name))
        for folder in (one, other):
            for stored in folder.stored(name):
                if (file := folder.file_of(stored)) is not None:
                    file.release(stored)
        done += sizes[name]
        progress(done, total)
    report.config = _configs(one, other)
    report.files = _files(one.path, other.path)
    return report


def _size(folder: Any, name: str) -> int:
    if name in folder.apart:
        return sum(len(data) for _, _, data in folder.raw(name).values())
    return stored_bytes(folder, name)


# ---------------------------------------------------------------- one tensor


def _tensor(one: Any, other: Any, name: str) -> Tensor:
    if name in one.apart:
        (left,), (right,) = one.raw(name).values(), other.raw(name).values()
        found = Tensor(name, (left[0], right[0]), count=math.prod(left[1]))
        if left[:2] != right[:2]:
            found.state = "shape"
        elif not _same_bytes(left[2], right[2]):
            found.state, found.unequal = "differs", found.count
        return found
    infos = one.info(name), other.info(name)
    found = Tensor(name, (_how(infos[0]), _how(infos[1])), count=math.prod(infos[0].shape))
    if infos[0].shape != infos[1].shape:
        found.state = "shape"
        return found
    quantised = [info.format for info in infos if info.format != "plain"]
    if infos[0].format == infos[1].format and infos[0].dtype == infos[1].dtype and _same_stored(one, other, name):
        if quantised:
            found.codes = found.scales = 0
        return found
    _values(found, one, other, name, infos)
    return found


def _how(info: Any) -> str:
    return info.dtype if info.format == "plain" else info.format


def _same_stored(one: Any, other: Any, name: str) -> bool:
    if isinstance(one, sources.dcp.DcpFolder) or isinstance(other, sources.dcp.DcpFolder):
        return False  # pieces are stored otherwise; the values decide
    left, right = list(one.raw(name).values()), list(other.raw(name).values())
    return all(mine[:2] == theirs[:2] and _same_bytes(mine[2], theirs[2]) for mine, theirs in zip(left, right, strict=True))


def _same_bytes(left: memoryview, right: memoryview) -> bool:
    if len(left) != len(right):
        return False
    return all(left[at : at + _CHUNK] == right[at : at + _CHUNK] for at in range(0, len(left), _CHUNK))


def _values(found: Tensor, one: Any, other: Any, name: str, infos: tuple[Any, Any]) -> None:
    """Fills in what the decoded values say."""
    left_format, right_format = (info.format for info in infos)
    grid = _Grid.of(left_format, right_format)
    if grid is not None:
        found.grid, found.codes, found.scales = grid.whose, 0, 0
    bits, on_grid, error, power = True, 0, 0.0, 0.0
    for rows in pieces(infos[0].shape):
        left, right = one.read(name, rows), other.read(name, rows)
        if grid is not None:
            on_grid += grid.see(found, (one, other), name, rows, (left, right))
        a, b = left.float(), right.float()
        same = a.view(torch.int32) == b.view(torch.int32)  # NaN and infinity, too
        bits = bits and bool(same.all())
        found.unequal += int((a != b).logical_and_(~same).sum())
        gap = (a - b).abs_().nan_to_num_(math.inf, math.inf).masked_fill_(same, 0.0)
        largest = float(gap.max()) if gap.numel() else 0.0
        if math.isinf(largest):
            found.ulps = -1
        elif found.ulps >= 0 and gap.numel():
            steps = (_ordinal(a) - _ordinal(b)).abs_()
            found.ulps = max(found.ulps, int(steps.max()))
        found.max_abs = max(found.max_abs, largest)
        error += float(gap.double().square_().sum())
        power += float(a.nan_to_num(0.0, 0.0, 0.0).double().square_().sum())
    found.rms = math.sqrt(error / power) if power > 0 else (0.0 if error == 0 else math.inf)
    found.state = "bits" if bits else "differs" if found.unequal else "values"
    if grid is not None and grid.whose:
        found.on_grid = on_grid / max(1, found.count)


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """The place of values rounded to bf16 in the row of all bf16 numbers: neighbours differ by one, -0 and 0 do not."""
    bits = values.to(torch.bfloat16).view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@dataclass
class _Grid:
    """What a quantised tensor is held against: its own kind, or plain values. `whose` grid it is: "A", "B", or "" for both."""

    format: str
    whose: str

    @staticmethod
    def of(left: str, right: str) -> _Grid | None:
        if left == right:
            return None if left == "plain" else _Grid(left, "")
        if "plain" in (left, right):
            return _Grid(right, "B") if left == "plain" else _Grid(left, "A")
        return None  # quantised in two ways: codes have nothing in common

    def see(self, found: Tensor, folders: tuple[Any, Any], name: str, rows: slice | None, values: tuple[Any, Any]) -> int:
        """Counts differing codes and scales of these rows into `found`; the values on the grid, where one side is plain."""
        unpack = int4.unpack if self.format == "int4_group" else _fp8_codes
        if not self.whose:
            (codes, scales), (other_codes, other_scales) = (folder.packed(name, rows) for folder in folders)
            other_codes = unpack(other_codes)
        else:
            mine = 0 if self.whose == "A" else 1
            codes, scales = folders[mine].packed(name, rows)
            plain = values[1 - mine]
            grid: Any = int4.int4_grid if self.format == "int4_group" else fp8.fp8_grid
            other_codes, other_scales = grid(plain)
            other_codes = other_codes if self.format == "int4_group" else _fp8_codes(other_codes)
        assert found.codes is not None and found.scales is not None
        found.codes += int((unpack(codes) != other_codes).sum())
        found.scales += int((scales != other_scales).sum())
        return int(_on_grid(plain, scales, self.format).sum()) if self.whose else 0


def _fp8_codes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def _on_grid(values: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    """True where a value is one that some code gives with the scale of its place."""
    x = values.float()
    if format == "int4_group":
        x = x.unflatten(-1, (scales.shape[-1], -1))
        wide = scales.float().unsqueeze(-1)
        return ((x / wide).round_().clamp_(-8, 7) * wide).to(torch.bfloat16).float() == x
    wide = scales.repeat_interleave(fp8.BLOCK, 0)[: x.shape[0]].repeat_interleave(fp8.BLOCK, 1)[:, : x.shape[1]]
    near = (x / wide).clamp_(-fp8.LARGEST, fp8.LARGEST).to(fp8.E4M3).float() * wide
    return near.to(values.dtype) == values


# ---------------------------------------------------------------- what lies beside


def _configs(one: Any, other: Any) -> dict[str, list[Any]]:
    """Numbers of the two models that differ, and other keys by which the same weights would give other logits."""
    left, right = dataclasses.asdict(one.spec), dataclasses.asdict(other.spec)
    found = {key: [left[key], right[key]] for key in left if key != "name" and left[key] != right[key]}
    found.pop("local_heads", None)  # of fresh models only
    if one.qat != other.qat:
        found[formats.QAT_KEY] = [one.qat, other.qat]
    return found


def _files(one: Path, other: Path) -> list[str]:
    """Files beside the weights, code and licences aside, that differ or that one lacks."""
    tables = []
    for folder in (one, other):
        files = (file for file in sources.beside(folder) if file.suffix in (".json", ".jinja", ".model", ".tiktoken", ".txt"))
        tables.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    return sorted(name for name in tables[0].keys() | tables[1].keys() if tables[0].get(name) != tables[1].get(name))
