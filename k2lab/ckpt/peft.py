"""LoRA adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors, read without trust and written.

Tensors are named `base_model.model.<module>.lora_A.weight` [r, in] and `...lora_B.weight` [out, r], modules as in released
checkpoints (`model.layers.1.mlp.experts.3.gate_proj`); a matrix W acts as W + scale B A, scale = alpha / r, or alpha / sqrt(r)
with `use_rslora`. Also read are names of transformers' classes (`forget_gate.f_a_proj`, `mlp.` for `block_sparse_moe.`), and
what PEFT writes for fused experts (`target_parameters`): one pair for all experts of a layer, A [E r, in] and B [out, r E],
expert e in the rows e r to (e + 1) r of A and in the columns e, e + E, ... of B; gate and up share A, their B are halves of one.

Legend: `E` experts, `D` width, `F` expert hidden width, `r` rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from k2lab.ckpt.safefile import NAMES, SafeFile, Writer
from k2lab.ckpt.strict import is_count, is_number, read_object
from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import CheckpointError, did_you_mean

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?:language_model\.)?(.+)\.lora_([AB])\.weight")
_FUSED = re.compile(r"(.*\.experts)(\.base_layer)?")
# Settings under which the tensors mean something else than W + scale B A, and the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "use_dora": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "modules_to_save": (None, []), "trainable_token_indices": (None,), "layer_replication": (None,), "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,), "velora_config": (None,), "monteclora_config": (None,), "kasa_config": (None,),
    # the others begin from a changed base, which the tensors alone do not tell
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


class Pair(NamedTuple):
    """The adapter of one matrix: A [r, in], B [out, r] as stored; the matrix acts as W + scale B A."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


class _Place(NamedTuple):
    """Where the pair of a matrix is stored: the module's stored name; for fused experts the expert, and the rows of B."""

    stored: str
    rank: int
    scale: float
    expert: int | None = None
    rows: slice | None = None


def is_adapter(folder: Path | str) -> bool:
    """True if the folder holds an adapter in PEFT's format."""
    return (Path(folder) / CONFIG).is_file()


class Adapter:
    """An opened adapter folder. Made by `open`; all names, shapes and settings are checked then, values when they are read.

    `path`; `config` adapter_config.json; `rank`, `alpha`, `rslora` its settings (single matrices may differ); `base` the path or
    name of the model that it was made for, or None.
    """

    def __init__(self, path: Path, config: dict[str, Any], file: SafeFile) -> None:
        self.path, self.config, self._file = path, config, file
        self.rank, self.alpha, self.rslora = config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora"))
        self.base: str | None = config.get("base_model_name_or_path")
        self._stored = self._checked()
        self._places: dict[str, _Place] = {}
        for module in self._stored:
            self._places |= self._places_of(module)
        self._last: tuple[str, torch.Tensor] | None = None  # B of the fused experts that were read last

    @classmethod
    def open(cls, folder: Path | str) -> Adapter:
        """Raises CheckpointError if this is no adapter, if its settings make its tensors mean something else than W + scale B A,
        if a tensor is unknown, lacks its other half or is misshaped, or if the file is damaged."""
        path = Path(folder)
        config = read_object(path / CONFIG)
        _check_config(config, path / CONFIG)
        return cls(path, config, SafeFile(path / TENSORS))

    # ------------------------------------------------------------ what there is

    def modules(self) -> list[str]:
        """Names of the matrices with an adapter, without `.weight`, as they are stored (fused experts one by one)."""
        return list(self._places)

    def delta(self, name: str) -> torch.Tensor | None:
        """scale B A in fp32 [out, in] of the tensor `name` (released, with .weight), or None if it has no adapter."""
        found = self._find(name.removesuffix(".weight"))
        if found is None or not name.endswith(".weight"):
            return None
        A, B, scale = self._pair(found)
        return (B.float() @ A.float()).mul_(scale)

    def of(self, names: Collection[str]) -> Mapping[str, Pair]:
        """The pairs by these released names of matrices (without `.weight`), read when asked for. Names without an adapter are
        left out. Raises CheckpointError if the adapter has a matrix that is not among them."""
        found = {name: place for name in names if (place := self._find(name)) is not None}
        used = {id(place) for place in found.values()}
        unknown = [name for name, place in self._places.items() if id(place) not in used]
        if unknown:
            raise self._wrong("the adapter has a matrix that the model lacks", unknown[0], next=did_you_mean(unknown[0], names))
        return _Pairs(self, found)

    def _find(self, name: str) -> _Place | None:
        for each in (name, _as_transformers(name)):
            if each in self._places:
                return self._places[each]
        return None

    # ------------------------------------------------------------ checks

    def _wrong(self, what: str, name: str | None = None, **more: Any) -> CheckpointError:
        file = self.path / TENSORS
        return CheckpointError(what, where=f"{name} in {file}" if name else str(file), **more)

    def _checked(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """{stored module: shapes of A and B}."""
        halves: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, entry in self._file.entries.items():
            match = _TENSOR.fullmatch(name)
            if match is None:
                raise self._wrong(
                    "this tensor is no LoRA factor", name, allowed=f"{PREFIX}<module>.lora_A.weight and .lora_B.weight"
                )
            if entry.dtype not in ("F32", "BF16", "F16", "F64") or len(entry.shape) != 2 or 0 in entry.shape:
                raise self._wrong(
                    "a LoRA factor is a matrix of floating-point numbers", name, got=f"{entry.dtype} {list(entry.shape)}"
                )
            stored = name[: match.start(2) - len(".lora_")]
            halves.setdefault(stored, {})[match[2]] = entry.shape
        if not halves:
            raise self._wrong("the adapter has no tensor")
        checked = {}
        for stored, shapes in halves.items():
            if len(shapes) < 2:
                raise self._wrong(f"lora_{'AB'['A' in shapes]} is missing", stored, got=f"lora_{next(iter(shapes))} alone")
            checked[stored] = (shapes["A"], shapes["B"])
        return checked

    def _settings(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module by the config."""
        rank = _by_pattern(self.config.get("rank_pattern"), module, self.rank)
        alpha = _by_pattern(self.config.get("alpha_pattern"), module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def _places_of(self, stored: str) -> dict[str, _Place]:
        """The matrices whose adapters are stored under one module's name."""
        match = _TENSOR.fullmatch(f"{stored}.lora_A.weight")
        assert match is not None, "checked before"
        module, (A, B) = match[1], self._stored[stored]
        fused = _FUSED.fullmatch(module)
        if fused is not None:
            return self._fused_places(stored, fused[1], bool(fused[2]))
        rank, scale = self._settings(module)
        if A[0] != B[1] or A[0] != rank:
            raise self._wrong(
                "the factors are not of the rank that adapter_config.json says",
                stored, got=f"A {list(A)}, B {list(B)}", allowed=f"rank {rank}",
            )  # fmt: skip
        return {module: _Place(stored, rank, scale)}

    def _fused_places(self, stored: str, module: str, inner: bool) -> dict[str, _Place]:
        """PEFT's pair for all experts: `experts` or, of the parameter that was wrapped first, `experts.base_layer`."""
        leaf = self._fused_parameter(module, inner)
        rank, scale = self._settings(f"{module}.{leaf}")
        A, B = self._stored[stored]
        if A[0] != B[1] or A[0] % rank or (leaf == "gate_up_proj" and B[0] % 2):
            raise self._wrong(
                "the factors of fused experts do not fit the rank",
                stored,
                got=f"A {list(A)}, B {list(B)}",
                allowed=f"rank {rank}",
            )
        half, parts = B[0] // 2, {"down_proj": slice(0, B[0])}
        if leaf == "gate_up_proj":
            parts = {"gate_proj": slice(0, half), "up_proj": slice(half, B[0])}
        return {
            f"{module}.{expert}.{matrix}": _Place(stored, rank, scale, expert, rows)
            for expert in range(A[0] // rank)
            for matrix, rows in parts.items()
        }

    def _fused_parameter(self, module: str, inner: bool) -> str:
        """Which parameter a fused pair belongs to. With two, the shapes tell: A of one has B's width of the other."""
        names = [str(name).rpartition(".")[2] for name in self.config.get("target_parameters") or ()]
        wanted = sorted({name for name in names if name in ("gate_up_proj", "down_proj")})
        both = [self._stored.get(f"{PREFIX}{module}{part}") for part in (".base_layer", "")]
        if both[0] is None and len(wanted) == 1:
            return wanted[0]
        if both[0] is not None and both[1] is not None:
            (A_in, B_in), (A_out, B_out) = both
            fits = [B_in[0] == 2 * A_out[1] and B_out[0] == A_in[1], B_out[0] == 2 * A_in[1] and B_in[0] == A_out[1]]
            if fits == [True, False]:  # as PEFT does: gate_up_proj first
                return "gate_up_proj" if inner else "down_proj"
            if fits == [False, True]:
                return "down_proj" if inner else "gate_up_proj"
        raise self._wrong(
            "it cannot be told which fused parameter these factors belong to", module,
            got=f"target_parameters {names}", allowed="gate_up_proj, down_proj or both",
        )  # fmt: skip

    # ------------------------------------------------------------ values

    def _pair(self, place: _Place) -> Pair:
        names = [f"{place.stored}.lora_{half}.weight" for half in "AB"]
        if place.expert is None:
            A, B = (self._file.tensor(name) for name in names)
        else:
            first = place.expert * place.rank
            A = self._file.tensor(names[0], rows=slice(first, first + place.rank))
            last = self._last  # threads share it
            if last is None or last[0] != names[1]:
                last = self._last = (names[1], self._file.tensor(names[1]))
            whole = last[1]
            B = whole[place.rows, place.expert :: whole.shape[1] // place.rank].contiguous()
        for name, tensor in zip(names, (A, B)):
            if not tensor.isfinite().all():
                raise self._wrong("the adapter holds NaN or infinity", name)
        return Pair(A, B, place.scale)


class _Pairs(Mapping[str, Pair]):
    def __init__(self, adapter: Adapter, places: dict[str, _Place]) -> None:
        self._adapter, self._places = adapter, places

    def __getitem__(self, name: str) -> Pair:
        return self._adapter._pair(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _as_transformers(name: str) -> str:
    """A released name of Kimi Linear as transformers' class has it (and PEFT, which sees that); others as they are."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    name = re.sub(r"\.self_attn\.(f_[ab]_proj)$", r".self_attn.forget_gate.\1", name)
    matrix = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return re.sub(r"(\.experts\.\d+\.)(w[123])$", lambda match: match[1] + matrix[match[2]], name)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _check_config(config: dict[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            "this adapter is not LoRA", where=f"peft_type in {file}", got=config.get("peft_type"), allowed="LORA"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not is_count(rank) or not rank:
        raise CheckpointError("a rank is an integer of 1 or more", where=f"r in {file}", got=rank)
    if not is_number(alpha):
        raise CheckpointError("alpha is a number", where=f"lora_alpha in {file}", got=alpha)
    for key, test, what in (("rank_pattern", lambda v: is_count(v) and v, "ranks"), ("alpha_pattern", is_number, "numbers")):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(test(value) for value in patterns.values()):
            raise CheckpointError(f"this maps names to {what}", where=f"{key} in {file}", got=patterns)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"this is no pattern: {error}", where=f"{key} in {file}", got=pattern) from None
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise CheckpointError(
                f"adapters with {key} are not read", where=str(file), got=config[key], allowed=" or ".join(map(repr, plain))
            )
    for key in ("target_parameters", "target_modules"):
        if not isinstance(config.get(key), (list, str, type(None))):
            raise CheckpointError("this is a list of names", where=f"{key} in {file}", got=config[key])
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        raise CheckpointError("this is a path or name", where=f"base_model_name_or_path in {file}")


# ---------------------------------------------------------------- writing


def save(
    folder: Path | str,
    pairs: Iterable[tuple[str, Any]],
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    base: str | None = None,
) -> None:
    """Writes an adapter folder: `pairs` are (released name of a matrix without .weight, (A [r, in], B [out, r], scale)).

    `rank` and `alpha` are what most matrices have; those of another rank or scale are named in the patterns. Tensors keep their
    types. PEFT and engines that read its format load the matrices that are linear layers there.
    """
    folder, found = Path(folder), dict(pairs)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    ranks = {re.escape(name): len(A) for name, (A, _, _) in found.items() if len(A) != rank}
    alphas = {
        re.escape(name): each * (math.sqrt(len(A)) if rslora else len(A))
        for name, (A, _, each) in found.items()
        if each != scale or len(A) != rank
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{name}.lora_{half}.weight": tensor for name, pair in found.items() for half, tensor in zip("AB", pair[:2])
    }
    entries = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    with Writer(folder / TENSORS, entries, {"format": "pt"}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "use_rslora": rslora, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
        "rank_pattern": ranks, "alpha_pattern": alphas, "target_modules": target_modules(found), "target_parameters": None,
    }  # fmt: skip
    write_json(folder / CONFIG, config)


def target_modules(names: Iterable[str]) -> list[str]:
    """Ends of modules' names that stand for exactly these modules: `self_attn.o_proj`, `mlp.gate_proj`, `experts.3.up_proj`."""
    parts = (name.split(".") for name in names)
    return sorted({".".join(each[-3 if each[-2].isdigit() else -2 :]) for each in parts})
