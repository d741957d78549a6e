"""Checkpoints of every family in the layouts of their releases, made up and narrow: recognised by fields, loaded, computed as
transformers does, refused where another architecture hides behind a known name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_samples import K2, LINEAR, YARN, alone, logits, make, pack, twin, twin_logits
from safetensors.torch import load_file, save_file

from k2lab import specs
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.models import build
from k2lab.specs import ModelSpec

NARROW: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 97,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
# Released shapes with all that is structure kept: layers and their pattern, choices per token, shared experts, scaling, YaRN.
RELEASED = {
    "kimi-k2": specs.get("kimi-k2").replace(**NARROW, num_layers=3, n_routed_experts=16, q_lora_rank=24),
    "kimi-linear-48b": specs.get("kimi-linear-48b").replace(
        **NARROW, n_routed_experts=16, linear_num_heads=2, linear_head_dim=16
    ),
    "moonlight-16b": specs.get("moonlight-16b").replace(**NARROW, num_layers=3, n_routed_experts=16),
}


def edit(folder: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Puts `change` into a folder's config.json, and writes `tensors` in place of its weights."""
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | change))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", RELEASED)
def test_released_layouts_load_and_compute_as_transformers(name: str, tmp_path: Path) -> None:
    model = make(RELEASED[name])
    build.save(model, tmp_path)
    # the name in config.json decides nothing
    edit(tmp_path, {"model_type": "something_new", "architectures": ["SomethingForCausalLM"]})
    again = build.load(open_folder(tmp_path))
    assert again.spec.replace(name=model.spec.name) == model.spec
    batch = pack((5, 70, 33))
    with torch.no_grad():
        theirs = twin_logits(twin(model), batch)
        worst = float((logits(again, batch) - theirs).abs().max() / theirs.abs().max())
        assert worst < (1e-5 if model.spec.num_layers == 3 else 1e-4)  # rounding grows over 27 layers


def test_kimi_linear_has_latent_attention_where_the_release_has_it(tmp_path: Path) -> None:
    build.save(make(RELEASED["kimi-linear-48b"]), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    latent = {int(name.split(".")[2]) + 1 for name in names if "kv_b_proj" in name}
    delta = {int(name.split(".")[2]) + 1 for name in names if "k_conv1d" in name}
    assert latent == {4, 8, 12, 16, 20, 24, 27}
    assert delta == set(range(1, 28)) - latent
    # a config that leaves the pattern out is refused: transformers' own default is that of no released model
    table = json.loads((tmp_path / "config.json").read_text())
    table["linear_attn_config"] = {key: value for key, value in table["linear_attn_config"].items() if "layers" not in key}
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(RecipeError, match="each layer from 1 to 27"):
        build.load(open_folder(tmp_path))


def tower(folder: Path, spec: ModelSpec = K2, **changes: Any) -> Any:
    """A vision-language checkpoint around a small model, as Kimi K2.5 and later are released; the model."""
    model = make(spec)
    build.save(model, folder)
    text = json.loads((folder / "config.json").read_text()) | changes
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.encoder.blocks.0.wqkv.weight"] = torch.zeros(12, 4)
    tensors["vision_tower.patch_embed.proj.weight"] = torch.zeros(4, 3)
    tensors["mm_projector.proj.0.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outer = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "vision_config": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": text}))
    return model


@pytest.mark.parametrize("spec", [K2, RELEASED["moonlight-16b"]], ids=["k2.5", "kimi-vl"])
def test_the_text_tower_of_a_vision_model_loads_and_what_is_left_out_is_said(spec: ModelSpec, tmp_path: Path) -> None:
    model = tower(tmp_path, spec)
    with pytest.warns(UserWarning, match=r"1 of mm_projector, 2 of vision_tower"):
        again = build.load(open_folder(tmp_path))
    assert again.state().keys() == model.state().keys()
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in model.state().items())
    build.save(again, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "kimi_k2"
    assert build.load(open_folder(tmp_path / "text")).state().keys() == model.state().keys()


def test_a_text_tower_that_is_incomplete_of_unknown_format_or_k3_is_refused(tmp_path: Path) -> None:
    tower(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"audio_tower.weight": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="audio_tower"):
        build.load(open_folder(tmp_path))
    missing = {name: tensor for name, tensor in tensors.items() if name != "language_model.model.norm.weight"}
    save_file(missing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        build.load(open_folder(tmp_path))
    tower(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="compressed-tensors"):
        build.load(open_folder(tmp_path))
    tower(tmp_path, LINEAR, attn_res_block_size=12)
    with pytest.raises(RecipeError, match="Kimi K3.*attn_res_block_size"):
        build.load(open_folder(tmp_path))


def test_vision_tensors_without_a_vision_config_are_unexpected(tmp_path: Path) -> None:
    build.save(make(K2), tmp_path)
    edit(tmp_path, {}, load_file(tmp_path / "model.safetensors") | {"vision_tower.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="vision_tower"):
        build.load(open_folder(tmp_path))


def yarn_frequencies(width: int, theta: float, table: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    """Inverse frequencies [R / 2] after YaRN (arXiv 2309.00071, section 3.2) and the ramp's first and last dimension."""

    def turns(beta: float) -> float:
        original = table["original_max_position_embeddings"]
        return width * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns(table["beta_fast"])), 0)
    high = min(math.ceil(turns(table["beta_slow"])), width - 1)
    plain = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain * (1 - ramp) + plain / table["factor"] * ramp, low, high


@pytest.mark.parametrize(("beta_fast", "low", "high"), [(1.0, 19, 20), (32.0, 8, 20)])
def test_yarn_is_what_config_json_says(beta_fast: float, low: int, high: int, tmp_path: Path) -> None:
    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    build.save(make(RELEASED["kimi-k2"].replace(num_layers=1, **widths)), tmp_path)
    edit(tmp_path, {"rope_scaling": YARN | {"beta_fast": beta_fast}, "max_position_embeddings": 262144})
    model = build.load(open_folder(tmp_path))
    expected, first, last = yarn_frequencies(64, 50000.0, model.spec.rope)
    assert (first, last) == (low, high)
    torch.testing.assert_close(model.hf.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0)
    attention = model.hf.model.layers[0].self_attn
    assert attention.scaling == pytest.approx(0.1446796, abs=1e-7)
    assert attention.scaling == pytest.approx(model.spec.softmax_scale(), rel=1e-12)
    # cos and sin themselves carry no factor: mscale and mscale_all_dim are equal
    assert model.hf.model.rotary_emb.attention_scaling == 1.0


STUDENTS = {
    "qwen": specs.get("qwen2.5-7b").replace(hidden_size=64, num_attention_heads=8, intermediate_size=96, num_kv_heads=2),
    "smollm": specs.get("smollm2-135m").replace(hidden_size=63, num_attention_heads=9, num_kv_heads=3, head_dim=8),
}
SMALL_STUDENT = {"num_layers": 2, "vocab_size": 97, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", STUDENTS)
def test_dense_students_speak_the_same_protocol(name: str, tmp_path: Path) -> None:
    model = build.from_spec(STUDENTS[name].replace(**SMALL_STUDENT), seed=1)
    build.save(model, tmp_path)
    again = build.load(open_folder(tmp_path)).train()
    batch = pack((5, 70, 33))
    together = logits(again, batch)
    assert torch.equal(together, logits(model, batch))
    apart = torch.cat([logits(model, part) for part in alone(batch)])
    assert float((together - apart).detach().abs().max()) < 1e-5
    together.square().mean().backward()
    assert {parameter_name for parameter_name, parameter in again.named_parameters() if parameter.grad is None} == set()
    assert (again.row_layouts(), again.max_logits(), again.expert_counts(), again.routers()) == ([], {}, {}, {})
    assert again.flops_per_token(128) == pytest.approx(sum(model.spec.flops_per_token(128).values()))
