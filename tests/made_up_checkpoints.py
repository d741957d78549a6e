"""Checkpoint folders with the names, block structure and formats of releases, and made-up weights; streamed, so that full widths
fit any machine. Also a script: `python tests/made_up_checkpoints.py DIR --spec k2-slice --format int4`.

The same seed gives the same weights in every format: the INT4 and FP8 folders are what the grids make of the BF16 one. Weights
are drawn tensor by tensor; those above a million values are laid from 127 drawn blocks of 128 x 128, in an order that no other
tensor has, which is as fast as memory.

Legend: `T` blocks of the tile, `O` rows (out), `I` columns (in).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from k2lab import specs  # noqa: E402
from k2lab.ckpt import formats  # noqa: E402
from k2lab.ckpt.safefile import NAMES, Writer  # noqa: E402
from k2lab.core.rng import rng  # noqa: E402
from k2lab.quant import fp8, int4  # noqa: E402
from k2lab.specs import ModelSpec  # noqa: E402
from k2lab.specs._tensors import Tensor  # noqa: E402
from k2lab.text import layout, tokenizer  # noqa: E402

FORMATS = {"bf16": "plain", "fp16": "plain", "fp32": "plain", "fp8": "fp8_block", "int4": "int4_group"}
PLAIN = {"fp16": torch.float16, "fp32": torch.float32}
BLOCK, NUM_BLOCKS = 128, 127  # a prime, so that any stride passes all of them
TILED = 1 << 20  # weights with more values are laid from the tile
YARN = {
    "type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
TOWER = "language_model."
# Some of the tensors of Kimi K2.5's vision tower and projector.
VISION = {
    "vision_tower.patch_embed.proj.weight": (48, 3, 14, 14),
    "vision_tower.encoder.blocks.0.norm0.weight": (48,),
    "vision_tower.encoder.blocks.0.wqkv.weight": (144, 48),
    "vision_tower.encoder.blocks.0.wqkv.bias": (144,),
    "mm_projector.proj.0.weight": (96, 96),
    "mm_projector.proj.2.weight": (64, 96),
}


def _small(name: str, **changes: Any) -> ModelSpec:
    """Widths that are whole groups of 32, but some no whole blocks of 128."""
    common: dict[str, Any] = {
        "hidden_size": 160,
        "vocab_size": 352,
        "intermediate_size": 288,
        "moe_intermediate_size": 96,
        "n_routed_experts": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "local_heads": (),
    }
    return specs.get(name).replace(**(common | changes))


@cache
def spec_of(name: str) -> ModelSpec:
    """`small-k2`, `small-linear`; `k2-slice`, `linear-slice`: full widths, one dense and one MoE layer, 16 experts, 4096 tokens;
    or any spec of the product."""
    if name == "small-k2":
        return _small("tiny-k2", q_lora_rank=64, rope=YARN, max_position_embeddings=131072)
    if name == "small-linear":
        kinds = ("kda", "mla")
        return _small("tiny-linear", layer_types=kinds, linear_num_heads=2, linear_head_dim=32)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if name == "k2-slice":
        return specs.get("kimi-k2").replace(num_layers=2, n_routed_experts=16, vocab_size=4096, **ids)
    if name == "linear-slice":
        kinds = ("kda", "mla")
        return specs.get("kimi-linear-48b").replace(num_layers=2, layer_types=kinds, n_routed_experts=16, vocab_size=4096, **ids)
    return specs.get(name)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Tile:
    """Blocks [T, 128, 128] of drawn weights, and what the grids make of them."""

    weights: torch.Tensor
    fp8: tuple[torch.Tensor, torch.Tensor]
    int4: tuple[torch.Tensor, torch.Tensor]


@cache
def _tile(seed: int, std: float) -> Tile:
    draw = rng(seed, "made-up checkpoint", "tile").standard_normal((NUM_BLOCKS, BLOCK, BLOCK), dtype=np.float32)
    weights = torch.from_numpy(draw * np.float32(std)).to(torch.bfloat16)
    flat = weights.reshape(NUM_BLOCKS * BLOCK, BLOCK)  # one column of blocks
    packed, scales = int4.quantise(flat)
    codes, inverse = fp8.quantise(flat)
    return Tile(
        weights,
        (codes.view(torch.uint8).reshape(weights.shape), inverse.reshape(-1, 1, 1)),
        (packed.reshape(NUM_BLOCKS, BLOCK, -1), scales.reshape(NUM_BLOCKS, BLOCK, -1)),
    )


def _laid(blocks: torch.Tensor, ordinal: int, shape: tuple[int, int]) -> torch.Tensor:
    """A matrix laid from `blocks` [T, a, b], where `shape` counts blocks: in an order that only this ordinal has."""
    offset, stride = ordinal % NUM_BLOCKS, 1 + ordinal // NUM_BLOCKS % (NUM_BLOCKS - 1)
    order = (offset + stride * torch.arange(math.prod(shape))) % NUM_BLOCKS
    found = blocks[order].reshape(*shape, *blocks.shape[1:])
    return found.transpose(1, 2).reshape(shape[0] * blocks.shape[1], shape[1] * blocks.shape[2])


def _vector(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = rng(seed, "made-up checkpoint", name)
    if name.endswith("A_log"):
        return torch.from_numpy(np.log(draw.uniform(1, 16, shape)).astype(np.float32))
    if "norm" in name.rsplit(".", 2)[-2]:
        return torch.from_numpy((1 + 0.1 * draw.standard_normal(shape)).astype(np.float32))
    std = 0.01 if len(shape) < 3 else 0.5
    return torch.from_numpy((std * draw.standard_normal(shape)).astype(np.float32))


@dataclass
class _Weight:
    """One logical tensor: its name, spec entry, number among all, and how it is stored."""

    name: str
    tensor: Tensor
    ordinal: int
    format: str
    seed: int
    std: float

    def is_tiled(self) -> bool:
        return len(self.tensor.shape) == 2 and self.tensor.numel > TILED

    def _blocks(self) -> tuple[int, int]:
        out, width = self.tensor.shape
        return -(-out // BLOCK), -(-width // BLOCK)

    def weights(self) -> torch.Tensor:
        """The weights before any quantisation: bf16, or fp32 where that is kept."""
        shape = self.tensor.shape
        if len(shape) != 2:
            found = _vector(self.name, shape, self.seed)
            return found if self.tensor.kind == "fp32_vector" else found.to(torch.bfloat16)
        if self.is_tiled():
            return _laid(_tile(self.seed, self.std).weights, self.ordinal, self._blocks())[: shape[0], : shape[1]].contiguous()
        draw = rng(self.seed, "made-up checkpoint", self.name).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(draw * np.float32(self.std)).to(torch.bfloat16)

    def parts(self, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(stored name, dtype, shape) of what `values` gives, in order."""
        shape = self.tensor.shape
        if self.format == "fp8_block":
            yield self.name, torch.float8_e4m3fn, shape
            yield self.name + "_scale_inv", torch.float32, self._blocks()
        elif self.format == "int4_group":
            yield self.name + "_packed", torch.int32, (shape[0], shape[1] // 8)
            yield self.name + "_scale", torch.bfloat16, (shape[0], shape[1] // 32)
            yield self.name + "_shape", torch.int32, (2,)
        else:
            keep = torch.float32 if self.tensor.kind == "fp32_vector" else torch.bfloat16
            yield self.name, keep if keep == torch.float32 or dtype is None else dtype, shape

    def values(self, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
        """The stored tensors, as `parts` says."""
        shape, blocks = self.tensor.shape, self._blocks() if len(self.tensor.shape) == 2 else (0, 0)
        whole = all(size % BLOCK == 0 for size in shape)
        if self.format == "fp8_block" and self.is_tiled() and whole:
            codes, scales = _tile(self.seed, self.std).fp8
            yield _laid(codes, self.ordinal, blocks)
            yield _laid(scales, self.ordinal, blocks)
        elif self.format == "fp8_block":
            yield from fp8.quantise(self.weights())
        elif self.format == "int4_group":
            if self.is_tiled() and whole:
                packed, scales = _tile(self.seed, self.std).int4
                yield _laid(packed, self.ordinal, blocks)
                yield _laid(scales, self.ordinal, blocks)
            else:
                yield from int4.quantise(self.weights())
            yield torch.tensor(shape, dtype=torch.int32)
        else:
            found = self.weights()
            yield found if found.dtype == torch.float32 or dtype is None else found.to(dtype)


def _weights(spec: ModelSpec, format: str, seed: int) -> Iterator[_Weight]:
    ordinal = 0
    for tensor in spec.tensors():
        stored = FORMATS[format] if formats.quantises(FORMATS[format], tensor) else "plain"
        for expert in range(tensor.count):
            name = tensor.name.replace("{e}", str(expert)) if tensor.count > 1 else tensor.name
            yield _Weight(name, tensor, ordinal, stored, seed, spec.initializer_range)
            ordinal += 1


def weights_of(spec: ModelSpec, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """(logical name, tensor) of the weights behind every format: bf16, and fp32 where that is kept."""
    for weight in _weights(spec, "bf16", seed):
        yield weight.name, weight.weights()


# ---------------------------------------------------------------- folders


@dataclass
class _Faults:
    """What is wrong with a folder; each names a stored tensor."""

    missing: str = ""  # left out
    extra: str = ""  # added, one number
    zero: str = ""  # all zero; packed codes all 0
    nan: str = ""  # its first value is NaN (floats and fp8)
    misshaped: str = ""  # its last row is left out
    retyped: str = ""  # the same bytes as a type of unsigned integers
    config: dict[str, Any] = field(default_factory=dict)  # keys of config.json to set, None removes


def make(
    path: Path | str,
    spec: ModelSpec | str = "small-k2",
    format: str = "bf16",
    seed: int = 0,
    shard_bytes: int | None = None,
    *,
    vision: bool = False,
    with_tokenizer: bool = True,
    **faults: Any,
) -> Path:
    """Writes a checkpoint folder and returns its path. `format` one of FORMATS; with `shard_bytes` shards of at most so many
    bytes and an index, else one file; `vision` as Kimi K2.5: a text_config, prefixed names and some vision tensors. `faults` as
    in `_Faults`."""
    path, spec, wrong = Path(path), spec_of(spec) if isinstance(spec, str) else spec, _Faults(**faults)
    path.mkdir(parents=True, exist_ok=True)
    plan = list(_plan(spec, format, seed, TOWER if vision else ""))
    if vision:
        plan += [(None, [(name, torch.bfloat16, shape)]) for name, shape in VISION.items()]
    if wrong.extra:
        plan.append((None, [(wrong.extra, torch.float32, (1,))]))
    for _, parts in plan:
        parts[:] = [_bent(part, wrong) for part in parts if part[0] != wrong.missing]
    where = _write(path, plan, PLAIN.get(format), seed, shard_bytes, wrong)
    if shard_bytes is not None:
        total = sum(math.prod(shape) * dtype.itemsize for _, parts in plan for _, dtype, shape in parts)
        table = {"metadata": {"total_size": total}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(table, indent=1))
    _write_config(path, spec, format, vision, wrong.config, with_tokenizer)
    return path


_Part = tuple[str, torch.dtype, tuple[int, ...]]


def _plan(spec: ModelSpec, format: str, seed: int, prefix: str) -> Iterator[tuple[_Weight | None, list[_Part]]]:
    for weight in _weights(spec, format, seed):
        yield weight, [(prefix + name, dtype, shape) for name, dtype, shape in weight.parts(PLAIN.get(format))]


def _bent(part: _Part, wrong: _Faults) -> _Part:
    name, dtype, shape = part
    if name == wrong.misshaped:
        shape = (shape[0] - 1, *shape[1:])
    if name == wrong.retyped:
        dtype = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[dtype.itemsize]
    return name, dtype, shape


def _spoilt(value: torch.Tensor, name: str, shape: tuple[int, ...], wrong: _Faults) -> torch.Tensor:
    if name == wrong.zero:
        value = torch.full_like(value, -0x77777778) if name.endswith("_packed") else torch.zeros_like(value)
    if name == wrong.nan:
        value = value.clone()
        flat = value.view(-1)
        flat[0] = 0x7F if value.dtype == torch.uint8 else math.nan
    return value[: shape[0]] if name == wrong.misshaped else value


def _write(
    path: Path,
    plan: list[tuple[_Weight | None, list[_Part]]],
    dtype: torch.dtype | None,
    seed: int,
    shard_bytes: int | None,
    wrong: _Faults,
) -> dict[str, str]:
    """Writes the shards and returns {stored name: file}."""
    groups: list[list[tuple[_Weight | None, list[_Part]]]] = [[]]
    room = shard_bytes if shard_bytes is not None else sys.maxsize
    for item in plan:
        size = sum(math.prod(shape) * kind.itemsize for _, kind, shape in item[1])
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes or 0
        groups[-1].append(item)
        room -= size
    where = {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if shard_bytes is None else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = {name: (NAMES[kind], shape) for _, parts in group for name, kind, shape in parts}
        with Writer(path / file, entries, {"format": "pt"}) as writer:
            for weight, parts in group:
                names = {name.removeprefix(TOWER): (name, shape) for name, _, shape in parts}
                for inner, value in _values(weight, parts, dtype, seed):
                    if inner in names:
                        name, shape = names[inner]
                        writer.write(name, _spoilt(value, name, shape, wrong))
        where |= dict.fromkeys(entries, file)
    return where


def _values(
    weight: _Weight | None, parts: list[_Part], dtype: torch.dtype | None, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if weight is not None:
        yield from zip((name for name, _, _ in weight.parts(dtype)), weight.values(dtype), strict=True)
        return
    for name, kind, shape in parts:
        draw = rng(seed, "made-up checkpoint", name).standard_normal(shape, dtype=np.float32)
        yield name, torch.from_numpy(draw).to(kind)


@cache
def small_tokenizer(vocab_size: int = 320) -> tokenizer.Tokenizer:
    """A byte-pair tokenizer in Kimi's layout."""
    return tokenizer.train_bpe([__doc__] * 4, vocab_size)


def _write_config(path: Path, spec: ModelSpec, format: str, vision: bool, changes: dict[str, Any], with_tokenizer: bool) -> None:
    table = spec.config()
    if with_tokenizer:
        small = small_tokenizer()
        small.save(path)
        table |= {"bos_token_id": small.bos_id, "eos_token_id": small.eos_id, "pad_token_id": small.pad_id}
        assert small.special[layout.BOS] < spec.vocab_size
    table["torch_dtype"] = {"fp32": "float32", "fp16": "float16"}.get(format, "bfloat16")
    parts = ("vision_tower", "mm_projector") if vision else ()
    quantised = formats.quantization_config(FORMATS[format], spec, parts)
    if quantised is not None:
        table["quantization_config"] = quantised
    inner = table
    if vision:
        table = {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": inner,
            "vision_config": {"hidden_size": 48, "num_hidden_layers": 1},
        }
    for key, value in changes.items():
        inner[key] = value
        if value is None:
            del inner[key]
    (path / "config.json").write_text(json.dumps(table, indent=1))
    ids = {key: inner[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if inner.get(key) is not None}
    (path / "generation_config.json").write_text(json.dumps({"max_length": 4096, **ids}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spec", default="small-k2", help="small-k2, small-linear, k2-slice, linear-slice, or a spec's name")
    parser.add_argument("--format", default="bf16", choices=FORMATS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-mb", type=int, help="shards of so many MB and an index; without it one file")
    parser.add_argument("--vision", action="store_true", help="as Kimi K2.5: a text tower beside vision tensors")
    args = parser.parse_args()
    began = time.perf_counter()
    shard_bytes = args.shard_mb * 10**6 if args.shard_mb else None
    make(args.folder, args.spec, args.format, args.seed, shard_bytes, vision=args.vision)
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    seconds = time.perf_counter() - began
    print(f"{args.folder}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s)")


if __name__ == "__main__":
    main()
