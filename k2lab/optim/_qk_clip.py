"""QK-Clip: after an update, scale down the query and key rows of every head whose logits grew beyond a threshold.

Legend: `H` heads, `N` no-position width, `R` rotary width, `V` value width, `Q` inner width of the query projection, `L`
key-value latent. Query rows per head are [nope N | rope R], key-value rows per head [k_nope N | v V].

Kimi K2 report (arXiv 2507.20534), section on MuonClip. S_h is the largest pre-softmax logit of head h in this step, *including*
the softmax scale (and YaRN's factor in it), over batch, micro-batches and ranks. If S_h > tau, then g = tau / S_h, and

    q_nope *= g^alpha,   k_nope *= g^(1 - alpha),   q_rope *= g.

A logit is q_nope . k_nope + q_rope . k_rope, so each logit of the head scales by exactly g. The rotary key is shared by all
heads and the values aren't part of a logit: neither is touched. Layers without softmax attention (KDA) have no maximum and are
skipped.

The maxima belong to the model: it fills them during forward passes (recomputation may observe a pass twice, which a maximum does
not mind), the engine reduces them over ranks once per step, and the model resets them before the next step. Nothing is kept here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from k2lab.core.errors import NumericsError
from k2lab.core.types import RowLayout


def check_layouts(shapes: Mapping[str, tuple[int, ...]], layouts: Sequence[RowLayout]) -> None:
    """Raises ValueError if a layout names a parameter that does not exist or whose rows don't add up to its heads."""
    for layout in layouts:
        for name, rows in ((layout.q, layout.nope + layout.rope), (layout.kv, layout.nope + layout.v)):
            if name not in shapes:
                raise ValueError(
                    f"row layout of layer {layout.layer}: {name!r} is not a parameter. "
                    "An absorbed or fused kv_b_proj cannot be clipped"
                )
            if shapes[name][0] != layout.num_heads * rows:
                raise ValueError(
                    f"row layout of layer {layout.layer}: {name!r} has {shapes[name][0]} rows, "
                    f"but {layout.num_heads} heads of {rows} rows need {layout.num_heads * rows}"
                )


def read(layouts: Sequence[RowLayout], max_logits: Mapping[int, Tensor | None] | None) -> dict[int, list[float]]:
    """The maxima of all layers that have both a layout and a maximum, on the host: {layer: [S_h of each head]}.

    One transfer for all layers. Raises NumericsError, naming layer and head, if one is not finite; nothing has moved then.
    """
    found: list[tuple[RowLayout, Tensor]] = []
    for layout in layouts:
        maxima_H = (max_logits or {}).get(layout.layer)
        if maxima_H is not None:
            found.append((layout, maxima_H))
    if not found:
        return {}
    for layout, maxima_H in found:
        if tuple(maxima_H.shape) != (layout.num_heads,):
            raise ValueError(f"maxima of layer {layout.layer} have shape {tuple(maxima_H.shape)}, not ({layout.num_heads},)")
    flat = torch.cat([maxima_H.detach().float() for _, maxima_H in found]).tolist()
    values: dict[int, list[float]] = {}
    at = 0
    for layout, _ in found:
        values[layout.layer] = flat[at : at + layout.num_heads]
        at += layout.num_heads
    for layer, heads in values.items():
        for head, value in enumerate(heads):
            if not math.isfinite(value):
                raise NumericsError(
                    "the largest attention logit is not finite; the optimizer has not moved",
                    where=f"layer {layer}, head {head}",
                    got=value,
                    next="-inf means that no token was attended since the last reset; otherwise lower optim.lr or optim.tau",
                )
    return values


def any_over(maxima: Mapping[int, Sequence[float]], tau: float) -> bool:
    """Whether any head has to be clipped."""
    return any(value > tau for heads in maxima.values() for value in heads)


def scale(
    params: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
    layouts: Sequence[RowLayout],
    maxima: Mapping[int, Sequence[float]],
    tau: float,
    alpha: float,
) -> dict[int, list[int]]:
    """Scales the rows of every head with S_h > tau in place; {layer: clipped heads}, layers without any left out.

    A head with S_h <= tau, so also with S_h <= 0, is not touched by a single bit: its factor is 1. A parameter with a master is
    set to the scaled master.
    """
    clipped: dict[int, list[int]] = {}
    for layout in layouts:
        over = [head for head, value in enumerate(maxima.get(layout.layer, ())) if value > tau]
        if not over:
            continue
        clipped[layout.layer] = over
        # On the host, in double: a handful of numbers, sent to the device at once, heads together.
        heads_H = torch.tensor(maxima[layout.layer], dtype=torch.float64)
        g_H = torch.where(heads_H > tau, tau / heads_H, 1.0)
        query = _row_factors(g_H**alpha, layout.nope, g_H, layout.rope)
        key = _row_factors(g_H ** (1.0 - alpha), layout.nope, torch.ones_like(g_H), layout.v)
        for name, factors_HR in ((layout.q, query), (layout.kv, key)):
            for own in (name, name.removesuffix("weight") + "bias"):
                if own in params:
                    _scale_rows(params[own], masters.get(own), factors_HR)
    return clipped


def _row_factors(first_H: Tensor, first: int, second_H: Tensor, second: int) -> Tensor:
    """[H, first + second]: each head's two factors, one per row."""
    return torch.cat([first_H[:, None].expand(-1, first), second_H[:, None].expand(-1, second)], dim=1)


def _scale_rows(param: Tensor, master: Tensor | None, factors_HR: Tensor) -> None:
    weight = param if master is None else master
    weight_HRX = weight.view(*factors_HR.shape, -1)
    # Factors in float32 at least: rounding them to bfloat16 first would miss g by up to 0.4 %.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factors_HR1 = factors_HR.to(dtype).to(weight.device, non_blocking=True).unsqueeze(-1)
    weight_HRX.copy_(weight_HRX * factors_HR1)
    if master is not None:
        param.view_as(weight_HRX).copy_(weight_HRX)


@torch.no_grad()
def apply(
    params: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
    layouts: Sequence[RowLayout],
    max_logits: Mapping[int, Tensor | None] | None,
    tau: float,
    alpha: float,
) -> dict[int, list[int]]:
    """QK-Clip in one call: `read`, then `scale`. Returns {layer: clipped heads}; raises NumericsError before anything moves."""
    return scale(params, masters, layouts, read(layouts, max_logits), tau, alpha)
