"""Adapter folders in PEFT's format: the peft library computes what we compute from the same files, in both directions; damaged or
foreign ones are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from k2lab import specs
from k2lab.ckpt import peft
from k2lab.ckpt.peft import Adapter
from k2lab.core.errors import CheckpointError
from k2lab.core.rng import rng
from k2lab.models import build, lora
from k2lab.models.wrap import TrainModel

SPEC = specs.get("tiny-k2").replace(
    hidden_size=64, vocab_size=97, intermediate_size=80, moe_intermediate_size=32, n_routed_experts=4, kv_lora_rank=32,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=24, initializer_range=0.1, local_heads=(),
)  # fmt: skip
LINEARS = ("attention", "shared_experts", "dense_mlp")
MODULE = "model.layers.0.self_attn.o_proj"


def adapted(targets: tuple[str, ...] = lora.TARGETS, **settings: Any) -> TrainModel:
    model = build.from_spec(SPEC, seed=1)
    lora.attach(model, lora.Settings(**{"rank": 4, "alpha": 6.0, **settings}), targets, seed=5)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def written(folder: Path, model: TrainModel) -> Path:
    kept = model.adapters
    peft.save(folder, lora.pairs(model), rank=kept.rank, alpha=kept.alpha, rslora=kept.rslora, base="base")
    return folder


def plain(model_type: str = "deepseek_v3") -> Any:
    """transformers' own class with the base's weights. peft takes gate, up and down of every layer of a deepseek_v3 for routed
    experts, so adapters of other such layers are loaded under the type of released checkpoints."""
    config = build.hf_config(SPEC)
    config._attn_implementation = config._experts_implementation = "eager"
    found = DeepseekV3ForCausalLM(config)
    found.load_state_dict(build.from_spec(SPEC, seed=1).hf.state_dict())
    found.config.model_type = model_type
    return found.eval()


TOKENS = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def difference(ours: TrainModel, theirs: Any) -> float:
    """Relative to the size of the logits."""
    one = ours.eval().hf(input_ids=TOKENS, use_cache=False).logits
    other = theirs(input_ids=TOKENS, use_cache=False).logits
    return float((one - other).norm() / other.norm())


# ---------------------------------------------------------------- with the peft library


@pytest.mark.parametrize(
    "targets, model_type",
    [(("attention",), "deepseek_v3"), (LINEARS, "kimi_k2"), (("attention", "routed_experts"), "deepseek_v3")],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_what_we_trained(tmp_path, targets, model_type, rslora) -> None:
    library = pytest.importorskip("peft")
    model = adapted(targets, rslora=rslora and "routed_experts" not in targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = library.PeftModel.from_pretrained(plain(model_type), written(tmp_path / "adapter", model))
    assert difference(model, theirs) < 1e-6
    assert difference(build.from_spec(SPEC, seed=1), theirs) > 1e-2


def _randomised(theirs: Any) -> Any:
    draw = torch.Generator().manual_seed(9)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return theirs


@pytest.mark.parametrize(
    "config, model_type",
    [
        ({"target_modules": r".*self_attn.*_proj.*|.*mlp\.(shared_experts\.)?(gate|up|down)_proj"}, "kimi_k2"),
        (
            {"target_modules": ["o_proj", "q_b_proj"], "rank_pattern": {"q_b_proj": 2}, "alpha_pattern": {"q_b_proj": 5}},
            "kimi_k2",
        ),
        ({"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, "kimi_k2"),
        ({"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}, "kimi_k2"),
        ({"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True}, "kimi_k2"),
        ({"target_modules": ["experts.gate_proj", "experts.up_proj", "experts.down_proj", "q_a_proj"]}, "deepseek_v3"),
    ],
    ids=["linear", "patterns", "fused", "fused down", "fused gate and up", "routed"],
)
def test_we_compute_what_peft_trained(tmp_path, config, model_type) -> None:
    library = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _randomised(library.get_peft_model(plain(model_type), library.LoraConfig(r=4, lora_alpha=6, **config))).eval()
        theirs.save_pretrained(tmp_path / "adapter")
    model = build.from_spec(SPEC, seed=1)
    adapter = Adapter.open(tmp_path / "adapter")
    lora.load(model, adapter.of(lora.names(model)), lora.Settings(rank=4, alpha=6.0))
    assert difference(model, theirs) < 1e-6
    # what is merged by `delta`, tensor by tensor, is what the model multiplies by
    before = build.from_spec(SPEC, seed=1)
    for name, pair in lora.pairs(model):
        found = adapter.delta(f"{name}.weight")
        assert torch.equal(found, pair.delta()) if found is not None else not pair.delta().any()
    weights = model.weights()
    changed = before.state()["model.layers.0.self_attn.o_proj.weight"]
    low = adapter.delta(f"{MODULE}.weight")
    assert torch.equal(weights[f"{MODULE}.weight"], changed if low is None else changed + low)


def test_our_config_is_one_that_peft_reads_without_a_word(tmp_path) -> None:
    library = pytest.importorskip("peft")
    folder = written(tmp_path / "adapter", adapted(LINEARS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = library.LoraConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 6, "base")


# ---------------------------------------------------------------- alone


def test_what_is_written_is_read_back(tmp_path) -> None:
    model = adapted()
    adapter = Adapter.open(written(tmp_path / "adapter", model))
    pairs = dict(lora.pairs(model))
    assert set(adapter.modules()) == set(pairs) and (adapter.rank, adapter.alpha, adapter.base) == (4, 6.0, "base")
    for name, pair in adapter.of(lora.names(model)).items():
        assert torch.equal(pair.A, pairs[name].A) and torch.equal(pair.B, pairs[name].B) and pair.scale == 1.5
        assert torch.equal(adapter.delta(f"{name}.weight"), pairs[name].delta())
    assert adapter.delta("model.embed_tokens.weight") is None and adapter.delta("model.norm.weight") is None
    ends = set(adapter.config["target_modules"])
    assert {"self_attn.o_proj", "mlp.gate_proj", "shared_experts.up_proj", "experts.3.down_proj"} < ends and len(ends) == 23
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.mlp.experts.3.gate_proj.lora_A.weight" in stored


def test_other_ranks_and_scales_are_kept(tmp_path) -> None:
    pairs = {"model.layers.0.self_attn.o_proj": (torch.randn(2, 8), torch.randn(6, 2), 0.75),
             "model.layers.1.self_attn.o_proj": (torch.randn(4, 8), torch.randn(6, 4), 3.0)}  # fmt: skip
    peft.save(tmp_path, pairs.items(), rank=4, alpha=6.0)
    found = Adapter.open(tmp_path).of(pairs)
    for name, (A, B, scale) in pairs.items():
        assert torch.equal(found[name].A, A) and torch.equal(found[name].B, B) and found[name].scale == scale


def test_names_of_kimi_linear_are_known_in_both_ways(tmp_path) -> None:
    factors = torch.randn(2, 8), torch.randn(6, 2), 0.5
    released = ["block_sparse_moe.experts.3.w1", "block_sparse_moe.shared_experts.up_proj", "self_attn.f_a_proj"]
    theirs = ["mlp.experts.3.gate_proj", "mlp.shared_experts.up_proj", "self_attn.forget_gate.f_a_proj"]
    names = [[f"model.layers.1.{name}" for name in each] for each in (released, theirs)]
    for number, written_as in enumerate(names):
        peft.save(tmp_path / str(number), [(name, factors) for name in written_as], rank=2, alpha=1.0)
        adapter = Adapter.open(tmp_path / str(number))
        assert all(adapter.delta(f"{name}.weight") is not None for name in names[0])
        assert set(adapter.of(names[0])) == set(names[0])


def test_a_matrix_that_the_model_lacks_is_named(tmp_path) -> None:
    adapter = Adapter.open(written(tmp_path, adapted()))
    with pytest.raises(CheckpointError, match=rf"{MODULE} in .*the model lacks.*Did you mean 'model.layers.1.self_attn.o_proj'"):
        adapter.of([name for name in adapter.modules() if name != MODULE])


@pytest.mark.parametrize(
    "change, says",
    [
        ({"peft_type": "IA3"}, "not LoRA"),
        ({"r": 0}, "rank is an integer"),
        ({"r": 8}, "not of the rank"),
        ({"lora_alpha": "8"}, "alpha is a number"),
        ({"use_dora": True}, "use_dora are not read"),
        ({"bias": "all"}, "bias are not read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save are not read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights are not read"),
        ({"rank_pattern": {"o_proj": 0}}, "maps names to ranks"),
        ({"rank_pattern": {"(": 2}}, "no pattern"),
        ({"target_modules": 3}, "list of names"),
        ({"base_model_name_or_path": 1}, "path or name"),
    ],
)
def test_settings_with_another_meaning_are_refused(tmp_path, change, says) -> None:
    folder = written(tmp_path, adapted())
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=says):
        Adapter.open(folder)


def _without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


A = f"base_model.model.{MODULE}.lora_A.weight"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: _without(t, A), "lora_A is missing"),
        (lambda t: {**t, "lm_head.weight": torch.ones(2, 2)}, "no LoRA factor"),
        (lambda t: {**t, A: torch.ones(3, 48)}, "not of the rank"),
        (lambda t: {**t, A: torch.ones(4)}, "is a matrix"),
        (lambda t: {**t, A: torch.ones(4, 48, dtype=torch.int32)}, "floating-point"),
        (lambda t: {}, "no tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, says) -> None:
    folder = written(tmp_path, adapted())
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(CheckpointError, match=says):
        Adapter.open(folder)


def test_damaged_files_and_values_are_refused(tmp_path) -> None:
    folder = written(tmp_path, adapted())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, A: torch.full_like(tensors[A], torch.nan)}, file)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        Adapter.open(folder).delta(f"{MODULE}.weight")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cut off"):
        Adapter.open(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        Adapter.open(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Adapter.open(tmp_path / "nowhere")


def test_no_mutation_of_a_file_does_more_than_an_error_of_ours(tmp_path) -> None:
    folder = written(tmp_path / "adapter", adapted(("attention",)))
    draw = rng(1, "mutations of an adapter")
    refused = 0
    for name, end in (("adapter_config.json", None), ("adapter_model.safetensors", 6000)):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            raw = bytearray(whole)
            kind = int(draw.integers(3))
            at = int(draw.integers(min(len(raw), end or len(raw))))
            if kind == 0:
                raw[at] = int(draw.integers(256))
            elif kind == 1:
                del raw[at : at + int(draw.integers(1, 40))]
            else:
                raw[at:at] = bytes(draw.integers(32, 126, int(draw.integers(1, 8)), dtype="u1"))
            (folder / name).write_bytes(raw)
            try:
                adapter = Adapter.open(folder)
                for module in adapter.modules():
                    adapter.delta(f"{module}.weight")
            except CheckpointError:
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 150
    assert len(Adapter.open(folder).modules()) == 10
