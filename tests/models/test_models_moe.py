"""Experts, feed-forward layers, norms and routers against transformers' eager code; counts and balancing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_samples import K2, LINEAR, VARIANTS, logits, make, pack, twin

from k2lab.core.errors import RecipeError
from k2lab.core.rng import rng
from k2lab.models import gemm
from k2lab.models.experts import DenseSwiGLU, ExpertsSwiGLU
from k2lab.models.gemm import Linear
from k2lab.models.norm import GatedRMSNormFunction, RMSNormFunction
from k2lab.models.router import update_router_bias


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def eager_experts(x, chosen, weights, gate_up, down):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(chosen.shape[1]):
            gate, up = (gate_up[chosen[t, k]] @ x[t]).chunk(2)
            out = out.index_add(0, torch.tensor([t]), (weights[t, k] * (down[chosen[t, k]] @ (F.silu(gate) * up)))[None])
    return out


@pytest.mark.parametrize("experts", [4, 9], ids=["all used", "some unused"])
def test_experts_equal_a_loop_over_tokens(experts: int) -> None:
    x, gate_up, down, weights = draw(13, 6), draw(experts, 10, 6, seed=1), draw(experts, 6, 5, seed=2), draw(13, 2, seed=3)
    chosen = torch.stack([torch.arange(13) % 4, (torch.arange(13) + 1) % 4], dim=1)
    inputs = (x, weights, gate_up, down)
    ours, theirs = (function(x, chosen, weights, gate_up, down) for function in (ExpertsSwiGLU.apply, eager_experts))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((out**2).sum(), inputs) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_experts_are_deterministic_over_threads() -> None:
    x, gate_up, down = (t.detach().float() for t in (draw(300, 16), draw(4, 32, 16, seed=1), draw(4, 16, 16, seed=2)))
    chosen = torch.from_numpy(rng(0, "chosen").permuted(torch.arange(4).repeat(300, 1).numpy(), axis=1)[:, :2].copy())
    weights = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(ExpertsSwiGLU.apply(x, chosen, weights, gate_up, down))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_feed_forward_norm_and_linear_gradients() -> None:
    x, gate, up, down = draw(5, 6), draw(4, 6, seed=1), draw(4, 6, seed=2), draw(6, 4, seed=3)
    torch.testing.assert_close(DenseSwiGLU.apply(x, gate, up, down), (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t())
    assert torch.autograd.gradcheck(DenseSwiGLU.apply, (x, gate, up, down))
    weight = draw(6, seed=4)
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 1e-6), F.rms_norm(x, (6,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-6), (x.unflatten(0, (1, 5)), weight))
    gate_5 = draw(5, 6, seed=5)
    expected = F.rms_norm(x, (6,), weight, 1e-6) * gate_5.sigmoid()
    torch.testing.assert_close(GatedRMSNormFunction.apply(x, weight, gate_5, 1e-6), expected)
    assert torch.autograd.gradcheck(lambda x, w, g: GatedRMSNormFunction.apply(x, w, g, 1e-6), (x, weight, gate_5))
    assert torch.autograd.gradcheck(Linear.apply, (x.unflatten(0, (1, 5)), gate))


def test_both_libraries_agree_on_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(70, 33).float(), draw(20, 33, seed=1).float()
    with torch.no_grad():
        fast = gemm.linear(x, weight), gemm.grad_input(gemm.linear(x, weight), weight)
        monkeypatch.setattr(gemm, "ONEDNN", False)
        plain = gemm.linear(x, weight), gemm.grad_input(gemm.linear(x, weight), weight)
    for a, b in zip(fast, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_norm_in_half_precision_rounds_as_transformers_does() -> None:
    model = make(K2, dtype=torch.bfloat16)
    x = draw(9, 48).bfloat16()
    assert torch.equal(model.hf.model.norm(x), twin(model).model.norm(x))


@pytest.mark.parametrize("name", ["k2", "k2, expert groups", "linear"])
def test_routers_choose_and_weigh_as_transformers_do(name: str) -> None:
    model = make(VARIANTS[name])
    x = draw(64, 48).float()
    theirs = {key: module for key, module in twin(model).named_modules() if key in model.routers()}
    for key, router in model.routers().items():
        ours, expected = router(x), theirs[key](x)
        order, order2 = ours[2].argsort(-1), expected[2].argsort(-1)
        assert torch.equal(ours[2].gather(1, order), expected[2].gather(1, order2))
        torch.testing.assert_close(ours[1].gather(1, order), expected[1].gather(1, order2), rtol=1e-5, atol=1e-7)
        assert router.e_score_correction_bias.abs().max() > 0


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_counts_are_tokens_per_expert_in_training_only(spec) -> None:
    model, batch = make(spec).train(), pack()
    T, K = len(batch.tokens_T), spec.num_experts_per_tok
    chosen = {}
    for name, router in model.routers().items():
        router.register_forward_hook(lambda module, inputs, out, name=name: chosen.__setitem__(name, out[2]))
    logits(model, batch)
    once = model.expert_counts()
    assert len(once) == len(spec.moe_layers())
    for name, counts in once.items():
        assert int(counts.sum()) == T * K
        assert torch.equal(counts, torch.bincount(chosen[name].flatten(), minlength=spec.n_routed_experts))
    with torch.no_grad():
        logits(model, batch)
    logits(model.eval(), batch)
    model.hf(input_ids=batch.tokens_T[None, :9])
    assert all(torch.equal(counts, once[name]) for name, counts in model.expert_counts().items())
    logits(model.train(), batch)
    assert all(torch.equal(counts, 2 * once[name]) for name, counts in model.expert_counts().items())
    model.reset_expert_counts()
    assert all(int(counts.sum()) == 0 for counts in model.expert_counts().values())


def test_sign_rule_balances_skewed_routers() -> None:
    model, batch = make(K2).train(), pack((80, 60))
    with torch.no_grad():
        for router in model.routers().values():
            router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.0, 0.0, -0.3]))  # a skew that sorting must undo

    def spread() -> float:
        model.reset_expert_counts()
        logits(model, batch)
        return max(float(c.float().std() / c.float().mean()) for c in model.expert_counts().values())

    first = spread()
    for _ in range(40):
        update_router_bias(model, model.expert_counts(), rate=1e-2)
        last = spread()
    assert last < 0.4 * first
    for router in model.routers().values():
        assert abs(float(router.e_score_correction_bias.sum())) < 1e-5


def test_bias_rule_moves_by_the_rate_and_refuses_unknown_names() -> None:
    model = make(K2)
    name, router = next(iter(model.routers().items()))
    router.e_score_correction_bias.zero_()
    update_router_bias(model, {name: torch.tensor([10, 0, 0, 2])}, rate=0.5)
    assert router.e_score_correction_bias.tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])
    before = router.e_score_correction_bias.clone()
    update_router_bias(model, {name: torch.zeros(4)})
    assert torch.equal(router.e_score_correction_bias, before)
    with pytest.raises(RecipeError, match="sign"):
        update_router_bias(model, {}, rule="median")
