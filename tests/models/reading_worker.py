"""One rank of a gloo group: loads sharded models and proves that its shards are those of the whole model, that it read about its
share of the expert bytes and no more, and that what FSDP2 was given computes as the whole model does."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import made_up_checkpoints  # noqa: E402

from k2lab.ckpt.folder import Folder, open_folder  # noqa: E402
from k2lab.dist import mesh as processes  # noqa: E402
from k2lab.models import build, reading  # noqa: E402


class Counting:
    """A folder that counts the bytes that are read of each tensor, as they are stored."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.bytes = folder, Counter[str]()
        self.spec = folder.spec
        for file in folder.files.values():
            file.tensor, file.read_into = self._counted(file.tensor), self._counted_into(file.read_into)

    def _counted(self, tensor: Any) -> Any:
        def read(name: str, *part: Any) -> torch.Tensor:
            found = tensor(name, *part)
            self.bytes[name] += found.numel() * found.element_size()
            return found

        return read

    def _counted_into(self, read_into: Any) -> Any:
        def read(target: torch.Tensor, name: str, *part: Any) -> None:
            read_into(target, name, *part)
            self.bytes[name] += target.numel() * target.element_size()

        return read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.folder, name)

    def share(self) -> float:
        """Bytes of experts that were read, as a part of all."""
        entries = {name: entry for file in self.folder.files.values() for name, entry in file.entries.items()}
        experts = [name for name in entries if ".experts." in name]
        assert all(self.bytes[name] <= entries[name].size for name in experts), "something was read twice"
        return sum(self.bytes[name] for name in experts) / sum(entries[name].size for name in experts)


def split(mesh: Any, dims: dict[str, int]) -> Any:
    """A `shard` function that makes DTensors of parameters whose names end as told, cut along the dim told."""

    def shard(hf: Any) -> None:
        for name, parameter in list(hf.named_parameters()):
            for ending, dim in dims.items():
                if name.endswith(ending):
                    module, _, last = name.rpartition(".")
                    placed = distribute_tensor(parameter, mesh, [Shard(dim)])
                    setattr(hf.get_submodule(module), last, torch.nn.Parameter(placed))

    return shard


def split_packed(mesh: Any) -> Any:
    """A `shard` function that gives each rank some of the packed experts."""

    def shard(hf: Any) -> None:
        for name, buffer in list(hf.named_buffers()):
            if name.endswith(("_codes", "_scales")):
                module, _, last = name.rpartition(".")
                hf.get_submodule(module).register_buffer(last, distribute_tensor(buffer, mesh, [Shard(0)]))

    return shard


def fsdp(mesh: Any) -> Any:
    def shard(hf: Any) -> None:
        for layer in hf.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(hf, mesh=mesh)

    return shard


def check(model: Any, whole: Any) -> int:
    """Compares this rank's shards with the slices of the whole model; how many tensors are sharded."""
    sharded = 0
    for name, tensor in reading._state(model.hf, model.spec).items():
        value = whole.hf.state_dict()[name]
        if isinstance(tensor, DTensor):
            sharded += 1
            placed = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            value, tensor = placed.to_local(), tensor.to_local()
        assert tensor.dtype == value.dtype, name
        assert torch.equal(tensor, value), name
    return sharded


def main() -> None:
    out = Path(sys.argv[1])
    rank, world, _ = processes.init("cpu")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    ways = {
        "fsdp": fsdp(mesh),
        "experts": split(mesh, {"experts.gate_up_proj": 0, "experts.down_proj": 0, "o_proj.weight": 1, "lm_head.weight": 0}),
        "columns": split(mesh, {"experts.gate_up_proj": 2, "experts.down_proj": 1, "q_a_proj.weight": 1, "conv1d.weight": 0}),
    }
    shares = {}
    # FSDP2 wants one dtype within a group, and decay parameters are fp32
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = (("int4", "small-k2", bf16), ("fp8", "small-k2", bf16), ("bf16", "small-k2", bf16), ("bf16", "small-linear", fp32))
    for format, spec, dtype in cases:
        folder = out / f"{spec}.{format}.{rank}"
        shape = made_up_checkpoints.spec_of(spec).replace(n_routed_experts=5)  # uneven over two ranks
        made_up_checkpoints.make(folder, shape, format, shard_bytes=300_000)
        whole = build.load(open_folder(folder), dtype)
        for way, shard in ways.items():
            source = Counting(open_folder(folder))
            model = build.load(source, dtype, shard=shard)
            assert check(model, whole) > (20 if way == "fsdp" else 2), (spec, format, way)
            shares[f"{spec}, {format}, {way}"] = source.share()
            if way == "fsdp":
                tokens = torch.arange(40)[None]
                with torch.no_grad():
                    assert torch.equal(model.hf(input_ids=tokens).logits, whole.hf(input_ids=tokens).logits)
                    assert check(model, whole) > 20
        if format == "int4":
            source, whole = Counting(open_folder(folder)), build.load(open_folder(folder), dtype, experts="packed")
            model = build.load(source, dtype, experts="packed", shard=split_packed(mesh))
            assert check(model, whole) == 4
            shares["int4, packed"] = source.share()
    (out / f"shares.{rank}.json").write_text(json.dumps(shares))
    processes.barrier()
    processes.close()


if __name__ == "__main__":
    main()
