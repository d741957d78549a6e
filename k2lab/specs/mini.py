"""Models for one GPU with the true shape of their big sisters: the same parts, names on disk, latent ranks and head widths.

Token ids are those of the tokenizer that the run trains; `spec.replace(bos_token_id=...)` sets them.
"""

from __future__ import annotations

from typing import Any

from k2lab.specs.spec import ModelSpec

# Kimi K2's head geometry.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

# The proxy that speed is measured on: a slice of Kimi K2 that fills one GPU. 2.32 B parameters.
_MINI_2B = ModelSpec(
    name="mini-2b",
    family="kimi_k2",
    hidden_size=2048,
    num_layers=6,
    vocab_size=32768,
    intermediate_size=8192,  # layer 0
    moe_intermediate_size=1024,
    first_k_dense_replace=1,
    n_routed_experts=64,
    num_experts_per_tok=8,
    n_shared_experts=1,
    routed_scaling_factor=2.827,
    num_attention_heads=16,
    q_lora_rank=1536,
    rope_theta=50000.0,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    **_LATENT,
)

# What the mini recipes train in minutes: 0.44 B parameters, 40 % of them active.
_WIDTHS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_layers": 8,
    "vocab_size": 4096,
    "intermediate_size": 4096,  # layer 0
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.827,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    **_LATENT,
}

_MINI_K2 = ModelSpec(
    name="mini-k2",
    family="kimi_k2",
    q_lora_rank=1536,
    rope_theta=50000.0,
    rms_norm_eps=1e-6,
    local_heads=(1, 2, 3, 4),  # as in tiny-k2
    **_WIDTHS,
)

_MINI_LINEAR = ModelSpec(
    name="mini-linear",
    family="kimi_linear",
    linear_num_heads=8,
    linear_head_dim=128,
    linear_conv_kernel_dim=4,
    nope=True,
    rms_norm_eps=1e-5,
    **_WIDTHS,
)

SPECS = (_MINI_2B, _MINI_K2, _MINI_LINEAR)
