"""Log-probabilities of a linear head and its divergence from a teacher's top-k, with gradients, piece by piece: the [T, W] logits
never exist.

Divergence at a position: forward KL(teacher || student) over the K tokens that the teacher names and one bucket for all others,

    sum_k p_k (log p_k - log q_k) + r (log r - log s),    r = 1 - sum_k p_k,  s = 1 - sum_k q_k,

with p the teacher and q the student. It never exceeds the KL over the whole vocabulary and equals it if K = W. The student's
remainder s is summed over the other tokens, not got by a subtraction, so that it has all its digits when it is small.

Legend: `T` positions, `D` width, `W` vocabulary, `K` teacher's tokens, `c` positions of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from k2lab.models import losses_gpu
from k2lab.models.gemm import grad_input, grad_weight, linear

CHUNK = 1024  # positions of a piece, if the caller does not say


def _pieces(mask_T: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Indices where the mask holds, `chunk` at a time."""
    rows = mask_T.nonzero()[:, 0]
    for first in range(0, len(rows), chunk):
        yield rows[first : first + chunk]


def _logits(hidden_cD: torch.Tensor, weight_WD: torch.Tensor) -> torch.Tensor:
    """Logits less their row maximum, [c, W], fp32 or wider."""
    logits = linear(hidden_cD, weight_WD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits -= logits.amax(-1, keepdim=True)
    return logits


@dataclass
class _Buckets:
    """The K + 1 buckets of a piece. Columns of entries that are not there (log p = -inf) hold zeros.

    `others_cW` exponentials of the student's logits, 0 at the teacher's tokens; `named_cK` the exponentials there; `total_c1` the
    sum of all; `rest_c1` that of `others_cW`, kept above 0; `p_cK`, `r_c1` the teacher; `mass_c1` = sum of p + r.
    """

    others_cW: torch.Tensor
    named_cK: torch.Tensor
    total_c1: torch.Tensor
    rest_c1: torch.Tensor
    p_cK: torch.Tensor
    r_c1: torch.Tensor
    mass_c1: torch.Tensor
    kl_c: torch.Tensor

    def gradient(self, ids_cK: torch.Tensor, kl_c1: torch.Tensor, logp_c1: torch.Tensor | None = None) -> torch.Tensor:
        """d/d logits [c, W] of sum of (kl_c1 x KL + logp_c1 x log p of a target), without the target's own + logp_c1; uses up
        `others_cW`.

        d KL / d logit_j = mass q_j - p_j for a named token, mass q_j - r q_j / s for any other.
        """
        every_c1 = kl_c1 * self.mass_c1 / self.total_c1
        if logp_c1 is not None:
            every_c1 = every_c1 - logp_c1 / self.total_c1
        grad_cW = self.others_cW.mul_(every_c1 - kl_c1 * self.r_c1 / self.rest_c1)
        return grad_cW.scatter_add_(1, ids_cK, self.named_cK * every_c1 - kl_c1 * self.p_cK)


def _buckets(logits_cW: torch.Tensor, ids_cK: torch.Tensor, teacher_cK: torch.Tensor) -> _Buckets:
    """The buckets and the divergence [c] of a piece; uses up `logits_cW` (less their row maximum)."""
    teacher_cK = teacher_cK.to(logits_cW.dtype)
    there = teacher_cK > -torch.inf
    p_cK = teacher_cK.exp()
    chosen_cK = logits_cW.gather(1, ids_cK)
    others_cW = logits_cW.exp_()
    named_cK = others_cW.gather(1, ids_cK) * there
    # Entries that are not there point at the best token, which is named anyway.
    others_cW.scatter_(1, torch.where(there, ids_cK, ids_cK[:, :1]), 0.0)
    rest_c1 = others_cW.sum(-1, keepdim=True)
    total_c1 = rest_c1 + named_cK.sum(-1, keepdim=True)
    tiny = torch.finfo(rest_c1.dtype).tiny
    rest_c1 = rest_c1.clamp(min=tiny)
    r_c1 = (1 - p_cK.sum(-1, keepdim=True)).clamp(min=0)
    if ids_cK.shape[1] >= others_cW.shape[1]:
        r_c1 = torch.where(there.all(-1, keepdim=True), 0.0, r_c1)  # all tokens are named: what is left is rounding
    log_total_c1 = total_c1.log()
    kl_cK = torch.where(there, p_cK * (teacher_cK - chosen_cK + log_total_c1), 0.0)
    kl_c1 = kl_cK.sum(-1, keepdim=True) + torch.special.xlogy(r_c1, r_c1) - r_c1 * (rest_c1.log() - log_total_c1)
    return _Buckets(others_cW, named_cK, total_c1, rest_c1, p_cK, r_c1, p_cK.sum(-1, keepdim=True) + r_c1, kl_c1[:, 0])


class LinearTopkKL(torch.autograd.Function):
    """See `linear_topk_kl`. Gradients are made in the forward pass for a factor of 1."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, teacher_ids_TK, teacher_logprobs_TK, weight_T, chunk):
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        kl_T = torch.zeros(len(weight_T), dtype=wide, device=hidden_TD.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_TD) if need_hidden else None
        total_weight = torch.zeros_like(weight_WD, dtype=wide) if need_weight else None
        for where in _pieces(weight_T != 0, chunk):
            hidden, ids = hidden_TD[where], teacher_ids_TK[where]
            buckets = _buckets(_logits(hidden, weight_WD), ids, teacher_logprobs_TK[where])
            kl_T[where] = buckets.kl_c
            if not (need_hidden or need_weight):
                continue
            grad = buckets.gradient(ids, weight_T[where].to(wide).unsqueeze(1)).to(hidden.dtype)
            if need_hidden:
                grad_hidden[where] = grad_input(grad, weight_WD)
            if need_weight:
                total_weight += grad_weight(grad, hidden)
        ctx.save_for_backward(grad_hidden, total_weight)
        ctx.dtype = weight_WD.dtype
        ctx.mark_non_differentiable(kl_T)
        return (kl_T * weight_T).sum(), kl_T

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, total_weight = ctx.saved_tensors
        grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
        total_weight = None if total_weight is None else (total_weight * grad).to(ctx.dtype)
        return grad_hidden, total_weight, None, None, None, None


class LinearLogprobs(torch.autograd.Function):
    """See `linear_logprobs` and `linear_logprobs_topk_kl`. The backward pass makes the logits again, and only of positions that
    the upstream gradient reaches."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, targets_T, weight_T, teacher_ids_TK, teacher_logprobs_TK, teacher_T, chunk):
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        logp_T = torch.zeros(len(targets_T), dtype=wide, device=hidden_TD.device)
        kl_T = torch.zeros_like(logp_T) if teacher_T is not None else None
        rows = weight_T != 0
        plain = rows if teacher_T is None else rows & (teacher_T == 0)
        for where in _pieces(plain, chunk):
            logits = _logits(hidden_TD[where], weight_WD)
            chosen = logits.gather(1, targets_T[where].unsqueeze(1))
            logp_T[where] = (chosen - logits.exp_().sum(-1, keepdim=True).log())[:, 0]
        if teacher_T is not None:
            for where in _pieces(rows & (teacher_T != 0), chunk):
                logits = _logits(hidden_TD[where], weight_WD)
                chosen = logits.gather(1, targets_T[where].unsqueeze(1))
                buckets = _buckets(logits, teacher_ids_TK[where], teacher_logprobs_TK[where])
                logp_T[where] = (chosen - buckets.total_c1.log())[:, 0]
                kl_T[where] = buckets.kl_c
        ctx.save_for_backward(hidden_TD, weight_WD, targets_T, weight_T, teacher_ids_TK, teacher_logprobs_TK, teacher_T)
        ctx.chunk = chunk
        return logp_T, kl_T

    @staticmethod
    def backward(ctx, logp_grad_T, kl_grad_T):
        hidden_TD, weight_WD, targets_T, weight_T, ids_TK, teacher_TK, teacher_T = ctx.saved_tensors
        wide = logp_grad_T.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_TD) if need_hidden else None
        total_weight = torch.zeros_like(weight_WD, dtype=wide) if need_weight else None
        rows = weight_T != 0
        taught = torch.zeros_like(rows) if teacher_T is None else rows & (teacher_T != 0) & (kl_grad_T != 0)
        plain = rows & ~taught & (logp_grad_T != 0)
        pieces = [(where, False) for where in _pieces(plain, ctx.chunk)] + [(where, True) for where in _pieces(taught, ctx.chunk)]
        for where, with_teacher in pieces:
            hidden, targets, upstream = hidden_TD[where], targets_T[where].unsqueeze(1), logp_grad_T[where].unsqueeze(1)
            logits = _logits(hidden, weight_WD)
            if with_teacher:
                ids = ids_TK[where]
                buckets = _buckets(logits, ids, teacher_TK[where])
                grad = buckets.gradient(ids, kl_grad_T[where].unsqueeze(1), upstream)
            else:
                grad = logits.exp_()
                grad *= -upstream / grad.sum(-1, keepdim=True)
            grad = grad.scatter_add_(1, targets, upstream).to(hidden.dtype)
            if need_hidden:
                grad_hidden[where] = grad_input(grad, weight_WD)
            if need_weight:
                total_weight += grad_weight(grad, hidden)
        total_weight = None if total_weight is None else total_weight.to(weight_WD.dtype)
        return grad_hidden, total_weight, None, None, None, None, None, None


def linear_logprobs(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets_T: torch.Tensor,
    weight_T: torch.Tensor,
    chunk: int | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """log p(target) [T] with gradient for any upstream gradient, fp32 or wider; 0 where the weight is 0.

    Logits are hidden W^T. The weight only selects: positions of weight 0 cost nothing, others are not multiplied by it. The
    backward pass computes logits anew and skips positions whose upstream gradient is 0. The largest temporary is [chunk, W];
    `chunk`, `rows` and CUDA as in `losses.linear_cross_entropy`.
    """
    if losses_gpu.takes(hidden_TD, weight_WD):
        return losses_gpu.LogProbs.apply(hidden_TD, weight_WD, targets_T, weight_T, None, None, None, chunk, rows)[0]
    return LinearLogprobs.apply(hidden_TD, weight_WD, targets_T, weight_T, None, None, None, chunk or CHUNK)[0]


def linear_topk_kl(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_logprobs_TK: torch.Tensor,
    weight_T: torch.Tensor,
    chunk: int | None = None,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over positions of weight x KL(teacher || student) in nats, a scalar with gradient; the divergences [T], detached, 0
    where the weight is 0), over the teacher's K tokens and one bucket for all others (see the file's head).

    `teacher_ids_TK` i64, distinct at each position; `teacher_logprobs_TK` of the whole distribution, the best first, -inf for an
    entry that is not there. Positions of weight 0 cost nothing and are not read. Sums are in fp32 or wider; the largest temporary
    is [chunk, W]; `chunk`, `rows` and CUDA as in `losses.linear_cross_entropy`.
    """
    if losses_gpu.takes(hidden_TD, weight_WD):
        return losses_gpu.TopkKL.apply(hidden_TD, weight_WD, teacher_ids_TK, teacher_logprobs_TK, weight_T, chunk, rows)
    return LinearTopkKL.apply(hidden_TD, weight_WD, teacher_ids_TK, teacher_logprobs_TK, weight_T, chunk or CHUNK)


def linear_logprobs_topk_kl(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets_T: torch.Tensor,
    weight_T: torch.Tensor,
    teacher_ids_TK: torch.Tensor,
    teacher_logprobs_TK: torch.Tensor,
    teacher_T: torch.Tensor,
    chunk: int | None = None,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`linear_logprobs` of the targets [T], divergences of `linear_topk_kl` [T]) from the same logits, both with gradient for
    any upstream gradient; the divergence is 0 where `weight_T` or `teacher_T` is 0."""
    teacher = (teacher_ids_TK, teacher_logprobs_TK, teacher_T)
    if losses_gpu.takes(hidden_TD, weight_WD):
        return losses_gpu.LogProbs.apply(hidden_TD, weight_WD, targets_T, weight_T, *teacher, chunk, rows)
    return LinearLogprobs.apply(hidden_TD, weight_WD, targets_T, weight_T, *teacher, chunk or CHUNK)
