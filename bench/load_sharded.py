"""Loading a checkpoint into a model that FSDP2 shards: what each rank reads, how fast, and how much memory it takes at most.

    python tests/made_up_checkpoints.py runs/linear-int4 --spec linear-slice --format int4 --shard-mb 100
    torchrun --standalone --nproc-per-node=2 bench/load_sharded.py runs/linear-int4

Memory is the process's resident peak while it loads (Linux: VmHWM), less what it held before; `weights` is what the rank's shards
take. Run once before, so that the files are in memory and disks are not what is measured.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    rank, world, _ = processes.init("cpu")
    mesh = init_device_mesh("cpu", (world,))

    def shard(hf: Any) -> None:
        for layer in hf.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(hf, mesh=mesh)

    source = open_folder(args.folder)
    stored = sum(file.size for file in source.files.values())
    processes.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, read, began = resident(False), bytes_read(), time.perf_counter()
    model = build.load(source, getattr(torch, args.dtype), shard=shard, threads=args.threads)
    seconds, read, peak = time.perf_counter() - began, bytes_read() - read, resident(True) - before
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in model.hf.state_dict().values()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in local)
    for turn in range(world):
        processes.barrier()
        if turn == rank:
            print(
                f"rank {rank} of {world}: {source.format}, {stored / 1e6:.0f} MB stored, read {read / 1e6:.0f} MB "
                f"({read / stored:.0%}) in {seconds:.2f} s ({read / 1e6 / seconds:.0f} MB/s); weights {weights / 1e6:.0f} MB, "
                f"peak {peak / 1e6:.0f} MB, {(peak - weights) / 1e6:.0f} MB beside them",
                flush=True,
            )
    processes.close()


if __name__ == "__main__":
    main()
