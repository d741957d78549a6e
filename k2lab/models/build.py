"""Building, loading and saving models as transformers classes.

Config files are read and written in the released, legacy form (`model_type: kimi_k2`, `rope_scaling`, `rope_theta`);
transformers 5 knows neither `kimi_k2` nor these keys, so the way in and out goes through `specs.ModelSpec`, which recognises
models by their fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.rng import rng
from k2lab.core.types import TensorSource
from k2lab.models import cpu, export, local_heads, packed, qat, reading
from k2lab.models.swap import swap
from k2lab.models.wrap import TrainModel
from k2lab.specs import ModelSpec

CLASSES: dict[str, tuple[type, type]] = {
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_linear": (KimiLinearConfig, KimiLinearForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def hf_config(spec: ModelSpec) -> Any:
    """transformers' config object for a spec. Kimi Linear's layer types are always explicit, because transformers' default
    pattern is that of no released model."""
    table = spec.config()
    kind = spec.family if spec.family != "dense" else table["model_type"]
    config_class, _ = CLASSES[kind]
    for key in ("model_type", "architectures", "torch_dtype"):
        table.pop(key, None)
    if spec.family == "kimi_linear":
        names = {"mla": "full_attention", "kda": "linear_attention"}
        table["layer_types"] = [names[layer] for layer in spec.layer_types]
    if spec.rope is None:
        table.pop("rope_scaling", None)
    return config_class.from_dict(table)


def _class_of(spec: ModelSpec) -> type:
    return CLASSES[spec.family if spec.family != "dense" else spec.config()["model_type"]][1]


# ---------------------------------------------------------------- from numbers


def from_spec(spec: ModelSpec, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TrainModel:
    """A fresh model. Every tensor is a function of (seed, its name, its shape) alone, not of module order, rank or torch
    version."""
    hf = blank(spec, device)
    for name, tensor in hf.named_parameters():
        _fill(tensor, name, seed, spec.initializer_range)
        if spec.local_heads:
            local_heads.begin(tensor, name, seed, spec)
    return TrainModel(hf, spec).to(dtype=dtype)


def blank(spec: ModelSpec, device: torch.device | str = "cpu") -> Any:
    """transformers' model of this shape in fp32, buffers set, parameters not: they hold whatever was in memory."""
    if torch.device(device).type == "cpu":
        cpu.keep_memory()
    hf = _on_meta(spec)
    reading.materialise(hf, device)
    for name, buffer in hf.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    _fill_buffers(hf)
    return hf


def _on_meta(spec: ModelSpec) -> Any:
    """transformers' model of this shape without memory."""
    with torch.device("meta"):
        return _class_of(spec)(hf_config(spec))


def initial(name: str, shape: tuple[int, ...], seed: int, std: float) -> np.ndarray:
    """The initial fp32 values of the parameter `name`, drawn from `rng(seed, "init", name)`.

    Norm weights are 1; biases 0; matrices, embeddings and convolutions normal(0, std); convolutions normal(0, 1 / sqrt(kernel)),
    the scale at which a short filter keeps the size of its input; decay as in flash-linear-attention: exp(A_log)
    uniform in [1, 16], dt_bias the inverse softplus of a step log-uniform in [1e-3, 1e-1]. Fused experts [E, ...] are drawn
    expert by expert, so that a rank which holds some of them draws only these.
    """
    last = name.rsplit(".", 2)[-2:]
    draw = rng(seed, "init", name)
    if last[-1] == "A_log":
        return np.log(draw.uniform(1.0, 16.0, shape)).astype(np.float32)
    if last[-1] == "dt_bias":
        step = np.exp(draw.uniform(np.log(1e-3), np.log(1e-1), shape))
        return (step + np.log(-np.expm1(-step))).astype(np.float32)
    if last[-1] == "bias":
        return np.zeros(shape, np.float32)
    if "norm" in last[0]:
        return np.ones(shape, np.float32)
    if last[0] == "conv1d":
        return draw.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
    if last[-1] in ("gate_up_proj", "down_proj"):  # fused experts: parameters, not modules
        each = [rng(seed, "init", name, n).standard_normal(shape[1:], dtype=np.float32) for n in range(shape[0])]
        return np.stack(each) * np.float32(std)
    return draw.standard_normal(shape, dtype=np.float32) * np.float32(std)


@torch.no_grad()
def _fill(tensor: torch.Tensor, name: str, seed: int, std: float) -> None:
    tensor.copy_(torch.from_numpy(initial(name, tuple(tensor.shape), seed, std)))


@torch.no_grad()
def _fill_buffers(hf: Any) -> None:
    """Buffers that no checkpoint holds: rotary frequencies follow from the config, counts start at 0."""
    for name, buffer in hf.named_buffers():
        if name.endswith("k2_counts"):
            buffer.zero_()
    for module in hf.modules():
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(hf.config)
            module.inv_freq.copy_(fresh.inv_freq)
            module.original_inv_freq = module.inv_freq.clone()
            module.attention_scaling = fresh.attention_scaling


# ---------------------------------------------------------------- from a checkpoint, and to a folder


def read_config(folder: Path | str) -> dict[str, Any]:
    """The config.json of a model folder. Raises CheckpointError if there is none or it is no JSON object."""
    file = Path(folder) / "config.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no model folder: it has no config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{file} holds no JSON object", got=table)
    return table


def load(
    source: TensorSource,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    experts: Literal["dense", "packed"] = "dense",
    shard: Callable[[torch.nn.Module], Any] | None = None,
    threads: int = 1,
) -> TrainModel:
    """A model from a checkpoint of any format that `source` reads (`ckpt.folder.open_folder`): Kimi K2, DeepSeek-V3, Moonlight,
    Kimi Linear, Qwen2, Llama; of Kimi K2.5 and later the text tower.

    Quantised weights are decoded into `dtype` piece by piece; router biases and decay parameters are at least fp32. `experts` =
    "packed" keeps the routed experts of an INT4 checkpoint as codes and scales, frozen (`packed.PackedExperts`). `shard`, for
    example a function that calls FSDP2's `fully_shard` on layers, sees the model before it has memory; of what it makes DTensors
    each rank reads its own shards only. `threads` > 1 reads several tensors at once.

    Either the whole model is there or an error is raised: CheckpointError if the tensors are not those of the config, RecipeError
    for other models (Kimi K3 among them) and settings that we do not train.
    """
    table = source.config()
    text = table["text_config"] if isinstance(table.get("text_config"), dict) else table
    spec = getattr(source, "spec", None) or ModelSpec.from_config(table)
    if text.get("attention_dropout"):
        where = getattr(source, "path", None)
        raise RecipeError(
            "attention dropout is not supported",
            where=f"{where}/config.json" if where else "config.json",
            got=text["attention_dropout"],
            allowed="0",
        )
    grid = qat.wanted(text)
    if torch.device(device).type == "cpu":
        cpu.keep_memory()
    hf = swap(_on_meta(spec).eval())
    if experts == "packed":
        packed.replace(hf)
    reading.cast(hf, dtype)
    if shard is not None:
        shard(hf)
    reading.fill(hf, spec, source, dtype, device, threads)
    _fill_buffers(hf)
    hf.config.dtype = dtype
    return TrainModel(hf, spec).qat(grid)


def save(model: TrainModel, folder: Path | str) -> None:
    """Writes safetensors under the released tensor names (experts one by one) and a legacy config.json into `folder`.

    The dtype is the model's; router bias and decay parameters stay fp32. `load` gives back the same bits. Adapters are merged,
    packed experts decoded, layer by layer.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        export.write(model.weights(), model.spec.family, folder)
    table = model.spec.config()
    table["torch_dtype"] = str(model.head().dtype).removeprefix("torch.")
    qat.mark(table, model)
    write_json(folder / "config.json", table)
