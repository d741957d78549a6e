"""The process group: one process, or data-parallel processes over gloo (CPU) or NCCL (CUDA), started by torchrun.

Gradients and counts are summed, never averaged: the division is by global counts, known before the first backward.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist

from k2lab.core.errors import MachineError

BUCKET_BYTES = 64 << 20


def init(device: str = "auto") -> tuple[int, int, torch.device]:
    """Joins the process group that the environment describes (`WORLD_SIZE`, as torchrun sets it); (rank, world, device)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = pick_device(device, local)
    if world == 1:
        return 0, 1, where
    if not dist.is_initialized():
        backend = "nccl" if where.type == "cuda" else "gloo"
        # Long: other ranks wait at a barrier while rank 0 alone prepares data. NCCL is told the device, else it guesses by rank.
        device_id = where if where.type == "cuda" else None
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12), device_id=device_id)
    return dist.get_rank(), dist.get_world_size(), where


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """`auto` = CUDA if there is one, else CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise MachineError("device = cuda, and torch sees no CUDA device", next="Use --device cpu, or see `k2 doctor`")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(device)


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def close() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """Element-wise sum over ranks, in fp64."""
    if not dist.is_initialized() or not values:
        return values
    names = sorted(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    packed = torch.tensor([float(values[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def reduce_tensors(tensors: dict, op: str = "sum") -> None:
    """All-reduces a dict of small tensors in place in one collective; `op` is sum or max."""
    if not dist.is_initialized() or not tensors:
        return
    keys = sorted(tensors, key=str)
    flat = torch.cat([tensors[key].reshape(-1).to(torch.float64) for key in keys])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    offset = 0
    for key in keys:
        size = tensors[key].numel()
        tensors[key].copy_(flat[offset : offset + size].view_as(tensors[key]))
        offset += size


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums gradients over ranks in buckets. A parameter without gradient on this rank takes part with zeros."""
    if not dist.is_initialized():
        return
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for group in by_type.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in group])
        dist.all_reduce(flat)
        offset = 0
        for gradient in group:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def agree(flag: bool) -> bool:
    """True on every rank if `flag` is true on any."""
    return bool(sum_values({"flag": float(flag)})["flag"])
