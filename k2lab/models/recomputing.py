"""Layers of which one block is computed again in the backward pass (`specs.recomputation` says which), or that are compiled
(`compiling`).

Counts of routers and maximum logits are taken while `TrainModel.hidden` runs, and the backward pass comes later: what is computed
again is not counted again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from k2lab.models import compiling


def again(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    """function(*inputs), of which autograd keeps only the inputs; nothing in our layers draws random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RecomputingLayer(torch.nn.Module):
    """Mixed into transformers' pre-norm decoder layers by `swap`: norm, attention, sum, norm, feed-forward, sum. While
    `k2_recompute` names one of the two blocks ("mixer" or "feed_forward"), training computes it again together with its norm;
    while `k2_compile` is set, training takes the layer compiled; else the class's own forward runs."""

    k2_recompute = ""
    k2_compile = False

    @property
    def k2_recomputing(self) -> str:
        """The block of this pass that is computed again, if any."""
        return self.k2_recompute if self.training and torch.is_grad_enabled() else ""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        block = self.k2_recomputing
        if args or kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, *args, **kwargs)
        if self.k2_compile and self.training and torch.is_grad_enabled():
            return compiling.layer()(self, hidden_states, kwargs)
        if not block:
            return super().forward(hidden_states, **kwargs)
        return self.k2_blocks(hidden_states, kwargs, block)

    def k2_blocks(self, x: torch.Tensor, kwargs: dict[str, Any], block: str = "") -> torch.Tensor:
        """The layer, `block` of which is computed again in the backward pass."""

        def mixer(x: torch.Tensor) -> torch.Tensor:
            return self.k2_mixed(self.input_layernorm(x), kwargs)

        def feed_forward(x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.post_attention_layernorm(x))

        x = x + (again(mixer, x) if block == "mixer" else mixer(x))
        return x + (again(feed_forward, x) if block == "feed_forward" else feed_forward(x))

    def k2_mixed(self, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of attention or KDA for the normalised input."""
        if hasattr(self.self_attn, "forget_gate"):  # KDA names its cache differently and wants no positions
            kwargs = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "use_cache")}
        mixed = self.self_attn(hidden_states=x, **kwargs)
        return mixed[0] if isinstance(mixed, tuple) else mixed
