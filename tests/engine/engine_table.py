"""A model small enough to check by hand: the logits at a position depend on its token and its place in the document."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from k2lab.core.types import Batch
from k2lab.data.pack import pack
from k2lab.engine.step import to_device

VOCAB, WIDTH, LONGEST = 17, 6, 16


class TableModel:
    """Enough of `core.types.Model` for objectives and forward_backward."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def table(rows: int) -> torch.Tensor:
            return (scale * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)).requires_grad_()

        self.parameters = {"embed": table(VOCAB), "place": table(LONGEST), "head": table(VOCAB)}

    def states(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.parameters["embed"][tokens] + self.parameters["place"][places]

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self.states(batch.tokens_T, batch.positions_T)

    def head(self) -> torch.Tensor:
        return self.parameters["head"]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., L, W] for documents that begin at index 0 of the last axis: plain autograd."""
        return self.states(tokens, torch.arange(tokens.shape[-1])) @ self.parameters["head"].t()

    def logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p of tokens 1.. [..., L - 1]."""
        return F.log_softmax(self.logits(tokens)[..., :-1, :], -1).gather(-1, tokens[..., 1:, None])[..., 0]

    def grads(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.parameters, torch.autograd.grad(value, list(self.parameters.values()), retain_graph=True)))

    def named_parameters(self):
        return iter(self.parameters.items())

    def train(self) -> None: ...
    def eval(self) -> None: ...
    def reset_max_logits(self) -> None: ...
    def reset_expert_counts(self) -> None: ...
    def max_logits(self) -> dict:
        return {}

    def expert_counts(self) -> dict:
        return {}


def sequences(count: int, seed: int = 0, least: int = 6) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, int(draw.integers(least, LONGEST))) for _ in range(count)]


def batch_of(items: list) -> Batch:
    """The host batch of samples or units."""
    return pack([sample for item in items for sample in (item if isinstance(item, tuple) else (item,))])


def on_device(batch: Batch, double: bool = True) -> Batch:
    """Tensors; streams of floats in fp64, so that comparisons are not limited by how streams are stored."""
    moved = to_device(batch, torch.device("cpu"))
    streams = {n: x.double() if double and x.is_floating_point() else x for n, x in moved.streams_T.items()}
    return dataclasses.replace(moved, streams_T=streams, weight_T=moved.weight_T.double())


def loss_of(objective, model, host: Batch) -> torch.Tensor:
    """The loss as the engine forms it: each term over its own count, times its coefficient."""
    from k2lab.engine.step import coefficient

    counts, sums = objective.counts(host), objective.sums(model, on_device(host))
    assert set(sums) == set(counts) | set(getattr(objective, "maxima", ()))
    factors = {name: coefficient(objective, name) for name in sums}
    return sum(factors[n] * value / counts[n] for n, value in sums.items() if factors[n] and counts[n])


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], rtol: float = 1e-10) -> float:
    """Largest difference relative to each tensor's largest entry; fails above `rtol`."""
    worst = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
    assert worst < rtol, worst
    return worst
