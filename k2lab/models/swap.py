"""Puts our parts into a transformers model: each affected module becomes an instance of a subclass of its own class, so that
names, parameters, hooks, `isinstance` and decoding stay as they are. Nothing is patched globally.
"""

from __future__ import annotations

from functools import cache

import torch

from k2lab.models import decode
from k2lab.models.attention import LogitStats
from k2lab.models.delta import FastKDA
from k2lab.models.experts import FastMLP
from k2lab.models.gemm import FastLinear
from k2lab.models.mla import FastMLA
from k2lab.models.norm import FastDecoderLayer, FastGatedRMSNorm, FastRMSNorm
from k2lab.models.recomputing import RecomputingLayer
from k2lab.models.router import CountingRouter

PARTS: dict[str, type[torch.nn.Module]] = {
    "DeepseekV3DecoderLayer": FastDecoderLayer,
    "KimiLinearDecoderLayer": FastDecoderLayer,
    "Qwen2DecoderLayer": RecomputingLayer,
    "LlamaDecoderLayer": RecomputingLayer,
    "DeepseekV3RMSNorm": FastRMSNorm,
    "KimiLinearRMSNorm": FastRMSNorm,
    "KimiLinearRMSNormGated": FastGatedRMSNorm,
    "Qwen2RMSNorm": FastRMSNorm,
    "LlamaRMSNorm": FastRMSNorm,
    "DeepseekV3MLP": FastMLP,
    "KimiLinearMLP": FastMLP,
    "DeepseekV3Attention": FastMLA,
    "KimiLinearAttention": FastMLA,
    "KimiLinearDeltaAttention": FastKDA,
    "DeepseekV3TopkRouter": CountingRouter,
    "KimiLinearTopkRouter": CountingRouter,
    "Linear": FastLinear,
}


@cache
def mixed(part: type[torch.nn.Module], original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A subclass of `original` that `part` is mixed into."""
    if issubclass(part, original):
        return part
    return type(f"K2{original.__name__}", (part, original), {"__doc__": part.__doc__, "__module__": __name__})


def swap(model: torch.nn.Module) -> torch.nn.Module:
    """Changes the classes of the model's modules in place, and tells samplers of our decoder; twice does no harm."""
    model.k2_decoder = decode.decoder
    for module in model.modules():
        part = PARTS.get(type(module).__name__)
        if part is None:
            continue
        if part is FastMLP and module.config.hidden_act != "silu":
            continue
        module.__class__ = mixed(part, type(module))
        if part is FastMLA:
            module.k2_stats = LogitStats()
        elif part is CountingRouter:
            module.k2_counting, module.k2_times = False, None
            counts = torch.zeros(module.num_experts, dtype=torch.int64, device=module.weight.device)
            module.register_buffer("k2_counts", counts, persistent=False)
    return model
