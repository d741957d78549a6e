"""Compiled layers of dense models: the same losses and gradients up to rounding, one graph for all layers and lengths, and only
in training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_samples import K2, LINEAR, logits, make, pack, relative

from k2lab import specs
from k2lab.core.errors import MachineError, RecipeError
from k2lab.models import compiling, lora
from k2lab.models.losses import linear_cross_entropy

DENSE = specs.get("tiny-dense").replace(vocab_size=97, num_layers=3)
QWEN = specs.get("tiny-qwen2").replace(vocab_size=97, num_layers=3)
LENGTHS = ((5, 70, 1, 33), (64, 64), (7, 3, 90, 2, 2, 40))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.CACHE, str(Path(str(tmp_path_factory.getbasetemp())) / "inductor"))


def _learnt(model, lengths: tuple[int, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    batch = pack(lengths)
    model.hf.zero_grad(set_to_none=True)
    loss, _ = linear_cross_entropy(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same(one, other, lengths: tuple[int, ...], bound: float = 1e-5) -> None:
    (loss, grads), (found, others) = _learnt(one, lengths), _learnt(other, lengths)
    assert found == pytest.approx(loss, rel=1e-6)
    assert grads.keys() == others.keys() and grads
    for name, grad in grads.items():
        assert relative(others[name], grad) < bound, name


@pytest.mark.slow
def test_losses_and_gradients_are_the_same_with_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = make(QWEN).train(), make(QWEN).train().compile()
    _same(plain, compiled, LENGTHS[0])
    calls, layer = [], compiling.layer()
    monkeypatch.setattr(compiling, "layer", lambda: calls.append(0) or layer)
    with torch.compiler.set_stance("fail_on_recompile"):  # other layers and lengths need no new graph
        for lengths in LENGTHS[1:]:
            _same(plain, compiled, lengths)
    assert len(calls) == len(LENGTHS[1:]) * QWEN.num_layers
    # a copy, such as a reference model, computes with its own weights
    other = copy.deepcopy(compiled)
    with torch.no_grad():
        other.hf.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert _learnt(other, LENGTHS[1])[0] != _learnt(compiled, LENGTHS[1])[0]
    assert _learnt(compiled, LENGTHS[1])[0] == pytest.approx(_learnt(plain, LENGTHS[1])[0], rel=1e-6)
    # evaluation is that of the layers as they were
    calls.clear()
    with torch.no_grad():
        assert torch.equal(logits(compiled, pack(LENGTHS[0])), logits(plain, pack(LENGTHS[0])))
    compiled.eval()
    assert torch.equal(logits(compiled, pack(LENGTHS[0])), logits(plain.eval(), pack(LENGTHS[0])))
    assert not calls


@pytest.mark.slow
def test_with_checkpointing_and_with_adapters() -> None:
    _same(make(DENSE).train(), make(DENSE).train().compile().recompute("layers"), LENGTHS[0])
    models = [make(DENSE).train() for _ in range(2)]
    for model in models:
        lora.attach(model, lora.Settings(rank=4, alpha=8.0), ("attention", "dense_mlp"), seed=0)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    models[1].compile()
    _same(*models, LENGTHS[0], bound=3e-5)  # factors' gradients pass through sums of both signs


def test_layers_of_kimis_families_are_refused_by_name() -> None:
    for spec in (K2, LINEAR):
        with pytest.raises(RecipeError, match="fused by hand") as caught:
            make(spec).compile(where="stage.sft.compile")
        assert "stage.sft.compile" in str(caught.value)


def test_a_machine_without_a_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MachineError, match="C\\+\\+ compiler"):
        make(DENSE).compile()


def test_the_cache_stays_unless_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for before, after in (
        (None, tmp_path / "k2lab" / "inductor"),
        ("/tmp/torchinductor_me", tmp_path / "k2lab" / "inductor"),
        (str(tmp_path / "mine"), tmp_path / "mine"),
    ):
        monkeypatch.delenv(compiling.CACHE) if before is None else monkeypatch.setenv(compiling.CACHE, before)
        compiling.prepare(torch.device("cpu"))
        assert compiling.os.environ[compiling.CACHE] == str(after)
