"""Stochastic rounding: right in the mean, one of the two neighbours, the same on resume; and bfloat16 momentum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.core.rng import derive
from k2lab.optim._rounding import round_into, seed
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

SHAPES = {"model.embed_tokens.weight": (40, 16), "mlp.experts.gate_up_proj": (4, 32, 16), "norm.weight": (16,)}


def noise(key: str, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive(5, key) % 2**63)
    return torch.randn(shape, generator=generator).to(dtype)


def params(dtype=torch.bfloat16) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(0.1 * noise(name, shape, dtype)) for name, shape in SHAPES.items()}


def advance(weights, optim, steps) -> None:
    for step in steps:
        for name, param in weights.items():
            param.grad = noise(f"{name} {step}", tuple(param.shape), param.dtype)
        optim.step(step, 10)


def test_a_value_goes_to_one_of_its_neighbours_with_the_right_chances():
    low, high = torch.tensor(1.0), torch.tensor(1.0078125)  # neighbours in bfloat16
    value = torch.full((100_000,), 1.0 + 0.3 * 0.0078125)
    out = torch.empty(100_000, dtype=torch.bfloat16)
    round_into(out, value, 3)
    assert set(out.unique().tolist()) == {float(low), float(high)}
    assert abs(float((out == high).float().mean()) - 0.3) < 0.01
    round_into(out, -value, 3)
    assert abs(float((out == -high).float().mean()) - 0.3) < 0.01


def test_what_bfloat16_holds_stays_and_so_do_infinities_and_nan():
    value = torch.tensor([0.0, 1.5, -3.0, float("inf"), float("-inf"), float("nan")])
    out = torch.empty(6, dtype=torch.bfloat16)
    for key in range(20):
        round_into(out, value, key)
        torch.testing.assert_close(out.float(), value, equal_nan=True, atol=0, rtol=0)


def test_the_chance_depends_on_name_and_update_only():
    value = noise("value", (1000,))
    outs = []
    for key in (seed("a", 1), seed("a", 1), seed("a", 2), seed("b", 1)):
        outs.append(torch.empty(1000, dtype=torch.bfloat16))
        round_into(outs[-1], value, key)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[3])


@pytest.mark.parametrize("config", [MuonClip, AdamW])
def test_many_small_updates_add_up_without_a_master(config):
    full, low = params(torch.float32), params()
    for name, param in full.items():
        param.data.copy_(low[name].data)
    changes = {"lr": 1e-5, "weight_decay": 0.0, "schedule": Constant()} | ({"ns_dtype": "fp32"} if config is MuonClip else {})
    start = {name: param.detach().clone() for name, param in full.items()}
    ends = {}
    for master, weights in (("auto", full), ("stochastic", low), ("off", params())):
        optim = config(**changes, master=master).build(weights.items(), [])
        assert not optim.masters
        for step in range(200):
            for name, param in weights.items():
                param.grad = torch.ones_like(param) * noise(name, SHAPES[name]).sign().to(param.dtype)
            optim.step(step, 200)
        ends[master] = {name: param.detach().float() - start[name] for name, param in weights.items()}
    for name in SHAPES:
        wanted = ends["auto"][name]
        along = {m: float((ends[m][name] * wanted).sum() / wanted.square().sum()) for m in ("stochastic", "off")}
        assert 0.8 < along["stochastic"] < 1.2, (name, along)
    assert min(float((ends["off"][n] * ends["auto"][n]).sum() / ends["auto"][n].square().sum()) for n in SHAPES) < 0.5


@pytest.mark.parametrize(
    "config",
    [
        MuonClip(lr=0.01, schedule=Constant(), master="stochastic", ns_dtype="fp32"),
        AdamW(lr=0.01, schedule=Constant(), master="stochastic"),
        MuonClip(lr=0.01, schedule=Constant(), momentum_dtype="bf16", ns_dtype="fp16"),
    ],
)
def test_continuation_is_bit_exact(config):
    straight = params()
    advance(straight, config.build(straight.items(), []), range(6))
    first = params()
    optim = config.build(first.items(), [])
    advance(first, optim, range(3))
    second = {name: nn.Parameter(param.detach().clone()) for name, param in first.items()}
    resumed = config.build(second.items(), [])
    resumed.load_state_tensors(optim.state_tensors())
    advance(second, resumed, range(3, 6))
    assert all(torch.equal(second[name], straight[name]) for name in SHAPES)


def test_stochastic_rounding_leaves_float32_weights_as_they_would_be():
    ends = []
    for master in ("auto", "stochastic"):
        weights = params(torch.float32)
        advance(
            weights, MuonClip(lr=0.01, schedule=Constant(), ns_dtype="fp32", master=master).build(weights.items(), []), range(2)
        )
        ends.append(weights)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in SHAPES)


def test_float16_weights_cannot_be_rounded_to_bfloat16():
    with pytest.raises(RecipeError, match="bfloat16 only"):
        AdamW(lr=0.01, master="stochastic").build(params(torch.float16).items(), [])


def test_bfloat16_momentum_halves_its_bytes_and_barely_changes_the_update():
    moved, states = [], []
    for kind in ("fp32", "bf16"):
        weights = params(torch.float32)
        start = weights["mlp.experts.gate_up_proj"].detach().clone()
        optim = MuonClip(lr=0.01, schedule=Constant(), ns_dtype="fp32", momentum_dtype=kind).build(weights.items(), [])
        advance(weights, optim, range(4))
        moved.append(weights["mlp.experts.gate_up_proj"].detach() - start)
        states.append(optim.state_tensors())
    name = "muon.momentum/mlp.experts.gate_up_proj"
    assert states[1][name].dtype == torch.bfloat16 and states[0][name].dtype == torch.float32
    assert 0 < (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
    assert all(states[1][key].dtype == states[0][key].dtype for key in states[0] if key != name)
    fresh = MuonClip(lr=0.01, schedule=Constant(), ns_dtype="fp32").build(params(torch.float32).items(), [])
    with pytest.raises(CheckpointError, match="does not fit"):
        fresh.load_state_tensors(states[1])
