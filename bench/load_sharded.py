"""Loading a checkpoint into a model that FSDP2 shards: what each rank reads, how fast, and how much memory it takes at most.

    python tests/made_up_checkpoints.py runs/linear-int4 --spec linear-slice --format int4 --shard-mb 100
    torchrun --standalone --nproc-per-node=2 bench/load_sharded.py runs/linear-int4 [--device cuda] [--check]

Memory is the process's resident peak while it loads (Linux: VmHWM), less what it held before, and with `--device cuda` the most
that the GPU held (bytes read are told for `cpu` only: with CUDA, Triton's compilers read more than the checkpoint has);
`weights` is what the rank's shards take. `--check` then gathers every tensor and compares it bit for bit with
the model that one process loads whole. Run once before, so that the files are in memory and disks are not what is measured.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from k2lab.ckpt.folder import open_folder  # noqa: E402
from k2lab.dist import mesh as processes  # noqa: E402
from k2lab.models import build  # noqa: E402


def resident(peak: bool) -> int:
    """Bytes that this process holds, or held at most since the peak was last reset."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text)[1]) * 1024


def bytes_read() -> int:
    """Bytes that this process has asked the system for."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def compared(model: Any, source: Any, args: argparse.Namespace) -> str:
    """Every gathered tensor against the same one of a model that is loaded whole, on the host."""
    whole, different = build.load(source, getattr(torch, args.dtype)).hf.state_dict(), []
    for name, tensor in model.hf.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(full.cpu(), whole[name]):
            different.append(name)
    return f"{len(different)} of {len(whole)} gathered tensors differ from those loaded whole" + "".join(
        f" {name}" for name in different[:5]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    rank, world, device = processes.init(args.device)
    mesh = init_device_mesh(args.device, (world,))

    def shard(hf: Any) -> None:
        for layer in hf.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(hf, mesh=mesh)

    source = open_folder(args.folder)
    stored = sum(file.size for file in source.files.values())
    processes.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, read, began = resident(False), bytes_read(), time.perf_counter()
    model = build.load(source, getattr(torch, args.dtype), device, shard=shard, threads=args.threads)
    on_device = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
    seconds, read, peak = time.perf_counter() - began, bytes_read() - read, resident(True) - before
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.hf.state_dict().values()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in local)
    for turn in range(world):
        processes.barrier()
        if turn == rank:
            line = f"rank {rank} of {world}: {source.format}, {stored / 1e6:.0f} MB stored, weights {weights / 1e6:.0f} MB, "
            if on_device:
                line += f"in {seconds:.2f} s; on the GPU at most {on_device / 1e6:.0f} MB, on the host {peak / 1e6:.0f} MB"
            else:
                line += (
                    f"read {read / 1e6:.0f} MB ({read / stored:.0%}) in {seconds:.2f} s ({read / 1e6 / seconds:.0f} MB/s); "
                    f"peak {peak / 1e6:.0f} MB, {(peak - weights) / 1e6:.0f} MB beside them"
                )
            print(line, flush=True)
    if args.check:
        print(f"rank {rank}: {compared(model, source, args)}", flush=True)
    processes.close()


if __name__ == "__main__":
    main()
