"""Weights under the names of released checkpoints, written as safetensors shard by shard.

transformers' own `save_pretrained` would do for Kimi K2, but for Kimi Linear it also renames the dense first layer's `mlp` to
`block_sparse_moe`, a name that no released checkpoint has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from k2lab.specs import pieces

SHARD_BYTES = 5 << 30


def released(name: str, tensor: torch.Tensor, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(released name, tensor) of one tensor of a transformers model: fused experts one by one, stacked convolutions apart."""
    for piece in pieces(name, tuple(tensor.shape), family):
        yield piece.name, tensor[piece.region]


def write(state: Mapping[str, torch.Tensor], family: str, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
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
