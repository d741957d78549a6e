"""Forward and backward of one optimizer step. Inside the package this is the only place that calls `backward()`.

What an objective is: `needs` names the streams it reads ("pairs" for `pair_S` and `sign_S`); `counts(batch)` gives for a host
batch the count of each term, which divides the term's sum over all ranks and micro-batches; `sums(model, batch)` gives for a
batch on the device every term's sum, all of them for every batch. `coefficients` {term: factor} (a term not named: 1) says how
terms add up to the loss; a term of coefficient 0 is a metric: reported, never trained. `maxima` names values of `sums` that have
no count: over micro-batches and ranks the largest is reported. `coefficients` and `maxima` may be left out.

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
from k2lab.models.gemm import adding_weight_gradients


@dataclass
class StepMetrics:
    """What the model observed during one step, over all micro-batches and ranks: `max_logits` {layer: [H]} and
    `expert_counts` {router: [E]}."""

    max_logits: dict[int, torch.Tensor] = field(default_factory=dict)
    expert_counts: dict[str, torch.Tensor] = field(default_factory=dict)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its arrays as tensors on `device`.

    For a CUDA device they travel from page-locked memory, behind the work that is queued, so the host does not wait. The document
    boundaries stay known on the host, as `starts_host_S1`: reading them back from the device would be a wait in every forward
    pass. Pairs (`pair_S`, `sign_S`) stay there as they are: they say what is picked, not what is computed with.
    """
    pinned = device.type == "cuda"

    def move(array: Any) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

    names = ("tokens_T", "targets_T", "weight_T", "positions_T", "starts_S1")
    changed = {name: move(getattr(batch, name)) for name in names}
    changed["streams_T"] = {name: move(array) for name, array in batch.streams_T.items()}
    moved = dataclasses.replace(batch, **changed)
    # No field: a batch that is changed on the device (`dataclasses.replace`) loses it and is read back, instead of keeping
    # boundaries that are no longer its own.
    object.__setattr__(moved, "starts_host_S1", batch.starts_S1)
    return moved


def coefficient(objective: Any, term: str) -> float:
    """The factor of a term in the loss; 0 for a metric, and for the names in `maxima`."""
    if term in maxima(objective):
        return 0.0
    return float(getattr(objective, "coefficients", {}).get(term, 1.0))


def maxima(objective: Any) -> tuple[str, ...]:
    """Names that are combined by max, not summed and divided."""
    return tuple(getattr(objective, "maxima", ()))


def means(objective: Any, sums: dict[str, float], counts: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """(trained terms, metrics), each {name: sum / count}; maxima are among the metrics as they are. Terms without count are left
    out."""
    trained, metrics = {}, {}
    for name, value in sums.items():
        if name in maxima(objective):
            metrics[name] = value
        elif counts.get(name):
            (trained if coefficient(objective, name) else metrics)[name] = value / counts[name]
    return trained, metrics


def forward_backward(
    model: Any, objective: Any, micro: Sequence[Batch], counts: dict[str, float]
) -> tuple[dict[str, float], StepMetrics]:
    """Accumulates gradients of sum over terms of coefficient x (sum over everything / global count), summed over ranks.

    `counts` are the global counts per term over all ranks and micro-batches. Returns the global sums per term (maxima: the
    global maxima) and what the model observed. Each term is divided exactly once, by its own count, so micro-batches and ranks
    of any size agree.
    """
    model.train()
    model.reset_max_logits()
    model.reset_expert_counts()
    totals: dict[str, torch.Tensor] = {}
    for host_batch in micro:
        sums = objective.sums(model, to_device(host_batch, model.device))
        factors = {name: coefficient(objective, name) for name in sums}
        loss = sum(value * factors[name] / counts[name] for name, value in sums.items() if factors[name] and counts[name])
        if isinstance(loss, torch.Tensor):
            with adding_weight_gradients():  # of several micro-batches, where the products can
                loss.backward()
        _add(totals, sums, maxima(objective))
    mesh.sum_gradients(parameter for _, parameter in model.named_parameters())
    metrics = StepMetrics(dict(model.max_logits()), dict(model.expert_counts()))
    mesh.reduce_tensors(metrics.max_logits, "max")
    mesh.reduce_tensors(metrics.expert_counts, "sum")
    return _over_ranks(totals, maxima(objective)), metrics


@torch.no_grad()
def forward_sums(model: Any, objective: Any, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, float]]:
    """(sums, counts) per term over `batches` of all ranks, without gradients: validation. Maxima are among the sums."""
    model.eval()
    totals: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    for host_batch in batches:
        _add(totals, objective.sums(model, to_device(host_batch, model.device)), maxima(objective))
        for name, value in objective.counts(host_batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return _over_ranks(totals, maxima(objective)), mesh.sum_values(counts)


def _add(totals: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], largest: tuple[str, ...]) -> None:
    for name, value in sums.items():
        value = value.detach().double()
        if name not in totals:
            totals[name] = value
        else:
            totals[name] = torch.maximum(totals[name], value) if name in largest else totals[name] + value


def _over_ranks(totals: dict[str, torch.Tensor], largest: tuple[str, ...]) -> dict[str, float]:
    """The totals over all ranks, on the host: one wait for the device, whatever their number."""
    tops = {name: totals[name].clone() for name in largest if name in totals}
    mesh.reduce_tensors(tops, "max")
    if not totals:
        return {}
    values = dict(zip(totals, torch.stack([tops.get(name, value).reshape(()) for name, value in totals.items()]).tolist()))
    summed = mesh.sum_values({name: value for name, value in values.items() if name not in tops})
    return {**summed, **{name: values[name] for name in tops}}
