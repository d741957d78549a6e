"""Laptop-sized models with the true shape of their big sisters: same parts, same head geometry, same names on disk.

Token ids are those of the tokenizer that the run trains; `spec.replace(bos_token_id=...)` sets them.
"""

from __future__ import annotations

from typing import Any

from k2lab.specs.spec import ModelSpec

# All tunable numbers of both models in one place.
WIDTHS: dict[str, Any] = {
    "hidden_size": 256,
    "vocab_size": 1536,
    "intermediate_size": 512,  # layer 0
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    # Top-2 weights of sigmoid scores sum to 1 and are nearly equal at the start, so the routed sum has variance 2 x (1/2)^2 = 1/2
    # of one expert's; sqrt(2) restores it to the shared expert's. (Kimi K2's 2.827 is sqrt(8) for its top-8 by the same rule.)
    "routed_scaling_factor": 1.414,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    # Above the usual 0.02: narrow matrices start with too small outputs otherwise (measured: 2.22 -> 2.21 bits per byte).
    "initializer_range": 0.04,
}

_TINY_K2 = ModelSpec(
    name="tiny-k2",
    family="kimi_k2",
    # Four heads: with two, names whose parts repeat are confused (70-80 % against 91 % copied, mean of three seeds).
    num_attention_heads=4,
    # Two layers are what a head that looks back and one that copies need. At equal time they beat three on text (1.99 against
    # 2.10 bits per byte).
    num_layers=2,
    q_lora_rank=128,
    rope_theta=50000.0,
    rms_norm_eps=1e-6,
    # Heads that know their neighbours from the start: induction (copying what followed a token before) forms in half of the
    # tokens, and text is predicted better, too (docs/log.md).
    local_heads=(1, 2, 3, 4),
    **WIDTHS,
)

_TINY_LINEAR = ModelSpec(
    name="tiny-linear",
    family="kimi_linear",
    num_attention_heads=2,
    num_layers=4,
    layer_types=("kda", "kda", "kda", "mla"),
    linear_num_heads=4,
    linear_head_dim=64,
    linear_conv_kernel_dim=4,
    nope=True,
    rms_norm_eps=1e-5,
    **WIDTHS,
)

SPECS = (_TINY_K2, _TINY_LINEAR)
