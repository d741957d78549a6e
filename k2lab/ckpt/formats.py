"""The formats of released weights: how a config.json tells them, which tensors they quantise, what is written for engines.

    plain        every tensor as bf16, fp16 or fp32
    fp8_block    Kimi K2, DeepSeek-V3: linear layers as e4m3 with one fp32 `weight_scale_inv` per 128 x 128 block
    int4_group   Kimi K2 Thinking, K2.5 and later: routed experts as compressed-tensors' "pack-quantized" INT4, one bf16 scale per
                 32 weights of a row

A format is recognised by its whole table, and anything that would change a value (other bits, groups, zero points, reordered
activations) is refused: weights that are decoded by a rule which is nearly theirs look like weights.
"""

from __future__ import annotations

from typing import Any, Literal

from k2lab.core.errors import CheckpointError
from k2lab.specs import ModelSpec
from k2lab.specs._tensors import Tensor

Name = Literal["plain", "fp8_block", "int4_group"]
FP8_BLOCK = 128
INT4_GROUP = 32
QAT_KEY = "k2_qat"
_ALLOWED = (
    "none, fp8 (e4m3, weight_block_size [128, 128]), or compressed-tensors pack-quantized (int, 4 bits, group_size 32, symmetric)"
)


# ---------------------------------------------------------------- reading


def table_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, at its top or in its text_config; None if there is none. Raises CheckpointError
    if there are two that differ, or it is no table."""
    text = config.get("text_config")
    tables = [place["quantization_config"] for place in (config, text) if isinstance(place, dict) and _given(place)]
    if not tables:
        return None
    if any(not isinstance(table, dict) for table in tables) or tables[0] != tables[-1]:
        raise CheckpointError("quantization_config is no table, or two differ", where="config.json", got=tables)
    return tables[0]


def _given(place: dict[str, Any]) -> bool:
    return place.get("quantization_config") is not None


def recognise(config: dict[str, Any]) -> Name:
    """The format that a config.json announces. Raises CheckpointError for a quantisation that is not read here."""
    for place in (config, config.get("text_config")):
        if isinstance(place, dict) and place.get("compression_config") is not None:
            raise _unknown("compression_config", place["compression_config"])
    table = table_of(config)
    if table is None:
        return "plain"
    method = table.get("quant_method")
    if method == "fp8":
        _check_fp8(table)
        return "fp8_block"
    if method == "compressed-tensors":
        _check_int4(table)
        return "int4_group"
    raise _unknown("quant_method", method)


def qat(config: dict[str, Any]) -> Name | None:
    """The format on whose grid the experts of a trained, not yet exported checkpoint lie (`k2_qat`), or None. Raises
    CheckpointError for another table than {"format": "int4_group", "group_size": 32}."""
    table = config.get(QAT_KEY)
    if table is None:
        return None
    if table != qat_table():
        raise CheckpointError(
            "this quantisation-aware training is not known", where=_at(QAT_KEY), got=table, allowed=str(qat_table())
        )
    return "int4_group"


def qat_table() -> dict[str, Any]:
    """What config.json holds under `k2_qat` where experts are multiplied by their INT4 grid values."""
    return {"format": "int4_group", "group_size": INT4_GROUP}


def _at(key: str) -> str:
    return f"config.json: {key}"


def _unknown(key: str, got: object) -> CheckpointError:
    return CheckpointError(
        "unknown quantisation",
        where=_at(f"quantization_config.{key}"),
        got=got if got is not None else "nothing",
        allowed=_ALLOWED,
        next="Take the release in one of these formats, or convert it to bf16 with the tool that made it",
    )


def _expect(table: dict[str, Any], path: str, rules: dict[str, tuple[Any, ...]]) -> None:
    """Each key of `rules` has one of its values in `table` (None: or is missing); other keys are refused."""
    for key, values in rules.items():
        got = table.get(key)
        if not any(got == value and isinstance(got, bool) == isinstance(value, bool) for value in values):
            raise _unknown(path + key, got)
    for key, got in table.items():
        if key not in rules and key not in _TELLING_NOTHING:
            raise _unknown(path + key, got)


# Keys that do not change what a stored value means: how the scales were once found, which library wrote the file, which modules
# are left alone (what is quantised shows in the tensors themselves).
_TELLING_NOTHING = {
    "quant_method",
    "ignore",
    "ignored_layers",
    "modules_to_not_convert",
    "modules_to_convert",
    "targets",
    "observer",
    "observer_kwargs",
    "version",
    "quantization_status",
    "global_compression_ratio",
    "run_compressed",
    "dequantize",
    "use_optimized_inference",
    "config_groups",
    "activation_scheme",
}


def _check_fp8(table: dict[str, Any]) -> None:
    rules = {
        "fmt": ("e4m3", "float8_e4m3fn", None),
        "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
        "scale_fmt": ("float", None),
        "expert_dtype": ("fp8", None),
        "weight_per_tensor": (False, None),
        "act_per_tensor": (False, None),
    }
    _expect(table, "", rules)
    if table.get("activation_scheme", "dynamic") != "dynamic":
        raise _unknown("activation_scheme", table["activation_scheme"])


_NOTHING: tuple[Any, ...] = (None, {}, [])


def _check_int4(table: dict[str, Any]) -> None:
    _expect(
        table,
        "",
        {
            "format": ("pack-quantized",),
            "kv_cache_scheme": _NOTHING,
            "sparsity_config": (*_NOTHING, {"format": "dense"}),
            "transform_config": _NOTHING,
        },
    )
    if table.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise _unknown("quantization_status", table["quantization_status"])
    groups = table.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _unknown("config_groups", groups)
    for name, group in groups.items():
        path = f"config_groups.{name}."
        _expect(
            group,
            path,
            {
                "weights": (group.get("weights"),),
                "input_activations": (None,),
                "output_activations": (None,),
                "format": ("pack-quantized", None),
            },
        )
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise _unknown(path + "weights", weights)
        _expect(
            weights,
            path + "weights.",
            {
                "num_bits": (4,),
                "type": ("int",),
                "strategy": ("group",),
                "group_size": (INT4_GROUP,),
                "symmetric": (True,),
                "actorder": (None, False),
                "dynamic": (False, None),
                "block_structure": (None,),
                "scale_dtype": (None, "torch.bfloat16", "bfloat16"),
                "zp_dtype": (None, "torch.int8", "int8"),
                "is_mx": (False, None),
            },
        )


# ---------------------------------------------------------------- writing


def quantises(format: str, tensor: Tensor) -> bool:
    """True if releases in `format` store `tensor` quantised. fp8_block: all linear layers (kv_b_proj too) and experts, not the
    router, the embedding and the head (DeepSeek-V3's rule); int4_group: routed experts whose rows are whole groups."""
    if format == "fp8_block":
        return tensor.kind in ("linear", "expert")
    if format == "int4_group":
        return tensor.kind == "expert" and tensor.shape[-1] % INT4_GROUP == 0
    return False


def quantization_config(format: str, spec: ModelSpec, vision: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The table to write beside weights in `format`, as in Moonshot's releases; transformers, compressed-tensors, vLLM and SGLang
    read it. `vision` are the first parts of vision tensors' names ("vision_tower"), which stay as they are. None for plain."""
    if format == "fp8_block":
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    if format != "int4_group":
        return None
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": INT4_GROUP,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": ignored(spec, vision),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def ignored(spec: ModelSpec, vision: tuple[str, ...] = ()) -> list[str]:
    """Modules that INT4 leaves alone, as compressed-tensors' ignore list: head, attention, shared experts, the dense layers' MLP,
    vision, and Kimi Linear's router, which some engines build as a Linear. A text tower's head has a prefix, so there the head
    is a pattern, as in Kimi K2.6."""
    head = "re:.*lm_head.*" if vision else "lm_head"
    names = [head, "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    router = [r"re:.*block_sparse_moe\.gate$"] if spec.family == "kimi_linear" else []
    return names + router + [f"re:{part}.*" for part in vision]
