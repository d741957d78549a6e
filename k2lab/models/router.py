"""Experts' router: choosing, counting and balancing without an auxiliary loss.

The bias `e_score_correction_bias` takes part in the choice only, never in the weights; nothing in transformers updates it.
Legend: `T` tokens, `D` width, `E` experts, `K` chosen experts, `Q` bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from k2lab.core.errors import RecipeError
from k2lab.models import experts_gpu

BINS = 1000  # of the quantile rule's histograms, as in the Kimi K3 report


class Choose(torch.autograd.Function):
    """The router of one group on a CUDA device, x and W in bf16: (logits fp32[T, E], weights fp32[T, K], chosen i64[T, K]).

    Products of bf16 numbers are exact in fp32, so tensor cores with fp32 sums give what fp32 copies of x and W would give, up to
    the order of the sum. In the backward pass the gradient at the logits is split into two bf16 numbers (error 2^-17) for the
    same reason. `counts` i64[E], if given, is added to in place."""

    @staticmethod
    def forward(ctx, x_TD, weight_ED, bias_E, counts_E, top_k, norm, scale):
        from k2lab.models.kernels import experts_triton as kernels

        logits_TE = torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)
        T, E = logits_TE.shape
        chosen_TK, weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64), logits_TE.new_empty(T, top_k)
        sizes = Choose.sizes(T, E)
        counting = counts_E is not None
        kernels.choose_kernel[sizes.pop("grid")](
            logits_TE, bias_E, chosen_TK, weights_TK, counts_E if counting else chosen_TK, T, scale,
            E=E, K=top_k, NORM=norm, COUNT=counting, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x_TD, weight_ED, logits_TE, chosen_TK)
        ctx.facts = norm, scale
        ctx.mark_non_differentiable(chosen_TK)
        ctx.set_materialize_grads(False)
        return logits_TE, weights_TK, chosen_TK

    @staticmethod
    def backward(ctx, grad_logits_TE, grad_weights_TK, _):
        from k2lab.models.kernels import experts_triton as kernels

        x_TD, weight_ED, logits_TE, chosen_TK = ctx.saved_tensors
        (T, E), top_k, (norm, scale) = logits_TE.shape, chosen_TK.shape[1], ctx.facts
        if grad_weights_TK is None:
            grad_weights_TK = logits_TE.new_zeros(T, top_k)
        split_T2E, sizes = x_TD.new_empty(T, 2 * E), Choose.sizes(T, E)
        direct = grad_logits_TE is not None
        kernels.choose_grad_kernel[sizes.pop("grid")](
            grad_weights_TK.contiguous(), logits_TE, chosen_TK, grad_logits_TE.contiguous() if direct else logits_TE, split_T2E,
            T, scale, E=E, K=top_k, NORM=norm, LOGITS=direct, **sizes,
        )  # fmt: skip
        grad_x_TD = split_T2E @ torch.cat([weight_ED, weight_ED])
        high_ED, low_ED = torch.mm(split_T2E.t(), x_TD, out_dtype=torch.float32).chunk(2)
        return grad_x_TD, (high_ED + low_ED).to(weight_ED.dtype), None, None, None, None, None

    @staticmethod
    def sizes(T: int, E: int) -> dict[str, Any]:
        """Tile sizes of both kernels: about 2048 scores to four warps."""
        wide = max(16, 1 << (E - 1).bit_length())
        rows = max(4, min(32, 2048 // wide))
        return {"grid": (-(-T // rows),), "BE": wide, "BT": rows, "num_warps": 4 if wide <= 512 else 8}


def _fused(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> bool:
    return x_TD.dtype == weight_ED.dtype == torch.bfloat16 and len(weight_ED) <= 1024 and experts_gpu.works(x_TD.device)


def _tally(chosen_TK: torch.Tensor, times_T: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """i64[E]: how often each expert was chosen, a token `times_T` times. On a CUDA device nothing waits for it."""
    if times_T is None and chosen_TK.device.type == "cuda":
        return torch.histc(chosen_TK.flatten().int(), num_experts, 0, num_experts - 1).long()
    times = None if times_T is None else times_T.repeat_interleave(chosen_TK.shape[1]).double()
    return torch.bincount(chosen_TK.flatten(), times, minlength=num_experts).long()


class CountingRouter(torch.nn.Module):
    """Mixed into transformers' sigmoid top-k routers by `swap`. The same choice and weights, without the group arithmetic where
    there is one group. Counts tokens per expert in `k2_counts` i64[E] while `k2_counting` is set (inside `TrainModel.hidden` in
    training only, so that recomputed layers, evaluation and decoding do not count); a token counts `k2_times` i64[T] times, so
    that a shared beginning weighs as much as its copies would (None: once). `k2_needed` i64[E, Q], if `track_quantiles` made
    one, counts likewise which bias each token would have needed to choose each expert."""

    k2_needed: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counted = not self.k2_counting
        x_TD = hidden_states.view(-1, self.hidden_dim)
        if self.num_group != 1:
            logits_TE, weights_TK, chosen_TK = super().forward(hidden_states)
        elif x_TD.device.type == "cuda" and self.k2_times is None and _fused(x_TD, self.weight):
            counts = self.k2_counts if self.k2_counting else None
            facts = self.top_k, bool(self.norm_topk_prob), float(self.routed_scaling_factor)
            logits_TE, weights_TK, chosen_TK = Choose.apply(x_TD, self.weight, self.e_score_correction_bias, counts, *facts)
            counted = True
        else:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
            scores_TE = logits_TE.sigmoid()
            with torch.no_grad():
                chosen_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=-1, sorted=False)[1]
            weights_TK = scores_TE.gather(1, chosen_TK)
            if self.norm_topk_prob:
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
            weights_TK = weights_TK * self.routed_scaling_factor
        if not counted:
            self.k2_counts += _tally(chosen_TK, self.k2_times, self.num_experts)
        if self.k2_counting and self.k2_needed is not None:
            _note_needed(self.k2_needed, logits_TE.detach(), self.e_score_correction_bias, self.top_k, self.k2_times)
        return logits_TE, weights_TK, chosen_TK


# ---------------------------------------------------------------- balancing


def _sign(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float, share: float) -> torch.Tensor:
    """Loss-free balancing (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3): rate towards the experts below the mean."""
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)


def _quantile(bias_E: torch.Tensor, needed_EQ: torch.Tensor, rate: float, share: float) -> torch.Tensor:
    """Quantile Balancing (Su 2026, kexue.fm/archives/11619; Kimi K3 report, section 2.3.3 and appendix D): each expert's new bias
    is the `share` = K / E quantile of the bias that the step's tokens would have needed to choose it, cutoff - score with the
    cutoff the (K+1)-th largest score + bias of the token. With those cutoffs, every expert would be chosen equally often. There
    is no rate; the quantile is interpolated in a histogram over [min(bias) - 1, max(bias) + 1]."""
    low, width = _span(bias_E)
    upto_EQ = needed_EQ.cumsum(1)
    wanted_E1 = upto_EQ[:, -1:] * share
    bin_E1 = (upto_EQ < wanted_E1).sum(1, keepdim=True).clamp(max=needed_EQ.shape[1] - 1)
    inside_E1 = needed_EQ.gather(1, bin_E1)
    part_E1 = (wanted_E1 - (upto_EQ.gather(1, bin_E1) - inside_E1)) / inside_E1.clamp(min=1)
    return low + (bin_E1 + part_E1).squeeze(1) * width


RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]] = {"sign": _sign, "quantile": _quantile}


def _span(bias_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lower end, width of a bin) of the histograms: scores are within [0, 1], so every needed bias is inside."""
    low = bias_E.min() - 1
    return low, (bias_E.max() + 1 - low) / BINS


@torch.no_grad()
def _note_needed(
    needed_EQ: torch.Tensor, logits_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, times_T: torch.Tensor | None
) -> None:
    """Adds every token's needed bias for every expert to the histograms, without waiting for the device."""
    scores_TE = logits_TE.sigmoid()
    cutoff_T1 = torch.topk(scores_TE + bias_E, top_k + 1, dim=-1)[0][:, -1:]
    low, width = _span(bias_E)
    bin_TE = ((cutoff_T1 - scores_TE - low) / width).long().clamp_(0, BINS - 1)
    bin_TE += torch.arange(len(bias_E), device=bin_TE.device) * BINS
    times_TE = (times_T.long()[:, None] if times_T is not None else bin_TE.new_ones(1, 1)).expand(bin_TE.shape)
    needed_EQ.view(-1).scatter_add_(0, bin_TE.flatten(), times_TE.reshape(-1))


def track_quantiles(model: Any, on: bool = True) -> None:
    """Makes (or drops) the histograms that the quantile rule needs, empty; they fill while experts are counted.

    Raises RecipeError if a router limits the choice to groups of experts, or chooses all of them: there is no cutoff then.
    """
    for name, router in model.routers().items():
        if on and (router.num_group != 1 or router.top_k >= router.num_experts):
            raise RecipeError(
                "the quantile rule needs routers that choose fewer than all experts, out of one group",
                where=f"router_bias_rule ({name})", got=f"{router.num_group} groups, {router.top_k} of {router.num_experts}",
                allowed="sign",
            )  # fmt: skip
        shape = (router.num_experts, BINS)
        router.k2_needed = torch.zeros(shape, dtype=torch.int64, device=router.weight.device) if on else None


def needed_biases(model: Any) -> dict[str, torch.Tensor]:
    """{router's module name: i64[E, Q]} histograms since `track_quantiles` or the last update by the quantile rule."""
    return {name: router.k2_needed.clone() for name, router in model.routers().items() if router.k2_needed is not None}


@torch.no_grad()
def update_router_bias(model: Any, counts: dict[str, torch.Tensor], rate: float = 1e-3, rule: str = "sign") -> None:
    """Moves every router's bias by its expert counts of the step (all ranks' sum), then centres it.

    `counts` {router module name: [E]} as from `TrainModel.expert_counts`; for the quantile rule {name: [E, Q]} as from
    `needed_biases` (the routers' own histograms start anew, since their range follows the bias; `rate` has no part in it). A
    router that saw no token keeps its bias. Centring changes no choice, since a constant added to all experts does not reorder
    them. Raises RecipeError for an unknown rule, or for counts of the other rule.
    """
    if rule not in RULES:
        raise RecipeError(f"there is no router bias rule {rule!r}", where="router_bias_rule", allowed=", ".join(RULES))
    routers = model.routers()
    for name, seen in counts.items():
        router = routers[name]
        bias_E = router.e_score_correction_bias
        if seen.dim() != (2 if rule == "quantile" else 1):
            raise RecipeError(
                "these counts are for the other rule", where=f"router_bias_rule = {rule!r} ({name})",
                got=f"counts of shape {tuple(seen.shape)}", next="quantile takes needed_biases(model), sign takes expert_counts",
            )  # fmt: skip
        seen = seen.to(device=bias_E.device, dtype=torch.float64)
        moved_E = RULES[rule](bias_E.double(), seen, rate, router.top_k / router.num_experts)
        bias_E.copy_(torch.where(seen.sum() > 0, moved_E - moved_E.mean(), bias_E.double()))
        if rule == "quantile" and router.k2_needed is not None:
            router.k2_needed.zero_()
