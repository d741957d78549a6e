"""The built optimizer: AdamW against torch, clipping, masters, and bit-exact continuation from saved state."""

from __future__ import annotations

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from k2lab.core.errors import CheckpointError, NumericsError, RecipeError
from k2lab.core.rng import derive
from k2lab.core.types import RowLayout
from k2lab.optim import _newton_schulz
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant
from k2lab.optim.schedules.wsd import WSD

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_b_proj.weight": (24, 8),
    "model.layers.0.self_attn.kv_b_proj.weight": (32, 8),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 16, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.A_log": (1, 1, 4, 1),
    "lm_head.weight": (40, 16),
}
LAYOUT = RowLayout(0, "model.layers.0.self_attn.q_b_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight", 2, 8, 4, 8)
MAXIMA = {0: torch.tensor([150.0, 20.0])}


def noise(key: str, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive(2, key) % 2**63)
    return torch.randn(shape, generator=generator).to(dtype)


def params(dtype=torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(0.1 * noise(name, shape, dtype)) for name, shape in SHAPES.items()}


def muonclip(**changes) -> MuonClip:
    return MuonClip(**{"lr": 0.01, "schedule": WSD(warmup=2, decay=4), "ns_dtype": "fp32", **changes})


def advance(weights, optim, steps, total=10, skip=()) -> list:
    infos = []
    for step in steps:
        for name, param in weights.items():
            param.grad = None if (step, name) in skip else noise(f"{name} {step}", tuple(param.shape), param.dtype)
        optim.clip(1.0)
        infos.append(optim.step(step, total, MAXIMA))
        optim.zero_grad()
    return infos


# ---------------------------------------------------------------- AdamW


def test_adamw_equals_torch_adamw():
    ours, theirs = params(), params()
    optim = AdamW(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, schedule=Constant()).build(ours.items(), [])
    decayed = [param for name, param in theirs.items() if "norm" not in name and "A_log" not in name]
    plain = [param for name, param in theirs.items() if "norm" in name or "A_log" in name]
    rival = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        foreach=False,
    )
    for step in range(5):
        for weights in (ours, theirs):
            for name, param in weights.items():
                # One parameter has no gradient in the second step: its bias correction must lag by one.
                idle = step == 1 and name == "lm_head.weight"
                param.grad = None if idle else noise(f"{name} {step}", tuple(param.shape))
        optim.step(step, 5)
        rival.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


def test_learning_rate_follows_the_schedule_and_is_reported():
    schedule = WSD(warmup=2, decay=4)
    weights = params()
    infos = advance(weights, AdamW(lr=0.5, schedule=schedule).build(weights.items(), []), range(10))
    assert [info.lr for info in infos] == [0.5 * schedule.factor(step, 10) for step in range(10)]
    assert all(info.clipped == {} for info in infos)


@pytest.mark.parametrize("factor", [float("nan"), -0.5, float("inf")])
def test_a_broken_schedule_of_the_users_is_named(factor):
    class Broken:
        def factor(self, step, total_steps):
            return factor

    weights = params()
    optim = AdamW(lr=0.5, schedule=Broken()).build(weights.items(), [])
    before = weights["lm_head.weight"].detach().clone()
    weights["lm_head.weight"].grad = torch.ones(40, 16)
    with pytest.raises(RecipeError, match="schedule, step 3 of 10"):
        optim.step(3, 10)
    assert torch.equal(weights["lm_head.weight"], before)


# ---------------------------------------------------------------- clipping


def test_clip_returns_the_global_norm_and_scales_once():
    weights = params()
    optim = muonclip().build(weights.items(), [LAYOUT])
    for name, param in weights.items():
        param.grad = noise(name, tuple(param.shape))
    expected = torch.cat([param.grad.flatten() for param in weights.values()]).double().norm()
    assert optim.clip(None) == pytest.approx(float(expected), rel=1e-6)
    assert optim.clip(1e6) == pytest.approx(float(expected), rel=1e-6)
    assert optim.clip(0.5) == pytest.approx(float(expected), rel=1e-6)
    assert optim.clip(0.5) == pytest.approx(0.5, rel=1e-5)


def test_clip_equals_torchs():
    ours, theirs = params(), params()
    for weights in (ours, theirs):
        for name, param in weights.items():
            param.grad = noise(name, tuple(param.shape))
    muonclip().build(ours.items(), []).clip(1.0)
    torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
    for name in SHAPES:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-7, rtol=1e-6)


def test_clip_sums_bfloat16_gradients_in_float32():
    weights = {"a.weight": nn.Parameter(torch.zeros(1000, 1000, dtype=torch.bfloat16))}
    optim = AdamW(lr=1.0).build(weights.items(), [])
    weights["a.weight"].grad = torch.full((1000, 1000), 1.0078125, dtype=torch.bfloat16)
    assert optim.clip(None) == pytest.approx(1007.8125, rel=1e-4)  # bfloat16 would say 1008


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clip_leaves_gradients_alone_when_the_norm_is_not_finite(bad):
    weights = params()
    optim = muonclip().build(weights.items(), [])
    for name, param in weights.items():
        param.grad = noise(name, tuple(param.shape))
    weights["lm_head.weight"].grad[0, 0] = bad
    kept = weights["model.embed_tokens.weight"].grad.clone()
    assert not torch.isfinite(torch.tensor(optim.clip(1.0)))
    assert torch.equal(weights["model.embed_tokens.weight"].grad, kept)


def test_no_gradient_at_all_is_an_error():
    weights = params()
    optim = muonclip().build(weights.items(), [])
    for call in (lambda: optim.clip(1.0), lambda: optim.step(0, 10)):
        with pytest.raises(NumericsError, match="no parameter has a gradient"):
            call()


def test_zero_grad_drops_gradients():
    weights = params()
    optim = muonclip().build(weights.items(), [])
    for param in weights.values():
        param.grad = torch.ones_like(param)
    optim.zero_grad()
    assert all(param.grad is None for param in weights.values())


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config", [muonclip(), muonclip(ns_dtype="bf16", per_head=True), AdamW(lr=0.01, schedule=WSD(warmup=2, decay=4))]
)
def test_continuation_from_saved_state_is_bit_exact(config, dtype, tmp_path):
    straight = params(dtype)
    skip = {(1, "lm_head.weight"), (2, "model.layers.0.mlp.experts.gate_up_proj")}
    infos = advance(straight, config.build(straight.items(), [LAYOUT]), range(6), skip=skip)

    first = params(dtype)
    optim = config.build(first.items(), [LAYOUT])
    advance(first, optim, range(3), skip=skip)
    safetensors.torch.save_file(optim.state_tensors(), tmp_path / "optim.safetensors")
    second = {name: nn.Parameter(param.detach().clone()) for name, param in first.items()}
    resumed = config.build(second.items(), [LAYOUT])
    resumed.load_state_tensors(safetensors.torch.load_file(tmp_path / "optim.safetensors"))
    assert resumed.scalars() == optim.scalars() and resumed.scalars()["updates"] == 3
    rest = advance(second, resumed, range(3, 6), skip=skip)

    assert rest == infos[3:]
    for name in SHAPES:
        assert torch.equal(second[name], straight[name]), name
    assert bool(infos[0].clipped) == isinstance(config, MuonClip)


def test_state_names_are_deterministic_and_complete():
    weights = params(torch.bfloat16)
    optim = muonclip().build(weights.items(), [LAYOUT])
    names = set(optim.state_tensors())
    muon = [name for name in SHAPES if "_b_proj" in name or "experts" in name]
    rest = [name for name in SHAPES if name not in muon]
    assert names == (
        {f"muon.momentum/{name}" for name in muon}
        | {f"adamw.{kind}/{name}" for name in rest for kind in ("exp_avg", "exp_avg_sq")}
        | {f"master/{name}" for name in SHAPES}
        | {"adamw.steps", "optim.scalars"}
    )
    advance(weights, optim, range(1))
    assert set(optim.state_tensors()) == names
    assert json.loads(json.dumps(optim.scalars())) == optim.scalars()


def test_another_table_is_refused_before_anything_changes():
    weights, other = params(), params()
    optim = muonclip().build(weights.items(), [LAYOUT])
    advance(weights, optim, range(2))
    for different in (muonclip(weight_decay=0.2), muonclip(per_head=True), muonclip(adamw_lr=0.5), AdamW(lr=0.01)):
        fresh = different.build(other.items(), [LAYOUT])
        with pytest.raises(CheckpointError, match="another parameter -> optimizer table"):
            fresh.load_state_tensors(optim.state_tensors())
        assert fresh.scalars()["updates"] == 0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("optim.scalars"), "no optimizer state"),
        (lambda s: s.update({"optim.scalars": torch.tensor([1, 2], dtype=torch.uint8)}), "not JSON"),
        (lambda s: s.pop("adamw.exp_avg/lm_head.weight"), "1 missing"),
        (lambda s: s.update({"adamw.exp_avg/ghost": torch.zeros(1)}), "1 unknown"),
        (lambda s: s.update({"adamw.exp_avg/lm_head.weight": torch.zeros(16, 40)}), "does not fit"),
        (lambda s: s.update({"adamw.exp_avg/lm_head.weight": torch.zeros(40, 16).double()}), "does not fit"),
        (lambda s: s.update({"adamw.steps": torch.zeros(1)}), "does not fit"),
    ],
)
def test_spoiled_state_is_refused_before_anything_changes(spoil, message):
    weights, other = params(), params()
    optim = muonclip().build(weights.items(), [LAYOUT])
    advance(weights, optim, range(2))
    state = optim.state_tensors()
    spoil(state)
    fresh = muonclip().build(other.items(), [LAYOUT])
    with pytest.raises(CheckpointError, match=message):
        fresh.load_state_tensors(state)
    assert not any(tensor.any() for name, tensor in fresh.state_tensors().items() if name != "optim.scalars")


def test_the_number_type_that_auto_chose_is_kept_on_resume(monkeypatch):
    weights = params()
    for chosen, other in ((True, False), (False, True)):
        monkeypatch.setattr("k2lab.optim._muon.choose_bf16", lambda device, bf16=chosen: (bf16, "measured"))
        began = muonclip(ns_dtype="auto").build(weights.items(), [LAYOUT])
        monkeypatch.setattr("k2lab.optim._muon.choose_bf16", lambda device, bf16=other: (bf16, "measured"))
        resumed = muonclip(ns_dtype="auto").build(params().items(), [LAYOUT])
        assert resumed.scalars()["ns_dtype"] != began.scalars()["ns_dtype"]
        resumed.load_state_tensors(began.state_tensors())
        assert resumed.scalars()["ns_dtype"] == began.scalars()["ns_dtype"]
        assert "kept from the checkpoint" in resumed.table_text()
        fixed = muonclip(ns_dtype="bf16" if other else "fp32").build(params().items(), [LAYOUT])
        fixed.load_state_tensors(began.state_tensors())
        assert fixed.scalars()["ns_dtype"] == ("bf16" if other else "fp32")


def test_the_choice_of_number_type_is_told():
    optim = MuonClip(lr=0.01).build(params().items(), [LAYOUT])
    assert optim.table_text().splitlines()[-1].startswith(f"Newton-Schulz in {optim.scalars()['ns_dtype']}: ")
    assert optim.scalars()["ns_dtype"] == ("bf16" if _newton_schulz.choose_bf16(torch.device("cpu"))[0] else "fp32")
    assert AdamW(lr=0.01).build(params().items(), []).scalars()["ns_dtype"] is None


# ---------------------------------------------------------------- masters


@pytest.mark.parametrize("config", [muonclip(), AdamW(lr=0.01, schedule=WSD(warmup=2, decay=4))])
def test_masters_follow_the_float32_run_and_parameters_are_their_rounding(config):
    low = params(torch.bfloat16)
    full = {name: nn.Parameter(param.detach().float()) for name, param in low.items()}
    a, b = config.build(low.items(), [LAYOUT]), config.build(full.items(), [LAYOUT])
    for step in range(4):
        for name in SHAPES:
            low[name].grad = noise(f"{name} {step}", SHAPES[name], torch.bfloat16)
            full[name].grad = low[name].grad.float()
        assert a.step(step, 10, MAXIMA) == b.step(step, 10, MAXIMA)
    for name in SHAPES:
        torch.testing.assert_close(a.masters[name], full[name].detach(), atol=1e-6, rtol=0)
        assert torch.equal(low[name], a.masters[name].to(torch.bfloat16))


def test_small_updates_survive_only_in_a_master():
    moved = {}
    for master in ("auto", "off"):
        weights = {"a.weight": nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))}
        optim = AdamW(lr=1e-4, weight_decay=0.0, schedule=Constant(), master=master).build(weights.items(), [])
        for step in range(100):
            weights["a.weight"].grad = torch.ones(8, 8, dtype=torch.bfloat16)
            optim.step(step, 100)
        moved[master] = bool((weights["a.weight"] != 1).all())
        assert bool(optim.masters) == (master == "auto")
    assert moved == {"auto": True, "off": False}


def test_float32_parameters_need_no_masters():
    assert muonclip().build(params().items(), [LAYOUT]).masters == {}


def test_masters_off_trains_bfloat16_with_muon_too():
    weights = params(torch.bfloat16)
    before = {name: param.detach().clone() for name, param in weights.items()}
    optim = muonclip(master="off", lr=0.1).build(weights.items(), [LAYOUT])
    advance(weights, optim, range(2))
    assert all(param.dtype == torch.bfloat16 and param.isfinite().all() for param in weights.values())
    assert all(not torch.equal(weights[name], before[name]) for name in SHAPES)


# ---------------------------------------------------------------- offload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [muonclip(), muonclip(momentum_dtype="bf16"), AdamW(lr=0.01, schedule=Constant())])
def test_state_on_the_host_changes_nothing(config, dtype):
    skip = {(1, "lm_head.weight"), (2, "model.layers.0.mlp.experts.gate_up_proj")}
    here, there = params(dtype), params(dtype)
    optims = [dataclasses.replace(config, offload=o).build(w.items(), [LAYOUT]) for o, w in (("off", here), ("cpu", there))]
    infos = [advance(w, optim, range(4), skip=skip) for w, optim in zip((here, there), optims)]
    assert infos[0] == infos[1]
    assert ["in the host's memory" in optim.table_text() for optim in optims] == [False, True]
    assert all(torch.equal(here[name], there[name]) for name in SHAPES)
    states = [optim.state_tensors() for optim in optims]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
