"""Forward and backward of one optimizer step. Inside the package this is the only place that calls `backward()`.

Axes: T packed tokens, S sequences, H heads, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from k2lab.core.types import Batch
from k2lab.dist import mesh


@dataclass
class StepMetrics:
    """What the model observed during one step, over all micro-batches and ranks: `max_logits` {layer: [H]} and
    `expert_counts` {router: [E]}."""

    max_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    expert_counts: dict[str, torch.Tensor] = field(default_factory=dict)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its arrays as tensors on `device`."""

    def move(array: Any) -> Any:
        return torch.from_numpy(array).to(device, non_blocking=True) if isinstance(array, np.ndarray) else array

    moved = {name: move(getattr(batch, name)) for name in ("tokens_T", "targets_T", "weight_T", "positions_T", "starts_S1")}
    return dataclasses.replace(batch, **moved, streams_T={name: move(array) for name, array in batch.streams_T.items()})


def forward_backward(
    model: Any, objective: Any, micro: Sequence[Batch], counts: dict[str, float]
) -> tuple[dict[str, float], StepMetrics]:
    """Accumulates gradients of sum over terms of (sum over all tokens / global count) and sums them over ranks.

    `counts` are the global counts per term over all ranks and micro-batches. Returns the global sums per term and what the
    model observed. Each term is divided exactly once, by its own count, so micro-batches and ranks of any size agree.
    """
    model.train()
    model.reset_max_logits()
    model.reset_expert_counts()
    totals: dict[str, torch.Tensor] = {}
    for host_batch in micro:
        batch = to_device(host_batch, model.device)
        sums = objective.sums(model, batch)
        loss = sum(value / counts[name] for name, value in sums.items() if counts[name])
        if isinstance(loss, torch.Tensor):
            loss.backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.detach().double()
    mesh.sum_gradients(parameter for _, parameter in model.named_parameters())
    metrics = StepMetrics(dict(model.max_logits()), dict(model.expert_counts()))
    mesh.reduce_tensors(metrics.max_logits, "max")
    mesh.reduce_tensors(metrics.expert_counts, "sum")
    return mesh.sum_values({name: float(value) for name, value in totals.items()}), metrics


@torch.no_grad()
def forward_sums(model: Any, objective: Any, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, float]]:
    """(sums, counts) per term over `batches` of all ranks, without gradients: validation."""
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for host_batch in batches:
        batch = to_device(host_batch, model.device)
        for name, value in objective.sums(model, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return mesh.sum_values(sums), mesh.sum_values(counts)
