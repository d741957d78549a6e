"""Packed attention against a plain masked softmax, and the maxima of its logits against brute force."""

from __future__ import annotations

import pytest
import torch
from model_samples import K2, LENGTHS, LINEAR, logits, make, pack

from k2lab.models import attention
from k2lab.models.attention import LogitStats, PackedAttention, attend_on_device
from k2lab.models.pack import Pack


def plain(q, k, v, scale: float, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [T, H, V], per-head maximum of the allowed logits) with one [T, T] mask."""
    document = torch.repeat_interleave(torch.arange(len(pack.lengths)), torch.tensor(pack.lengths))
    allowed = (document[:, None] == document[None]) & torch.ones(len(document), len(document)).tril().bool()
    scores = torch.einsum("thc,shc->hts", q, k) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hts,shv->thv", scores.softmax(-1), v), scores.amax((1, 2))


def sample(T: int, heads: int = 3, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(T, heads, width, generator=generator, dtype=dtype).requires_grad_() for width in (24, 24, 16)]


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (64, 65, 128, 129, 300), (2,) * 40, (7, 0, 9)])
@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "computed again"])
def test_packed_attention_equals_masked_softmax(lengths, keep_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEEP_BYTES", keep_bytes)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    layout = Pack.of(starts, "cpu")
    stats = LogitStats(active=True)
    q, k, v = sample(layout.num_tokens)
    weights = torch.randn(layout.num_tokens, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = PackedAttention.apply(q, k, v, 0.3, layout, stats)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    expected_out, maxima = plain(q, k, v, 0.3, layout)
    expected = torch.autograd.grad((expected_out * weights).sum(), (q, k, v))
    torch.testing.assert_close(out, expected_out, rtol=0, atol=1e-12)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.max_H, maxima.float(), rtol=1e-6, atol=1e-6)


def test_the_way_of_other_devices_gives_the_same() -> None:
    layout = Pack.of([0, 5, 75, 76, 276], "cpu")
    q, k, v = sample(276)
    out = attend_on_device(q, k, v, 0.3, layout, None)
    torch.testing.assert_close(out, plain(q, k, v, 0.3, layout)[0], rtol=0, atol=1e-12)


def test_bound_is_an_upper_bound_and_tau_makes_it_exact() -> None:
    layout = Pack.of([0, 5, 75, 76, 276], "cpu")
    q, k, v = sample(276)
    maxima = plain(q, k, v, 0.3, layout)[1].float()
    loose = LogitStats(active=True, tau=1e9)
    attend_on_device(q, k, v, 0.3, layout, loose)
    assert not loose.exact
    assert bool((loose.max_H >= maxima).all())
    tight = LogitStats(active=True, tau=0.0)
    attend_on_device(q, k, v, 0.3, layout, tight)
    assert tight.exact
    torch.testing.assert_close(tight.max_H, maxima, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_model_maxima_equal_brute_force_from_queries_and_keys(spec) -> None:
    model, batch = make(spec).train(), pack()
    seen: dict[int, torch.Tensor] = {}
    real = attention.attend

    def spy(q, k, v, scale, layout, stats, keep):
        seen[len(seen)] = plain(q.detach(), k.detach(), v.detach(), scale, layout)[1]
        return real(q, k, v, scale, layout, stats, keep)

    from k2lab.models import mla

    mla.attend, restore = spy, mla.attend
    try:
        model.hidden(batch)
    finally:
        mla.attend = restore
    found = model.max_logits()
    assert list(found) == list(spec.layers_of("mla")) == [layout.layer for layout in model.row_layouts()]
    for expected, values in zip(seen.values(), found.values()):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    assert all(model.max_logits_exact().values())


def test_maxima_run_over_micro_batches_and_rest_in_evaluation() -> None:
    model = make(K2).train()
    first, second = pack(seed=1), pack(seed=2)
    apart = []
    for batch in (first, second):
        model.reset_max_logits()
        logits(model, batch)
        apart.append(model.max_logits())
    model.reset_max_logits()
    assert model.max_logits() == {}
    logits(model, first)
    logits(model, second)
    for layer, values in model.max_logits().items():
        assert torch.equal(values, torch.maximum(apart[0][layer], apart[1][layer]))
    before = model.max_logits()
    model.reset_max_logits()
    logits(model.eval(), first)
    with torch.no_grad():
        logits(model.train(), first)
    assert model.max_logits() == {}
    assert len(before) == model.spec.num_layers


def test_scaling_a_head_by_its_layout_scales_its_logits_exactly() -> None:
    """QK-Clip's identity: nope rows of q and k by sqrt(g), rope rows of q by g."""
    model, batch = make(K2).train(), pack()
    model.hidden(batch)
    before = model.max_logits()
    layout = model.row_layouts()[1]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        q = weights[layout.q].view(layout.num_heads, layout.nope + layout.rope, -1)
        kv = weights[layout.kv].view(layout.num_heads, layout.nope + layout.v, -1)
        q[1, : layout.nope] *= 0.5
        q[1, layout.nope :] *= 0.25
        kv[1, : layout.nope] *= 0.5
    model.reset_max_logits()
    model.hidden(batch)
    after = model.max_logits()[layout.layer]
    torch.testing.assert_close(after[1], before[layout.layer][1] * 0.25, rtol=1e-5, atol=0)
    torch.testing.assert_close(after[0], before[layout.layer][0], rtol=1e-5, atol=0)
