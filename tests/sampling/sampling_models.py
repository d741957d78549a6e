"""Tiny random models of both families, transformers' own classes."""

import torch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_k2(**changes):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "n_routed_experts": 4, "first_k_dense_replace": 1, "q_lora_rank": 32, **changes}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()


def tiny_linear(**changes):
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    torch.manual_seed(0)
    sizes = {
        **SIZES,
        "num_local_experts": 4,
        "q_lora_rank": None,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        **changes,
    }
    return KimiLinearForCausalLM(KimiLinearConfig(**sizes)).eval()


def swapped(model):
    """The same model with K2 Lab's own modules, as trainers and stages have it."""
    from k2lab.models import attention, experts
    from k2lab.models.swap import swap

    swap(model)
    model.config._attn_implementation = attention.NAME
    model.config._experts_implementation = experts.NAME
    return model


FAMILIES = {
    "k2": tiny_k2,
    "linear": tiny_linear,
    "k2-swapped": lambda: swapped(tiny_k2()),
    "linear-swapped": lambda: swapped(tiny_linear()),
}
