"""Stages that train low-rank adapters on a frozen model: what the planner needs to know of them, and what adapters count.

Of a matrix [out, in] an adapter has rank x (out + in) parameters. Frozen matrices have no gradient, master or optimizer state,
and no weight gradient is computed: two forward passes per step instead of three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.core.types import PlanInput
from k2lab.specs import ModelSpec
from k2lab.specs._tensors import Tensor, tensor_bytes
from k2lab.specs.spec import FP8_BLOCK, INT4_GROUP

# On a GPU a layer's experts are decoded into one buffer of at most so many bytes, which all layers share, or within products.
DECODED = 1 << 30


@dataclass(frozen=True)
class AdapterInput(PlanInput):
    """A training stage with `rank` > 0: which matrices are adapted (`targets`), and whether routed experts are INT4 in memory."""

    rank: int = 0
    targets: tuple[str, ...] = ()
    packed: bool = False


def of(inp: PlanInput) -> AdapterInput | None:
    """The stage's adapters, or None if it trains all weights."""
    return inp if isinstance(inp, AdapterInput) and inp.rank else None


def target_of(tensor: Tensor) -> str | None:
    """The recipe's name for the matrices that a tensor belongs to, or None if it cannot be adapted."""
    if tensor.kind == "expert":
        return "routed_experts"
    if tensor.kind != "linear":
        return None
    return "attention" if tensor.group.startswith("attention") else tensor.group


def adapted(inp: AdapterInput, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """(target, matrix) of all matrices with an adapter."""
    for tensor in spec.tensors():
        target = target_of(tensor)
        if target is not None and target in inp.targets:
            yield target, tensor


def parameters(inp: AdapterInput, spec: ModelSpec) -> dict[str, int]:
    """Parameters of the adapters by target; targets that the model lacks are left out."""
    found: dict[str, int] = {}
    for target, tensor in adapted(inp, spec):
        found[target] = found.get(target, 0) + inp.rank * sum(tensor.shape) * tensor.count
    return found


def active(inp: AdapterInput, spec: ModelSpec) -> int:
    """Parameters of adapters that meet a token."""
    return sum(inp.rank * sum(tensor.shape) * tensor.active for _, tensor in adapted(inp, spec))


def frozen_bytes(inp: AdapterInput, spec: ModelSpec, each: int) -> tuple[int, int]:
    """(bytes of the frozen model, of its largest layer), `each` bytes per parameter but for packed experts (INT4 and scales) and
    vectors that stay fp32."""
    layers: dict[int | None, int] = {}
    plain = "fp32" if each == 4 else "bf16"
    for tensor in spec.tensors():
        format = "int4_group" if inp.packed and tensor.kind == "expert" else plain
        size = tensor_bytes(tensor, format, FP8_BLOCK, INT4_GROUP)
        layers[tensor.layer] = layers.get(tensor.layer, 0) + size * tensor.count
    return sum(layers.values()), max(size for layer, size in layers.items() if layer is not None)


def decoded_bytes(inp: AdapterInput, spec: ModelSpec, on_cpu: bool, each: int) -> int:
    """Bytes of decoded experts: on a CPU one expert's gate and up, on a GPU up to a shared buffer."""
    if not inp.packed:
        return 0
    pair = 2 * spec.moe_intermediate_size * spec.hidden_size * each
    return pair if on_cpu else min(DECODED, pair * spec.n_routed_experts)
