"""Building, loading and saving models as transformers classes.

Config files are read and written in the released, legacy form (`model_type: kimi_k2`, `rope_scaling`, `rope_theta`);
transformers 5 knows neither `kimi_k2` nor these keys, so the way in and out goes through `specs.ModelSpec`, which recognises
models by their fields.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
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
from transformers.utils import logging as transformers_logging

from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.rng import rng
from k2lab.models import cpu, export, local_heads
from k2lab.models.wrap import ALWAYS_FP32, TrainModel
from k2lab.specs import ModelSpec


class KimiLinear(KimiLinearForCausalLM):
    """transformers' class, with router bias and decay parameters kept in fp32 when the rest is loaded in half precision."""

    _keep_in_fp32_modules_strict = ALWAYS_FP32


CLASSES: dict[str, tuple[type, type]] = {
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_linear": (KimiLinearConfig, KimiLinear),
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
    with torch.device("meta"):
        hf = _class_of(spec)(hf_config(spec))
    hf.to_empty(device=device)
    hf.tie_weights()
    _fill_buffers(hf)
    return hf


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
    """Buffers that `to_empty` left unset: router biases start at 0, rotary frequencies follow from the config."""
    for name, buffer in hf.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    for module in hf.modules():
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(hf.config)
            module.inv_freq.copy_(fresh.inv_freq)
            module.original_inv_freq = module.inv_freq.clone()
            module.attention_scaling = fresh.attention_scaling


# ---------------------------------------------------------------- from and to a folder


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


# Tensors of a vision-language checkpoint (Kimi K2.5 and later, Kimi-VL): the text tower's have this prefix, these others are not
# ours.
TOWER = "language_model."
VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")


def load(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> TrainModel:
    """A model from a folder with config.json and safetensors, in the released tensor names: Kimi K2, DeepSeek-V3, Moonlight,
    Kimi Linear, Qwen2, Llama; of Kimi K2.5 and later the text tower, under the names that it has without its prefix.

    Vision tensors are left where they are, and a warning counts them. Raises CheckpointError for a folder that is incomplete or
    quantised, RecipeError for other models (Kimi K3 among them).
    """
    table = read_config(path)
    text = table["text_config"] if isinstance(table.get("text_config"), dict) else table
    quantised = table.get("quantization_config") or text.get("quantization_config")
    if quantised:
        raise CheckpointError(
            f"{path} holds quantised weights",
            got=quantised.get("quant_method"),
            allowed="fp32, bf16 or fp16 safetensors",
            next="Convert it to bf16 first",
        )
    spec = ModelSpec.from_config(table, name=Path(path).name)
    if text.get("attention_dropout"):
        raise RecipeError(
            "attention dropout is not supported", where=f"{path}/config.json", got=text["attention_dropout"], allowed="0"
        )
    hf, info = _read(path, spec, dtype, device, {} if text is table else {"key_mapping": {rf"^{re.escape(TOWER)}": ""}})
    unexpected = [name for name in info["unexpected_keys"] if not re.search(r"inv_freq$|\.layers\.61\.", name)]
    vision = [name for name in unexpected if text is not table and name.startswith(VISION)]
    odd = [*info["missing_keys"], *(set(unexpected) - set(vision)), *(str(name) for name in info["mismatched_keys"])]
    if odd:
        raise CheckpointError(
            f"the tensors in {path} are not those of its config.json: {len(odd)} are missing, unexpected or of another shape",
            got=", ".join(sorted(map(str, odd))[:5]),
        )
    if vision:
        parts = Counter(name.split(".", 1)[0] for name in vision)
        shown = ", ".join(f"{count} of {part}" for part, count in sorted(parts.items()))
        warnings.warn(f"{path}: the text tower was loaded; vision tensors were skipped: {shown}", stacklevel=2)
    return TrainModel(hf, spec).to(device=device)


def _read(
    path: Path | str, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str, more: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """transformers' model and what its loader says of missing and unexpected tensors."""
    if torch.device(device).type == "cpu":
        cpu.keep_memory()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return _class_of(spec).from_pretrained(
            str(path), config=hf_config(spec), dtype=dtype, output_loading_info=True, local_files_only=True, **more
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def save(model: TrainModel, folder: Path | str) -> None:
    """Writes safetensors under the released tensor names (experts one by one) and a legacy config.json into `folder`.

    The dtype is the model's; router bias and decay parameters stay fp32. `load` gives back the same bits.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        export.write(model.state(), model.spec.family, folder)
    table = model.spec.config()
    table["torch_dtype"] = str(model.head().dtype).removeprefix("torch.")
    write_json(folder / "config.json", table)
