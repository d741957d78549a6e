"""Dense students: what Kimi models are distilled into."""

from __future__ import annotations

from k2lab.specs.spec import ModelSpec

# Qwen2's shape, laptop-sized, with the vocabulary of the tiny Kimi models.
_TINY_DENSE = ModelSpec(
    name="tiny-dense",
    family="dense",
    hidden_size=192,
    num_layers=2,
    vocab_size=2048,
    intermediate_size=512,
    num_attention_heads=6,
    num_kv_heads=2,
    attention_bias=True,
    tie_word_embeddings=True,
    rope_theta=10000.0,
    max_position_embeddings=4096,
)

# The student of tiny-k2: Qwen2's shape, the same vocabulary and width, 52 % of its active parameters outside the embeddings.
# Fewer and wider heads decode faster than more and narrower ones of the same size.
_TINY_QWEN2 = ModelSpec(
    name="tiny-qwen2",
    family="dense",
    hidden_size=256,
    num_layers=2,
    vocab_size=1536,
    intermediate_size=384,
    num_attention_heads=4,
    num_kv_heads=2,
    attention_bias=True,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    initializer_range=0.04,
    local_heads=(1, 2, 3, 4),  # as in its teacher
)

# Qwen/Qwen2.5-7B
_QWEN25_7B = ModelSpec(
    name="qwen2.5-7b",
    family="dense",
    hidden_size=3584,
    num_layers=28,
    vocab_size=152064,
    intermediate_size=18944,
    num_attention_heads=28,
    num_kv_heads=4,
    attention_bias=True,
    rope_theta=1000000.0,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_id=151643,
)

# Qwen/Qwen2.5-32B
_QWEN25_32B = ModelSpec(
    name="qwen2.5-32b",
    family="dense",
    hidden_size=5120,
    num_layers=64,
    vocab_size=152064,
    intermediate_size=27648,
    num_attention_heads=40,
    num_kv_heads=8,
    attention_bias=True,
    rope_theta=1000000.0,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    bos_token_id=151643,
    eos_token_id=151643,
)

# HuggingFaceTB/SmolLM2-135M
_SMOLLM2_135M = ModelSpec(
    name="smollm2-135m",
    family="dense",
    hidden_size=576,
    num_layers=30,
    vocab_size=49152,
    intermediate_size=1536,
    num_attention_heads=9,
    num_kv_heads=3,
    tie_word_embeddings=True,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    initializer_range=0.041666666666666664,
    bos_token_id=0,
    eos_token_id=0,
)

SPECS = (_TINY_DENSE, _TINY_QWEN2, _QWEN25_7B, _QWEN25_32B, _SMOLLM2_135M)
