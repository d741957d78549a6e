"""The same update on a GPU as on the CPU, the kernels against float32, and the choices that a GPU makes by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from k2lab.core.rng import derive
from k2lab.core.types import RowLayout
from k2lab.optim import _newton_schulz as ns
from k2lab.optim import _ns_fused
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_hopper = pytest.mark.skipif(not HOPPER, reason="the kernels are for compute capability 9.x")

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "a.q_b_proj.weight": (48, 32),
    "a.kv_b_proj.weight": (64, 16),
    "mlp.experts.gate_up_proj": (4, 64, 32),
    "mlp.experts.down_proj": (4, 40, 24),
    "mlp.gate.weight": (12, 32),
    "norm.weight": (32,),
}
LAYOUT = RowLayout(0, "a.q_b_proj.weight", "a.kv_b_proj.weight", 2, 16, 8, 16)
MUON = MuonClip(lr=0.01, schedule=Constant())


def noise(*key: str | int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive(3, *key) % 2**63))


def run(device: str, dtype: torch.dtype, config: MuonClip, steps: int = 3) -> tuple[dict[str, torch.Tensor], object]:
    weights = {name: nn.Parameter((0.1 * noise(name, shape=shape)).to(device, dtype)) for name, shape in SHAPES.items()}
    optim = config.build(weights.items(), [LAYOUT])
    for step in range(steps):
        for name, param in weights.items():
            param.grad = noise("grad", name, step, shape=SHAPES[name]).to(device, dtype)
        optim.clip(1.0)
        assert optim.step(step, 3, {0: torch.tensor([250.0, 3.0], device=device)}).clipped == {0: [0]}
    return {name: param.detach().cpu().float() for name, param in weights.items()}, optim


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def test_gpu_equals_cpu_in_fp32():
    config = dataclasses.replace(MUON, ns_dtype="fp32")
    cpu, gpu = run("cpu", torch.float32, config)[0], run("cuda", torch.float32, config)[0]
    for name in SHAPES:
        torch.testing.assert_close(gpu[name], cpu[name], atol=1e-5, rtol=0)


def test_auto_is_16_bits_where_native_and_bfloat16_weights_have_masters():
    _, optim = run("cuda", torch.bfloat16, MUON)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert optim.scalars()["ns_dtype"] == ("mixed" if HOPPER else "bf16" if native else "fp32")
    assert ("symmetric products in Triton" in optim.table_text()) == HOPPER
    assert set(optim.masters) == set(SHAPES)
    for name, master in optim.masters.items():
        assert master.device.type == "cuda"
        assert torch.equal(optim.params[name], master.to(torch.bfloat16))


@needs_hopper
@pytest.mark.parametrize("shape", [(5, 256, 512), (3, 192, 328), (2, 64, 256), (3, 8, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_equal_float32_within_their_rounding_and_write_nothing_else(shape, dtype):
    from k2lab.optim import _ns_triton

    count, rows, cols = shape
    x = noise("x", shape=shape).cuda().to(dtype)
    c = noise("c", shape=(count, rows, rows)).cuda()
    c, scale = (c + c.mT).to(dtype), torch.rand(count, device="cuda") + 0.5
    wide = torch.full((count + 2, rows, rows), float("nan"), dtype=dtype, device="cuda")
    out = _ns_triton.symmetric(x, x, wide[1:-1], 1 / cols, plus=(0.7, c), scale_B=scale, diagonal=-1.5)
    exact = x.double() @ x.double().mT / cols + 0.7 * c.double()
    exact = exact * scale.double()[:, None, None] ** 2 - 1.5 * torch.eye(rows, device="cuda", dtype=torch.float64)
    bound = 1e-3 if dtype == torch.float16 else 5e-3
    assert relative(out, exact) < bound
    assert torch.equal(out, out.mT)
    assert wide[0].isnan().all() and wide[-1].isnan().all()
    wide = torch.full((count + 2, rows, cols), float("nan"), dtype=dtype, device="cuda")
    out = _ns_triton.times(c, x, wide[1:-1], 0.1, plus=(0.7, x), scale_B=scale)
    exact = (0.1 * c.double() @ x.double() + 0.7 * x.double()) * scale.double()[:, None, None]
    assert relative(out, exact) < bound
    assert wide[0].isnan().all() and wide[-1].isnan().all()
    assert relative(_ns_triton.times(c, x, torch.empty_like(x), 0.1), 0.1 * c.double() @ x.double()) < bound


@needs_hopper
@pytest.mark.parametrize("shape", [(4, 256, 512), (4, 256, 256), (2, 64, 512), (2, 192, 1536)])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_newton_schulz_is_as_close_to_float32_as_the_plain_bfloat16_quintic(shape, half):
    kernels, _ = _ns_fused.kernels(torch.device("cuda"))
    for x in (noise("x", shape=shape), noise("x", shape=shape) * torch.logspace(0, -3, shape[1])[:, None]):
        x = x.cuda()
        scale = 1.0 / torch.linalg.vector_norm(x, dim=(1, 2))
        exact = ns.newton_schulz(x.double(), 5, bf16=False)
        found, factor = _ns_fused.orthogonalise(x.to(torch.bfloat16), scale, 5, half, kernels)
        assert relative(found.double() * factor, exact) < 1.2 * relative(ns.newton_schulz(x, 5, bf16=True), exact)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ns_dtype, bound", [("auto", 0.04), ("fp16", 0.02), ("bf16", 0.04)])
def test_fused_passes_make_the_update_that_float32_makes(dtype, ns_dtype, bound):
    start = {name: (0.1 * noise(name, shape=shape)).to(dtype).float() for name, shape in SHAPES.items()}
    config = dataclasses.replace(MUON, ns_dtype=ns_dtype)
    fused, optim = run("cuda", dtype, config)
    torch_made, other = run("cuda", dtype, dataclasses.replace(config, ns_dtype="fp32"))
    for name in SHAPES:
        mine = optim.masters[name].cpu() if optim.masters else fused[name]
        theirs = other.masters[name].cpu() if other.masters else torch_made[name]
        assert relative(mine - start[name], theirs - start[name]) < bound, name
        if optim.masters:
            assert torch.equal(optim.params[name], optim.masters[name].to(dtype)), name
    for key, momentum in optim.muon.state().items():
        torch.testing.assert_close(momentum, other.muon.state()[key], atol=1e-6, rtol=1e-6)


@needs_hopper
def test_a_run_goes_on_with_other_kernels():
    _, began = run("cuda", torch.bfloat16, MUON)
    state = {name: tensor.clone() for name, tensor in began.state_tensors().items()}
    ends = []
    for kernel in ("auto", "torch"):
        weights = {name: nn.Parameter(param.detach().clone()) for name, param in began.params.items()}
        optim = dataclasses.replace(MUON, ns_kernel=kernel).build(weights.items(), [LAYOUT])
        optim.load_state_tensors(state)
        assert optim.scalars() == began.scalars()
        for name, param in weights.items():
            param.grad = noise("next", name, shape=SHAPES[name]).cuda().to(torch.bfloat16)
        optim.step(3, 10)
        ends.append({name: optim.masters[name] - state[f"master/{name}"] for name in SHAPES})
    assert all(relative(ends[0][name], ends[1][name]) < 0.02 for name in SHAPES)


@needs_hopper
def test_stochastic_rounding_is_right_in_the_mean_and_depends_on_the_update_only():
    from k2lab.optim import _muon_triton

    weight = torch.ones(2, 256, 512, device="cuda", dtype=torch.bfloat16)
    update = torch.full((2, 256, 512), 0.3 * 2**-7, device="cuda", dtype=torch.float16)
    outs = []
    for seed, first in ((1, 0), (1, 0), (2, 0), (1, 5)):
        outs.append(weight.clone())
        _muon_triton.scatter(update, outs[-1], None, 1.0, 1.0, seed=seed, first=first)
        assert set(outs[-1].unique().tolist()) == {1.0, 1.0 + 2**-7}
        assert abs(float((outs[-1] > 1).float().mean()) - float(update[0, 0, 0]) * 2**7) < 0.005
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[3])
    assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_on_the_host_changes_nothing(dtype):
    (here, one), (there, two) = (run("cuda", dtype, dataclasses.replace(MUON, offload=o)) for o in ("off", "cpu"))
    assert all(torch.equal(here[name], there[name]) for name in SHAPES)
    states = one.state_tensors(), two.state_tensors()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.cpu(), states[1][name].cpu()), name
    assert all(tensor.is_pinned() for name, tensor in states[1].items() if name.startswith(("muon", "adamw.exp", "master")))


def test_an_update_never_waits_for_the_gpu():
    _, optim = run("cuda", torch.bfloat16, MUON)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            optim.muon.update(0.01, 3)
            optim.adamw.update(0.01, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
