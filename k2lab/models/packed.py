"""Routed experts that are frozen: dense, or INT4 in memory as released checkpoints hold them, and low-rank terms beside them.

An expert's matrix is decoded when it is multiplied and forgotten after it; the backward pass decodes it again. On a CPU at most
one expert's matrix is decoded at any time; `experts.ExpertsSwiGLU` multiplies by it, so results are those of the decoded weights,
bit for bit. On a GPU `packed_gpu` decodes inside its products. Frozen weights get no gradient; the input, the router's weights
and the low-rank factors do.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` chosen experts, `r` rank, `n` rows of one expert.
Weights: gate_up [E, 2F, D] (gate rows first), down [E, D, F]; packed: eight codes to an int32, one bf16 scale for 32 columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from k2lab.core.errors import RecipeError
from k2lab.models import slower
from k2lab.models.experts import Dense, ExpertsSwiGLU
from k2lab.quant import int4

SCALES = ("gate_up_scales", "down_scales")  # buffers that stay bf16 whatever the model's dtype: they are part of a format


class Packed(NamedTuple):
    """The four buffers: codes int32 [E, 2F, D / 8] and [E, D, F / 8], scales bf16 [E, 2F, D / 32] and [E, D, F / 32]."""

    gate_up_codes: torch.Tensor
    gate_up_scales: torch.Tensor
    down_codes: torch.Tensor
    down_scales: torch.Tensor

    @property
    def num_experts(self) -> int:
        return len(self.down_codes)

    def gate_up(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[2F, D], decoded."""
        return int4.dequantise(self.gate_up_codes[expert], self.gate_up_scales[expert], dtype=dtype)

    def down(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """[D, F], decoded."""
        return int4.dequantise(self.down_codes[expert], self.down_scales[expert], dtype=dtype)


class ExpertLoRA(NamedTuple):
    """Low-rank terms of all experts of a layer: a matrix W [out, in] acts as W + scale B A. A [E, r, in], B [E, out, r]; `in` is
    D for gate and up and F for down, `out` the other."""

    gate_A: torch.Tensor
    gate_B: torch.Tensor
    up_A: torch.Tensor
    up_B: torch.Tensor
    down_A: torch.Tensor
    down_B: torch.Tensor
    scale: float

    @property
    def factors(self) -> tuple[torch.Tensor, ...]:
        return self[:6]


NAMES = ("gate_lora_A", "gate_lora_B", "up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B")  # parameters of an experts module


def lora_of(module: Any) -> ExpertLoRA | None:
    """The low-rank terms of an experts module (`models.lora` puts them there), or None."""
    if not hasattr(module, NAMES[0]):
        return None
    return ExpertLoRA(*(getattr(module, name) for name in NAMES), module.k2_scale)


# ---------------------------------------------------------------- the sum over a token's experts


def frozen_experts(
    x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, base: Packed | Dense, lora: ExpertLoRA | None
) -> torch.Tensor:
    """Sum over each token's chosen experts of weight x expert(token), [T, D], of frozen weights with low-rank terms."""
    if x_TD.device.type == "cuda":
        from k2lab.models import packed_gpu

        obstacle = packed_gpu.obstacle(x_TD, base, lora)
        if obstacle is None:
            return packed_gpu.experts(x_TD, chosen_TK, weights_TK, base, lora)
        slower.say(f"the fused frozen experts are not used, {obstacle}", "they run one by one, which is slower")
    factors, scale = (lora.factors, lora.scale) if lora is not None else ((), 0.0)
    weights_TK = weights_TK.to(x_TD.dtype)
    return ExpertsSwiGLU.apply(x_TD, chosen_TK, weights_TK, None, None, None, base, scale, *factors)


# ---------------------------------------------------------------- the module


class PackedExperts(torch.nn.Module):
    """Takes the place of transformers' fused experts (`replace`), with codes and scales as buffers instead of weights.

    Args: `config` the model's, E experts, `width` D, `hidden` F; both multiples of 32. Buffers hold whatever was in memory."""

    def __init__(self, config: Any, experts: int, width: int, hidden: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        for size in (width, hidden):
            if size % int4.GROUP:
                raise RecipeError("experts of this width cannot be packed", got=size, allowed=f"multiples of {int4.GROUP}")
        self.config, self.num_experts, self.hidden_dim, self.intermediate_dim = config, experts, width, hidden
        for name, rows, columns in (("gate_up", 2 * hidden, width), ("down", width, hidden)):
            codes = torch.empty(experts, rows, columns // int4.PER_WORD, dtype=torch.int32, device=device)
            scales = torch.empty(experts, rows, columns // int4.GROUP, dtype=torch.bfloat16, device=device)
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scales", scales)

    @property
    def packed(self) -> Packed:
        """The four buffers."""
        return Packed(self.gate_up_codes, self.gate_up_scales, self.down_codes, self.down_scales)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return frozen_experts(hidden_states, top_k_index, top_k_weights, self.packed, lora_of(self))

    def dense(self, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """All values of "gate_up_proj" [E, 2F, D] or "down_proj" [E, D, F], decoded."""
        stem = name.removesuffix("_proj")
        return int4.dequantise(getattr(self, f"{stem}_codes"), getattr(self, f"{stem}_scales"), dtype=dtype)


def replace(hf: Any) -> list[str]:
    """Puts a `PackedExperts` in the place of every mixture's fused experts, buffers on the device of the weights before (meta, if
    that is where they are), unset. Returns the modules' names."""
    found = []
    for name, module in list(hf.named_modules()):
        inner = getattr(module, "experts", None)
        if not isinstance(getattr(inner, "gate_up_proj", None), torch.nn.Parameter):
            continue
        E, D, F = inner.down_proj.shape
        module.experts = PackedExperts(inner.config if hasattr(inner, "config") else hf.config, E, D, F, inner.down_proj.device)
        found.append(f"{name}.experts")
    return found


@torch.no_grad()
def pack_(hf: Any) -> list[str]:
    """Packs the experts of a dense model in place by the INT4 grid, layer by layer. Their values change to those of the grid,
    unless they lie on it already. Returns the modules' names."""
    found = []
    for name, module in list(hf.named_modules()):
        inner = getattr(module, "experts", None)
        if not isinstance(getattr(inner, "gate_up_proj", None), torch.nn.Parameter):
            continue
        E, D, F = inner.down_proj.shape
        new = PackedExperts(inner.config if hasattr(inner, "config") else hf.config, E, D, F, inner.down_proj.device)
        for stem in ("gate_up", "down"):
            codes, scales = int4.quantise(getattr(inner, f"{stem}_proj"))
            getattr(new, f"{stem}_codes").copy_(codes)
            getattr(new, f"{stem}_scales").copy_(scales)
        module.experts = new
        found.append(f"{name}.experts")
    return found
