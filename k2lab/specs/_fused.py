"""Which released tensors make up one tensor of transformers' models: fused experts, stacked convolutions, other names.

The one table between the two namings, read forwards by the export and backwards by the loader.

Legend: `E` experts, `D` width, `F` expert hidden width, `X` channels of one convolution. Fused experts: gate_up [E, 2F, D] (gate
rows first), down [E, D, F]; stacked convolutions [3X, 1, kernel] in the order q, k, v.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_MOE = re.compile(r"mlp\.(gate|experts|shared_experts)\.")
# names of the gate, up and down matrix of one expert
_MATRICES = {"kimi_k2": ("gate_proj", "up_proj", "down_proj"), "kimi_linear": ("w1", "w3", "w2")}


class Piece(NamedTuple):
    """A released tensor and where it lies in the tensor that it is a part of: `tensor[region]` has the released shape. `region`
    has one entry per dim of the whole tensor: a slice with both ends, or an int where the released tensor lacks the dim."""

    name: str
    region: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the released tensor."""
        return tuple(part.stop - part.start for part in self.region if isinstance(part, slice))


def pieces(name: str, shape: tuple[int, ...], family: str) -> list[Piece]:
    """The released tensors that make up the tensor `name` of this shape in a transformers model of `family` (ModelSpec's), in
    the order in which they lie in it. They cover it and do not overlap."""
    whole = tuple(slice(0, size) for size in shape)
    match = _LAYER.fullmatch(name)
    if match is None or family not in _MATRICES:
        return [Piece(name, whole)]
    prefix, rest = match.groups()
    if family == "kimi_linear":
        rest = rest.replace("self_attn.forget_gate.", "self_attn.")
        if _MOE.match(rest):
            rest = "block_sparse_moe." + rest.removeprefix("mlp.")
        if rest == "self_attn.conv1d.weight":
            X = shape[0] // 3
            return [
                Piece(f"{prefix}self_attn.{part}_conv1d.weight", (slice(n * X, n * X + X), *whole[1:]))
                for n, part in enumerate("qkv")
            ]
    gate, up, down = _MATRICES[family]
    if rest.endswith(".experts.gate_up_proj"):
        stem, F = prefix + rest.removesuffix("gate_up_proj"), shape[1] // 2
        halves = ((gate, slice(0, F)), (up, slice(F, 2 * F)))
        return [Piece(f"{stem}{e}.{matrix}.weight", (e, rows, whole[2])) for e in range(shape[0]) for matrix, rows in halves]
    if rest.endswith(".experts.down_proj"):
        stem = prefix + rest.removesuffix("down_proj")
        return [Piece(f"{stem}{e}.{down}.weight", (e, *whole[1:])) for e in range(shape[0])]
    return [Piece(prefix + rest, whole)]
