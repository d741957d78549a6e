"""Weight gradients that products add to `.grad` themselves, inside `adding_weight_gradients` only."""

from __future__ import annotations

import pytest
import torch

from k2lab.models import gemm
from k2lab.models.gemm import AddingLinear, adding_weight_gradients


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)


def test_linear_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(AddingLinear.apply, sample())


def test_three_micro_batches_sum_in_the_first_ones_memory() -> None:
    x, weight = sample()
    expected = torch.zeros_like(weight)
    for step in range(3):
        expected += torch.autograd.grad((step + 1.0) * torch.nn.functional.linear(x, weight).square().sum(), weight)[0]
        with adding_weight_gradients():
            ((step + 1.0) * AddingLinear.apply(x, weight).square().sum()).backward()
        if step == 0:
            first, version = weight.grad, weight.grad._version
    assert weight.grad is first and first._version == version + 2
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_one_weight_used_twice_in_a_graph() -> None:
    x, weight = sample()
    with adding_weight_gradients():
        for _ in range(2):
            AddingLinear.apply(x, weight).sum().add(AddingLinear.apply(2 * x, weight).sum()).backward()
    expected = torch.autograd.grad(6 * torch.nn.functional.linear(x, weight).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


def test_outside_gradients_are_returned() -> None:
    x, weight = sample()
    AddingLinear.apply(x, weight).sum().backward()
    before = weight.grad.clone()
    (grad,) = torch.autograd.grad(AddingLinear.apply(x, weight).sum(), weight)
    assert torch.equal(grad, before) and torch.equal(weight.grad, before)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("why", ["hook", "post-accumulate hook", "another type", "not a leaf", "transposed"])
def test_where_it_may_not_be_added_autograd_does_it(why: str) -> None:
    x, weight = sample()
    seen = []
    used = weight
    if why == "hook":
        weight.register_hook(lambda grad: seen.append(grad))
    elif why == "post-accumulate hook":
        weight.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf))
    elif why == "not a leaf":
        used = weight * 1
    weight.grad = torch.ones(5, 3, dtype=torch.float64).t() if why == "transposed" else torch.ones_like(weight)
    with adding_weight_gradients():
        assert gemm.room(weight) is None or why in ("not a leaf", "another type")
        if why == "another type":
            half = weight.detach().half()
            half.grad = torch.ones_like(half)
            half.grad.data = half.grad.data.float()
            assert gemm.room(half) is None
        AddingLinear.apply(x, used).sum().backward()
    assert len(seen) == ("hook" in why)
    expected = 1 + torch.autograd.grad(torch.nn.functional.linear(x, weight).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)
