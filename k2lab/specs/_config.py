"""Between `ModelSpec` and Hugging Face's config.json. Models are recognised by fields, never by `model_type` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from k2lab.core.errors import RecipeError

if TYPE_CHECKING:
    from k2lab.specs.spec import ModelSpec

# Kimi K3's text model shares model_type "kimi_linear" and the architecture's name with Kimi-Linear-48B; only these fields differ.
K3_FIELDS = ("attn_res_block_size", "routed_expert_hidden_size", "gate_lower_bound", "mla_use_output_gate")


# ---------------------------------------------------------------- writing


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """A config.json with legacy keys (`rope_scaling`, `rope_theta`): engines and remote code that do not know transformers 5's
    `rope_parameters` would otherwise run without YaRN and not say so."""
    shared = {
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.initializer_range,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rope_theta": spec.rope_theta,
        "rope_scaling": dict(spec.rope) if spec.rope else None,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_id) if isinstance(spec.eos_token_id, tuple) else spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    if spec.family == "dense":
        return shared | _dense_keys(spec)
    latent = {
        "q_lora_rank": spec.q_lora_rank,
        "kv_lora_rank": spec.kv_lora_rank,
        "qk_nope_head_dim": spec.qk_nope_head_dim,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "v_head_dim": spec.v_head_dim,
        "moe_intermediate_size": spec.moe_intermediate_size,
        "moe_layer_freq": 1,
        "first_k_dense_replace": spec.first_k_dense_replace,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "topk_group": spec.topk_group,
        "num_nextn_predict_layers": 0,
    }
    if spec.family == "kimi_k2":
        return shared | latent | _k2_keys(spec)
    del shared["rope_scaling"]  # nothing is rotated; transformers would warn about the null
    return shared | latent | _linear_keys(spec)


def _dense_keys(spec: ModelSpec) -> dict[str, Any]:
    keys: dict[str, Any] = {"max_position_embeddings": spec.max_position_embeddings, "attention_dropout": 0.0}
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        keys["head_dim"] = spec.head_dim
    if spec.attention_bias:
        return keys | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    return keys | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}


def _k2_keys(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "max_position_embeddings": spec.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_routed_experts": spec.n_routed_experts,
        "n_shared_experts": spec.n_shared_experts,
        "num_experts_per_tok": spec.num_experts_per_tok,
        "n_group": spec.n_group,
        "norm_topk_prob": spec.norm_topk_prob,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _linear_keys(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "model_max_length": spec.max_position_embeddings,
        "mla_use_nope": True,
        "num_experts": spec.n_routed_experts,
        "num_shared_experts": spec.n_shared_experts,
        "num_experts_per_token": spec.num_experts_per_tok,
        "num_expert_group": spec.n_group,
        "moe_renormalize": spec.norm_topk_prob,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
        "linear_attn_config": {
            "full_attn_layers": [index + 1 for index in spec.layers_of("mla")],
            "kda_layers": [index + 1 for index in spec.layers_of("kda")],
            "num_heads": spec.linear_num_heads,
            "head_dim": spec.linear_head_dim,
            "short_conv_kernel_size": spec.linear_conv_kernel_dim,
        },
    }


# ---------------------------------------------------------------- reading


def from_config(config: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """The fields of a ModelSpec, from a config.json as a dict. Raises RecipeError for models of no family that we have."""
    if not isinstance(config, dict):
        raise RecipeError("a config.json holds one JSON object", got=config)
    outer = config.get("_name_or_path") or config.get("model_type")
    _refuse_k3(config)
    if isinstance(config.get("text_config"), dict):  # Kimi K2.5, Kimi-VL: the text tower inside a vision-language model
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
        config = ids | {key: value for key, value in config["text_config"].items() if key not in ids or value is not None}
        _refuse_k3(config)
    if config.get("kv_lora_rank"):
        linear = isinstance(config.get("linear_attn_config"), dict) or bool(config.get("linear_num_heads"))
        values = _read_latent(config) | (_read_linear(config) if linear else _read_k2(config))
    else:
        values = _read_dense(config)
    values |= {
        "name": name or str(outer or values["family"]),
        "hidden_size": _need(config, "hidden_size"),
        "num_layers": _need(config, "num_hidden_layers"),
        "vocab_size": _need(config, "vocab_size"),
        "intermediate_size": _need(config, "intermediate_size"),
        "num_attention_heads": _need(config, "num_attention_heads"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "initializer_range": float(config.get("initializer_range", 0.02)),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": _ids(config.get("eos_token_id")),
        "pad_token_id": config.get("pad_token_id"),
    }
    if config.get("hidden_act", "silu") != "silu":
        raise _not_ours("hidden_act", config["hidden_act"], "silu")
    return values


def _refuse_k3(config: dict[str, Any]) -> None:
    nested = config.get("linear_attn_config")
    tables = [config] + ([nested] if isinstance(nested, dict) else [])
    found = [key for key in K3_FIELDS if any(table.get(key) not in (None, False) for table in tables)]
    if found:
        raise RecipeError(
            "this is Kimi K3, which has the model_type of Kimi Linear but another architecture (attention residuals, "
            "latent experts, bounded decay, gated latent attention), and is not supported",
            where="config.json",
            got="the fields " + ", ".join(found),
            allowed="Kimi K2, Kimi Linear 48B, Moonlight, DeepSeek-V3, Qwen2, Llama",
        )


def _not_ours(key: str, got: object, allowed: str) -> RecipeError:
    return RecipeError("this model is not one that K2 Lab builds", where=f"config.json: {key}", got=got, allowed=allowed)


def _need(config: dict[str, Any], *names: str) -> Any:
    for key in names:
        if config.get(key) is not None:
            return config[key]
    raise RecipeError("this key is required and missing", where=f"config.json: {names[0]}", allowed=" or ".join(names))


def _pick(config: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in names if config.get(key) is not None), default)


def _ids(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _positions(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope, from legacy keys or from transformers 5's `rope_parameters`."""
    table, theta = config.get("rope_scaling"), config.get("rope_theta")
    modern = config.get("rope_parameters")
    if isinstance(modern, dict):
        theta = modern.get("rope_theta", theta)
        if table is None and modern.get("rope_type", "default") != "default":
            table = {key: value for key, value in modern.items() if key != "rope_theta"}
    if isinstance(table, dict):
        kind = table.get("type", table.get("rope_type", "default"))
        table = {key: value for key, value in table.items() if key not in ("type", "rope_type", "rope_theta")}
        # "type" is the key of DeepSeek's generation, "rope_type" that of Llama 3.1's
        table = {"type" if kind == "yarn" else "rope_type": kind, **table} if kind != "default" else None
    return {"rope_theta": float(theta if theta is not None else 10000.0), "rope": table or None}


def _read_latent(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("attention_bias"):
        raise _not_ours("attention_bias", True, "false")
    frequency = config.get("moe_layer_freq", 1)
    if frequency != 1:
        raise _not_ours("moe_layer_freq", frequency, "1")
    return {
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_nope_head_dim": _need(config, "qk_nope_head_dim"),
        "qk_rope_head_dim": _need(config, "qk_rope_head_dim"),
        "v_head_dim": _need(config, "v_head_dim"),
        "moe_intermediate_size": _need(config, "moe_intermediate_size"),
        "first_k_dense_replace": _first_dense(config),
        "n_routed_experts": _need(config, "n_routed_experts", "num_experts", "num_local_experts"),
        "num_experts_per_tok": _need(config, "num_experts_per_tok", "num_experts_per_token"),
        "n_shared_experts": _need(config, "n_shared_experts", "num_shared_experts"),
        "n_group": _pick(config, ("n_group", "num_expert_group"), 1),
        "topk_group": _pick(config, ("topk_group",), 1),
        "routed_scaling_factor": float(_need(config, "routed_scaling_factor")),
        "norm_topk_prob": bool(_pick(config, ("norm_topk_prob", "moe_renormalize"), True)),
        "max_position_embeddings": _need(config, "max_position_embeddings", "model_max_length"),
    }


def _first_dense(config: dict[str, Any]) -> int:
    kinds = config.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return _need(config, "first_k_dense_replace")
    dense = next((index for index, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if any(kind == "dense" for kind in kinds[dense:]):
        raise _not_ours("mlp_layer_types", kinds, "dense layers first, then sparse ones only")
    return dense


def _read_k2(config: dict[str, Any]) -> dict[str, Any]:
    for key, right in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key, right) != right:
            raise _not_ours(key, config[key], f'"{right}" (Kimi K2, DeepSeek-V3, Moonlight)')
    return {"family": "kimi_k2"} | _positions(config)


def _read_linear(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("mla_use_nope") is False:
        raise _not_ours("mla_use_nope", False, "true")
    if config.get("moe_router_activation_func", "sigmoid") != "sigmoid":
        raise _not_ours("moe_router_activation_func", config["moe_router_activation_func"], "sigmoid")
    table = config.get("linear_attn_config") or {}
    return {
        "family": "kimi_linear",
        "nope": True,
        "layer_types": _layer_types(config, table),
        "linear_num_heads": _pick(table, ("num_heads",), config.get("linear_num_heads")),
        "linear_head_dim": _pick(table, ("head_dim",), config.get("linear_head_dim")),
        "linear_conv_kernel_dim": _pick(table, ("short_conv_kernel_size",), config.get("linear_conv_kernel_dim")),
        "rope_theta": float(config.get("rope_theta") or 10000.0),
    }


def _layer_types(config: dict[str, Any], table: dict[str, Any]) -> tuple[str, ...]:
    if isinstance(config.get("layer_types"), list):
        names = {"full_attention": "mla", "linear_attention": "kda"}
        return tuple(names.get(kind, kind) for kind in config["layer_types"])
    layers = _need(config, "num_hidden_layers")
    full, kda = table.get("full_attn_layers"), table.get("kda_layers")
    # transformers would fall back to a pattern that no released model has; a config that does not say is refused
    if not isinstance(full, list) or not isinstance(kda, list) or sorted(full + kda) != list(range(1, layers + 1)):
        raise _not_ours(
            "linear_attn_config",
            {"full_attn_layers": full, "kda_layers": kda},
            f"each layer from 1 to {layers} in one of the two",
        )
    return tuple("mla" if index + 1 in full else "kda" for index in range(layers))


def _read_dense(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    # Qwen3 and others share Qwen2's fields but add norms that no field shows, so here the type must be known.
    if kind not in ("qwen2", "llama"):
        raise _not_ours("model_type", kind, "qwen2 or llama, or a config with kv_lora_rank (Kimi K2, Kimi Linear, DeepSeek-V3)")
    for key in ("use_sliding_window", "mlp_bias"):
        if config.get(key):
            raise _not_ours(key, True, "false")
    if kind == "llama" and config.get("attention_bias"):
        raise _not_ours("attention_bias", True, "false for llama")
    return {
        "family": "dense",
        "attention_bias": kind == "qwen2",
        "num_kv_heads": _pick(config, ("num_key_value_heads",), 0),
        "head_dim": _pick(config, ("head_dim",), 0),
        "max_position_embeddings": _need(config, "max_position_embeddings"),
    } | _positions(config)
