"""Activation checkpointing: the same losses, gradients, counts and maximum logits, and fewer bytes kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import K2, LINEAR, logits, make, pack

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.models import lora, packed
from k2lab.models.gemm import adding_weight_gradients
from k2lab.models.router import needed_biases, track_quantiles
from k2lab.models.wrap import TrainModel

DENSE = specs.get("tiny-dense").replace(vocab_size=97)
SPECS = {"k2": K2, "linear": LINEAR, "dense": DENSE}
BLOCKS = ("mixer", "feed_forward")
LENGTHS = (70, 1, 200, 33)


def observed(model: TrainModel) -> dict[str, Any]:
    """Loss, gradients, counts, histograms and maximum logits of two micro-batches that are added up."""
    model.train().hf.zero_grad(set_to_none=True)
    model.reset_expert_counts()
    model.reset_max_logits()
    for histogram in (router.k2_needed for router in model.routers().values() if router.k2_needed is not None):
        histogram.zero_()
    losses = {}
    with adding_weight_gradients():
        for seed in range(2):
            batch = pack(LENGTHS, seed=seed)
            loss = torch.nn.functional.cross_entropy(logits(model, batch), batch.targets_T.long())
            loss.backward()
            losses[f"loss {seed}"] = loss.detach()
    found = {f"gradient {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    counts = {f"counts {name}": value for name, value in model.expert_counts().items()}
    needed = {f"needed {name}": value for name, value in needed_biases(model).items()}
    maxima = {f"maximum {layer}": value for layer, value in model.max_logits().items()}
    return {**losses, **found, **counts, **needed, **maxima}


def check_equal(model: TrainModel) -> None:
    """All modes, and either block of every layer whatever the rule would choose, against keeping everything."""
    expected = observed(model.recompute("none"))
    assert any(name.startswith("gradient") for name in expected)
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))  # a block ends early the second time
        for name, module in model.hf.named_modules()
        if name.endswith(("self_attn", "post_attention_layernorm"))
    ]
    for mode in ("layers", "selective", *BLOCKS):
        if mode in BLOCKS:
            model.recompute("none")
            for layer in model.hf.base_model.layers:
                layer.k2_recompute = mode
        else:
            model.recompute(mode, 256)
        calls.clear()
        found = observed(model)
        assert len(calls) > 2 * 2 * model.spec.num_layers, f"{mode} computed nothing again"
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), mode
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", SPECS)
def test_losses_gradients_counts_and_maxima_stay_the_same_bit_for_bit(name: str) -> None:
    model = make(SPECS[name])
    if model.routers():
        track_quantiles(model)
    model.capture_max_logits(1.0)
    check_equal(model)


def test_each_token_is_counted_once() -> None:
    model, batch = make(K2).train(), pack(LENGTHS)
    for mode in BLOCKS:
        for layer in model.hf.base_model.layers:
            layer.k2_recompute = mode
        model.reset_expert_counts()
        logits(model, batch).square().mean().backward()
        for counts in model.expert_counts().values():
            assert int(counts.sum()) == sum(LENGTHS) * K2.num_experts_per_tok


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_the_same_with_quantisation_aware_training(spec: Any) -> None:
    wide = {"hidden_size": 64, "moe_intermediate_size": 32}
    check_equal(make(spec.replace(**wide)).qat())


@pytest.mark.parametrize("packing", [False, True], ids=["frozen", "packed"])
def test_the_same_with_adapters(packing: bool) -> None:
    model = make(K2.replace(hidden_size=64, moe_intermediate_size=32))
    if packing:
        packed.pack_(model.hf)
    lora.attach(model, lora.Settings(rank=4, alpha=4.0), lora.TARGETS, seed=5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):  # 0 at the start
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(7))
    check_equal(model)


def kept_bytes(model: TrainModel, lengths: tuple[int, ...]) -> int:
    """Bytes of distinct tensors, parameters aside, that live for the backward pass after the forward pass, probabilities too."""
    own = {p.untyped_storage().data_ptr() for _, p in model.named_parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.hidden(pack(lengths))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", SPECS)
def test_kept_bytes_fall(name: str) -> None:
    model = make(SPECS[name])
    none, selective, layers = (kept_bytes(model.recompute(mode, 256), LENGTHS) for mode in ("none", "selective", "layers"))
    assert layers < selective < none


def test_selective_computes_again_what_the_shape_says() -> None:
    model = make(K2).recompute("selective", 256)
    expected = specs.recomputation.choose(K2, 256, 4)
    assert [layer.k2_recompute for layer in model.hf.base_model.layers] == expected
    assert not any(layer.k2_recompute for layer in model.recompute("layers").hf.base_model.layers)


def test_nothing_is_kept_apart_in_evaluation() -> None:
    model, batch = make(K2), pack(LENGTHS)
    expected = logits(model.eval(), batch)
    assert torch.equal(logits(model.recompute("selective"), batch), expected)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(RecipeError, match="no recomputation 'selectiv'"):
        make(K2).recompute("selectiv")
