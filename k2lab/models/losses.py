"""Cross-entropy of a linear head, piece by piece: the [T, W] logits never exist. Log-probabilities with gradient and divergences
from a teacher are in `_distribution.py`, re-exported here.

Legend: `T` positions, `D` width, `W` vocabulary, `c` positions of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from k2lab.models import losses_gpu
from k2lab.models._distribution import CHUNK, linear_logprobs, linear_logprobs_topk_kl, linear_topk_kl
from k2lab.models.gemm import grad_input, grad_weight, linear

__all__ = ["linear_cross_entropy", "linear_logprobs", "linear_logprobs_topk_kl", "linear_topk_kl", "token_logprobs"]


def _pieces(rows: torch.Tensor, chunk: int) -> Iterator[tuple[slice, torch.Tensor]]:
    for first in range(0, len(rows), chunk):
        yield slice(first, first + chunk), rows[first : first + chunk]


def _softmax_parts(
    hidden_cD: torch.Tensor, weight_WD: torch.Tensor, targets_c1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log p of the targets [c, 1], exponentials of the logits less their row maximum [c, W], row sums of these [c, 1]); fp32 or
    wider. One [c, W] buffer."""
    logits = linear(hidden_cD, weight_WD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, targets_c1)
    sums = logits.exp_().sum(-1, keepdim=True)
    return chosen - sums.log(), logits, sums


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. Gradients are made in the forward pass, where the probabilities are at hand, for a factor of 1;
    the backward pass multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, targets_T, weight_T, chunk):
        rows = weight_T.nonzero()[:, 0]
        dense = len(rows) == len(weight_T)
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        nll_T = torch.zeros(len(targets_T), dtype=wide, device=hidden_TD.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = (torch.empty_like if dense else torch.zeros_like)(hidden_TD) if need_hidden else None
        total_weight = torch.zeros_like(weight_WD, dtype=wide) if need_weight else None
        for part, chosen in _pieces(rows, chunk):
            where = part if dense else chosen
            hidden, targets, weights = hidden_TD[where], targets_T[where].unsqueeze(1), weight_T[where].to(wide).unsqueeze(1)
            logprobs, grad, sums = _softmax_parts(hidden, weight_WD, targets)
            nll_T[where] = -logprobs[:, 0]
            if not (need_hidden or need_weight):
                continue
            grad *= weights / sums
            grad.scatter_add_(1, targets, -weights)
            grad = grad.to(hidden.dtype)
            if need_hidden:
                grad_hidden[where] = grad_input(grad, weight_WD)
            if need_weight:
                total_weight += grad_weight(grad, hidden)
        ctx.save_for_backward(grad_hidden, total_weight)
        ctx.dtype = weight_WD.dtype
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * weight_T).sum(), nll_T

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, total_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        total_weight = None if total_weight is None else (total_weight * grad).to(ctx.dtype)
        return grad_hidden, total_weight, None, None, None


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets_T: torch.Tensor,
    weight_T: torch.Tensor,
    chunk: int | None = None,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over positions of weight x negative log-likelihood in nats, a scalar with gradient; the negative log-likelihoods [T],
    detached, 0 where the weight is 0).

    Logits are hidden W^T. Sums are in fp32 or wider; the largest temporary is [chunk, W] (None: 1,024 positions), on CUDA with as
    many positions as fill half a gigabyte, or 4,096, if `chunk` is less. Positions of weight 0 cost nothing; on CUDA that needs
    `rows`, a bound on the number of the others that the host knows (`Batch.num_tokens`).
    """
    if losses_gpu.takes(hidden_TD, weight_WD):
        return losses_gpu.CrossEntropy.apply(hidden_TD, weight_WD, targets_T, weight_T, chunk, rows)
    return LinearCrossEntropy.apply(hidden_TD, weight_WD, targets_T, weight_T, chunk or CHUNK)


@torch.no_grad()
def token_logprobs(
    hidden_TD: torch.Tensor, weight_WD: torch.Tensor, targets_T: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """log p(target) at every position, [T], fp32 or wider, no gradient; in pieces of `chunk` positions."""
    if losses_gpu.takes(hidden_TD, weight_WD):
        every_T = torch.ones(len(targets_T), device=hidden_TD.device)
        return losses_gpu.log_probs(hidden_TD, weight_WD, targets_T, every_T, chunk)
    found = []
    for first in range(0, len(targets_T), chunk or CHUNK):
        part = slice(first, first + (chunk or CHUNK))
        found.append(_softmax_parts(hidden_TD[part], weight_WD, targets_T[part].unsqueeze(1))[0][:, 0])
    return torch.cat(found)
