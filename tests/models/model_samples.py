"""Small models of both families, packs for them, and transformers' own unswapped twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM, KimiLinearForCausalLM

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.types import Batch
from k2lab.models import build
from k2lab.models.wrap import TrainModel
from k2lab.specs import ModelSpec

_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "vocab_size": 97,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "initializer_range": 0.1,
}
K2 = specs.get("tiny-k2").replace(**_SMALL, q_lora_rank=24)
LINEAR = specs.get("tiny-linear").replace(**_SMALL, linear_num_heads=2, linear_head_dim=16)
YARN = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
VARIANTS: dict[str, ModelSpec] = {
    "k2": K2,
    "k2, full query projection": K2.replace(q_lora_rank=None),
    "k2, yarn": K2.replace(rope=YARN, max_position_embeddings=262144),
    "k2, expert groups": K2.replace(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3),
    "linear": LINEAR,
    "linear, low-rank query": LINEAR.replace(q_lora_rank=24),
}
LENGTHS = (5, 70, 1, 200, 33, 16, 17)  # short and long, around the limits of groups (16, 64) and blocks (128)


def make(spec: ModelSpec, seed: int = 1, dtype: torch.dtype = torch.float32) -> TrainModel:
    """A small model whose router biases differ from 0, so that they matter."""
    model = build.from_spec(spec, seed=seed, dtype=dtype)
    for n, router in enumerate(model.routers().values()):
        router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, router.num_experts).roll(n))
    return model


def twin(model: TrainModel) -> Any:
    """transformers' own model with the same weights: eager attention, eager experts, no part of ours."""
    cls = KimiLinearForCausalLM if model.spec.family == "kimi_linear" else DeepseekV3ForCausalLM
    config = build.hf_config(model.spec)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    plain = cls(config)
    plain.load_state_dict(model.hf.state_dict())
    return plain.to(model.head().dtype)


def pack(lengths: tuple[int, ...] = LENGTHS, vocab: int = 97, seed: int = 0, numpy: bool = False) -> Batch:
    """Random documents of these lengths; the last position of each has weight 0."""
    starts = np.cumsum([0, *lengths])
    tokens = rng(seed, "tokens").integers(0, vocab, starts[-1])
    weight = np.ones(starts[-1], np.float32)
    weight[starts[1:] - 1] = 0
    arrays = (tokens, np.roll(tokens, -1), weight, np.concatenate([np.arange(n) for n in lengths]), starts)
    return Batch(*(array if numpy else torch.from_numpy(array) for array in arrays), num_tokens=int(weight.sum()))


def alone(batch: Batch) -> list[Batch]:
    """Each document of a pack as a pack of its own."""
    bounds = batch.starts_S1.tolist()
    found = []
    for start, end in zip(bounds, bounds[1:]):
        streams = (batch.tokens_T, batch.targets_T, batch.weight_T, batch.positions_T)
        found.append(Batch(*(x[start:end] for x in streams), torch.tensor([0, end - start])))
    return found


def logits(model: TrainModel, batch: Batch) -> torch.Tensor:
    return model.hidden(batch) @ model.head().t()


def twin_logits(plain: Any, batch: Batch) -> torch.Tensor:
    """Every document by itself through transformers' model, concatenated."""
    return torch.cat([plain(input_ids=part.tokens_T[None], use_cache=False).logits[0] for part in alone(batch)])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def gradient_errors(model: TrainModel, exact: TrainModel) -> dict[str, float]:
    """Relative error of every parameter's gradient. A decay rate's gradient is one sum over tokens and channels, whose terms
    nearly cancel; its error is measured against the gradient of its bias, which has such sums by channel, where that is
    larger."""
    wanted, found = dict(exact.named_parameters()), {}
    for name, parameter in model.named_parameters():
        true = wanted[name].grad
        if true is not None:
            size = max(true.norm(), wanted[name.replace("A_log", "dt_bias")].grad.norm())
            found[name] = float((parameter.grad.to(true) - true).norm() / size.clamp(min=1e-12))
    return found
