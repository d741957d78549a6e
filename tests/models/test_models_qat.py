"""Quantisation-aware training: every pass multiplies by what an export holds, and gradients go straight through."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_samples import K2, LINEAR, make, pack

from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.slots import load as slot
from k2lab.core.types import SampleParams
from k2lab.engine.objectives.lm import LM
from k2lab.engine.step import forward_backward
from k2lab.models import build, experts_gpu, export, lora, qat
from k2lab.models.gemm import adding_weight_gradients
from k2lab.quant import int4
from k2lab.sampling.local import LocalSampler
from k2lab.specs import get

SPECS = {
    "k2": K2.replace(hidden_size=64, moe_intermediate_size=32),
    "linear": LINEAR.replace(hidden_size=64, moe_intermediate_size=32, n_routed_experts=6),
}
LENGTHS = (40, 5, 33)


@pytest.fixture(params=[*SPECS])
def spec(request):
    return SPECS[request.param]


def experts_of(model):
    return [module for module in model.hf.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")]


@torch.no_grad()
def exported(model):
    """A model of the values that an export of the experts decodes to, without quantisation-aware training."""
    other = copy.deepcopy(model).qat(None)
    for module in experts_of(other):
        for weight in (module.gate_up_proj, module.down_proj):
            weight.copy_(int4.dequantise(*int4.quantise(weight)))
    return other


def assert_grids(model):
    """What the layers multiply by is what an export, matrix by matrix under released names, decodes to."""
    seen = {}
    for module in experts_of(model):
        seen |= {id(module.gate_up_proj): qat.weights(module)[0], id(module.down_proj): qat.weights(module)[1]}
    count = 0
    for name, weight in model.hf.named_parameters():
        if id(weight) not in seen:
            continue
        stored = export.released(name, weight.detach(), model.spec.family)
        multiplied = export.released(name, seen[id(weight)], model.spec.family)
        for (key, part), (same, value) in zip(stored, multiplied, strict=True):
            assert key == same and torch.equal(int4.dequantise(*int4.quantise(part), dtype=part.dtype), value)
            count += 1
    assert count == 3 * model.spec.n_routed_experts * len(experts_of(model))


def gradients(model, batch, retain=False):
    hidden = model.hidden(batch)
    (hidden.float() ** 2).sum().backward(retain_graph=retain)
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- forward and gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_pass_is_that_of_the_exported_weights(spec, dtype, training) -> None:
    model, batch = make(spec, dtype=dtype), pack(LENGTHS)
    plain = model.hidden(batch).detach()
    model.qat().train(training)
    other = exported(model).train(training)
    with torch.set_grad_enabled(training):
        ours, theirs = model.hidden(batch), other.hidden(batch)
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain)
    assert_grids(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_those_of_the_exported_weights_straight_through(spec, dtype) -> None:
    model, batch = make(spec, dtype=dtype).qat().train(), pack(LENGTHS)
    other = exported(model).train()
    (ours, grads), (theirs, expected) = gradients(model, batch), gradients(other, batch)
    assert torch.equal(ours, theirs) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in grads)
    assert all(module.gate_up_proj.grad.any() and module.down_proj.grad.any() for module in experts_of(model))


def test_gradients_by_hand() -> None:
    """One expert, two tokens, in float64 but for the grid: y = w down(silu(gate x) * up x) with the values in place."""
    module = make(SPECS["k2"]).qat().train().hf.model.layers[-1].mlp.experts
    module.to(torch.float64)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    chosen, weights = torch.tensor([[1], [1]]), torch.tensor([[0.7], [0.3]], dtype=torch.float64)
    out = module(x, chosen, weights)
    grad = torch.randn_like(out)
    out.backward(grad)
    up_values = int4.values(module.gate_up_proj)[1].double().requires_grad_()
    down_values = int4.values(module.down_proj)[1].double().requires_grad_()
    inner = x.detach().requires_grad_()
    gate, up = (inner @ up_values.t()).chunk(2, dim=1)
    expected = weights * ((torch.nn.functional.silu(gate) * up) @ down_values.t())
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, inner.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(module.gate_up_proj.grad[1], up_values.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(module.down_proj.grad[1], down_values.grad, rtol=0, atol=1e-12)
    assert not module.down_proj.grad[0].any()


def test_gradients_of_micro_batches_are_added() -> None:
    model = make(SPECS["k2"]).qat().train()
    batches = [pack(LENGTHS, seed=n) for n in range(2)]
    expected = None
    for batch in batches:
        model.hf.zero_grad(set_to_none=True)
        _, grads = gradients(model, batch)
        expected = grads if expected is None else {name: expected[name] + grads[name] for name in grads}
    model.hf.zero_grad(set_to_none=True)
    with adding_weight_gradients():
        for batch in batches:
            _, grads = gradients(model, batch)
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model, batch = make(SPECS["k2"]).qat().train(), pack(LENGTHS)
    _, expected = gradients(model, batch)
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.hf.zero_grad(set_to_none=True)
    _, grads = gradients(model.recompute(), batch)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)


def test_other_ways_to_multiply_see_the_values_too() -> None:
    """transformers' grouped_mm, which runs where our functions do not."""
    model, batch = make(SPECS["k2"]).qat().train(), pack(LENGTHS)
    other = exported(model).train()
    for each in (model, other):
        for module in experts_of(each):
            module._is_expert_parallel = True
    (ours, grads), (theirs, expected) = gradients(model, batch), gradients(other, batch)
    assert torch.equal(ours, theirs) and all(torch.equal(grads[name], expected[name]) for name in expected)


def test_frozen_experts_and_adapters_see_the_values() -> None:
    model, batch = make(SPECS["k2"]).qat().train(), pack(LENGTHS)
    expected = model.hidden(batch).detach()
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(model.hidden(batch), expected)
    masters = experts_of(model)[0].down_proj.clone()
    lora.attach(model, lora.Settings(rank=4, alpha=4.0), lora.TARGETS, seed=0)
    # factors B are 0 at the start; from here on the weights are the values, so that merging adds to what was trained beside
    torch.testing.assert_close(model.hidden(batch), expected, rtol=0, atol=1e-5)
    settled = experts_of(model)[0].down_proj
    assert not torch.equal(settled, masters) and torch.equal(settled, int4.values(masters).float())
    assert torch.equal(int4.values(settled).float(), settled)


# ---------------------------------------------------------------- values are kept, and never stale


def counted(monkeypatch):
    calls = []
    inner = int4.values

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return inner(*args, **kwargs)

    monkeypatch.setattr(int4, "values", counting)
    return calls


def test_values_are_computed_once_while_weights_stay(monkeypatch) -> None:
    calls = counted(monkeypatch)
    model, batch = make(SPECS["k2"]).qat().train(), pack(LENGTHS)
    layers = len(experts_of(model))
    for _ in range(3):
        gradients(model, batch)
    assert len(calls) == 2 * layers
    with torch.no_grad():
        experts_of(model)[0].down_proj.mul_(1.5)
    model.hidden(batch)
    assert len(calls) == 2 * layers + 1
    assert all(len(module.k2_qat._kept) == 2 for module in experts_of(model))


def test_every_way_to_change_a_weight_is_noticed() -> None:
    model, batch = make(SPECS["k2"]).qat().eval(), pack(LENGTHS)
    module = experts_of(model)[0]
    saved = {name: tensor.clone() for name, tensor in model.state().items()}
    seen = []

    @torch.no_grad()
    def changed():
        found = model.hidden(batch)
        assert torch.equal(found, exported(model).hidden(batch))
        assert all(not torch.equal(found, before) for before in seen)
        seen.append(found)

    changed()
    with torch.no_grad():
        module.gate_up_proj[2] *= 1.3
    changed()
    module.down_proj.detach().view(-1)[:640].add_(0.5)  # a view shares the counter
    changed()
    torch._foreach_mul_([module.down_proj.detach()], 0.7)
    changed()
    module.down_proj.data = module.down_proj.data * 1.1  # other memory
    changed()
    module.down_proj = torch.nn.Parameter(module.down_proj.detach() * 1.1)
    changed()
    model.load_state({name: tensor * 1.2 for name, tensor in saved.items()})
    changed()
    module.gate_up_proj.data.mul_(1.1)  # unseen by the counter: a change of mode forgets
    model.train().eval()
    changed()
    model.to(dtype=torch.bfloat16)
    changed()


def test_optimizers_raise_the_version_of_what_they_change() -> None:
    for name, settings in (("muonclip", {"ns_dtype": "fp32"}), ("adamw", {})):
        for dtype in (torch.float32, torch.bfloat16):
            model = make(SPECS["k2"], dtype=dtype).qat().train()
            optim = slot("optimizer", name)(lr=1e-2, **settings).build(model.named_parameters(), model.row_layouts())
            gradients(model, pack(LENGTHS))
            before = {key: parameter._version for key, parameter in model.named_parameters()}
            optim.step(0, 1, model.max_logits())
            moved = {key for key, parameter in model.named_parameters() if parameter._version > before[key]}
            assert {key for key in before if "experts." in key} <= moved


def test_copies_begin_with_nothing_kept() -> None:
    model = make(SPECS["k2"]).qat().eval()
    model.hidden(pack(LENGTHS))
    other = copy.deepcopy(model)
    assert other.qat_format == "int4_group" and not experts_of(other)[0].k2_qat._kept and experts_of(model)[0].k2_qat._kept
    assert not any("qat" in name for name in model.state())


# ---------------------------------------------------------------- training, saving, decoding


def trained(model, optim, first, last):
    losses = []
    for step in range(first, last):
        batch = pack(LENGTHS, seed=step % 3, numpy=True)
        sums, metrics = forward_backward(model, LM(), [batch], {"lm": batch.num_tokens})
        optim.clip(1.0)
        optim.step(step, 100, metrics.max_logits)
        optim.zero_grad()
        losses.append(sums["lm"])
    return losses


def optimizer(model, name="muonclip"):
    settings = {"muonclip": {"ns_dtype": "fp32", "tau": 0.5}, "adamw": {}}[name]
    return slot("optimizer", name)(lr=5e-3, **settings).build(model.named_parameters(), model.row_layouts())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_saving_and_loading_multiply_by_the_same_bits(spec, dtype, tmp_path) -> None:
    model = make(spec, dtype=dtype).qat()
    losses = trained(model, optimizer(model), 0, 6)
    assert losses[3] < losses[0]
    assert_grids(model)
    build.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["k2_qat"] == {"format": "int4_group", "group_size": 32}
    batch = pack(LENGTHS)
    again = build.load(open_folder(tmp_path), dtype=dtype)
    assert again.qat_format == "int4_group"
    assert_grids(again)
    with torch.no_grad():
        expected = model.eval().hidden(batch)
        assert torch.equal(again.eval().hidden(batch), expected)
        assert torch.equal(exported(model).hidden(batch), expected)
        if dtype == torch.bfloat16:  # other number types hold the same values
            wide = build.load(open_folder(tmp_path), dtype=torch.float32)
            assert torch.equal(qat.weights(experts_of(wide)[0])[0], qat.weights(experts_of(model)[0])[0].float())


def test_qat_changes_nothing_of_a_model_without_it(tmp_path) -> None:
    model = make(SPECS["k2"])
    build.save(model, tmp_path)
    assert "k2_qat" not in json.loads((tmp_path / "config.json").read_text())
    assert build.load(open_folder(tmp_path)).qat_format is None


@pytest.mark.parametrize("name", ["muonclip", "adamw"])
def test_training_resumes_bit_for_bit(name) -> None:
    straight = make(SPECS["k2"]).qat()
    trained(straight, optimizer(straight, name), 0, 6)
    model = make(SPECS["k2"]).qat()
    optim = optimizer(model, name)
    trained(model, optim, 0, 3)
    state = {key: tensor.clone() for key, tensor in model.state().items()}
    moments = {key: tensor.clone() for key, tensor in optim.state_tensors().items()}
    again = make(SPECS["k2"], seed=9).qat()
    again.load_state(state)
    other = optimizer(again, name)
    other.load_state_tensors(moments)
    trained(again, other, 3, 6)
    for key, tensor in straight.state().items():
        assert torch.equal(tensor, again.state()[key]), key


def test_our_decoder_and_the_models_own_use_the_values() -> None:
    model = make(SPECS["k2"]).qat().eval()
    prompts = [[3, 5, 7, 11], [2, 4]]
    params = SampleParams(max_tokens=8, temperature=0.0)

    def drawn(each, decoder=True):
        return LocalSampler(each.hf, 0, eos_id=96, decoder=decoder).sample(prompts, params, ["a", "b"])

    other = exported(model)
    for decoder in (True, False):
        ours, theirs = drawn(model, decoder), drawn(other, decoder)
        for a, b in zip(ours, theirs, strict=True):
            assert a.tokens == b.tokens and a.logprobs == b.logprobs
    # values that were kept while sampling (in inference mode) serve a training step, and are new after it
    trained(model, optimizer(model), 0, 1)
    changed = drawn(model.eval())
    assert changed[0].logprobs == drawn(exported(model))[0].logprobs != ours[0].logprobs


# ---------------------------------------------------------------- what is refused


def test_models_that_have_no_such_experts_are_refused() -> None:
    student = build.from_spec(get("tiny-qwen2").replace(hidden_size=64, intermediate_size=64, vocab_size=64), seed=0)
    with pytest.raises(RecipeError, match=r"stage\.sft\.qat: .* no routed experts"):
        student.qat("int4_group", where="stage.sft.qat")
    with pytest.raises(RecipeError, match="moe_intermediate_size = 24"):
        make(K2.replace(hidden_size=64)).qat()
    with pytest.raises(RecipeError, match="hidden_size = 48"):
        make(K2).qat()
    with pytest.raises(RecipeError, match="Did you mean 'int4_group'"):
        make(SPECS["k2"]).qat("int4_groups")
    adapted = make(SPECS["k2"])
    lora.attach(adapted, lora.Settings(rank=4, alpha=4.0), lora.TARGETS, seed=0)
    with pytest.raises(RecipeError, match="low-rank adapters"):
        adapted.qat()


@pytest.mark.parametrize("entry", [{"format": "fp4", "group_size": 32}, {"format": "int4_group", "group_size": 128}, "int4"])
def test_unknown_grids_are_refused(entry, tmp_path) -> None:
    build.save(make(SPECS["k2"]).qat(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "k2_qat": entry}))
    with pytest.raises(CheckpointError, match="k2_qat"):
        build.load(open_folder(tmp_path))


# ---------------------------------------------------------------- on a GPU


def GPU(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@GPU
@pytest.mark.parametrize(("width", "hidden"), [(256, 128), (96, 64)], ids=["our products", "grouped_mm"])
def test_gpu_passes_multiply_by_the_exported_values(width, hidden) -> None:
    E, T, K = 8, 700, 2
    draw = torch.Generator("cuda").manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, device="cuda", generator=draw).mul_(0.1).to(torch.bfloat16)

    masters = [made(E, 2 * hidden, width).requires_grad_(), made(E, width, hidden).requires_grad_()]
    values = [int4.values(weight).requires_grad_() for weight in masters]
    x, upstream = made(T, width), made(T, width)
    chosen = torch.rand(T, E, device="cuda", generator=draw).argsort(dim=1)[:, :K]
    weights = torch.rand(T, K, device="cuda", generator=draw)

    def run(leaves, seen):
        inner = x.clone().requires_grad_()
        mixed = weights.clone().requires_grad_()
        before = torch.cuda.memory_allocated()
        out = experts_gpu.experts(inner, chosen, mixed, *leaves, seen)
        held = torch.cuda.memory_allocated() - before
        with adding_weight_gradients():
            out.backward(upstream)
        return [out.detach(), inner.grad, mixed.grad, *(leaf.grad.clone() for leaf in leaves)], held

    for _ in range(2):  # the second time gradients are added where they lie
        (ours, held), (theirs, plain) = run(masters, qat.fresh), run(values, None)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert held <= plain  # no values are kept between the passes


@GPU
def test_gpu_training_keeps_nothing_and_decoding_is_never_stale() -> None:
    spec = SPECS["k2"].replace(hidden_size=128, moe_intermediate_size=128)
    model = make(spec, dtype=torch.bfloat16).to("cuda").qat()
    batch = pack(LENGTHS)
    optim = optimizer(model)
    for step in range(3):
        with torch.no_grad():
            assert torch.equal(model.eval().hidden(batch), exported(model).hidden(batch))
            assert all(len(module.k2_qat._kept) == 2 for module in experts_of(model))
        trained(model, optim, step, step + 1)
        assert not any(module.k2_qat._kept for module in experts_of(model))
    assert_grids(model)
