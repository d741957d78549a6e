"""The quantile rule of the router bias (on any machine), and the mixture's fused path on a GPU: sorting, experts, router, MLP."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_samples import K2, logits, make, pack, relative
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from k2lab.core.errors import RecipeError
from k2lab.models import experts_gpu, slower
from k2lab.models.experts import DenseSwiGLU, ExpertsSwiGLU
from k2lab.models.router import BINS, needed_biases, track_quantiles, update_router_bias


def skewed():
    model = make(K2).train()
    with torch.no_grad():
        for router in model.routers().values():
            router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.0, 0.0, -0.3]))
    return model


def spread(model, batch) -> float:
    model.reset_expert_counts()
    logits(model, batch)
    return max(float(c.float().std() / c.float().mean()) for c in model.expert_counts().values())


def test_quantile_rule_balances_in_a_few_updates() -> None:
    model, batch = skewed(), pack((80, 60))
    first = spread(model, batch)
    track_quantiles(model)
    for _ in range(4):
        model.reset_expert_counts()
        logits(model, batch)
        update_router_bias(model, needed_biases(model), rule="quantile")
    assert spread(model, batch) < 0.2 * first
    assert all(abs(float(router.e_score_correction_bias.sum())) < 1e-5 for router in model.routers().values())


def test_quantile_rule_is_the_quantile_of_the_needed_bias() -> None:
    model, batch = skewed(), pack((80, 60))
    name, router = next(iter(model.routers().items()))
    track_quantiles(model)
    seen = []
    router.register_forward_hook(lambda module, inputs, out: seen.append(out[0].sigmoid()))
    logits(model, batch)
    scores, bias = seen[0].detach().double(), router.e_score_correction_bias.double()
    cutoff = (scores + bias).sort(dim=1, descending=True)[0][:, router.top_k]
    expected = torch.quantile(cutoff[:, None] - scores, router.top_k / router.num_experts, dim=0)
    histograms = needed_biases(model)
    assert histograms[name].sum(1).tolist() == [140] * router.num_experts
    update_router_bias(model, {name: histograms[name]}, rule="quantile")
    width = (float(bias.max() - bias.min()) + 2) / BINS
    gap = (router.e_score_correction_bias.double() - (expected - expected.mean())).abs().max()
    assert float(gap) < 3 * width + 0.02  # neighbouring order statistics of 140 tokens lie up to 0.02 apart
    assert int(router.k2_needed.sum()) == 0


def test_quantile_histograms_count_in_training_only_and_weigh_shared_tokens() -> None:
    model = skewed()
    router = next(iter(model.routers().values()))
    track_quantiles(model)
    x = torch.randn(9, router.hidden_dim, generator=torch.Generator().manual_seed(0))
    router(x)
    assert int(router.k2_needed.sum()) == 0
    router.k2_counting = True
    router(torch.cat([x, x[:4]]))
    copies = router.k2_needed.clone()
    router.k2_needed.zero_()
    router.k2_times = torch.tensor([2] * 4 + [1] * 5)
    router(x)
    assert torch.equal(router.k2_needed, copies)
    track_quantiles(model, on=False)
    assert needed_biases(model) == {}


def test_rules_refuse_each_others_counts_and_routers_without_a_cutoff() -> None:
    model = make(K2)
    name, router = next(iter(model.routers().items()))
    with pytest.raises(RecipeError, match="other rule"):
        update_router_bias(model, {name: torch.ones(router.num_experts)}, rule="quantile")
    with pytest.raises(RecipeError, match="other rule"):
        update_router_bias(model, {name: torch.ones(router.num_experts, BINS)})
    before = router.e_score_correction_bias.clone()
    update_router_bias(model, {name: torch.zeros(router.num_experts, BINS)}, rule="quantile")
    assert torch.equal(router.e_score_correction_bias, before)
    router.top_k = router.num_experts
    with pytest.raises(RecipeError, match="fewer than all"):
        track_quantiles(model)


# ---------------------------------------------------------------- on a GPU

T, D, H, E, K = 1000, 256, 384, 6, 3  # H: width of an expert


def on_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(function))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(experts: int = E, skew: float = 0.0) -> torch.Tensor:
    """Expert 1 is never chosen, expert 0 oftener with more skew."""
    scores = torch.rand(T, experts, generator=torch.Generator().manual_seed(9))
    scores[:, 0] += skew
    scores[:, 1] = -1
    return scores.topk(K, dim=1)[1]


def layer_inputs() -> list[torch.Tensor]:
    x, gate_up = draw(T, D, seed=1), draw(E, 2 * H, D, seed=2) / D**0.5
    return [x, draw(T, K, seed=3).sigmoid(), gate_up, draw(E, D, H, seed=4) / H**0.5]


@on_gpu
def test_route_sorts_stably_and_leaves_foreign_experts_out() -> None:
    chosen = choices(skew=0.5)
    chosen[7, 1] = E  # as transformers marks experts of other ranks
    at = experts_gpu.route(chosen.cuda(), E)
    ids, ends = chosen.flatten(), [0, *at.ends_E.tolist()]
    assert at.counts().tolist() == torch.bincount(ids[ids < E], minlength=E).tolist()
    for expert in range(E):
        mine = (ids == expert).nonzero().flatten()
        rows = at.slot_R[ends[expert] : ends[expert + 1]].cpu()
        assert torch.equal(rows[: len(mine)].long(), mine)
        assert len(rows) % experts_gpu.ALIGN == 0 and bool((rows[len(mine) :] == -1).all())
        assert torch.equal(at.row_N.cpu()[mine].long(), torch.arange(len(mine)) + ends[expert])
    assert int(at.row_N[7 * K + 1]) == -1


class Module(torch.nn.Module):
    """What transformers' experts functions look at."""

    has_gate, has_bias, is_transposed, has_post_expert_norm, _is_expert_parallel = True, False, False, False, False

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.num_experts = gate_up, down, len(gate_up)

    def _apply_gate(self, pre: torch.Tensor) -> torch.Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up


@on_gpu
@pytest.mark.parametrize("skew", [0.0, 5.0], ids=["balanced", "one expert has every token"])
def test_fused_experts_are_as_exact_as_transformers(skew: float) -> None:
    chosen, half = choices(skew=skew), [t.bfloat16() for t in layer_inputs()]
    half[1] = half[1].float()
    exact = [t.double().requires_grad_() for t in half]
    expected = ExpertsSwiGLU.apply(exact[0], chosen, *exact[1:])
    grad = draw(T, D, seed=5).bfloat16()
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    errors = []
    for fused in (True, False):
        inputs = [t.cuda().requires_grad_() for t in half]
        if fused:
            assert experts_gpu.obstacle(inputs[0], *inputs[2:]) is None
            out = experts_gpu.experts(inputs[0], chosen.cuda(), *inputs[1:])
        else:
            out = ALL_EXPERTS_FUNCTIONS["grouped_mm"](Module(*inputs[2:]), inputs[0], chosen.cuda(), inputs[1])
        found = [out, *torch.autograd.grad(out, inputs, grad.cuda())]
        errors.append([relative(a.detach().cpu().double(), b.detach()) for a, b in zip(found, wanted)])
    for ours, theirs in zip(*errors):
        assert ours <= 1.2 * theirs < 0.02


@on_gpu
def test_fused_experts_do_not_wait_and_repeat_exactly() -> None:
    chosen, found = choices().cuda(), []
    x, weights, gate_up, down = (t.cuda() for t in layer_inputs())
    inputs = [x.bfloat16(), weights, gate_up.bfloat16(), down.bfloat16()]
    grad = torch.randn_like(inputs[0])
    for strict in (False, True, True):
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            taken = [t.clone().requires_grad_() for t in inputs]
            out = experts_gpu.experts(taken[0], chosen, *taken[1:])
            found.append([out, *torch.autograd.grad(out, taken, grad)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))


@on_gpu
def test_fused_mlp_gradients() -> None:
    shapes = ((T, D), (H, D), (H, D), (D, H))
    exact = [draw(*shape, seed=n).double().div(shape[1] ** 0.25).requires_grad_() for n, shape in enumerate(shapes)]
    expected = DenseSwiGLU.apply(*exact)
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        inputs = [t.detach().to("cuda", dtype).requires_grad_() for t in exact]
        out = experts_gpu.DenseSwiGLUGPU.apply(*inputs)
        assert relative(out.detach().cpu().double(), expected.detach()) < bound
        for a, b in zip(torch.autograd.grad(out.float().square().sum(), inputs), wanted):
            assert relative(a.cpu().double(), b) < bound


@on_gpu
@pytest.mark.parametrize("norm", [True, False])
def test_fused_router_equals_the_plain_one(norm: bool) -> None:
    plain, fused = (make(K2, dtype=torch.bfloat16).to("cuda") for _ in range(2))
    name, router = next(iter(fused.routers().items()))
    other = plain.routers()[name]
    x = draw(T, K2.hidden_size, seed=1).bfloat16().cuda()
    found = []
    for module, times in ((router, None), (other, torch.ones(T, dtype=torch.int64, device="cuda"))):  # `times`: the plain path
        module.norm_topk_prob, module.k2_counting, module.k2_times = norm, True, times
        taken = x.clone().requires_grad_()
        scores, weights, chosen = module(taken)
        order = chosen.argsort(1)
        loss = (weights.gather(1, order) * draw(T, router.top_k, seed=2).cuda()).sum() + (scores * 0.01).square().sum()
        found.append(
            (scores, chosen.gather(1, order), weights.gather(1, order), *torch.autograd.grad(loss, (taken, module.weight)))
        )
    ours, theirs = found
    assert torch.equal(ours[1], theirs[1]) and torch.equal(router.k2_counts, other.k2_counts)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-6)
    for a, b in zip(ours[3:], theirs[3:]):
        assert relative(a.float(), b.float()) < 5e-3


@on_gpu
def test_other_widths_and_types_say_that_they_are_slower() -> None:
    x, gate_up, down = torch.zeros(4, 72).cuda(), torch.zeros(2, 48, 72).cuda(), torch.zeros(2, 72, 24).cuda()
    assert "bfloat16" in str(experts_gpu.obstacle(x, gate_up, down))
    assert experts_gpu.obstacle(x.cpu(), gate_up, down) is not None
    slower.say.cache_clear()
    with pytest.warns(UserWarning, match="72 and 24 are not both multiples of 128.*slower|written for Hopper.*slower"):
        assert not experts_gpu.fast(x, down)
