"""Weights under the names of released checkpoints, written as safetensors shard by shard.

transformers' own `save_pretrained` would do for Kimi K2, but for Kimi Linear it also renames the dense first layer's `mlp` to
`block_sparse_moe`, a name that no released checkpoint has.

Legend: `E` experts, `F` expert hidden width, `X` channels of one convolution. Fused experts: gate_up [E, 2F, D], down [E, D, F].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 5 << 30
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
# names of a gate, up and down matrix of one expert
_MATRICES = {"kimi_k2": ("gate_proj", "up_proj", "down_proj"), "kimi_linear": ("w1", "w3", "w2")}


def released(name: str, tensor: torch.Tensor, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(released name, tensor) of one tensor of a transformers model: fused experts one by one, stacked convolutions apart."""
    match = _LAYER.fullmatch(name)
    if match is None or family not in _MATRICES:
        yield name, tensor
        return
    prefix, rest = match.groups()
    if family == "kimi_linear":
        rest = rest.replace("self_attn.forget_gate.", "self_attn.")
        if re.match(r"mlp\.(gate|experts|shared_experts)\.", rest):
            rest = "block_sparse_moe." + rest.removeprefix("mlp.")
        if rest == "self_attn.conv1d.weight":
            for part, weight in zip("qkv", tensor.chunk(3, dim=0)):
                yield f"{prefix}self_attn.{part}_conv1d.weight", weight
            return
    gate, up, down = _MATRICES[family]
    if rest.endswith(".experts.gate_up_proj"):
        stem = prefix + rest.removesuffix("gate_up_proj")
        for expert, both in enumerate(tensor):
            for matrix, weight in zip((gate, up), both.chunk(2, dim=0)):
                yield f"{stem}{expert}.{matrix}.weight", weight
    elif rest.endswith(".experts.down_proj"):
        stem = prefix + rest.removesuffix("down_proj")
        for expert, weight in enumerate(tensor):
            yield f"{stem}{expert}.{down}.weight", weight
    else:
        yield prefix + rest, tensor


def write(state: dict[str, torch.Tensor], family: str, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `state` (transformers names) into `folder`: model.safetensors, or shards of at most `shard_bytes` and their
    index."""
    names = [
        (new, part.numel() * part.element_size())
        for name, tensor in state.items()
        for new, part in released(name, tensor, family)
    ]
    shards, room = [0], shard_bytes
    for _, size in names:
        if size > room and shards[-1]:
            shards.append(0)
            room = shard_bytes
        shards[-1] += 1
        room -= size
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
        for n in range(len(shards))
    ]
    where: dict[str, str] = {}
    tensors = ((new, part) for name, tensor in state.items() for new, part in released(name, tensor, family))
    for file, count in zip(files, shards):
        # cloned: safetensors refuses views that share memory
        part = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in _take(tensors, count)
        }
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in names)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def _take(items: Iterator[tuple[str, torch.Tensor]], count: int) -> Iterator[tuple[str, torch.Tensor]]:
    for _ in range(count):
        yield next(items)
