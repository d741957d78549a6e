"""Experts' router: choosing, counting and balancing without an auxiliary loss.

The bias `e_score_correction_bias` takes part in the choice only, never in the weights; nothing in transformers updates it.
Legend: `T` tokens, `E` experts, `K` chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from k2lab.core.errors import RecipeError


class CountingRouter(torch.nn.Module):
    """Mixed into transformers' sigmoid top-k routers by `swap`. The same choice and weights, without the group arithmetic where
    there is one group. Counts tokens per expert in `k2_counts` i64[E] while `k2_counting` is set (inside `TrainModel.hidden` in
    training only, so that recomputed layers, evaluation and decoding do not count); a token counts `k2_times` i64[T] times, so
    that a shared beginning weighs as much as its copies would (None: once)."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.num_group != 1:
            logits_TE, weights_TK, chosen_TK = super().forward(hidden_states)
        else:
            x_TD = hidden_states.view(-1, self.hidden_dim)
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
            scores_TE = logits_TE.sigmoid()
            with torch.no_grad():
                chosen_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=-1, sorted=False)[1]
            weights_TK = scores_TE.gather(1, chosen_TK)
            if self.norm_topk_prob:
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
            weights_TK = weights_TK * self.routed_scaling_factor
        if self.k2_counting:
            times = None if self.k2_times is None else self.k2_times.repeat_interleave(self.top_k).double()
            self.k2_counts += torch.bincount(chosen_TK.flatten(), times, minlength=self.num_experts).long()
        return logits_TE, weights_TK, chosen_TK


def _sign(bias_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> torch.Tensor:
    """Loss-free balancing (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3): rate towards the experts below the mean."""
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)


RULES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {"sign": _sign}


@torch.no_grad()
def update_router_bias(model: Any, counts: dict[str, torch.Tensor], rate: float = 1e-3, rule: str = "sign") -> None:
    """Moves every router's bias by its expert counts of the step (all ranks' sum), then centres it.

    `counts` {router module name: [E]} as from `TrainModel.expert_counts`. A router that saw no token keeps its bias. Centring
    changes no choice, since a constant added to all experts does not reorder them. Raises RecipeError for an unknown rule.
    """
    if rule not in RULES:
        raise RecipeError(f"there is no router bias rule {rule!r}", where="router_bias_rule", allowed=", ".join(RULES))
    routers = model.routers()
    for name, counts_E in counts.items():
        bias_E = routers[name].e_score_correction_bias
        seen_E = counts_E.to(device=bias_E.device, dtype=torch.float64)
        if float(seen_E.sum()) == 0:
            continue
        moved_E = RULES[rule](bias_E.double(), seen_E, rate)
        bias_E.copy_(moved_E - moved_E.mean())
