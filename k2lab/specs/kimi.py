"""Moonshot's released shapes. A checkpoint's own config.json always wins over these (`ModelSpec.from_config`): releases differ in
YaRN factor, context and end-of-sequence id."""

from __future__ import annotations

from k2lab.specs.spec import ModelSpec

# Kimi-K2-Base of July 2025: 128k context, YaRN factor 32. Releases from September 2025 on have factor 64 and 262,144 positions.
_KIMI_K2 = ModelSpec(
    name="kimi-k2",
    family="kimi_k2",
    hidden_size=7168,
    num_layers=61,
    vocab_size=163840,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    first_k_dense_replace=1,
    n_routed_experts=384,
    num_experts_per_tok=8,
    n_shared_experts=1,
    routed_scaling_factor=2.827,
    num_attention_heads=64,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=50000.0,
    rope={
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    bos_token_id=163584,
    eos_token_id=163585,
    pad_token_id=163839,
)

_KIMI_LINEAR_48B = ModelSpec(
    name="kimi-linear-48b",
    family="kimi_linear",
    hidden_size=2304,
    num_layers=27,
    vocab_size=163840,
    intermediate_size=9216,
    moe_intermediate_size=1024,
    first_k_dense_replace=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_shared_experts=1,
    routed_scaling_factor=2.446,
    num_attention_heads=32,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,  # part of the key that the heads share; not rotated
    v_head_dim=128,
    linear_num_heads=32,
    linear_head_dim=128,
    linear_conv_kernel_dim=4,
    nope=True,
    max_position_embeddings=1048576,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163586,
    pad_token_id=163839,
)

_MOONLIGHT_16B = ModelSpec(
    name="moonlight-16b",
    family="kimi_k2",
    hidden_size=2048,
    num_layers=27,
    vocab_size=163840,
    intermediate_size=11264,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    n_routed_experts=64,
    num_experts_per_tok=6,
    n_shared_experts=2,
    routed_scaling_factor=2.446,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    rope_theta=50000.0,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_id=163585,
    pad_token_id=163839,
)

SPECS = (_KIMI_K2, _KIMI_LINEAR_48B, _MOONLIGHT_16B)
