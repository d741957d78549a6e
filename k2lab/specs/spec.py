"""`ModelSpec`: the shape of a language model as plain numbers, and everything that follows from the numbers alone.

Three families: `kimi_k2` (latent attention and experts; DeepSeek-V3's shape), `kimi_linear` (Kimi Delta Attention with a latent
attention layer now and then, experts, no positional encoding) and `dense` (Qwen2 or Llama shaped students).

Counts follow from one table, the list of weight tensors (`_tensors.py`), so that names on disk, parameters, bytes and flops
cannot disagree. No torch.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from dataclasses import replace as _replace
from typing import Any, Literal

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.schema import convert
from k2lab.specs import _config, _tensors
from k2lab.specs._check import check
from k2lab.specs._tensors import Tensor

FORMATS = ("fp32", "bf16", "fp8_block", "int4_group")
KDA_CHUNK = 64  # chunk length C of the chunk-wise delta rule in the flop count (Kimi Linear report, eq. 13)
FP8_BLOCK = 128  # one fp32 scale per 128 x 128 block
INT4_GROUP = 32  # one bf16 scale per 32 weights of a row


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of one model. Frozen; `replace()` gives a checked, changed copy.

    Zeros and empty values mean "not in this family" or "derived": `num_kv_heads` 0 = `num_attention_heads`; `head_dim` 0 =
    `hidden_size / num_attention_heads`; `layer_types` empty = all `mla`, all `attention`, or for `kimi_linear` three `kda`
    before each `mla` and an `mla` at the end. Raises RecipeError if the numbers do not make a model.
    """

    name: str
    family: Literal["kimi_k2", "kimi_linear", "dense"]
    hidden_size: int  # D
    num_layers: int
    vocab_size: int  # W
    intermediate_size: int  # width of the dense MLPs
    num_attention_heads: int  # H

    # dense attention
    num_kv_heads: int = 0  # key-value heads; latent attention has one per query head
    head_dim: int = 0
    attention_bias: bool = False  # biases on q, k and v as in Qwen2; without them the dense shape is Llama's

    # experts; the first `first_k_dense_replace` layers keep a dense MLP
    moe_intermediate_size: int = 0  # F
    first_k_dense_replace: int = 0
    n_routed_experts: int = 0  # E
    num_experts_per_tok: int = 0  # K
    n_shared_experts: int = 0
    n_group: int = 1  # group-limited routing: choose among the best `topk_group` of `n_group` expert groups
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True

    # latent attention (MLA)
    q_lora_rank: int | None = None  # Q; None = one full query projection
    kv_lora_rank: int = 0  # L
    qk_nope_head_dim: int = 0  # N
    qk_rope_head_dim: int = 0  # R; shared key part, rotated unless `nope`
    v_head_dim: int = 0  # V

    # which attention each layer has: "mla", "kda" or "attention"
    layer_types: tuple[str, ...] = ()

    # Kimi Delta Attention (KDA)
    linear_num_heads: int = 0
    linear_head_dim: int = 0
    linear_conv_kernel_dim: int = 0

    # positions
    rope_theta: float = 10000.0
    rope: dict[str, Any] | None = field(default=None, hash=False)  # scaling table as in config.json (YaRN), or None
    nope: bool = False  # no positional encoding at all (Kimi Linear)
    max_position_embeddings: int = 4096

    # the rest
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # A fresh model's first heads of layer 0 begin by looking this many tokens back, e.g. (1, 2); () = no head does. See
    # `models/local_heads.py`. Of no meaning once there are weights, so config.json does not hold it.
    local_heads: tuple[int, ...] = field(default=(), compare=False)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_attention_heads)
        if self.family == "dense" and not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not self.layer_types:
            object.__setattr__(self, "layer_types", default_layer_types(self.family, self.num_layers))
        if self.rope is not None:
            object.__setattr__(self, "rope", dict(self.rope))
        check(self)

    # ------------------------------------------------------------ shape

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.head_dim if self.family == "dense" else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.head_dim if self.family == "dense" else self.v_head_dim

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices (from 0) of the layers with attention `kind`: "mla", "kda" or "attention"."""
        return tuple(index for index, value in enumerate(self.layer_types) if value == kind)

    def moe_layers(self) -> tuple[int, ...]:
        """Indices (from 0) of the layers with routed experts."""
        return tuple(range(self.first_k_dense_replace, self.num_layers)) if self.n_routed_experts else ()

    def softmax_scale(self) -> float:
        """What attention logits are multiplied by: qk_head_dim^-0.5, times YaRN's (0.1 m ln(factor) + 1)^2 where the table has
        `mscale_all_dim` = m (DeepSeek-V3's rule)."""
        scale = self.qk_head_dim**-0.5
        if self.rope and self.rope.get("mscale_all_dim") and self.rope.get("factor", 1.0) > 1.0:
            scale *= (0.1 * self.rope["mscale_all_dim"] * math.log(self.rope["factor"]) + 1.0) ** 2
        return scale

    # ------------------------------------------------------------ counts

    def tensors(self) -> Iterator[Tensor]:
        """The weight tensors with group and kind; the routed experts of a layer come as one entry with a `count`."""
        return _tensors.tensors(self)

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name on disk, shape) of every tensor of a released checkpoint in BF16, experts one by one."""
        for tensor in self.tensors():
            if tensor.count == 1:
                yield tensor.name, tensor.shape
            else:
                for expert in range(tensor.count):
                    yield tensor.name.replace("{e}", str(expert)), tensor.shape

    def parameters(self) -> dict[str, int]:
        """Parameters by group: embedding, head, attention_mla, attention_kda, attention_dense, dense_mlp, routed_experts,
        shared_experts, routers, norms; groups that the model lacks are left out. A router's correction bias counts as router."""
        groups: dict[str, int] = {}
        for tensor in self.tensors():
            groups[tensor.group] = groups.get(tensor.group, 0) + tensor.numel * tensor.count
        return groups

    def total(self) -> int:
        """All parameters (a tied head is counted once)."""
        return sum(self.parameters().values())

    def active(self, with_embeddings: bool = True) -> int:
        """Parameters that one token meets: everything but the routed experts that it was not sent to. `with_embeddings=False`
        leaves out the input embedding and the head."""
        return sum(
            tensor.numel * tensor.active
            for tensor in self.tensors()
            if with_embeddings or tensor.group not in ("embedding", "head")
        )

    def matmul_active(self) -> int:
        """Weights that one token is multiplied by: `active()` without the embedding (a look-up), norms, biases and convolutions;
        the head counts also where it is tied to the embedding."""
        weights = sum(tensor.numel * tensor.active for tensor in self.tensors() if tensor.is_matrix)
        return weights + (self.vocab_size * self.hidden_size if self.tie_word_embeddings else 0)

    def bytes(self, format: str) -> int:
        """Size of all weights stored as `format`.

        "fp32", "bf16" (router bias, A_log and dt_bias stay fp32); "fp8_block": linear layers and experts as e4m3 with one fp32
        scale per 128 x 128 block, the rest as in bf16; "int4_group": routed experts as INT4 with one bf16 scale per 32 weights of
        a row, the rest bf16 (without the few bytes of `weight_shape` of each packed matrix).
        Raises RecipeError for another format, and for int4_group on a model without routed experts.
        """
        if format not in FORMATS:
            raise RecipeError(
                f"there is no weight format {format!r}", allowed=", ".join(FORMATS), next=did_you_mean(format, FORMATS)
            )
        if format == "int4_group" and not self.n_routed_experts:
            raise RecipeError(
                f"{self.name} has no routed experts, and int4_group packs only these", allowed="fp32, bf16, fp8_block"
            )
        return sum(_tensors.tensor_bytes(tensor, format, FP8_BLOCK, INT4_GROUP) * tensor.count for tensor in self.tensors())

    def require_int4(self, where: str | None = None) -> None:
        """Raises RecipeError unless models of this shape have routed experts whose rows are whole INT4 groups."""
        if not self.n_routed_experts:
            raise RecipeError(
                f"{self.name} has no routed experts, and INT4 is for these only",
                where=where,
                got=f"family {self.family}",
                allowed="a model with a mixture of experts",
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % INT4_GROUP:
                raise RecipeError(
                    f"the rows of {self.name}'s experts cannot be split into INT4 groups",
                    where=where,
                    got=f"{name} = {getattr(self, name)}",
                    allowed=f"multiples of {INT4_GROUP}",
                )

    def require_compilable(self, where: str | None = None) -> None:
        """Raises RecipeError unless training may compile layers of this shape: those of Kimi's families are fused by hand."""
        if self.family != "dense":
            raise RecipeError(
                f"layers of {self.name} are not compiled: what a compiler would fuse is fused by hand in them",
                where=where,
                got=f"family {self.family}",
                allowed="dense models (Llama, Qwen2)",
                next="Leave out compile",
            )

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of cache that each token of context adds: (kv_lora_rank + qk_rope_head_dim) per MLA layer, 2 x heads x head_dim
        per ordinary attention layer, nothing for KDA."""
        latent = len(self.layers_of("mla")) * (self.kv_lora_rank + self.qk_rope_head_dim)
        full = len(self.layers_of("attention")) * 2 * self.num_kv_heads * self.head_dim
        return (latent + full) * dtype_bytes

    def state_bytes(self, dtype_bytes: int = 4) -> int:
        """Bytes of recurrent KDA state per sequence, whatever its length: heads x head_dim^2 per layer (fp32 by default)."""
        return len(self.layers_of("kda")) * self.linear_num_heads * self.linear_head_dim**2 * dtype_bytes

    def conv_state_bytes(self, dtype_bytes: int = 2) -> int:
        """Bytes of the short convolutions' state per sequence: the last kernel-1 inputs of q, k and v in each KDA layer."""
        width = 3 * self.linear_num_heads * self.linear_head_dim
        return len(self.layers_of("kda")) * width * max(self.linear_conv_kernel_dim - 1, 0) * dtype_bytes

    def flops_per_token(self, context: int, training: bool = True) -> dict[str, float]:
        """Model flops (a multiply and an add are two) per token of a causal sequence of `context` tokens, by term.

        matmul     2 x matmul_active
        mla        scores and values of the expanded form, half of the square: heads (qk + v) x context per layer
        attention  the same for ordinary attention
        kda        heads (6 d^2 + 3 C d + C^2) per layer, C = 64 (Kimi Linear report, eq. 13), plus the short convolutions;
                   independent of the context

        `training=True` multiplies by 3 (the backward pass is two forward passes), the usual count for MFU: recomputation, and the
        scores that flash kernels compute again, are not model flops.
        """
        if context < 1:
            raise RecipeError("a context has at least 1 token", where="context", got=context)
        quadratic = self.num_attention_heads * (self.qk_head_dim + self.value_head_dim) * context
        d, chunk = self.linear_head_dim, KDA_CHUNK
        convolution = 2 * 3 * self.linear_num_heads * d * self.linear_conv_kernel_dim
        kda = self.linear_num_heads * (6 * d * d + 3 * chunk * d + chunk * chunk) + convolution
        terms = {
            "matmul": 2.0 * self.matmul_active(),
            "mla": float(len(self.layers_of("mla")) * quadratic),
            "attention": float(len(self.layers_of("attention")) * quadratic),
            "kda": float(len(self.layers_of("kda")) * kda),
        }
        return {name: value * (3.0 if training else 1.0) for name, value in terms.items()}

    # ------------------------------------------------------------ config.json

    def config(self) -> dict[str, Any]:
        """A legacy style Hugging Face config.json as a dict, with the keys that Moonshot's releases and serving engines read
        (`rope_scaling`, `rope_theta`, `topk_method`, `scoring_func`; for Kimi Linear `linear_attn_config` with layers from 1)."""
        return _config.to_config(self)

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str | None = None) -> ModelSpec:
        """The spec of a config.json, recognised by its fields: Kimi K2, DeepSeek-V3, Moonlight, the text tower of Kimi K2.5
        (`text_config`), Kimi Linear, Qwen2, Llama. Multi-token-prediction layers are not part of the spec.

        Raises RecipeError for other models, among them Kimi K3, whose model_type is also "kimi_linear".
        """
        hints = typing.get_type_hints(cls)
        values = _config.from_config(config, name)
        return cls(**{key: convert(value, hints[key], f"config.json: {key}") for key, value in values.items()})

    def replace(self, **overrides: Any) -> ModelSpec:
        """A copy with other values, types checked as in a recipe. Values that were derived (`num_kv_heads`, `head_dim`,
        `layer_types`) are derived anew unless given. Raises RecipeError for unknown fields and wrong types."""
        hints = typing.get_type_hints(type(self))
        known = [item.name for item in fields(self)]
        for key in overrides:
            if key not in known:
                raise RecipeError(
                    f"a model has no {key!r}", where=f"model.{key}", allowed=", ".join(known), next=did_you_mean(key, known)
                )
        values = {key: convert(value, hints[key], f"model.{key}") for key, value in overrides.items()}
        if "layer_types" not in values and self.layer_types == default_layer_types(self.family, self.num_layers):
            values["layer_types"] = ()
        if "num_kv_heads" not in values and self.num_kv_heads == self.num_attention_heads:
            values["num_kv_heads"] = 0
        if "head_dim" not in values and self.head_dim * self.num_attention_heads == self.hidden_size:
            values["head_dim"] = 0
        return _replace(self, **values)


def default_layer_types(family: str, num_layers: int) -> tuple[str, ...]:
    """Attention kind by layer. `kimi_linear`: every fourth layer and the last are "mla" (the released 48B model's rule: layers 4,
    8, 12, 16, 20, 24 and 27 of 27, counted from 1), the others "kda"."""
    if family == "kimi_linear":
        return tuple("mla" if index % 4 == 3 or index == num_layers - 1 else "kda" for index in range(num_layers))
    return ("attention" if family == "dense" else "mla",) * num_layers
