"""Log-probabilities with gradient and the divergence from a teacher's top-k, against full-vocabulary autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2lab.models import _distribution
from k2lab.models.losses import linear_cross_entropy, linear_logprobs, linear_logprobs_topk_kl, linear_topk_kl

T, D, W = 40, 8, 23


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    head = torch.randn(W, D, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, W, (T,), generator=generator)
    weight = torch.rand(T, generator=generator, dtype=torch.float64) + 0.1
    weight[::3] = 0
    teacher = torch.randn(T, W, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    return hidden.requires_grad_(), head.requires_grad_(), targets, weight, teacher


def bucket_kl(logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The definition, written out: K named tokens and one bucket, by plain autograd."""
    q = logits.softmax(-1).gather(1, ids)
    p = teacher.exp()
    r, s = 1 - p.sum(-1), 1 - q.sum(-1)
    return (p * (teacher - q.log())).sum(-1) + r * (r.log() - s.log())


def gradients(value: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, of, retain_graph=True)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_logprobs_and_any_upstream_gradient(chunk: int) -> None:
    hidden, head, targets, weight, _ = inputs()
    logp = linear_logprobs(hidden, head, targets, weight, chunk=chunk)
    expected = F.log_softmax(hidden @ head.t(), -1).gather(1, targets[:, None])[:, 0] * (weight != 0)
    torch.testing.assert_close(logp, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.sin(torch.arange(T, dtype=torch.float64))
    upstream[5] = 0
    for a, b in zip(gradients(logp @ upstream, hidden, head), gradients(expected @ upstream, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_logprobs_equal_cross_entropy_and_pass_gradcheck() -> None:
    hidden, head, targets, weight, _ = inputs()
    total, nll = linear_cross_entropy(hidden, head, targets, weight)
    logp = linear_logprobs(hidden, head, targets, weight)
    torch.testing.assert_close(-(logp * weight).sum(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(-logp.detach(), nll, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(-(logp * weight).sum(), hidden, head), gradients(total, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    few = (hidden[:5].detach().requires_grad_(), head.detach()[:6].clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets[:5] % 6, weight[:5], 2), few)


def test_positions_of_weight_zero_or_gradient_zero_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    real = _distribution._logits
    monkeypatch.setattr(_distribution, "_logits", lambda h, w: rows.append(len(h)) or real(h, w))
    hidden, head, targets, weight, _ = inputs()
    logp = linear_logprobs(hidden, head, targets, weight, chunk=10)
    trained = int((weight != 0).sum())
    assert sum(rows) == trained and max(rows) <= 10
    rows.clear()
    upstream = torch.ones(T, dtype=torch.float64)
    upstream[:12] = 0
    (grad,) = gradients(logp @ upstream, hidden)
    assert sum(rows) == int((weight[12:] != 0).sum())
    assert float(grad[:12].abs().max()) == 0 and float(grad[weight == 0].abs().max()) == 0


def test_nothing_selected_gives_zeros_with_a_gradient() -> None:
    hidden, head, targets, _, teacher = inputs()
    none = torch.zeros(T)
    ids = torch.arange(3).expand(T, 3).contiguous()
    for value in (
        linear_logprobs(hidden, head, targets, none).sum(),
        linear_topk_kl(hidden, head, ids, teacher[:, :3], none)[0],
        sum(x.sum() for x in linear_logprobs_topk_kl(hidden, head, targets, none, ids, teacher[:, :3], none)),
    ):
        assert float(value.detach()) == 0
        assert all(float(grad.abs().max()) == 0 for grad in gradients(value, hidden, head))


@pytest.mark.parametrize("top_k", [1, 5, W - 1])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_topk_kl_is_its_definition(top_k: int, chunk: int) -> None:
    hidden, head, _, weight, teacher = inputs()
    named, ids = teacher.topk(top_k, -1)
    total, kl = linear_topk_kl(hidden, head, ids, named, weight, chunk=chunk)
    expected = bucket_kl(hidden @ head.t(), ids, named) * (weight != 0)
    torch.testing.assert_close(kl, expected.detach(), rtol=1e-9, atol=1e-12)
    assert not kl.requires_grad and float(kl.min()) >= 0
    torch.testing.assert_close(total, (expected * weight).sum(), rtol=1e-10, atol=0)
    for a, b in zip(gradients(2.0 * total, hidden, head), gradients(2.0 * (expected * weight).sum(), hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_with_all_tokens_it_is_the_full_kl_and_it_grows_towards_it() -> None:
    hidden, head, _, weight, teacher = inputs()
    full = F.kl_div(F.log_softmax(hidden @ head.t(), -1), teacher, log_target=True, reduction="none").sum(-1)
    sums = []
    for top_k in (1, 4, 12, W):
        named, ids = teacher.topk(top_k, -1)
        total, kl = linear_topk_kl(hidden, head, ids, named, weight)
        assert bool((kl <= (full * (weight != 0)).detach() + 1e-12).all())
        sums.append(float(total.detach()))
    assert sums == sorted(sums) and sums[0] < 0.9 * sums[-1]
    torch.testing.assert_close(kl, (full * (weight != 0)).detach(), rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(total, hidden, head), gradients((full * weight).sum(), hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_entries_that_are_not_there_change_nothing() -> None:
    hidden, head, _, weight, teacher = inputs()
    named, ids = teacher.topk(4, -1)
    short = linear_topk_kl(hidden, head, ids, named, weight)
    padded_ids = torch.cat([ids, torch.zeros(T, 2, dtype=torch.long)], 1)
    padded = linear_topk_kl(hidden, head, padded_ids, torch.cat([named, torch.full((T, 2), -torch.inf)], 1), weight)
    torch.testing.assert_close(padded[1], short[1], rtol=1e-12, atol=0)
    for a, b in zip(gradients(padded[0], hidden, head), gradients(short[0], hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("top_k", [2, W])
def test_a_teacher_that_is_certain_and_a_student_that_is_sure_stay_finite(scale: float, top_k: int) -> None:
    hidden, head, targets, weight, teacher = inputs(torch.float32)
    sure = (teacher.float() * 50).log_softmax(-1)  # remainder 0 to rounding
    named, ids = sure.topk(top_k, -1)
    big = (hidden * scale).detach().requires_grad_()
    total, kl = linear_topk_kl(big, head, ids, named, weight.float())
    both = linear_logprobs_topk_kl(big, head, targets, weight.float(), ids, named, torch.ones(T))
    for value in (total, kl, *both, *gradients(total, big, head), *gradients(both[0].sum() + both[1].sum(), big, head)):
        assert bool(torch.isfinite(value).all())
    torch.testing.assert_close(both[1].detach(), kl, rtol=1e-6, atol=1e-6)


def test_small_remainders_of_the_student_keep_their_digits() -> None:
    """With the student sure of the named tokens, 1 - sum q has no digit left in fp32; the sum over the others has all."""
    logits = torch.tensor([[20.0, 19.0, -3.0, -4.0]])
    hidden, head = torch.eye(4)[:1], torch.zeros(4, 4)
    head[:, 0] = logits[0]
    named = torch.tensor([[0.5, 0.3]]).log()
    ids = torch.tensor([[0, 1]])
    _, kl = linear_topk_kl(hidden, head, ids, named, torch.ones(1))
    assert float(kl) == pytest.approx(float(bucket_kl(logits.double(), ids, named.double())), rel=1e-5)


def test_combined_values_and_gradients_equal_the_separate_ones() -> None:
    hidden, head, targets, weight, teacher = inputs()
    named, ids = teacher.topk(5, -1)
    taught = (torch.arange(T) % 4 != 1).double()
    logp, kl = linear_logprobs_topk_kl(hidden, head, targets, weight, ids, named, taught, chunk=6)
    total, alone = linear_topk_kl(hidden, head, ids, named, weight * taught)
    torch.testing.assert_close(kl.detach(), alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logp, linear_logprobs(hidden, head, targets, weight), rtol=1e-12, atol=1e-12)
    upstream = torch.cos(torch.arange(T, dtype=torch.float64))
    together = gradients(logp @ upstream + 0.7 * (kl * weight).sum(), hidden, head)
    separate = gradients(linear_logprobs(hidden, head, targets, weight) @ upstream + 0.7 * total, hidden, head)
    for a, b in zip(together, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients((kl * weight).sum(), hidden, head), gradients(total, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_half_precision_sums_in_fp32() -> None:
    hidden, head, targets, weight, teacher = inputs(torch.bfloat16)
    named, ids = teacher.float().topk(5, -1)
    logp, kl = linear_logprobs_topk_kl(hidden, head, targets, weight.float(), ids, named, torch.ones(T))
    assert logp.dtype == kl.dtype == torch.float32
    grads = gradients(logp.sum() + kl.sum(), hidden, head)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    want = linear_logprobs_topk_kl(*exact, targets, weight, ids, named, torch.ones(T))
    for a, b in zip(grads, gradients(want[0].sum() + want[1].sum(), *exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b).norm() / b.norm()) < 2e-2
