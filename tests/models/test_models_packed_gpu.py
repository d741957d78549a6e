"""Frozen experts and quantisation-aware training on a GPU: near fp32 on the CPU, and the same bits however codes are decoded."""

from __future__ import annotations

import pytest
import torch
from model_samples import relative

from k2lab.models import experts_gpu, packed_gpu, qat
from k2lab.models.experts import ExpertsSwiGLU
from k2lab.models.gemm import adding_weight_gradients
from k2lab.models.packed import Dense, ExpertLoRA, Packed, frozen_experts
from k2lab.quant import int4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
T, E, K = 1000, 6, 3
FAST, ODD = (256, 384), (96, 160)  # widths D, F: those of our products, and others
SCALE = 2.0


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def choices() -> torch.Tensor:
    """Expert 1 is never chosen, expert 0 oftener than others; some choices are of no expert here."""
    scores = torch.rand(T, E, generator=torch.Generator().manual_seed(9))
    scores[:, 0] += 0.5
    scores[:, 1] = -1
    chosen = scores.topk(K, dim=1)[1]
    chosen[::50, 2] = E
    return chosen


def inputs(D: int, F: int, rank: int) -> tuple[torch.Tensor, ...]:
    """x, weights of the choices, six low-rank factors, gate_up, down, gradient of the output; all bf16."""
    shapes = ((rank, D), (F, rank), (rank, D), (F, rank), (rank, F), (D, rank))
    factors = [draw(E, *shape, seed=20 + n) / 8 for n, shape in enumerate(shapes)]
    x, weights = draw(T, D, seed=1), draw(T, K, seed=2).sigmoid()
    return x, weights, factors, draw(E, 2 * F, D, seed=3) / D**0.5, draw(E, D, F, seed=4) / F**0.5, draw(T, D, seed=5)


def on_gpu(base, x, weights, factors, grad) -> list[torch.Tensor]:
    """Output and gradients at x, weights and factors."""
    leaves = [t.detach().cuda().requires_grad_() for t in (x, weights, *factors)]
    lora = ExpertLoRA(*leaves[2:], SCALE) if factors else None
    assert packed_gpu.obstacle(leaves[0], base, lora) is None
    out = packed_gpu.experts(leaves[0], choices().cuda(), leaves[1], base, lora)
    return [out, *torch.autograd.grad(out, leaves, grad.cuda())]


def on_cpu(gate_up, down, x, weights, factors, grad) -> list[torch.Tensor]:
    leaves = [t.detach().float().requires_grad_() for t in (x, weights, *factors)]
    base, lora = Dense(gate_up.float(), down.float()), ExpertLoRA(*leaves[2:], SCALE) if leaves[2:] else None
    out = frozen_experts(leaves[0], choices(), leaves[1], base, lora)
    return [out, *torch.autograd.grad(out, leaves, grad.float())]


@pytest.fixture(params=[True, False], ids=["in tiles", "beforehand"])
def decoding(request, monkeypatch) -> bool:
    monkeypatch.setattr(packed_gpu, "MANY", 1 << 30 if request.param else 0)
    return request.param


@pytest.mark.parametrize("widths", [FAST, (384, 256), (128, 128), ODD], ids=str)
@pytest.mark.parametrize("rank", [0, 8, 24, 64])
def test_packed_experts_are_near_fp32_on_the_cpu(widths, rank: int, decoding: bool) -> None:
    D, F = widths
    x, weights, factors, gate_up, down, grad = inputs(D, F, max(rank, 1))
    factors = factors if rank else []
    base = Packed(*int4.quantise(gate_up.cuda()), *int4.quantise(down.cuda()))
    found = on_gpu(base, x, weights, factors, grad)
    expected = on_cpu(int4.values(gate_up), int4.values(down), x, weights, factors, grad)
    for n, (one, other) in enumerate(zip(found, expected)):
        assert relative(one.float().cpu(), other) < 1.2e-2, n
    for gradient in found[3:]:
        assert not bool(gradient[1].any()), "an expert that nobody chose learns nothing"


def test_both_ways_of_decoding_and_bf16_weights_give_the_same_bits(monkeypatch) -> None:
    x, weights, factors, gate_up, down, grad = inputs(*FAST, rank=8)
    base = Packed(*int4.quantise(gate_up.cuda()), *int4.quantise(down.cuda()))
    dense = Dense(int4.values(gate_up.cuda()), int4.values(down.cuda()))
    runs = [on_gpu(dense, x, weights, factors, grad)]
    expert = 2 * 2 * FAST[0] * FAST[1] * 2  # bytes of gate and up in bf16
    for many, scratch in ((0, 1 << 30), (0, expert), (0, 5 * expert // 2), (0, 1), (1 << 30, 0), (1 << 30, 0)):
        monkeypatch.setattr(packed_gpu, "MANY", many)
        monkeypatch.setattr(packed_gpu, "SCRATCH", scratch)
        runs.append(on_gpu(base, x, weights, factors, grad))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))


def test_frozen_bf16_experts_without_low_rank_terms_are_those_of_full_training() -> None:
    x, weights, _, gate_up, down, grad = inputs(*FAST, rank=1)
    found = on_gpu(Dense(gate_up.cuda(), down.cuda()), x, weights, [], grad)
    leaves = [t.cuda().requires_grad_() for t in (x, weights)]
    out = experts_gpu.experts(leaves[0], choices().cuda(), leaves[1], gate_up.cuda(), down.cuda())
    expected = [out, *torch.autograd.grad(out, leaves, grad.cuda())]
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_a_lora_step_does_not_wait_for_the_device(decoding: bool) -> None:
    x, weights, factors, gate_up, down, grad = inputs(*FAST, rank=8)
    base = Packed(*int4.quantise(gate_up.cuda()), *int4.quantise(down.cuda()))
    leaves = [t.cuda().requires_grad_() for t in (x, weights, *factors)]
    chosen, grad = choices().cuda(), grad.cuda()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = packed_gpu.experts(leaves[0], chosen, leaves[1], base, ExpertLoRA(*leaves[2:], SCALE))
            torch.autograd.grad(out, leaves, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_the_kernels_do_not_take_is_said() -> None:
    x, _, factors, gate_up, down, _ = inputs(*FAST, rank=96)
    base = Dense(gate_up.cuda(), down.cuda())
    assert "rank" in packed_gpu.obstacle(x.cuda(), base, ExpertLoRA(*(f.cuda() for f in factors), SCALE))
    assert "bfloat16" in packed_gpu.obstacle(x.cuda().float(), base, None)
    assert "CUDA" in packed_gpu.obstacle(x, Dense(gate_up, down), None)


def test_quantisation_aware_training_multiplies_by_exported_values_and_trains_the_weights() -> None:
    x, weights, _, gate_up, down, grad = inputs(*FAST, rank=1)
    leaves = [t.cuda().requires_grad_() for t in (x, weights, gate_up, down)]
    chosen = choices().cuda()
    out = experts_gpu.experts(leaves[0], chosen, *leaves[1:], qat.fresh)
    found = [out, *torch.autograd.grad(out, leaves, grad.cuda(), retain_graph=True)]
    twins = [t.detach().requires_grad_() for t in (*leaves[:2], int4.values(leaves[2]), int4.values(leaves[3]))]
    twin = experts_gpu.experts(twins[0], chosen, *twins[1:])
    expected = [twin, *torch.autograd.grad(twin, twins, grad.cuda())]
    assert all(torch.equal(one, other) for one, other in zip(found, expected))
    fp32 = [t.detach().float().cpu().requires_grad_() for t in twins]
    reference = ExpertsSwiGLU.apply(fp32[0], choices(), *fp32[1:])
    for one, other in zip(found, [reference, *torch.autograd.grad(reference, fp32, grad.float())]):
        assert relative(one.float().cpu(), other) < 1.2e-2
    for leaf in leaves[2:]:
        leaf.grad = torch.ones_like(leaf)
    places = [leaf.grad.data_ptr() for leaf in leaves[2:]]
    with adding_weight_gradients():
        out.backward(grad.cuda())
    assert places == [leaf.grad.data_ptr() for leaf in leaves[2:]]
    for leaf, gradient in zip(leaves[2:], found[3:]):
        assert relative(leaf.grad.float() - 1, gradient.float()) < 2e-2
