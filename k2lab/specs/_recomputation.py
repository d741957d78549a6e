"""Activation checkpointing by cost: which block of each layer is computed again in the backward pass instead of kept.

A pre-norm layer is two blocks, each with the norm before it: the mixer (MLA, KDA, ordinary attention) and the feed-forward block
(dense MLP, or router, routed and shared experts). Of either it is known, per token, what its forward pass costs (flops) and what
the backward pass needs of it (bytes). Computing a block again frees its bytes, less its input, at the price of its flops.

The rule of "selective": of each layer, the block with fewer flops per byte freed is computed again and the other one is kept; at
a tie the feed-forward block is. So attention is kept where contexts are long, and experts are kept where these are wide. Kimi K2
in bf16: experts 5,800 flops per byte at any length; attention 2,050 at 4,096 tokens (computed again) and 6,260 at 32,768 (kept).
"""

from __future__ import annotations

from typing import NamedTuple

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.specs._activations import activation_bytes
from k2lab.specs.spec import ModelSpec

MODES = ("none", "layers", "selective")
NAMES = ("mixer", "feed_forward")


class Block(NamedTuple):
    """Per token: flops of the forward pass, bytes that are kept for the backward pass, bytes of the block's input."""

    flops: float
    bytes: float
    input: float

    @property
    def price(self) -> float:
        """Flops per byte freed if the block is computed again; infinite if nothing is freed."""
        freed = self.bytes - self.input
        return self.flops / freed if freed > 0 else float("inf")


class Layer(NamedTuple):
    """The two blocks of one layer."""

    mixer: Block
    feed_forward: Block


def blocks(spec: ModelSpec, context: int, element: int) -> list[Layer]:
    """Both blocks of every layer for sequences of `context` tokens and weights of `element` bytes. Attention probabilities, which
    only a CPU keeps, are not among the bytes."""
    parts, moe = activation_bytes(spec, element), set(spec.moe_layers())
    beyond = spec.flops_per_token(context, training=False)
    numbers = {kind: len(spec.layers_of(kind)) for kind in ("mla", "kda", "attention")}
    numbers |= {"experts": len(moe), "mlp": spec.num_layers - len(moe)}
    each = {kind: parts[kind] / number for kind, number in numbers.items() if number}
    products = [[0.0, 0.0] for _ in range(spec.num_layers)]
    for tensor in spec.tensors():
        if tensor.layer is not None and tensor.is_matrix:
            products[tensor.layer][not tensor.group.startswith("attention")] += 2.0 * tensor.numel * tensor.active
    entering = float(spec.hidden_size * element)
    found = []
    for layer, kind in enumerate(spec.layer_types):
        mixing, feeding = products[layer]
        mixer = Block(mixing + beyond[kind] / numbers[kind], each[kind], entering)
        found.append(Layer(mixer, Block(feeding, each["experts" if layer in moe else "mlp"], entering)))
    return found


def choose(spec: ModelSpec, context: int, element: int) -> list[str]:
    """What "selective" computes again in each layer: "mixer" or "feed_forward"."""
    return [
        "mixer" if layer.mixer.price < layer.feed_forward.price else "feed_forward" for layer in blocks(spec, context, element)
    ]


def recomputed(spec: ModelSpec, mode: str, context: int, element: int, where: str | None = None) -> list[tuple[str, ...]]:
    """Per layer, the blocks that `mode` computes again. Raises RecipeError (at `where`) for an unknown mode."""
    if mode not in MODES:
        raise RecipeError(
            f"there is no recomputation {mode!r}", where=where, allowed=", ".join(MODES), next=did_you_mean(mode, MODES)
        )
    if mode == "selective":
        return [(name,) for name in choose(spec, context, element)]
    return [NAMES if mode == "layers" else ()] * spec.num_layers
