"""From logits to a token: drawing by inversion, log-probabilities, the most probable tokens.

Axes: B rows of a batch, W vocabulary, S spans of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SPAN = 64  # tokens whose probabilities are summed first: the cumulative sum over the vocabulary is taken over these sums


@dataclass(frozen=True)
class Chosen:
    """`tokens` i64[B], their log-probabilities `logprobs` f32[B] under the untempered distribution, and, if asked for, the most
    probable tokens `top_ids` i64[B, K] with `top_logprobs` f32[B, K], most probable first."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


def choose(
    logits_BW: torch.Tensor, uniforms_B: torch.Tensor | None, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Chosen:
    """The next token of each row: greedy without `uniforms_B`, else as `draw` says. Logits f32; they may be overwritten."""
    shifted_BW = logits_BW.sub_(logits_BW.amax(dim=-1, keepdim=True))
    weights_BW = shifted_BW.exp()
    total_B1 = weights_BW.sum(dim=-1, keepdim=True).log_()
    if uniforms_B is None:
        chosen_B = shifted_BW.argmax(dim=-1)
    elif temperature == 1 and top_p == 1:
        chosen_B = _invert(weights_BW, uniforms_B)
    else:
        chosen_B = draw(shifted_BW, uniforms_B, temperature, top_p)
    logprobs_B = (shifted_BW.gather(1, chosen_B[:, None]) - total_B1)[:, 0]
    if not top_k:
        return Chosen(chosen_B, logprobs_B)
    best_BK, ids_BK = shifted_BW.topk(min(top_k, shifted_BW.shape[1]), dim=-1)
    return Chosen(chosen_B, logprobs_B, ids_BK, best_BK - total_B1)


def draw(logits_BW: torch.Tensor, uniforms_B: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """Tokens i64[B] by inversion: the first token, in vocabulary order, at which the cumulative probability exceeds the uniform.

    The distribution is softmax(logits / temperature), restricted to the nucleus (the fewest most probable tokens that together
    reach `top_p`; Holtzman et al. 2020, arXiv:1904.09751) and renormalised. Vocabulary order, not order of probability, keeps
    the map from uniform to token continuous in the logits: rounding moves a boundary by an ulp and cannot swap two tokens.
    """
    weights_BW = ((logits_BW - logits_BW.amax(dim=-1, keepdim=True)) / temperature).exp_()
    if top_p < 1:
        probs_BW = weights_BW.double() / weights_BW.double().sum(dim=-1, keepdim=True)
        sorted_BW, order_BW = probs_BW.sort(dim=-1, descending=True, stable=True)
        before_BW = sorted_BW.cumsum(dim=-1) - sorted_BW
        weights_BW = weights_BW * torch.zeros_like(probs_BW, dtype=torch.bool).scatter_(1, order_BW, before_BW < top_p)
    return _invert(weights_BW, uniforms_B)


def _invert(weights_BW: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulative sum of the weights exceeds uniform x their total: first among the spans, then
    within the span. Sums are in fp64."""
    B, W = weights_BW.shape
    spans_BSX = F.pad(weights_BW, (0, -W % SPAN)).view(B, -1, SPAN) if W % SPAN else weights_BW.view(B, -1, SPAN)
    sums_BS = spans_BSX.sum(dim=-1, dtype=torch.float32).double()
    cumulative_BS = sums_BS.cumsum(dim=-1)
    target_B1 = _below(uniforms_B[:, None] * cumulative_BS[:, -1:], cumulative_BS[:, -1:])
    span_B1 = torch.searchsorted(cumulative_BS, target_B1, right=True).clamp_(max=sums_BS.shape[1] - 1)  # NaN is beyond all
    rest_B1 = target_B1 - (cumulative_BS - sums_BS).gather(1, span_B1)
    within_BX = spans_BSX[torch.arange(B, device=weights_BW.device), span_B1[:, 0]].double().cumsum(dim=-1)
    place_B1 = torch.searchsorted(within_BX, _below(rest_B1.clamp_(min=0), within_BX[:, -1:]), right=True)
    return (span_B1 * SPAN + place_B1)[:, 0].clamp_(max=W - 1)


def _below(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """u < 1, but u x total may round up to total, beyond which no token lies."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
