"""Low-rank adapters: everywhere the same function as merged weights, on a frozen base, in training, evaluation and decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_samples import K2, LINEAR, VARIANTS, logits, make, pack

from k2lab import specs
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.models import decode, lora, packed
from k2lab.models.wrap import TrainModel
from k2lab.specs import ModelSpec

WIDE = K2.replace(hidden_size=64, moe_intermediate_size=32)
QWEN = specs.get("tiny-qwen2").replace(vocab_size=97, hidden_size=64, intermediate_size=96)
SPECS: dict[str, ModelSpec] = {**VARIANTS, "qwen2": QWEN}
SETTINGS = lora.Settings(rank=4, alpha=8.0)


def adapted(spec: ModelSpec, targets: tuple[str, ...] = lora.TARGETS, on: bool = True, pack_experts: bool = False) -> TrainModel:
    """A small model with adapters; `on` draws B too, so that they matter."""
    model = make(spec)
    if pack_experts:
        packed.pack_(model.hf)
    lora.attach(model, SETTINGS, targets, seed=5)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if on and name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def merged(model: TrainModel) -> TrainModel:
    """A dense model without adapters that has this one's merged weights."""
    other = make(model.spec)
    other.load_state(dict(model.weights()))
    return other


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_adapters_start_without_effect_and_act_as_merged_weights(spec: ModelSpec) -> None:
    batch = pack()
    with torch.no_grad():
        assert torch.equal(logits(adapted(spec, on=False), batch), logits(make(spec), batch))
        model = adapted(spec)
        found, want = logits(model, batch), logits(merged(model), batch)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(make(spec), batch), atol=1e-2)


@pytest.mark.parametrize("spec", [K2, LINEAR, QWEN, WIDE], ids=["k2", "linear", "qwen2", "packed"])
def test_gradients_are_those_of_merged_weights(spec: ModelSpec) -> None:
    batch = pack((5, 70, 16))
    model = adapted(spec, pack_experts=spec is WIDE).train()
    other = merged(model).train()
    for each in (model, other):
        logits(each, batch).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.state())
    assert all(p.grad is None for name, p in model.named_parameters() if not lora.is_factor(name))
    dense = dict(other.named_parameters())
    for name, module in model.hf.named_modules():
        if isinstance(module, lora.LoRALinear):
            grad = dense[f"{name}.weight"].grad
            want = (module.k2_scale * module.lora_B.t() @ grad, module.k2_scale * grad @ module.lora_A.t())
            for found, each in zip((module.lora_A.grad, module.lora_B.grad), want):
                assert float((found - each.detach()).norm() / each.detach().norm().clamp(min=1e-6)) < 1e-3, name
        elif packed.lora_of(module) is not None:
            grad_gate, grad_up = dense[f"{name}.gate_up_proj"].grad.chunk(2, dim=1)
            grads = {"gate": grad_gate, "up": grad_up, "down": dense[f"{name}.down_proj"].grad}
            for stem, grad in grads.items():
                A, B = getattr(module, f"{stem}_lora_A"), getattr(module, f"{stem}_lora_B")
                for found, each in ((A.grad, B.mT @ grad), (B.grad, grad @ A.mT)):
                    each = module.k2_scale * each.detach()
                    assert float((found - each).norm() / each.norm().clamp(min=1e-6)) < 1e-3, f"{name} {stem}"


@pytest.mark.parametrize("spec", [K2, LINEAR, QWEN, WIDE], ids=["k2", "linear", "qwen2", "packed"])
@torch.no_grad()
def test_our_decoder_knows_adapters_and_packed_experts(spec: ModelSpec) -> None:
    model = adapted(spec, pack_experts=spec is WIDE).eval()
    batch = pack((30,))
    want = logits(model, batch)
    decoder = decode.decoder(model.hf)
    assert decoder is not None
    tokens = batch.tokens_T.tolist()
    found = [decoder.start([tokens[:20]], [1])]
    found += [decoder.step([token]) for token in tokens[20:]]
    torch.testing.assert_close(torch.cat(found), want[19:], rtol=1e-3, atol=1e-4)


def test_targets_choose_modules_and_count_matrices() -> None:
    model = make(WIDE)
    counts = lora.attach(model, SETTINGS, ("attention", "routed_experts"), seed=1)
    moe = len(WIDE.moe_layers())
    assert counts == {"attention": 5 * WIDE.num_layers, "routed_experts": 3 * WIDE.n_routed_experts * moe}
    names = {name.rpartition(".")[0] for name in model.state()}
    assert names == {
        *(f"model.layers.{n}.self_attn.{part}" for n in range(WIDE.num_layers)
          for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        *(f"model.layers.{n}.mlp.experts" for n in WIDE.moe_layers()),
    }  # fmt: skip


def test_first_values_depend_on_seed_and_name_alone() -> None:
    one, two = (adapted(WIDE, targets, on=False).state() for targets in (lora.TARGETS, ("routed_experts",)))
    for name, tensor in two.items():
        assert torch.equal(tensor, one[name])
        assert tensor.any() == name.endswith("lora_A")
    A = one["model.layers.1.mlp.experts.down_lora_A"]
    assert float(A.abs().max()) <= 32**-0.5 and float(A.std()) == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)
    assert not torch.equal(A[0], A[1])


def test_mistakes_are_told() -> None:
    with pytest.raises(RecipeError, match="no LoRA target 'atention'.*Did you mean 'attention'"):
        lora.attach(make(K2), SETTINGS, ("atention",), seed=1)
    with pytest.raises(RecipeError, match="at least 1"):
        lora.attach(make(K2), lora.Settings(rank=0, alpha=1.0), ("attention",), seed=1)
    with pytest.raises(RecipeError, match="none of these LoRA targets"):
        lora.attach(make(QWEN), SETTINGS, ("routed_experts",), seed=1)


def test_scale_is_alpha_by_rank_or_by_its_root() -> None:
    assert lora.Settings(rank=16, alpha=32.0).scale == 2.0
    assert lora.Settings(rank=16, alpha=32.0, rslora=True).scale == 8.0


# ---------------------------------------------------------------- pairs: out and in


@pytest.mark.parametrize("spec", [WIDE, LINEAR, QWEN], ids=["k2", "linear", "qwen2"])
def test_pairs_are_named_as_released_and_read_back(spec: ModelSpec) -> None:
    model = adapted(spec)
    found = dict(lora.pairs(model))
    released = {tensor.name for tensor in spec.tensors()}
    names = {name if "experts." not in name else _any_expert(name) for name in found}
    assert all(f"{name}.weight" in released for name in names)
    other = make(spec)
    lora.load(other, found, SETTINGS)
    assert other.state().keys() == model.state().keys()
    assert all(torch.equal(tensor, model.state()[name]) for name, tensor in other.state().items())
    with torch.no_grad():
        assert torch.equal(logits(other, pack()), logits(model, pack()))


def _any_expert(name: str) -> str:
    stem, _, rest = name.partition(".experts.")
    return f"{stem}.experts.{{e}}.{rest.split('.', 1)[1]}" if rest else name


def test_a_partial_adapter_leaves_the_other_matrices_alone() -> None:
    full = dict(lora.pairs(adapted(WIDE)))
    some = {name: pair for name, pair in full.items() if name.endswith(("experts.2.up_proj", "q_a_proj"))}
    model = make(WIDE)
    lora.load(model, some, SETTINGS)
    weights, before = model.weights(), make(WIDE).state()
    assert torch.equal(weights["model.layers.1.mlp.experts.down_proj"], before["model.layers.1.mlp.experts.down_proj"])
    fused, old = weights["model.layers.1.mlp.experts.gate_up_proj"], before["model.layers.1.mlp.experts.gate_up_proj"]
    changed = (fused != old).any(-1)
    assert changed[2, 32:].all() and changed.sum() == 32


def test_adapters_of_another_model_are_refused() -> None:
    found = dict(lora.pairs(adapted(WIDE)))
    strange = {"model.layers.9.self_attn.q_a_proj": next(iter(found.values()))}
    with pytest.raises(CheckpointError, match="the model lacks"):
        lora.load(make(WIDE), strange, SETTINGS)
    with pytest.raises(CheckpointError, match="does not fit"):
        lora.load(make(K2), found, SETTINGS)
    mixed = copy.copy(found)
    name = "model.layers.1.mlp.experts.0.up_proj"
    mixed[name] = mixed[name]._replace(scale=3.0)
    with pytest.raises(CheckpointError, match="one scale"):
        lora.load(make(WIDE), mixed, SETTINGS)


def test_state_of_an_adapted_model_is_its_adapters() -> None:
    model, other = adapted(WIDE), adapted(WIDE, on=False)
    assert all(lora.is_factor(name) for name in model.state())
    other.load_state(model.state())
    with torch.no_grad():
        assert torch.equal(logits(model, pack()), logits(other, pack()))


def test_recomputed_layers_give_the_same_gradients() -> None:
    grads: list[dict[str, Any]] = []
    for again in (False, True):
        model = adapted(WIDE, pack_experts=True).train()
        if again:
            model.recompute()
        logits(model, pack((9, 40))).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
