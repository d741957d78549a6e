"""A committed-size model, fixed documents and one training step, shared by the law tests."""

from __future__ import annotations

import numpy as np
import torch
from made_up import items

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.slots import load
from k2lab.core.types import Sample
from k2lab.data.feed import PackedFeed
from k2lab.engine.step import forward_backward
from k2lab.models import build

VOCAB = 320
SMALL = {
    "tiny-k2": {"spec": "tiny-k2", "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_layers": 2},
    "tiny-linear": {"spec": "tiny-linear", "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128},
}


def model_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    return build.from_spec(specs.from_recipe(SMALL[name]), seed=seed, dtype=dtype)


def documents(count: int = 64) -> list[Sample]:
    """Documents with some structure to learn: noisy arithmetic sequences of different strides."""
    docs = []
    for i in range(count):
        draw = rng(5, "law documents", i)
        length, start, stride = int(draw.integers(8, 60)), int(draw.integers(0, VOCAB)), int(draw.integers(1, 7))
        tokens = (start + stride * np.arange(length) + (draw.random(length) < 0.1)) % VOCAB
        weight = np.ones(length, dtype=np.float32)
        weight[0] = 0
        docs.append(Sample(tokens=tokens.astype(np.int32), weight=weight, key=f"d{i}", source="law"))
    return docs


def feed_of(per_device_batch: int = 4, rank: int = 0, world: int = 1, objective=None) -> PackedFeed:
    """Rows of the documents; with an objective, of whole samples that carry what it needs."""
    docs = documents() if objective is None else items(objective.needs, [doc.tokens[:40] for doc in documents()], VOCAB)
    return PackedFeed(
        docs,
        lambda epoch: rng(1, "order", epoch).permutation(len(docs)),
        seq_len=64 if objective is None else 96,
        global_batch=4,
        per_device_batch=per_device_batch,
        fill="split" if objective is None else "whole",
        rank=rank,
        world=world,
    )


def one_backward(model, feed: PackedFeed, objective=None):
    """(sums, metrics, gradients by name, tokens of the step in order) of one step without an update."""
    from k2lab.dist import mesh

    objective = objective or load("objective", "lm")()
    micro = feed.take()
    counts: dict[str, float] = {}
    for batch in micro:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    counts = mesh.sum_values(counts)
    sums, metrics = forward_backward(model, objective, micro, counts)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums, metrics, grads, np.concatenate([batch.tokens_T for batch in micro])


def train_steps(model, feed: PackedFeed, steps: int, lr: float = 1e-3) -> list[float]:
    """Losses of `steps` MuonClip steps with fp32 Newton-Schulz and the router bias, as the loop does them."""
    from k2lab.dist import mesh
    from k2lab.models.router import update_router_bias

    objective = load("objective", "lm")()
    optim = load("optimizer", "muonclip")(lr=lr, ns_dtype="fp32", tau=0.5).build(model.named_parameters(), model.row_layouts())
    model.capture_max_logits(0.5)
    losses = []
    for step in range(steps):
        micro = feed.take()
        counts = mesh.sum_values({"lm": float(sum(objective.counts(batch)["lm"] for batch in micro))})
        sums, metrics = forward_backward(model, objective, micro, counts)
        optim.clip(1.0)
        optim.step(step, steps, metrics.max_logits)
        optim.zero_grad()
        update_router_bias(model, metrics.expert_counts)
        losses.append(sums["lm"] / counts["lm"])
    return losses


def largest_relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of tensors, relative to each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)) for n in a)
