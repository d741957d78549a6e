"""RMSNorm on CUDA, and the decoder layers that keep their residual sums in it. Kernels are checked on a GPU; what is around them
is checked on the CPU too, with the kernels' definitions written out in PyTorch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from model_samples import K2, LINEAR, make, pack, relative

from k2lab.models import norm
from k2lab.models.losses import linear_cross_entropy
from k2lab.models.norm import GatedRMSNormCUDA, GatedRMSNormFunction, RMSNormCUDA, RMSNormFunction, Sum

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
EPS = 1e-6


def _forward(x, weight, eps, other_TD=None, gate_TD=None):
    total = x if other_TD is None else x + other_TD
    scales = (total.float().square().mean(-1) + eps).rsqrt()
    y = weight * (total.float() * scales.unsqueeze(1)).to(x.dtype)
    return y if gate_TD is None else y * gate_TD.sigmoid(), total, scales


def _backward(grads, x, weight, scales, gate_TD=None, extra_TD=None):
    grad = sum(grads)
    unit, share = x.float() * scales.unsqueeze(1), 1 if gate_TD is None else gate_TD.float().sigmoid()
    through = grad.float() * share
    grad_gate = None if gate_TD is None else (through * weight * unit * (1 - share)).to(x.dtype)
    grad_unit = through * weight
    grad_x = (grad_unit - unit * (grad_unit * unit).mean(-1, keepdim=True)) * scales.unsqueeze(1)
    grad_x = (grad_x if extra_TD is None else grad_x + extra_TD).to(x.dtype)
    return grad_x, (through * unit).sum(0).to(weight.dtype), grad_gate


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request.node, "callspec", None) is not None and request.node.callspec.params.get("device") == "cpu":
        monkeypatch.setattr(
            norm, "_kernels", lambda: SimpleNamespace(forward=_forward, gradients=_backward, sum_of=lambda a, b, c: a + b + c)
        )


def sample(device: str, width: int, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(x with strided rows, another of its shape, gate, weight) as leaves and in fp64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, other, gate = (torch.randn(2, 9, width + 8, generator=generator) for _ in range(3))
    weight = torch.rand(width, generator=generator) + 0.5
    leaves = [part.to(device, dtype).requires_grad_() for part in (x, other, gate, weight)]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    return leaves, exact


def compare(found, of, expected, of_exact, bound: float) -> None:
    upstream = [torch.randn(part.shape, generator=torch.Generator().manual_seed(i)) for i, part in enumerate(expected)]
    scalar = sum((part * up.to(part)).sum() for part, up in zip(found, upstream, strict=True))
    exact = sum((part * up).sum() for part, up in zip(expected, upstream, strict=True))
    a, b = torch.autograd.grad(scalar, of), torch.autograd.grad(exact, of_exact)
    for got, want in zip((*found, *a), (*expected, *b), strict=True):
        assert relative(got.detach().cpu().double(), want.detach()) < bound


BOUNDS = pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"])


@DEVICES
@BOUNDS
@pytest.mark.parametrize("width", [7, 128, 576])
def test_norm_of_strided_rows(device: str, width: int, dtype: torch.dtype, bound: float) -> None:
    (x, _, _, weight), (x64, _, _, weight64) = sample(device, width, dtype)
    found = RMSNormCUDA.apply(x[..., :width], None, weight, EPS, 1)[:1]
    compare(found, (x, weight), (RMSNormFunction.apply(x64[..., :width], weight64, EPS),), (x64, weight64), bound)


@DEVICES
@BOUNDS
def test_the_sum_and_both_ways_of_its_gradient(device: str, dtype: torch.dtype, bound: float) -> None:
    (x, other, _, weight), (x64, other64, _, weight64) = sample(device, 40, dtype)
    total = x64[..., :40] + other64[..., :40]
    found = RMSNormCUDA.apply(x[..., :40], other[..., :40], weight, EPS, 1)
    expected = (RMSNormFunction.apply(total, weight64, EPS), total)
    compare(found, (x, other, weight), expected, (x64, other64, weight64), bound)
    found = RMSNormCUDA.apply(x[..., :40], None, weight, EPS, 1)
    expected = (RMSNormFunction.apply(x64[..., :40], weight64, EPS), x64[..., :40])
    compare(found, (x, weight), expected, (x64, weight64), bound)
    found = RMSNormCUDA.apply(x[..., :40], other[..., :40], weight, EPS, 1)[1:]
    compare(found, (x, other), (total,), (x64, other64), bound)


@DEVICES
@BOUNDS
@pytest.mark.parametrize("unused", [(), (1,), (0, 2), (3,)], ids=["all used", "one unused", "two unused", "sum unused"])
def test_gradients_of_copies_are_summed(device: str, unused: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    (x, other, _, weight), (x64, other64, _, weight64) = sample(device, 40, dtype)
    total = x64[..., :40] + other64[..., :40]
    found = RMSNormCUDA.apply(x[..., :40], other[..., :40], weight, EPS, 3)
    expected = (*[RMSNormFunction.apply(total, weight64, EPS)] * 3, total)
    found, expected = ([part for i, part in enumerate(parts) if i not in unused] for parts in (found, expected))
    compare(found, (x, other, weight), expected, (x64, other64, weight64), bound)


@DEVICES
@BOUNDS
def test_sum_of_three(device: str, dtype: torch.dtype, bound: float) -> None:
    (*parts, _), (*exact, _) = sample(device, 1234, dtype)
    compare([Sum.apply(*parts)], parts, [sum(exact)], exact, bound)


@DEVICES
@BOUNDS
def test_gated_norm(device: str, dtype: torch.dtype, bound: float) -> None:
    (x, _, gate, weight), (x64, _, gate64, weight64) = sample(device, 32, dtype)
    found = (GatedRMSNormCUDA.apply(x[..., :32], weight, gate[..., :32], EPS),)
    expected = (GatedRMSNormFunction.apply(x64[..., :32], weight64, gate64[..., :32], EPS),)
    compare(found, (x, weight, gate), expected, (x64, weight64, gate64), bound)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_with_their_sums_in_the_norms_compute_the_same(
    device: str, spec, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(spec).train(), pack()
    model.recompute("layers" if recompute else "none")
    found, taken = [], []
    real = norm._normed
    monkeypatch.setattr(norm, "_normed", lambda *parts: taken.append(len(parts)) or real(*parts))
    for ours in (False, True):
        monkeypatch.setattr(norm, "takes", lambda x, weight, ours=ours: ours)
        model.hf.zero_grad()
        loss, _ = linear_cross_entropy(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for _, parameter in model.named_parameters())])
    assert len(taken) == 2 * spec.num_layers * (1 + recompute)
    for a, b in zip(*found, strict=True):
        assert relative(b, a) < 1e-4


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("width", [512, 1536, 2048])
def test_rounds_as_transformers_and_repeats_every_bit(device: str, width: int) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(3000, width, device=device, generator=generator).bfloat16().requires_grad_()
    weight = torch.rand(width, device=device, generator=generator).bfloat16().requires_grad_()
    wide = x.float()
    theirs = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    runs = []
    for _ in range(2):
        y = RMSNormCUDA.apply(x, None, weight, EPS, 1)[0]
        runs.append((y, *torch.autograd.grad(y, (x, weight), wide.bfloat16().detach().flip(0))))
    assert float((runs[0][0] != theirs).float().mean()) < 1e-3
    torch.testing.assert_close(runs[0][0], theirs, rtol=2**-6, atol=0)  # at most two roundings
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
