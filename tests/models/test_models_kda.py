"""Chunked KDA against its definition in fp64 and transformers' chunked path; the short convolution; boundaries; gates of any
strength."""

from __future__ import annotations

import pytest
import torch
from model_samples import relative
from transformers.models.kimi_linear.modeling_kimi_linear import causal_conv1d_fn, chunk_kimi_delta_attention

from k2lab.models.conv import short_conv
from k2lab.models.kda import chunk_kda, decay_gate, recurrent_kda
from k2lab.models.pack import Pack

LENGTHS = (5, 70, 33, 1, 100, 16, 32)
PACK = Pack.of(torch.tensor([0, *LENGTHS]).cumsum(0), "cpu")


def sample(strength: float, dtype: torch.dtype, tokens: int = sum(LENGTHS), batch: int = 1, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(int(strength * 10))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, *shape, generator=generator, dtype=torch.float64)

    gate = -torch.rand(batch, tokens, heads, 8, generator=generator, dtype=torch.float64) * strength
    gate[:, ::3] *= 1e-3  # weak gates between strong ones: a sum of strong ones must not swallow them
    return [x.to(dtype).requires_grad_() for x in (draw(8), draw(8), draw(6), gate, draw().sigmoid())]


def run(kernel, inputs: list[torch.Tensor], states: torch.Tensor | None, pack: Pack | None = PACK):
    """(out, final states, gradients of a generic scalar of both)."""
    out, final = kernel(
        *inputs, initial_state=states, output_final_state=True, use_qk_l2norm_in_kernel=True, **({"pack": pack} if pack else {})
    )
    value = (out.double() ** 2).sum() + (final.double() ** 3).sum()
    return out, final, torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("strength", [0.1, 1.6, 5.0, 50.0, 1000.0])
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_chunked_equals_the_recurrence(strength: float, chunk: int) -> None:
    states = torch.randn(len(LENGTHS), 2, 8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = run(recurrent_kda, sample(strength, torch.float64), states)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):

        def kernel(*x, **flags):
            return chunk_kda(*x, chunk_size=chunk, **flags)

        inputs = [x.detach().to(dtype).requires_grad_() for x in sample(strength, torch.float64)]
        out, final, grads = run(kernel, inputs, states.to(dtype))
        assert bool(torch.isfinite(out).all())
        assert float((out - exact[0]).detach().abs().max()) < tolerance
        assert float((final - exact[1]).detach().abs().max()) < tolerance
        assert all(relative(a.double(), b) < 10 * tolerance for a, b in zip(grads, exact[2]))


def test_gradcheck() -> None:
    inputs = [x.detach()[..., :3].requires_grad_() if x.dim() == 4 else x for x in sample(1.5, torch.float64, tokens=9, heads=1)]
    pack = Pack.of([0, 2, 8, 9], "cpu")
    states = torch.randn(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def function(*x):
        return chunk_kda(*x[:-1], initial_state=x[-1], output_final_state=True, chunk_size=4, pack=pack)

    assert torch.autograd.gradcheck(function, (*inputs, states), atol=1e-7)
    strong = [x if n != 3 else (x.detach() * 40).requires_grad_() for n, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(function, (*strong, states), atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_equals_transformers_fallback_on_a_batch(tokens: int) -> None:
    inputs = sample(1.6, torch.float32, tokens=tokens, batch=2)
    states = torch.randn(2, 2, 8, 6, generator=torch.Generator().manual_seed(3))
    ours, theirs = run(chunk_kda, inputs, states, None), run(chunk_kimi_delta_attention, inputs, states, None)
    assert float((ours[0] - theirs[0]).detach().abs().max()) < 1e-5
    assert float((ours[1] - theirs[1]).detach().abs().max()) < 1e-5
    assert all(relative(a, b) < 1e-4 for a, b in zip(ours[2], theirs[2]))


def test_state_handed_over_equals_one_pass() -> None:
    inputs = sample(1.6, torch.float64, tokens=90)
    whole, final = chunk_kda(*inputs, output_final_state=True)
    first, state = chunk_kda(*(x[:, :41] for x in inputs), output_final_state=True)
    second, last = chunk_kda(*(x[:, 41:] for x in inputs), initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)
    assert chunk_kda(*inputs)[1] is None


def test_a_document_sees_nothing_of_its_neighbours() -> None:
    inputs = sample(0.5, torch.float64)
    changed = [x.detach().clone() for x in inputs]
    start, end = PACK.starts[4], PACK.starts[5]
    for x in changed:
        x[:, :start] = x[:, :start].flip(1)
        x[:, end:] *= 0.5
    a, b = (chunk_kda(*x, pack=PACK)[0][:, start:end] for x in (inputs, changed))
    assert torch.equal(a, b)


def test_gates() -> None:
    z = torch.linspace(-30, 30, 24).view(4, 2, 3)
    log_rate, bias = torch.tensor([[0.5], [2.0]]), torch.full((2, 3), 0.1)
    expected = -log_rate.exp() * torch.log1p((z.double() + 0.1).exp()).float()
    torch.testing.assert_close(decay_gate(z, log_rate, bias), expected)
    bounded = decay_gate(z, log_rate, bias, lower_bound=-5.0)
    torch.testing.assert_close(bounded, -5 * torch.sigmoid(log_rate.exp() * (z + 0.1)))
    assert float(bounded.min()) >= -5
    assert decay_gate(z.bfloat16(), log_rate, bias).dtype == torch.float32


def test_short_convolution_equals_transformers_on_each_document() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 3, 4, 5, 40, 1, 9)
    pack = Pack.of(torch.tensor([0, *lengths]).cumsum(0), "cpu")
    x = torch.randn(sum(lengths), 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ours = short_conv(x, weight, pack)
    theirs = torch.cat([causal_conv1d_fn(part.t()[None], weight, activation="silu")[0].t() for part in x.split(lengths)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad((ours**3).sum(), (x, weight)), torch.autograd.grad((theirs**3).sum(), (x, weight))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x, w: short_conv(x, w, pack), (x, weight))


@pytest.mark.parametrize("rate", [-1.8, -2.6, -3.0, -4.5])
def test_gradients_stay_exact_where_a_chunk_decays_by_its_limit(rate: float) -> None:
    """Decays of -32 to -89 over half a chunk, on both sides of the limit between the two ways of computing: values and gradients
    against the recurrence in fp64, nothing infinite."""
    T, H, D = 64, 2, 16
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randn(1, T, H, D, generator=draw, dtype=torch.float64) for _ in range(3)]
    gates = rate * (0.5 + torch.rand(1, T, H, D, generator=draw, dtype=torch.float64))
    beta = torch.rand(1, T, H, generator=draw, dtype=torch.float64)
    found = {}
    for name, function, dtype in (("ours", chunk_kda, torch.float32), ("exact", recurrent_kda, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (*inputs, gates, beta)]
        out, _ = function(*leaves, use_qk_l2norm_in_kernel=True)
        (out * torch.arange(D, dtype=dtype)).sum().backward()
        found[name] = [out.detach(), *(leaf.grad for leaf in leaves)]
    for ours, exact in zip(found["ours"], found["exact"], strict=True):
        assert torch.isfinite(ours).all()
        assert relative(ours.double(), exact) < 1e-5
