"""Newton-Schulz in 16 bits by fused products: its error against the plain bfloat16 quintic, its forms, and what takes it.

The products are torch's here, with float32 sums as on a GPU; the kernels themselves are tested in test_optim_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2lab.core.rng import derive
from k2lab.optim import _muon, _ns_fused, _ns_torch
from k2lab.optim import _newton_schulz as ns
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

FP16, BF16 = torch.float16, torch.bfloat16


def spectra(rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Matrices [1, rows, cols] in float32: random, with rows of very different size, outliers, and of many condition numbers."""
    generator = torch.Generator().manual_seed(derive(0, "fused", rows, cols) % 2**63)
    random = torch.randn(1, rows, cols, generator=generator)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, rows, generator=generator, dtype=torch.float64))[0]
    values = {
        "flat": torch.ones(rows),
        "3 decades": torch.logspace(0, -3, rows),
        "10 decades": torch.logspace(0, -10, rows),
        "8 large": torch.cat([torch.ones(8), 1e-2 * torch.ones(rows - 8)]),
        "1 large": torch.cat([torch.ones(1), 1e-3 * torch.ones(rows - 1)]),
    }
    found = {
        "random": random,
        "rows": random * torch.logspace(0, -4, rows)[:, None],
        "outliers": random * (1 + 1000 * (torch.rand(1, rows, cols, generator=generator) < 1e-4)),
    }
    return found | {name: ((left * value) @ right.mT).float()[None] for name, value in values.items()}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(derive(1, "fused", *shape) % 2**63))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def fused(form, x: torch.Tensor, half: torch.dtype, steps: int = 5, size: float = 1.0) -> torch.Tensor:
    x = x * size
    scale = 1.0 / (torch.linalg.vector_norm(x, dim=(1, 2)) + ns.EPS)
    found, factor = form(x.to(BF16), scale, steps, half, _ns_torch)
    return found.float() * factor


@pytest.mark.parametrize("rows, cols", [(128, 256), (192, 192), (64, 512)])
@pytest.mark.parametrize("form, half, most", [("plain", BF16, 1.2), ("plain", FP16, 1.0), ("gram", FP16, 1.15)])
def test_error_stays_within_that_of_the_plain_bfloat16_quintic(rows, cols, form, half, most):
    for name, x in spectra(rows, cols).items():
        exact = ns.newton_schulz(x.double(), 5, bf16=False)
        plain = error(ns.newton_schulz(x, 5, bf16=True), exact)
        assert error(fused(getattr(_ns_fused, form), x, half), exact) < most * plain, name


def test_float16_is_much_finer_than_bfloat16_on_random_matrices():
    x = spectra(192, 192)["random"]
    exact = ns.newton_schulz(x.double(), 5, bf16=False)
    assert error(fused(_ns_fused.plain, x, FP16), exact) < 0.5 * error(fused(_ns_fused.plain, x, BF16), exact)


def test_the_gram_form_would_fail_in_bfloat16_so_it_is_not_taken_there(monkeypatch):
    x = spectra(128, 256)["3 decades"]
    exact = ns.newton_schulz(x.double(), 5, bf16=False)
    assert error(fused(_ns_fused.gram, x, BF16), exact) > 1.2 * error(ns.newton_schulz(x, 5, bf16=True), exact)
    taken = []
    for form in ("plain", "gram"):
        monkeypatch.setattr(_ns_fused, form, lambda *args, form=form: taken.append(form))
    for rows, cols, half in ((128, 256, BF16), (128, 256, FP16), (128, 128, FP16)):
        _ns_fused.orthogonalise(torch.zeros(1, rows, cols), torch.ones(1), 5, half, _ns_torch)
    assert taken == ["plain", "gram", "plain"]


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_any_number_of_steps(form, steps):
    x = spectra(128, 256)["random"]
    exact = ns.newton_schulz(x.double(), steps, bf16=False)
    assert error(fused(getattr(_ns_fused, form), x, FP16, steps), exact) < 0.02


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e3, 1e12])
def test_the_size_of_the_input_does_not_matter(size):
    x = spectra(128, 256)["3 decades"]
    exact = ns.newton_schulz(x.double() * size, 5, bf16=False)
    assert error(fused(_ns_fused.gram, x, FP16, size=size), exact) < 1.2 * error(ns.newton_schulz(x * size, 5, bf16=True), exact)


def test_zero_stays_zero_and_one_bad_matrix_does_not_spoil_its_stack():
    x = spectra(128, 256)["random"].repeat(3, 1, 1)
    x[1] = 0.0
    clean = fused(_ns_fused.gram, x, FP16)
    assert not clean[1].any()
    x[0, 0, 0] = float("nan")
    mixed = fused(_ns_fused.gram, x, FP16)
    assert mixed[0].isnan().any() and torch.equal(mixed[1:], clean[1:])


def test_symmetric_products_are_symmetric_to_the_bit():
    x = spectra(64, 96)["random"].to(BF16)
    out = _ns_torch.symmetric(x, x, torch.empty(1, 64, 64, dtype=FP16), 0.1)
    assert torch.equal(out, out.mT)
    torch.testing.assert_close(out.float(), 0.1 * x.float() @ x.float().mT, atol=1e-6, rtol=1e-3)


def test_float16_is_a_choice_on_any_device_and_kernels_may_change_on_resume():
    shape = (4, 64, 48)
    weights = {kind: nn.Parameter(0.1 * noise(*shape)) for kind in ("fp32", "fp16")}
    name = "mlp.experts.down_proj"
    for kind, param in weights.items():
        start = param.detach().clone()
        optim = MuonClip(lr=0.1, schedule=Constant(), ns_dtype=kind, weight_decay=0.0).build([(name, param)], [])
        param.grad = noise(*shape)
        optim.step(0, 1)
        param.data -= start
        state = optim.state_tensors()
    assert 0 < error(weights["fp16"].detach(), weights["fp32"].detach().double()) < 0.02
    assert optim.scalars()["ns_dtype"] == "fp16"
    resumed = MuonClip(lr=0.1, schedule=Constant(), ns_kernel="torch", weight_decay=0.0).build([(name, weights["fp32"])], [])
    resumed.load_state_tensors(state)
    assert resumed.scalars()["ns_dtype"] == "fp16"
    assert "fp16: kept from the checkpoint" in resumed.table_text()
    weights["fp32"].grad = torch.ones(shape)
    resumed.step(1, 2)
    assert weights["fp32"].isfinite().all()


def test_what_a_hopper_gpu_chose_goes_on_elsewhere_by_torch(monkeypatch):
    """A run begun in mixed types keeps them: float16 on Gram matrices of wide ones, bfloat16 for square ones."""
    shapes = {"wide.weight": (16, 64), "square.weight": (32, 32)}
    gpu = {name: nn.Parameter(0.1 * noise(*shape)) for name, shape in shapes.items()}
    monkeypatch.setattr(_ns_fused, "kernels", lambda device, wanted="auto": (_ns_torch, "as on a Hopper GPU"))
    began = MuonClip(lr=0.1, schedule=Constant()).build(gpu.items(), [])
    monkeypatch.undo()
    assert began.scalars()["ns_dtype"] == "mixed"
    taken = []
    monkeypatch.setattr(_muon, "newton_schulz", lambda x, *_: taken.append("bf16") or x)
    monkeypatch.setattr(_ns_fused, "gram", lambda x, *_: (taken.append("gram") or x, 1.0))
    resumed = MuonClip(lr=0.1, schedule=Constant()).build(gpu.items(), [])
    resumed.load_state_tensors(began.state_tensors())
    assert resumed.scalars()["ns_dtype"] == "mixed"
    for name, param in gpu.items():
        param.grad = noise(*shapes[name])
    resumed.step(0, 1)
    assert sorted(taken) == ["bf16", "gram"]


def test_where_there_are_no_kernels_torch_is_taken_and_the_reason_told():
    found, why = _ns_fused.kernels(torch.device("cpu"))
    assert found is None and why == "torch's products"
    found, why = _ns_fused.kernels(torch.device("cuda"), "torch")
    assert found is None and "as the recipe says" in why


def test_old_gpus_are_told_why_they_get_none(monkeypatch):
    _ns_fused.kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    found, why = _ns_fused.kernels(torch.device("cuda"))
    assert found is None and "this GPU has 8.0" in why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(_ns_fused, "find_spec", lambda name: None)
    _ns_fused.kernels.cache_clear()
    assert _ns_fused.kernels(torch.device("cuda"))[1].endswith("triton is not installed")
    _ns_fused.kernels.cache_clear()


def test_muon_by_stacks_in_float16_transposes_tall_matrices(monkeypatch):
    monkeypatch.setattr(_muon, "STACK_ELEMENTS", {"cpu": 3 * 64 * 48})
    g = noise(4, 64, 48)
    moved = {}
    for tall in (True, False):
        param = nn.Parameter(torch.zeros(4, 64, 48) if tall else torch.zeros(4, 48, 64))
        optim = MuonClip(lr=0.1, schedule=Constant(), ns_dtype="fp16").build([("mlp.experts.down_proj", param)], [])
        param.grad = (g if tall else g.mT).contiguous()
        optim.step(0, 1)
        moved[tall] = param.detach() if tall else param.detach().mT
    torch.testing.assert_close(moved[True], moved[False], atol=1e-6, rtol=1e-2)
