"""Causal attention over packed documents, with the exact per-head maximum of its logits, registered in transformers as "k2lab".

No [T, T] mask exists: long documents are cut into blocks of queries that see the keys of their own document only, short ones are
padded into groups (padding on the right is harmless under a causal mask). Documents that continue a stem (`Pack.branches`) see
its keys through one product for all of them. The backward pass is written by hand, with the probabilities kept, or computed again
where they would take more than `KEEP_BYTES` per layer.

Legend: `B` batch, `T` packed tokens, `H` heads, `C` query and key head width, `V` value head width, `G` documents of a group,
`P` padded length. Logits are queries x keys x scale, before softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from k2lab.models.pack import Branches, Group, Pack

NAME = "k2lab"
KEEP_BYTES = 256 << 20


@dataclass
class LogitStats:
    """Running per-head maximum of one layer's logits. `exact` is False once only an upper bound (|q| |k| scale) was taken.

    On a CPU and in a GPU's packed kernel it is always exact, because the scores are there anyway. `tau`: padded groups on a GPU
    take the exact maximum only where the bound exceeds tau (never if tau is None), since it costs a pass. `active` only inside
    `TrainModel.hidden` in training, so evaluation, decoding and recomputation do not observe.
    """

    tau: float | None = None
    active: bool = False
    exact: bool = True
    max_H: torch.Tensor | None = None

    def see(self, max_H: torch.Tensor) -> None:
        self.max_H = max_H if self.max_H is None else torch.maximum(self.max_H, max_H)

    def reset(self) -> None:
        self.max_H, self.exact = None, True


# ---------------------------------------------------------------- CPU: explicit scores


@cache
def _above_diagonal(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal logits [..., queries, keys] whose last queries and keys are the same tokens."""
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    n = scores.shape[1]
    scores[:, :, -n:] += _above_diagonal(n, scores.dtype, scores.device)
    return scores


def _probabilities(scores: torch.Tensor) -> torch.Tensor:
    if scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


def _gathered(x_THC: torch.Tensor, group: Group) -> torch.Tensor:
    """[G * H, P, C] of a group."""
    count, padded = group.rows.shape
    x = x_THC.index_select(0, group.rows.flatten()).view(count, padded, *x_THC.shape[1:])
    return x.transpose(1, 2).reshape(count * x_THC.shape[1], padded, x_THC.shape[2])


def _scatter(out_THC: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    """Writes the real places of x [G * H, P, C] into `out_THC`."""
    count, padded = group.rows.shape
    places = x.view(count, -1, padded, x.shape[-1]).transpose(1, 2).flatten(0, 1)
    out_THC.index_copy_(0, group.tokens, places.index_select(0, group.valid))


def attend(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, pack: Pack, stats: LogitStats | None, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Attention output [T, H, V] and the probabilities of blocks, then of groups, then of branches, that `attend_backward` needs
    (None where they are not kept). Inputs need unit stride in the last axis only."""
    T, H, V = v_THV.shape
    out_THV = v_THV.new_empty(T, H, V)
    kept: list[torch.Tensor | None] = []
    maxima = []
    size = q_THC.element_size() * H
    scores_bytes = sum((end - first) * (end - start) for start, first, end in pack.blocks) * size
    branch_bytes = sum(branches.num_scores for branches in pack.branches) * size
    keep_branches = keep and branch_bytes <= KEEP_BYTES
    keep_blocks = keep and scores_bytes <= KEEP_BYTES
    observe = stats is not None and stats.active
    for start, first, end in pack.blocks:
        scores = _scores(q_THC[first:end].transpose(0, 1), k_THC[start:end].transpose(0, 1), scale)
        if observe:
            maxima.append(scores.amax((1, 2)))
        probs = _probabilities(scores)
        torch.bmm(probs, v_THV[start:end].transpose(0, 1), out=out_THV[first:end].transpose(0, 1))
        kept.append(probs if keep_blocks else None)
    for group in pack.small_groups:
        scores = _scores(_gathered(q_THC, group), _gathered(k_THC, group), scale)
        if observe:
            maxima.append(scores.amax((1, 2)).view(-1, H).amax(0))
        probs = _probabilities(scores)
        _scatter(out_THV, torch.bmm(probs, _gathered(v_THV, group)), group)
        kept.append(probs if keep else None)
    for branches in pack.branches:
        scores = _branch_scores(_by_head(q_THC, branches.queries), _by_head(k_THC, branches.keys), k_THC, scale, branches)
        if observe:
            maxima.append(scores.amax((1, 2)))
        probs = _probabilities(scores)
        _write_branches(out_THV, _branch_values(probs, _by_head(v_THV, branches.keys), v_THV, branches), branches.queries)
        kept.append(probs if keep_branches else None)
    if observe:
        stats.see(torch.stack(maxima).amax(0).float())
    return out_THV, kept


def attend_backward(
    grad_THV: torch.Tensor,
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THV: torch.Tensor,
    scale: float,
    pack: Pack,
    kept: Sequence[torch.Tensor | None],
    grad_v_THV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (q, k) of `attend`; that of v is written into `grad_v_THV` (it may be a part of a wider tensor)."""
    grad_q, grad_k = torch.empty_like(q_THC), torch.empty_like(k_THC)
    previous = -1
    for (start, first, end), probs in zip(pack.blocks, kept):
        q, k = q_THC[first:end].transpose(0, 1), k_THC[start:end].transpose(0, 1)
        if probs is None:
            probs = _probabilities(_scores(q, k, scale))
        grad = grad_THV[first:end].transpose(0, 1)
        grad_s = torch.bmm(grad, v_THV[start:end].permute(1, 2, 0))
        grad_s = torch._softmax_backward_data(grad_s, probs, -1, probs.dtype)
        # alpha carries the scale: logits = scale * q k
        _write(grad_q[first:end].transpose(0, 1), grad_s, k, scale, add=False)
        _write(grad_k[start:end].transpose(0, 1), grad_s.transpose(1, 2), q, scale, add=start == previous)
        _write(grad_v_THV[start:end].transpose(0, 1), probs.transpose(1, 2), grad, 1.0, add=start == previous)
        previous = start
    for group, probs in zip(pack.small_groups, kept[len(pack.blocks) :]):
        q, k = _gathered(q_THC, group), _gathered(k_THC, group)
        if probs is None:
            probs = _probabilities(_scores(q, k, scale))
        grad = _gathered_gradient(grad_THV, group)
        grad_s = torch.bmm(grad, _gathered(v_THV, group).transpose(1, 2))
        grad_s = torch._softmax_backward_data(grad_s, probs, -1, probs.dtype)
        _scatter(grad_q, torch.bmm(grad_s, k).mul_(scale), group)
        _scatter(grad_k, torch.bmm(grad_s.transpose(1, 2), q).mul_(scale), group)
        _scatter(grad_v_THV, torch.bmm(probs.transpose(1, 2), grad), group)
    # the stems' own gradients are there by now: branches add to them
    for branches, probs in zip(pack.branches, kept[len(pack.blocks) + len(pack.small_groups) :]):
        _branches_backward(grad_THV, q_THC, k_THC, v_THV, scale, branches, probs, (grad_q, grad_k, grad_v_THV))
    return grad_q, grad_k


def _write(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, add: bool) -> None:
    out.baddbmm_(a, b, beta=1.0 if add else 0.0, alpha=alpha)


def _gathered_gradient(grad_THV: torch.Tensor, group: Group) -> torch.Tensor:
    """As `_gathered`, but 0 at padded places, whose outputs nobody sees."""
    count, padded = group.rows.shape
    H, V = grad_THV.shape[1:]
    grad = grad_THV.new_zeros(count * padded, H, V)
    grad.index_copy_(0, group.valid, grad_THV.index_select(0, group.tokens))
    return grad.view(count, padded, H, V).transpose(1, 2).reshape(count * H, padded, V)


# Branches: x [H, G P, C] holds all branches of a stem; the same memory as [H G, P, C] holds each by itself. Scores are
# [H, G P, stem + keys], so one softmax goes over a branch's stem and its own tokens.


def _by_head(x_THC: torch.Tensor, group: Group) -> torch.Tensor:
    """[H, G P, C] of a group."""
    return x_THC.index_select(0, group.rows.flatten()).transpose(0, 1).contiguous()


def _each(x: torch.Tensor, branches: Branches) -> torch.Tensor:
    """[H, G P, *] as [H G, P, *], a view."""
    return x.view(len(x) * len(branches.queries.rows), -1, x.shape[2])


def _write_branches(out_THC: torch.Tensor, x: torch.Tensor, group: Group, add: bool = False) -> None:
    """Writes the real places of x [H, G P, C] into `out_THC`, or adds them."""
    places = x.transpose(0, 1).contiguous().index_select(0, group.valid)
    if add:
        out_THC.index_add_(0, group.tokens, places)
    else:
        out_THC.index_copy_(0, group.tokens, places)


def _branch_scores(q: torch.Tensor, k: torch.Tensor, k_THC: torch.Tensor, scale: float, branches: Branches) -> torch.Tensor:
    """Logits [H, G P, stem + keys] of queries and keys [H, G P, C] of branches."""
    stem_HCP = k_THC[branches.start : branches.end].permute(1, 2, 0)
    by_stem = torch.baddbmm(q.new_empty(1), q, stem_HCP, beta=0, alpha=scale)
    own = _scores(_each(q, branches), _each(k, branches), scale)
    return torch.cat([by_stem, own.view(*q.shape[:2], -1)], dim=-1)


def _branch_values(probs: torch.Tensor, v: torch.Tensor, v_THV: torch.Tensor, branches: Branches) -> torch.Tensor:
    """Outputs [H, G P, V]: probabilities x values of the stem and of the branch."""
    stem = branches.end - branches.start
    out = torch.bmm(probs[..., :stem], v_THV[branches.start : branches.end].transpose(0, 1))
    _write(_each(out, branches), _each(probs, branches)[..., stem:], _each(v, branches), 1.0, add=True)
    return out


def _branches_backward(
    grad_THV: torch.Tensor,
    q_THC: torch.Tensor,
    k_THC: torch.Tensor,
    v_THV: torch.Tensor,
    scale: float,
    branches: Branches,
    probs: torch.Tensor | None,
    into: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Gradients of a block: into `into` (q, k, v) it writes those of its queries and, as the first block, of its keys and values;
    a later block adds to keys and values, and each adds to the stem's."""
    queries, keys, tokens = branches.queries, branches.keys, slice(branches.start, branches.end)
    stem = branches.end - branches.start
    q, k, v = _by_head(q_THC, queries), _by_head(k_THC, keys), _by_head(v_THV, keys)
    if probs is None:
        probs = _probabilities(_branch_scores(q, k, k_THC, scale, branches))
    grad = grad_THV.new_zeros(queries.rows.numel(), *grad_THV.shape[1:])
    grad = grad.index_copy_(0, queries.valid, grad_THV.index_select(0, queries.tokens)).transpose(0, 1).contiguous()
    grad_own = torch.bmm(_each(grad, branches), _each(v, branches).transpose(1, 2)).view(*q.shape[:2], -1)
    grad_s = torch.cat([torch.bmm(grad, v_THV[tokens].permute(1, 2, 0)), grad_own], dim=-1)
    grad_s = torch._softmax_backward_data(grad_s, probs, -1, probs.dtype)
    by_stem, own, own_probs = grad_s[..., :stem], _each(grad_s, branches)[..., stem:], _each(probs, branches)[..., stem:]
    grad_q, grad_k, grad_v = into
    of_q = torch.bmm(by_stem, k_THC[tokens].transpose(0, 1))
    _write(_each(of_q, branches), own, _each(k, branches), 1.0, add=True)
    of_k, of_v = torch.bmm(own.transpose(1, 2), _each(q, branches)), torch.bmm(own_probs.transpose(1, 2), _each(grad, branches))
    _write_branches(grad_q, of_q.mul_(scale), queries)
    _write_branches(grad_k, of_k.mul_(scale).view(k.shape), keys, add=not branches.first)
    _write_branches(grad_v, of_v.view(v.shape), keys, add=not branches.first)
    grad_k[tokens] += torch.bmm(by_stem.transpose(1, 2), q).mul_(scale).transpose(0, 1)
    grad_v[tokens] += torch.bmm(probs[..., :stem].transpose(1, 2), grad).transpose(0, 1)


class PackedAttention(torch.autograd.Function):
    """Autograd around `attend`: q [T, H, C], k [T, H, C], v [T, H, V] -> [T, H, V]."""

    @staticmethod
    def forward(ctx, q_THC, k_THC, v_THV, scale, pack, stats):
        out, kept = attend(q_THC, k_THC, v_THV, scale, pack, stats, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(q_THC, k_THC, v_THV, *kept)
        ctx.scale, ctx.pack = scale, pack
        return out

    @staticmethod
    def backward(ctx, grad_THV):
        q_THC, k_THC, v_THV, *kept = ctx.saved_tensors
        grad_v = torch.empty_like(v_THV)
        grad_q, grad_k = attend_backward(grad_THV, q_THC, k_THC, v_THV, ctx.scale, ctx.pack, kept, grad_v)
        return grad_q, grad_k, grad_v, None, None, None


# ---------------------------------------------------------------- GPU: what no packed kernel takes, on padded groups


def attend_on_device(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, pack: Pack, stats: LogitStats | None
) -> torch.Tensor:
    """Attention output [T, H, V] through scaled_dot_product_attention on documents grouped by padded length."""
    T, H, V = v_THV.shape
    assert not pack.parents, "branches are for the CPU"
    out_THV = v_THV.new_empty(T, H, V)
    for group in pack.all_groups:
        shape = (*group.rows.shape, H, -1)
        q, k, v = (x.index_select(0, group.rows.flatten()).view(shape).transpose(1, 2) for x in (q_THC, k_THC, v_THV))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        places = out.transpose(1, 2).flatten(0, 1)
        out_THV = out_THV.index_copy(0, group.tokens, places.index_select(0, group.valid))
        if stats is not None and stats.active:
            _observe(q.detach(), k.detach(), scale, stats)
    return out_THV


@torch.no_grad()
def _observe(q_GHPC: torch.Tensor, k_GHPC: torch.Tensor, scale: float, stats: LogitStats, block: int = 1024) -> None:
    """Per-head bound max|q| max|k| scale per document; where it exceeds tau for any head, the exact maximum, block by block."""
    bound = (q_GHPC.float().norm(dim=-1).amax(-1) * k_GHPC.float().norm(dim=-1).amax(-1) * scale).amax(0)
    if stats.tau is None or bool((bound <= stats.tau).all()):
        stats.exact = False
        stats.see(bound)
        return
    length = q_GHPC.shape[2]
    for first in range(0, length, block):
        end = min(first + block, length)
        scores = torch.matmul(q_GHPC[:, :, first:end], k_GHPC[:, :, :end].transpose(2, 3)).float() * scale
        scores[..., first:] += _above_diagonal(end - first, torch.float32, scores.device)
        stats.see(scores.amax((0, 2, 3)))


# ---------------------------------------------------------------- transformers' interface


def packed(
    q_THC: torch.Tensor, k_THC: torch.Tensor, v_THV: torch.Tensor, scale: float, pack: Pack, stats: LogitStats | None = None
) -> torch.Tensor:
    """Causal attention within documents, by the way that suits the device. Shapes as in `PackedAttention`."""
    if q_THC.device.type == "cpu":
        return PackedAttention.apply(q_THC, k_THC, v_THV, scale, pack, stats)
    from k2lab.models import attention_gpu

    if attention_gpu.takes(q_THC, q_THC.shape[2], v_THV.shape[2]):
        return attention_gpu.ragged(q_THC, k_THC, v_THV, scale, pack, stats)
    return attend_on_device(q_THC, k_THC, v_THV, scale, pack, stats)


def _repeated(x_BGTC: torch.Tensor, times: int) -> torch.Tensor:
    return x_BGTC if times == 1 else x_BGTC.repeat_interleave(times, dim=1)


@torch.compiler.disable  # it follows the documents of each pack
def k2lab_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    k2_pack: Pack | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query [B, H, T, C], key and value [B, G, T, *] -> ([B, T, H, V], None).

    With `k2_pack` (B = 1) documents do not see each other. With a mask, or fewer queries than keys (decoding), PyTorch's
    scaled_dot_product_attention runs with the mask that `sdpa_mask` built.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    key, value = _repeated(key, groups), _repeated(value, groups)
    B, H, T, _ = query.shape
    causal = kwargs.get("is_causal") is not False
    if k2_pack is None and (attention_mask is not None or key.shape[2] != T or dropout or not causal):
        is_causal = causal and attention_mask is None and T > 1
        if is_causal and key.shape[2] > T:  # first pass into a static cache: the rest of it is empty
            key, value = key[:, :, :T], value[:, :, :T]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
        return out.transpose(1, 2).contiguous(), None
    pack = k2_pack if k2_pack is not None else Pack.rows(B, T, query.device)
    assert pack.num_tokens == B * T, "a pack describes exactly the tokens that are there"
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = packed(q, k, v, scale, pack, getattr(module, "k2_stats", None))
    return out.view(B, T, H, -1), None


# Set while `TrainModel.hidden` runs: documents are in the pack, so transformers shall build no [T, T] mask from position_ids.
packing: ContextVar[bool] = ContextVar("k2lab_packing", default=False)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None for packs and plain causal passes, else the boolean mask that padding or a cache needs."""
    return None if packing.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, k2lab_attention)
AttentionMaskInterface.register(NAME, _mask)
