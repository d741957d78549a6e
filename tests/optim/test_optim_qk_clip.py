"""QK-Clip: each clipped head's logits scale by exactly g in an explicit MLA, nothing else moves, and the traps others fell into.

Legend: `T` tokens, `D` width, `H` heads, `N` no-position head width, `R` rotary head width, `V` value width, `Q` query latent,
`L` key-value latent.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from k2lab.core.errors import NumericsError
from k2lab.core.rng import derive
from k2lab.core.types import RowLayout
from k2lab.optim import _qk_clip
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

T, D, H, N, R, V, Q, L = 12, 32, 4, 16, 8, 16, 24, 20
# Kimi K2's softmax scale: (N + R)^-0.5 times YaRN's factor at 64; tau is about logits that include it.
SCALE = (N + R) ** -0.5 * (0.1 * math.log(64.0) + 1.0) ** 2


def noise(key: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive(1, key) % 2**63)
    return torch.randn(*shape, generator=generator)


def rotate(x_THR: torch.Tensor) -> torch.Tensor:
    """Rotary positions on interleaved pairs."""
    angle_T1r = torch.arange(T)[:, None, None] * 50000.0 ** (-torch.arange(0, R, 2) / R)
    even, odd = x_THR[..., ::2], x_THR[..., 1::2]
    return torch.stack(
        [even * angle_T1r.cos() - odd * angle_T1r.sin(), even * angle_T1r.sin() + odd * angle_T1r.cos()], dim=-1
    ).flatten(-2)


def mla_params(q_lora: bool, prefix: str = "a") -> dict[str, nn.Parameter]:
    """Projections of one MLA layer with large weights, so that logits are large."""
    shapes = {"kv_a_proj_with_mqa": (L + R, D), "kv_b_proj": (H * (N + V), L), "o_proj": (D, H * V)}
    shapes |= {"q_a_proj": (Q, D), "q_b_proj": (H * (N + R), Q)} if q_lora else {"q_proj": (H * (N + R), D)}
    return {f"{prefix}.{name}.weight": nn.Parameter(noise(name, *shape)) for name, shape in shapes.items()}


def layout(q_lora: bool, layer: int = 0, prefix: str = "a") -> RowLayout:
    return RowLayout(layer, f"{prefix}.{'q_b_proj' if q_lora else 'q_proj'}.weight", f"{prefix}.kv_b_proj.weight", H, N, R, V)


def logits_and_values(p: dict[str, torch.Tensor], x_TD: torch.Tensor, nope: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled causal logits [H, T, T] (future = -inf) and values [T, H, V] of multi-head latent attention."""
    q = x_TD @ p["a.q_a_proj.weight"].T @ p["a.q_b_proj.weight"].T if "a.q_a_proj.weight" in p else x_TD @ p["a.q_proj.weight"].T
    latent_TL, k_rope_TR = (x_TD @ p["a.kv_a_proj_with_mqa.weight"].T).split([L, R], dim=-1)
    q_nope_THN, q_rope_THR = q.view(T, H, N + R).split([N, R], dim=-1)
    k_nope_THN, v_THV = (latent_TL @ p["a.kv_b_proj.weight"].T).view(T, H, N + V).split([N, V], dim=-1)
    k_rope_THR = k_rope_TR[:, None].expand(T, H, R)
    if not nope:
        q_rope_THR, k_rope_THR = rotate(q_rope_THR), rotate(k_rope_THR)
    logits_HTT = torch.einsum("thn,shn->hts", q_nope_THN, k_nope_THN) + torch.einsum("thr,shr->hts", q_rope_THR, k_rope_THR)
    return (logits_HTT * SCALE).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")), v_THV


def largest(logits_HTT: torch.Tensor) -> torch.Tensor:
    return logits_HTT.amax(dim=(1, 2))


@pytest.mark.parametrize("q_lora", [True, False])
@pytest.mark.parametrize("nope", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 0.2, 1.0])
@torch.no_grad()
def test_clipped_heads_scale_by_exactly_g_and_others_by_nothing(q_lora, nope, alpha):
    p, x_TD = mla_params(q_lora), noise("x", T, D)
    before_HTT, values = logits_and_values(p, x_TD, nope)
    s_H = largest(before_HTT)
    tau = float(s_H.sort().values[1])  # the two largest heads are above, one is exactly at tau
    over = [head for head in range(H) if s_H[head] > tau]
    assert len(over) == 2
    old = {name: param.clone() for name, param in p.items()}

    clipped = _qk_clip.apply(p, {}, [layout(q_lora)], {0: s_H}, tau, alpha)

    assert clipped == {0: over}
    after_HTT, values_after = logits_and_values(p, x_TD, nope)
    seen = before_HTT.isfinite()
    for head in range(H):
        g = tau / float(s_H[head]) if head in over else 1.0
        wrong = (after_HTT[head] - g * before_HTT[head])[seen[head]].abs().max() / before_HTT[head][seen[head]].abs().max()
        assert wrong < 1e-6, (head, float(wrong))
        if head not in over:
            assert torch.equal(after_HTT[head], before_HTT[head])
    torch.testing.assert_close(largest(after_HTT)[over], torch.full((2,), tau), rtol=1e-5, atol=0)
    # Values and the rotary key that all heads share are not touched by a bit, nor is any other projection.
    assert torch.equal(values, values_after)
    moving = {layout(q_lora).q} | ({layout(q_lora).kv} if alpha < 1.0 else set())
    assert {name for name in p if not torch.equal(p[name], old[name])} == moving


@torch.no_grad()
def test_maxima_at_or_below_zero_never_clip_or_make_nan():
    p = mla_params(True)
    old = {name: param.clone() for name, param in p.items()}
    assert _qk_clip.apply(p, {}, [layout(True)], {0: torch.tensor([0.0, -3.0, -1e30, 100.0])}, 100.0, 0.5) == {}
    assert all(torch.equal(p[name], old[name]) for name in p)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_maxima_name_layer_and_head_before_anything_moves(bad):
    p = mla_params(True)
    optim = MuonClip(lr=0.1, schedule=Constant(), ns_dtype="fp32").build(p.items(), [layout(True, layer=7)])
    for name, param in p.items():
        param.grad = noise(f"g {name}", *param.shape)
    old = {name: param.detach().clone() for name, param in p.items()}
    with pytest.raises(NumericsError, match="layer 7, head 2"):
        optim.step(0, 10, {7: torch.tensor([500.0, 1.0, bad, 1.0])})
    assert all(torch.equal(p[name], old[name]) for name in p)
    assert optim.scalars()["updates"] == 0
    assert not any(tensor.any() for name, tensor in optim.state_tensors().items() if "momentum" in name)


@torch.no_grad()
def test_hybrid_stacks_skip_layers_without_a_maximum_and_maxima_without_a_layout():
    p = {**mla_params(True, "a"), **mla_params(False, "b")}
    layouts = [layout(True, 3, "a"), layout(False, 7, "b")]
    high = torch.tensor([200.0, 1.0, 1.0, 1.0])
    old = {name: param.clone() for name, param in p.items()}
    assert _qk_clip.apply(p, {}, layouts, {3: None, 5: high, 7: high}, 100.0, 0.5) == {7: [0]}
    assert all(torch.equal(p[name], old[name]) for name in p if name.startswith("a."))
    assert not torch.equal(p["b.q_proj.weight"], old["b.q_proj.weight"])
    assert _qk_clip.apply(p, {}, layouts, {}, 100.0, 0.5) == {}
    assert _qk_clip.apply(p, {}, layouts, None, 100.0, 0.5) == {}


@torch.no_grad()
def test_master_and_bfloat16_copy_are_both_scaled():
    masters = {name: param.detach().clone() for name, param in mla_params(True).items()}
    p = {name: master.to(torch.bfloat16) for name, master in masters.items()}
    expected = {name: master.clone() for name, master in masters.items()}
    s_H = torch.tensor([400.0, 50.0, 130.0, -2.0])
    _qk_clip.apply(expected, {}, [layout(True)], {0: s_H}, 100.0, 0.5)
    assert _qk_clip.apply(p, masters, [layout(True)], {0: s_H}, 100.0, 0.5) == {0: [0, 2]}
    for name in p:
        assert torch.equal(masters[name], expected[name])
        assert torch.equal(p[name], masters[name].to(torch.bfloat16))
    assert not torch.equal(masters["a.kv_b_proj.weight"], mla_params(True)["a.kv_b_proj.weight"])


@torch.no_grad()
def test_bfloat16_without_master_takes_the_factor_in_float32():
    p = {name: param.to(torch.bfloat16) for name, param in mla_params(True).items()}
    rows = p["a.q_b_proj.weight"].view(H, N + R, Q)[1, N:].clone()
    _qk_clip.apply(p, {}, [layout(True)], {0: torch.tensor([1.0, 300.0, 1.0, 1.0])}, 100.0, 0.5)
    assert torch.equal(p["a.q_b_proj.weight"].view(H, N + R, Q)[1, N:], (rows.float() * (100.0 / 300.0)).to(torch.bfloat16))


@torch.no_grad()
def test_biases_of_the_projections_are_scaled_with_their_rows():
    p = {**mla_params(True), "a.q_b_proj.bias": noise("bias", H * (N + R))}
    old = p["a.q_b_proj.bias"].view(H, N + R).clone()
    _qk_clip.apply(p, {}, [layout(True)], {0: torch.tensor([1.0, 1.0, 1.0, 400.0])}, 100.0, 0.5)
    new = p["a.q_b_proj.bias"].view(H, N + R)
    torch.testing.assert_close(new[3], torch.cat([old[3, :N] * 0.5, old[3, N:] * 0.25]))
    assert torch.equal(new[:3], old[:3])


def trained(tau: float | None, **changes) -> tuple[dict[str, nn.Parameter], object]:
    p = mla_params(True)
    return p, MuonClip(lr=1e-4, schedule=Constant(), ns_dtype="fp32", tau=tau, **changes).build(p.items(), [layout(True)])


def test_it_is_on_by_default_with_kimi_k2s_threshold():
    assert MuonClip(lr=1.0).tau == 100.0 and MuonClip(lr=1.0).alpha == 0.5


@pytest.mark.parametrize("tau", [None, float("inf")])
def test_it_can_be_switched_off(tau):
    p, optim = trained(tau)
    q, other = trained(None)
    for params, built, maxima in ((p, optim, {0: torch.full((H,), 1e9)}), (q, other, None)):
        for name, param in params.items():
            param.grad = noise(f"g {name}", *param.shape)
        assert built.step(0, 10, maxima).clipped == {}
    assert all(torch.equal(p[name], q[name]) for name in p)
    assert "QK-Clip: off" in optim.table_text() and "QK-Clip: tau 100" in trained(100.0)[1].table_text()


def test_a_run_that_clips_every_step_holds_the_logits_down_and_reads_the_maxima_only():
    """The maxima of a step come from before its update, so a head may exceed tau by one update's growth and no more."""
    p, optim = trained(20.0)
    x_TD = noise("x", T, D)
    for step in range(3):
        # Two micro-batches, the second observed twice as under activation recomputation: a maximum does not mind.
        running_H = torch.full((H,), float("-inf"))  # the model resets its maxima at the start of a step
        for scale in (0.5, 1.0, 1.0):
            logits_HTT, values_THV = logits_and_values(p, x_TD * scale)
            running_H = torch.maximum(running_H, largest(logits_HTT.detach()))
            (values_THV.square().mean() + logits_HTT[logits_HTT.isfinite()].square().mean()).backward()
        expected = [head for head in range(H) if running_H[head] > 20.0]
        given = running_H.clone()
        assert optim.step(step, 3, {0: running_H}).clipped == ({0: expected} if expected else {})
        assert torch.equal(running_H, given)
        optim.zero_grad()
        if step == 0:
            assert expected
    with torch.no_grad():
        assert largest(logits_and_values(p, x_TD)[0]).max() < 20.0 * 1.05


def test_nothing_is_remembered_between_steps():
    p, optim = trained(100.0)
    for step, (high, clipped) in enumerate([(250.0, {0: [0]}), (50.0, {})]):
        for name, param in p.items():
            param.grad = noise(f"g {name}", *param.shape)
        assert optim.step(step, 2, {0: torch.tensor([high, 1.0, 1.0, 1.0])}).clipped == clipped


def test_frozen_projections_are_never_scaled():
    p = mla_params(True)
    p["a.kv_b_proj.weight"].requires_grad_(False)
    optim = MuonClip(lr=1e-4, schedule=Constant(), ns_dtype="fp32", weight_decay=0.0).build(p.items(), [layout(True)])
    p["a.q_b_proj.weight"].grad = torch.zeros_like(p["a.q_b_proj.weight"])
    old = {name: param.detach().clone() for name, param in p.items()}
    assert optim.step(0, 1, {0: torch.full((H,), 1e4)}).clipped == {}
    assert "QK-Clip: tau 100, alpha 0.5, 0 attention layers" in optim.table_text()
    assert all(torch.equal(p[name], old[name]) for name in p)


def test_layouts_that_do_not_fit_are_refused_when_built():
    p = mla_params(True)
    absorbed = {name: param for name, param in p.items() if "kv_b" not in name}
    with pytest.raises(ValueError, match="absorbed"):
        MuonClip(lr=1.0).build(absorbed.items(), [layout(True)])
    with pytest.raises(ValueError, match="rows"):
        MuonClip(lr=1.0).build(p.items(), [RowLayout(0, "a.q_b_proj.weight", "a.kv_b_proj.weight", H, N, R + 1, V)])
    optim = MuonClip(lr=1.0).build(p.items(), [layout(True)])
    p["a.o_proj.weight"].grad = torch.zeros_like(p["a.o_proj.weight"])
    with pytest.raises(ValueError, match="shape"):
        optim.step(0, 1, {0: torch.zeros(H + 1)})
