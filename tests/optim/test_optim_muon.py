"""Muon against an explicit per-matrix reference and torch.optim.Muon; update size; splits; decay; stacking."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2lab.core.rng import derive
from k2lab.core.types import RowLayout
from k2lab.optim import _muon
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

SHAPES = {
    "model.layers.0.self_attn.q_b_proj.weight": (96, 32),
    "model.layers.0.self_attn.kv_b_proj.weight": (128, 16),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.1.mlp.gate.weight": (8, 64),
    "model.layers.1.mlp.experts.gate_up_proj": (8, 64, 64),
    "model.layers.1.mlp.experts.down_proj": (8, 64, 32),
    "model.layers.1.mlp.shared_experts.gate_proj.weight": (32, 64),
}
LAYOUT = RowLayout(0, "model.layers.0.self_attn.q_b_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight", 4, 16, 8, 16)


def noise(key: str, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive(0, key) % 2**63)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def params(dtype=torch.float32, shapes=SHAPES) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(0.1 * noise(name, shape, dtype)) for name, shape in shapes.items()}


def settings(**changes) -> MuonClip:
    return MuonClip(**{"lr": 0.02, "schedule": Constant(), "ns_dtype": "fp32", **changes})


def run(weights: dict[str, nn.Parameter], config: MuonClip, steps: int = 3, layouts=()) -> None:
    optim = config.build(weights.items(), list(layouts))
    for step in range(steps):
        for name, param in weights.items():
            param.grad = noise(f"{name} {step}", tuple(param.shape), param.dtype)
        optim.step(step, steps)


def reference_muon(weight: torch.Tensor, grads: list[torch.Tensor], config: MuonClip) -> torch.Tensor:
    """Muon on one matrix, straight from the formulas, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad in grads:
        momentum = config.momentum * momentum + grad.double()
        x = grad.double() + config.momentum * momentum if config.nesterov else momentum
        x = x / (x.norm() + 1e-7)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(config.ns_steps):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        weight = weight - config.lr * (0.2 * max(weight.shape) ** 0.5 * x + config.weight_decay * weight)
    return weight


def matrices(name: str, tensor: torch.Tensor, per_head: bool) -> list[torch.Tensor]:
    """The matrices of a parameter, as its name says."""
    if tensor.ndim == 3:
        halves = [half for expert in tensor for half in (expert.chunk(2) if "gate_up" in name else [expert])]
        return list(halves)
    return list(tensor.chunk(4)) if per_head and "_b_proj" in name else [tensor]


@pytest.mark.parametrize("changes", [{}, {"nesterov": False}, {"per_head": True}, {"weight_decay": 0.0, "ns_steps": 3}])
def test_every_matrix_follows_the_formulas(changes):
    config, weights = settings(**changes), params()
    before = {name: param.detach().clone() for name, param in weights.items()}
    run(weights, config, layouts=[LAYOUT])
    for name, param in weights.items():
        grads = [matrices(name, noise(f"{name} {step}", tuple(param.shape)), config.per_head) for step in range(3)]
        starts = matrices(name, before[name], config.per_head)
        for index, (start, end) in enumerate(zip(starts, matrices(name, param.detach(), config.per_head))):
            expected = reference_muon(start, [grad[index] for grad in grads], config)
            torch.testing.assert_close(end.double(), expected, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_float64_parameters_are_trained_in_float64():
    config, weights = settings(), params(torch.float64)
    name = "model.layers.0.self_attn.o_proj.weight"
    start = weights[name].detach().clone()
    run(weights, config)
    expected = reference_muon(start, [noise(f"{name} {step}", (64, 64), torch.float64) for step in range(3)], config)
    torch.testing.assert_close(weights[name].detach(), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("ns_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_within_its_bfloat16(ns_dtype, nesterov):
    flat = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    ours, theirs = params(shapes=flat), params(shapes=flat)
    start = {name: param.detach().clone() for name, param in ours.items()}
    rival = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    run(ours, settings(ns_dtype=ns_dtype, nesterov=nesterov), steps=3)
    for step in range(3):
        for name, param in theirs.items():
            param.grad = noise(f"{name} {step}", tuple(param.shape))
        rival.step()
    for name in flat:
        moved, expected = ours[name].detach() - start[name], theirs[name].detach() - start[name]
        assert (moved - expected).norm() < 0.02 * expected.norm(), name


def test_torch_muon_rejects_the_experts_that_we_batch():
    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([params()["model.layers.1.mlp.experts.down_proj"]])


@pytest.mark.parametrize("per_head", [False, True])
def test_update_rms_is_that_of_adamw(per_head):
    config, weights = settings(weight_decay=0.0, per_head=per_head), params()
    before = {name: param.detach().clone() for name, param in weights.items()}
    run(weights, config, steps=1, layouts=[LAYOUT])
    for name, param in weights.items():
        rms = (param.detach() - before[name]).square().mean().sqrt() / config.lr
        assert 0.15 < rms < 0.25, (name, float(rms))


def test_gate_and_up_are_orthogonalised_apart():
    name = "model.layers.1.mlp.experts.gate_up_proj"
    fused = {name: params()[name]}
    apart = {
        f"model.layers.1.mlp.experts.{half}": nn.Parameter(fused[name].detach().chunk(2, dim=1)[index].clone())
        for index, half in enumerate(("gate_proj", "up_proj"))
    }
    grad = noise("grad", (8, 64, 64))
    grad[:, :32] *= 100.0  # fused orthogonalisation would drown the up half
    for weights in (fused, apart):
        optim = settings().build(weights.items(), [])
        for index, param in enumerate(weights.values()):
            param.grad = grad if len(weights) == 1 else grad.chunk(2, dim=1)[index].clone()
        optim.step(0, 1)
    together = torch.cat([param.detach() for param in apart.values()], dim=1)
    torch.testing.assert_close(fused[name].detach(), together, atol=1e-7, rtol=0)


def test_per_head_is_a_switch_and_changes_only_the_named_projections():
    whole, split = params(), params()
    run(whole, settings(), steps=1, layouts=[LAYOUT])
    run(split, settings(per_head=True), steps=1, layouts=[LAYOUT])
    for name in SHAPES:
        same = torch.allclose(whole[name], split[name], atol=1e-6)
        assert same == (name not in (LAYOUT.q, LAYOUT.kv)), name


def test_decay_uses_the_raw_learning_rate():
    weights = params()
    before = {name: param.detach().clone() for name, param in weights.items()}
    optim = settings(lr=0.5, weight_decay=0.1).build(weights.items(), [])
    for param in weights.values():
        param.grad = torch.zeros_like(param)
    optim.step(0, 1)
    for name, param in weights.items():
        torch.testing.assert_close(param.detach(), before[name] * 0.95, atol=0, rtol=1e-6)


def test_stack_size_does_not_change_the_update(monkeypatch):
    large, small = params(), params()
    run(large, settings())
    monkeypatch.setattr(_muon, "STACK_ELEMENTS", {"cpu": 3 * 32 * 64})  # three expert matrices: cuts through parameters
    run(small, settings())
    for name in SHAPES:
        torch.testing.assert_close(small[name], large[name], atol=1e-6, rtol=0)


def test_a_parameter_without_gradient_is_left_alone():
    weights = params()
    idle = "model.layers.1.mlp.experts.down_proj"
    before = weights[idle].detach().clone()
    optim = settings().build(weights.items(), [])
    for name, param in weights.items():
        param.grad = None if name == idle else noise(name, tuple(param.shape))
    optim.step(0, 1)
    assert torch.equal(weights[idle], before)
    assert not optim.state_tensors()[f"muon.momentum/{idle}"].any()


def test_gradient_accumulation_in_any_cut_gives_the_same_step():
    x, y = noise("x", (32, 16)), noise("y", (32, 8))
    ends = []
    for micro in (1, 4):
        weights = {"proj.weight": nn.Parameter(0.1 * noise("w", (8, 16)))}
        optim = settings().build(weights.items(), [])
        for xs, ys in zip(x.chunk(micro), y.chunk(micro)):
            ((xs @ weights["proj.weight"].T - ys).square().sum() / 32).backward()
        optim.clip(1.0)
        optim.step(0, 1)
        ends.append(weights["proj.weight"].detach())
    torch.testing.assert_close(ends[0], ends[1], atol=1e-6, rtol=0)


def test_adamw_lr_moves_only_what_adamw_owns():
    shapes = {"model.embed_tokens.weight": (16, 8), "proj.weight": (8, 16)}
    plain, scaled = params(shapes=shapes), params(shapes=shapes)
    start = {name: param.detach().clone() for name, param in plain.items()}
    run(plain, settings(weight_decay=0.0), steps=1)
    run(scaled, settings(weight_decay=0.0, adamw_lr=0.002), steps=1)
    assert torch.equal(plain["proj.weight"], scaled["proj.weight"])
    moved = [x["model.embed_tokens.weight"].detach() - start["model.embed_tokens.weight"] for x in (plain, scaled)]
    torch.testing.assert_close(moved[1], moved[0] * 0.1, atol=1e-6, rtol=0)
