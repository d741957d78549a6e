"""Our parts against transformers' own path: logits, gradients, documents packed and alone, both families and their variants."""

from __future__ import annotations

import pytest
import torch
from model_samples import K2, LINEAR, VARIANTS, alone, logits, make, pack, relative, twin, twin_logits

from k2lab.models.swap import swap


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_logits_and_gradients_equal_transformers_on_each_document(name: str) -> None:
    model = make(VARIANTS[name]).train()
    plain, batch = twin(model), pack()
    ours, theirs = logits(model, batch), twin_logits(plain, batch)
    assert float((ours - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max()))
    for result in (ours, theirs):
        torch.nn.functional.cross_entropy(result, batch.targets_T).backward()
    expected = dict(plain.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[parameter_name].grad) < 1e-4, parameter_name


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_a_document_does_not_depend_on_its_neighbours(spec) -> None:
    model, batch = make(spec), pack()
    together = logits(model, batch)
    apart = torch.cat([logits(model, part) for part in alone(batch)])
    assert float((together - apart).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_gradients_do_not_cross_documents(spec) -> None:
    model, batch = make(spec, dtype=torch.float64).train(), pack((20, 90, 30))
    embedding = model.hf.get_input_embeddings()
    seen = []
    handle = embedding.register_forward_hook(lambda module, inputs, out: seen.append(out.retain_grad() or out))
    logits(model, batch)[20:110].square().sum().backward()  # only the middle document
    handle.remove()
    grad = seen[0].grad[0]
    assert float(grad[:20].abs().max()) == 0
    assert float(grad[110:].abs().max()) == 0
    assert float(grad[20:110].abs().min(dim=1).values.max()) > 0


def test_transformers_kimi_linear_leaks_across_packed_documents_and_ours_does_not() -> None:
    model = make(LINEAR)
    batch = pack((40, 40))
    second = alone(batch)[1]
    with torch.no_grad():
        plain = twin(model)
        packed = plain(input_ids=batch.tokens_T[None], position_ids=batch.positions_T[None], use_cache=False).logits[0, 40:]
        by_itself = plain(input_ids=second.tokens_T[None], use_cache=False).logits[0]
        ours, ours_by_itself = logits(model, batch)[40:], logits(model, second)
    assert float((packed - by_itself).abs().max()) > 1e-2, (
        "transformers no longer leaks: our own path may have become unnecessary"
    )
    assert float((ours - ours_by_itself).abs().max()) < 1e-5
    assert float((ours - by_itself).abs().max()) < 1e-5


def test_numpy_batches_are_accepted() -> None:
    model = make(K2)
    assert torch.equal(model.hidden(pack(numpy=True)), model.hidden(pack()))


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_swapping_keeps_names_and_is_idempotent(spec) -> None:
    model = make(spec)
    plain = twin(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.hf.state_dict().keys() == plain.state_dict().keys()
    before = [type(module) for module in model.hf.modules()]
    swap(model.hf)
    assert [type(module) for module in model.hf.modules()] == before
    for ours, theirs in zip(model.hf.modules(), plain.modules()):
        assert isinstance(ours, type(theirs))


def test_no_mask_of_all_tokens_is_built_for_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    from k2lab.models import attention

    built = []
    monkeypatch.setattr(attention, "sdpa_mask", lambda *args, **kwargs: built.append(kwargs))
    make(K2).hidden(pack())
    assert not built


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_recomputation_changes_neither_gradients_nor_counts(spec) -> None:
    model, batch = make(spec).train(), pack()
    found = []
    for mode in ("none", "layers"):
        model.recompute(mode)
        model.hf.zero_grad()
        model.reset_expert_counts()
        model.reset_max_logits()
        logits(model, batch).square().mean().backward()
        found.append(
            (
                {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
                model.expert_counts(),
                model.max_logits(),
            )
        )
    (grads, counts, maxima), (grads2, counts2, maxima2) = found
    assert all(relative(grads2[name], grads[name]) < 1e-6 for name in grads)
    assert all(torch.equal(counts[name], counts2[name]) for name in counts)
    assert all(torch.equal(maxima[layer], maxima2[layer]) for layer in maxima)
