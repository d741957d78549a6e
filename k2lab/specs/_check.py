"""Do the numbers of a `ModelSpec` make a model? Each refusal names the field and what would have been right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2lab.core.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from k2lab.specs.spec import ModelSpec

FAMILIES = {"kimi_k2": ("mla",), "kimi_linear": ("mla", "kda"), "dense": ("attention",)}


def check(spec: ModelSpec) -> None:
    """Raises RecipeError if the spec is not a model that this project builds."""
    if spec.family not in FAMILIES:
        raise _wrong("family", spec.family, ", ".join(FAMILIES), did_you_mean(str(spec.family), FAMILIES))
    for name in (
        "hidden_size",
        "num_layers",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        _at_least(spec, name, 1)
    for name in ("rms_norm_eps", "initializer_range", "rope_theta", "routed_scaling_factor"):
        if not getattr(spec, name) > 0:
            raise _wrong(name, getattr(spec, name), "a number above 0")
    _check_layers(spec)
    _check_positions(spec)
    if spec.family == "dense":
        _check_dense(spec)
    else:
        _check_latent(spec)
        _check_experts(spec)
    if spec.layers_of("kda"):
        for name in ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"):
            _at_least(spec, name, 1)
    _check_local_heads(spec)
    _check_tokens(spec)


def _wrong(name: str, got: object, allowed: str, next: str | None = None) -> RecipeError:
    return RecipeError("this number does not make a model", where=f"model.{name}", got=got, allowed=allowed, next=next)


def _at_least(spec: ModelSpec, name: str, low: int) -> None:
    value = getattr(spec, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _wrong(name, value, f"an integer of at least {low}")


def _check_layers(spec: ModelSpec) -> None:
    kinds = FAMILIES[spec.family]
    if len(spec.layer_types) != spec.num_layers:
        raise _wrong("layer_types", f"{len(spec.layer_types)} entries for {spec.num_layers} layers", "one entry per layer")
    for kind in spec.layer_types:
        if kind not in kinds:
            raise _wrong("layer_types", kind, f"{' or '.join(kinds)} in family {spec.family}", did_you_mean(str(kind), kinds))


def _check_positions(spec: ModelSpec) -> None:
    if spec.nope != (spec.family == "kimi_linear"):
        raise _wrong("nope", spec.nope, f"{spec.family == 'kimi_linear'} in family {spec.family}")
    if spec.rope is None:
        return
    if spec.nope:
        raise _wrong("rope", spec.rope, "no rope table: the model has no positional encoding")
    kind, factor = spec.rope.get("type", spec.rope.get("rope_type")), spec.rope.get("factor")
    if not isinstance(kind, str):
        raise _wrong("rope", spec.rope, 'a table with `type`, for example "yarn"')
    if not isinstance(factor, (int, float)) or factor < 1:
        raise _wrong("rope.factor", factor, "a number of at least 1")


def _check_local_heads(spec: ModelSpec) -> None:
    if not spec.local_heads:
        return
    if spec.family != "kimi_k2" and not spec.attention_bias:
        raise _wrong("local_heads", spec.local_heads, "none, except in family kimi_k2 and in dense models with attention_bias")
    if len(spec.local_heads) > spec.num_attention_heads or min(spec.local_heads) < 1:
        raise _wrong("local_heads", spec.local_heads, f"at most {spec.num_attention_heads} distances (one a head) of 1 or more")


def _check_dense(spec: ModelSpec) -> None:
    _at_least(spec, "head_dim", 1)
    if spec.head_dim % 2:
        raise _wrong("head_dim", spec.head_dim, "an even number, because rotary pairs dimensions")
    if spec.num_attention_heads % spec.num_kv_heads:
        raise _wrong("num_kv_heads", spec.num_kv_heads, f"a divisor of num_attention_heads = {spec.num_attention_heads}")
    for name in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "kv_lora_rank", "linear_num_heads"):
        if getattr(spec, name):
            raise _wrong(name, getattr(spec, name), "0 in family dense")


def _check_latent(spec: ModelSpec) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        _at_least(spec, name, 1)
    if spec.q_lora_rank is not None:
        _at_least(spec, "q_lora_rank", 1)
    if spec.qk_rope_head_dim % 2:
        raise _wrong("qk_rope_head_dim", spec.qk_rope_head_dim, "an even number, because rotary pairs dimensions")
    if spec.num_kv_heads != spec.num_attention_heads:
        raise _wrong("num_kv_heads", spec.num_kv_heads, "num_attention_heads: latent attention has a key per query head")
    for name in ("attention_bias", "tie_word_embeddings", "head_dim"):
        if getattr(spec, name):
            raise _wrong(name, getattr(spec, name), f"nothing: family {spec.family} does not have it")


def _check_experts(spec: ModelSpec) -> None:
    for name in ("moe_intermediate_size", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group"):
        _at_least(spec, name, 1)
    _at_least(spec, "n_routed_experts", 2)
    _at_least(spec, "first_k_dense_replace", 0)
    if spec.first_k_dense_replace > spec.num_layers:
        raise _wrong("first_k_dense_replace", spec.first_k_dense_replace, f"at most num_layers = {spec.num_layers}")
    if spec.n_routed_experts % spec.n_group or spec.n_routed_experts // spec.n_group < 2:
        raise _wrong("n_group", spec.n_group, f"a divisor of n_routed_experts = {spec.n_routed_experts} with groups of 2 or more")
    if spec.topk_group > spec.n_group:
        raise _wrong("topk_group", spec.topk_group, f"at most n_group = {spec.n_group}")
    reachable = spec.topk_group * (spec.n_routed_experts // spec.n_group)
    if spec.num_experts_per_tok > reachable:
        raise _wrong("num_experts_per_tok", spec.num_experts_per_tok, f"at most {reachable}, the experts a token can reach")


def _check_tokens(spec: ModelSpec) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(spec, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not (isinstance(token, int) and 0 <= token < spec.vocab_size):
                raise _wrong(name, token, f"an id from 0 to vocab_size - 1 = {spec.vocab_size - 1}")
