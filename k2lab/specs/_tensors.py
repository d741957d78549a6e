"""The weight tensors of a spec: names on disk, shapes, and what kind of weight each is. One table from which all counts follow.

Legend: `D` width, `H` heads, `N` no-position head width, `R` rotary head width, `V` value head width, `Q` query latent,
`L` key-value latent, `E` experts, `F` expert hidden width, `W` vocabulary. Linear weights are [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from k2lab.specs.spec import ModelSpec

Kind = Literal["embedding", "head", "linear", "expert", "router", "norm", "conv", "vector", "fp32_vector"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight tensor, or the equal tensors of all routed experts of a layer (`{e}` in the name stands for the expert).

    `count` copies exist, `active` of them meet a token. `kind` says how it is used and stored: "fp32_vector" stays fp32 on disk,
    "linear" and "expert" may be quantised.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    kind: Kind
    layer: int | None = None
    count: int = 1
    active: int = 1

    @property
    def numel(self) -> int:
        """Elements of one copy."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """True if tokens are multiplied by it as a matrix: linear layers, experts, routers, the head."""
        return self.kind in ("linear", "expert", "router", "head")


def tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """All tensors in the order of a checkpoint: embedding, layers, final norm, head."""
    embed = (spec.vocab_size, spec.hidden_size)
    yield Tensor("model.embed_tokens.weight", embed, "embedding", "embedding")
    moe = set(spec.moe_layers())
    attention = {"mla": _mla, "kda": _kda, "attention": _dense_attention}
    for layer, kind in enumerate(spec.layer_types):
        prefix = f"model.layers.{layer}."
        yield Tensor(prefix + "input_layernorm.weight", (spec.hidden_size,), "norms", "norm", layer)
        yield from attention[kind](spec, prefix + "self_attn.", layer)
        yield Tensor(prefix + "post_attention_layernorm.weight", (spec.hidden_size,), "norms", "norm", layer)
        if layer in moe:
            yield from _experts(spec, prefix, layer)
        else:
            yield from _mlp(spec, prefix + "mlp.", spec.intermediate_size, "dense_mlp", layer)
    yield Tensor("model.norm.weight", (spec.hidden_size,), "norms", "norm")
    if not spec.tie_word_embeddings:
        yield Tensor("lm_head.weight", embed, "head", "head")


def _linear(name: str, out: int, width: int, group: str, layer: int) -> Tensor:
    return Tensor(name + ".weight", (out, width), group, "linear", layer)


def _norm(name: str, width: int, layer: int) -> Tensor:
    return Tensor(name + ".weight", (width,), "norms", "norm", layer)


def _mla(spec: ModelSpec, prefix: str, layer: int) -> Iterator[Tensor]:
    D, H, L, R = spec.hidden_size, spec.num_attention_heads, spec.kv_lora_rank, spec.qk_rope_head_dim
    N, V, Q = spec.qk_nope_head_dim, spec.v_head_dim, spec.q_lora_rank
    group = "attention_mla"
    if Q is None:
        yield _linear(prefix + "q_proj", H * (N + R), D, group, layer)
    else:
        yield _linear(prefix + "q_a_proj", Q, D, group, layer)
        yield _norm(prefix + "q_a_layernorm", Q, layer)
        yield _linear(prefix + "q_b_proj", H * (N + R), Q, group, layer)
    yield _linear(prefix + "kv_a_proj_with_mqa", L + R, D, group, layer)
    yield _norm(prefix + "kv_a_layernorm", L, layer)
    yield _linear(prefix + "kv_b_proj", H * (N + V), L, group, layer)
    yield _linear(prefix + "o_proj", D, H * V, group, layer)


def _kda(spec: ModelSpec, prefix: str, layer: int) -> Iterator[Tensor]:
    D, H, d = spec.hidden_size, spec.linear_num_heads, spec.linear_head_dim
    group = "attention_kda"
    for name in "qkv":
        yield _linear(f"{prefix}{name}_proj", H * d, D, group, layer)
    for name in "qkv":
        yield Tensor(f"{prefix}{name}_conv1d.weight", (H * d, 1, spec.linear_conv_kernel_dim), group, "conv", layer)
    yield Tensor(prefix + "A_log", (1, 1, H, 1), group, "fp32_vector", layer)
    yield Tensor(prefix + "dt_bias", (H * d,), group, "fp32_vector", layer)
    yield _linear(prefix + "f_a_proj", d, D, group, layer)
    yield _linear(prefix + "f_b_proj", H * d, d, group, layer)
    yield _linear(prefix + "b_proj", H, D, group, layer)
    yield _linear(prefix + "g_a_proj", d, D, group, layer)
    yield _linear(prefix + "g_b_proj", H * d, d, group, layer)
    yield _norm(prefix + "o_norm", d, layer)
    yield _linear(prefix + "o_proj", D, H * d, group, layer)


def _dense_attention(spec: ModelSpec, prefix: str, layer: int) -> Iterator[Tensor]:
    D, group = spec.hidden_size, "attention_dense"
    widths = {"q": spec.num_attention_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    for name, heads in widths.items():
        yield _linear(f"{prefix}{name}_proj", heads * spec.head_dim, D, group, layer)
        if spec.attention_bias:
            yield Tensor(f"{prefix}{name}_proj.bias", (heads * spec.head_dim,), group, "vector", layer)
    yield _linear(prefix + "o_proj", D, spec.num_attention_heads * spec.head_dim, group, layer)


def _mlp(spec: ModelSpec, prefix: str, width: int, group: str, layer: int) -> Iterator[Tensor]:
    D = spec.hidden_size
    yield _linear(prefix + "gate_proj", width, D, group, layer)
    yield _linear(prefix + "up_proj", width, D, group, layer)
    yield _linear(prefix + "down_proj", D, width, group, layer)


def _experts(spec: ModelSpec, prefix: str, layer: int) -> Iterator[Tensor]:
    D, E, F = spec.hidden_size, spec.n_routed_experts, spec.moe_intermediate_size
    if spec.family == "kimi_linear":  # Kimi Linear's releases name the block and the expert matrices differently
        block, gate, up, down = "block_sparse_moe.", "w1", "w3", "w2"
    else:
        block, gate, up, down = "mlp.", "gate_proj", "up_proj", "down_proj"
    yield Tensor(f"{prefix}{block}gate.weight", (E, D), "routers", "router", layer)
    yield Tensor(f"{prefix}{block}gate.e_score_correction_bias", (E,), "routers", "fp32_vector", layer)
    for name, shape in ((gate, (F, D)), (up, (F, D)), (down, (D, F))):
        tensor_name = f"{prefix}{block}experts.{{e}}.{name}.weight"
        yield Tensor(tensor_name, shape, "routed_experts", "expert", layer, count=E, active=spec.num_experts_per_tok)
    yield from _mlp(spec, f"{prefix}{block}shared_experts.", F * spec.n_shared_experts, "shared_experts", layer)


def tensor_bytes(tensor: Tensor, format: str, fp8_block: int, int4_group: int) -> int:
    """Bytes of one copy of `tensor` stored as `format` (one of spec.FORMATS)."""
    if format == "fp32" or tensor.kind == "fp32_vector":
        return 4 * tensor.numel
    if format == "fp8_block" and tensor.kind in ("linear", "expert"):
        out, width = tensor.shape
        return tensor.numel + 4 * math.ceil(out / fp8_block) * math.ceil(width / fp8_block)
    if format == "int4_group" and tensor.kind == "expert":
        out, width = tensor.shape
        packed = 4 * math.ceil(width / 8)  # eight 4-bit values in an int32
        return out * (packed + 2 * math.ceil(width / int4_group))
    return 2 * tensor.numel
