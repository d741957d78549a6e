"""The chunked head loss against PyTorch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2lab.models import losses
from k2lab.models.losses import linear_cross_entropy, token_logprobs


def sample(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(31, 8, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 31, (50,), generator=generator)
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    weight[::3] = 0
    return hidden.requires_grad_(), head.requires_grad_(), targets, weight


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
@pytest.mark.parametrize("sparse", [True, False])
def test_sum_and_gradients(chunk: int, sparse: bool) -> None:
    hidden, head, targets, weight = sample()
    weight = weight if sparse else weight + 0.1
    total, nll = linear_cross_entropy(hidden, head, targets, weight, chunk=chunk)
    expected_nll = F.cross_entropy(hidden @ head.t(), targets, reduction="none")
    expected = (expected_nll * weight).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(nll, expected_nll.detach() * (weight != 0), rtol=1e-12, atol=1e-12)
    assert not nll.requires_grad
    for a, b in zip(*(torch.autograd.grad(3.0 * value, (hidden, head)) for value in (total, expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_negative_weights_and_an_empty_selection() -> None:
    hidden, head, targets, weight = sample()
    plus, _ = linear_cross_entropy(hidden, head, targets, weight)
    minus, _ = linear_cross_entropy(hidden, head, targets, -weight)
    assert float(plus + minus) == pytest.approx(0.0, abs=1e-12)
    total, _ = linear_cross_entropy(hidden, head, targets, torch.zeros(50))
    grads = torch.autograd.grad(total, (hidden, head))
    assert float(total) == 0
    assert all(float(grad.abs().max()) == 0 for grad in grads)


def test_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = losses._softmax_parts
    monkeypatch.setattr(losses, "_softmax_parts", lambda h, w, t: seen.append(len(h)) or real(h, w, t))
    hidden, head, targets, weight = sample()
    linear_cross_entropy(hidden, head, targets, weight, chunk=10)
    assert max(seen) <= 10
    assert sum(seen) == int((weight != 0).sum())


def test_half_precision_accumulates_in_fp32() -> None:
    hidden, head, targets, weight = sample(torch.bfloat16)
    total, nll = linear_cross_entropy(hidden, head, targets, weight, chunk=7)
    assert nll.dtype == torch.float32
    grads = torch.autograd.grad(total, (hidden, head))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16]
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    expected, _ = linear_cross_entropy(*exact, targets, weight)
    assert float(total) == pytest.approx(float(expected), rel=2e-3)
    for a, b in zip(grads, torch.autograd.grad(expected, exact)):
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


def test_huge_logits_stay_finite() -> None:
    hidden, head, targets, weight = sample(torch.float32)
    total, _ = linear_cross_entropy(hidden * 1e4, head, targets, weight)
    assert bool(torch.isfinite(total))


def test_token_logprobs() -> None:
    hidden, head, targets, _ = sample()
    expected = F.log_softmax(hidden @ head.t(), -1).gather(1, targets[:, None])[:, 0].detach()
    torch.testing.assert_close(token_logprobs(hidden, head, targets, chunk=9), expected, rtol=1e-12, atol=1e-12)
