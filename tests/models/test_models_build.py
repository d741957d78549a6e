"""Building, saving and loading: reproducible beginnings, released names, legacy config, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_samples import K2, LINEAR, VARIANTS, YARN, logits, make, pack
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from k2lab import specs
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.models import build, export

QWEN = specs.ModelSpec(
    name="small-qwen",
    family="dense",
    hidden_size=32,
    num_layers=2,
    vocab_size=97,
    intermediate_size=48,
    num_attention_heads=4,
    num_kv_heads=2,
    attention_bias=True,
    tie_word_embeddings=True,
)


def names_and_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", [*VARIANTS, "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_are_lossless_under_released_names(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make((VARIANTS | {"dense": QWEN})[name], dtype=dtype)
    build.save(model, tmp_path)
    assert names_and_shapes(tmp_path) == dict(model.spec.tensor_shapes())
    again = build.load(open_folder(tmp_path), dtype=dtype)
    before, after = model.state(), again.state()
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key], after[key]), key
    assert again.spec.replace(name="x") == model.spec.replace(name="x")
    batch = pack((20, 80))
    assert torch.equal(logits(model, batch), logits(again, batch))


def test_config_is_legacy_and_bias_stays_fp32(tmp_path: Path) -> None:
    build.save(make(VARIANTS["k2, yarn"], dtype=torch.bfloat16), tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["model_type"] == "kimi_k2"
    assert table["rope_scaling"] == YARN
    assert table["rope_theta"] == 50000.0
    assert (table["topk_method"], table["scoring_func"], table["torch_dtype"]) == ("noaux_tc", "sigmoid", "bfloat16")
    assert "rope_parameters" not in table
    bias = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = make(K2)
    build.save(model, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    export.write(model.state(), "kimi_k2", tmp_path, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert all((tmp_path / file).stat().st_size < 120_000 for file in files)
    again = build.load(open_folder(tmp_path))
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in model.state().items())


def test_yarn_softmax_scale_of_kimi_k2() -> None:
    k2 = specs.get("kimi-k2")
    widths = {"hidden_size": 32, "intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "num_attention_heads": 2}
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    small = k2.replace(num_layers=1, n_routed_experts=2, num_experts_per_tok=1, rope=YARN, **widths, **tokens)
    attention = build.from_spec(small, seed=0).hf.model.layers[0].self_attn
    assert attention.qk_head_dim == 192
    assert attention.scaling == pytest.approx(0.1446796, abs=1e-7)
    assert attention.scaling == pytest.approx(small.softmax_scale())


def test_a_fresh_model_depends_on_seed_and_names_only() -> None:
    one, two, other = (build.from_spec(LINEAR, seed=n) for n in (5, 5, 6))
    deeper = build.from_spec(LINEAR.replace(num_layers=5), seed=5)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, two.state()[name])
        if "norm" in name or "bias" in name.rsplit(".", 1)[-1]:
            continue
        assert not torch.equal(tensor, other.state()[name]), name
    shared = [name for name in one.state() if "layers.0." in name or "embed" in name]
    assert all(torch.equal(one.state()[name], deeper.state()[name]) for name in shared)
    weight = one.state()["model.layers.1.mlp.experts.gate_up_proj"]
    assert float(weight.std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(weight[0], weight[1])
    rate = one.state()["model.layers.0.self_attn.forget_gate.A_log"].exp()
    assert bool(((rate >= 1) & (rate <= 16)).all())
    step = torch.nn.functional.softplus(one.state()["model.layers.0.self_attn.forget_gate.dt_bias"])
    assert bool(((step > 0.9e-3) & (step < 1.1e-1)).all())


def test_first_numbers_are_frozen() -> None:
    """Golden: a change here changes every run that starts from a fresh model."""
    weight = build.from_spec(K2.replace(initializer_range=0.02), seed=0).state()["model.layers.1.self_attn.kv_b_proj.weight"]
    assert weight[0, :4].tolist() == pytest.approx(GOLDEN, rel=1e-6)


GOLDEN = [0.031038125976920128, -0.023721586912870407, -0.002023843117058277, 0.011142149567604065]


def test_kimi_linear_layers_are_explicit() -> None:
    config = build.hf_config(LINEAR)
    assert config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    assert config.linear_head_dim == 16


@pytest.mark.parametrize("field", ["attn_res_block_size", "routed_expert_hidden_size", "gate_lower_bound", "mla_use_output_gate"])
def test_kimi_k3_is_refused_by_its_fields(field: str, tmp_path: Path) -> None:
    build.save(make(LINEAR), tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | {field: 12}))
    with pytest.raises(RecipeError, match="K3"):
        build.load(open_folder(tmp_path))


def test_incomplete_foreign_and_unknown_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build.load(open_folder(tmp_path))
    build.save(make(K2), tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match="unknown quantisation"):
        build.load(open_folder(tmp_path))
    config.write_text(text)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = {name: t for name, t in tensors.items() if name != "model.layers.1.mlp.experts.2.up_proj.weight"}
    save_file(missing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        build.load(open_folder(tmp_path))
    save_file(
        {name: t for name, t in tensors.items() if "norm" not in name}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="norm"):
        build.load(open_folder(tmp_path))
    save_file(tensors | {"model.extra": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="extra"):
        build.load(open_folder(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError):
        build.load(open_folder(tmp_path))


def test_dense_students_train_packed_and_have_no_layouts() -> None:
    model = build.from_spec(QWEN, seed=0).train()
    batch = pack((30, 70, 5))
    together = logits(model, batch)
    parts, first = [], 0
    for length in (30, 70, 5):
        tokens = batch.tokens_T[None, first : first + length]
        parts.append(model.hf(input_ids=tokens, use_cache=False).logits[0])
        first += length
    assert float((together - torch.cat(parts)).abs().max().detach()) < 1e-5
    together.square().mean().backward()
    assert model.row_layouts() == []
    assert model.max_logits() == {}
    assert model.expert_counts() == {}
    assert all(parameter.grad is not None for _, parameter in model.named_parameters())


def test_state_goes_back_and_refuses_other_models() -> None:
    model, other = make(K2, seed=1), make(K2, seed=2)
    saved = {name: tensor.clone() for name, tensor in model.state().items()}
    assert any("e_score_correction_bias" in name for name in saved)
    other.load_state(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state().items())
    with pytest.raises(CheckpointError, match="names"):
        make(LINEAR).load_state(saved)
    with pytest.raises(CheckpointError, match="shape"):
        make(K2.replace(vocab_size=98)).load_state(saved)


def test_dtype_keeps_biases_and_frequencies() -> None:
    model = make(K2, dtype=torch.bfloat16)
    for name, tensor in (*model.hf.named_parameters(), *model.hf.named_buffers()):
        if name.endswith(("e_score_correction_bias", "inv_freq")):
            assert tensor.dtype == torch.float32, name
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, name
    hidden = model.hidden(pack())
    assert hidden.dtype == torch.bfloat16
    assert bool(torch.isfinite(hidden).all())
