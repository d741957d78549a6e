"""Newton-Schulz: the Gram form against the plain one and both against float64, over well- and ill-conditioned spectra."""

from __future__ import annotations

import pytest
import torch

from k2lab.core.rng import derive
from k2lab.optim import _newton_schulz as ns


def spectra(rows: int, cols: int) -> dict[str, torch.Tensor]:
    """Matrices [2, rows, cols] in float64 whose singular values are flat, spread over many decades, or mostly zero."""
    generator = torch.Generator().manual_seed(derive(0, "spectra", rows, cols) % 2**63)
    random = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(2, rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(2, cols, rows, generator=generator, dtype=torch.float64))[0]
    zeros = torch.zeros(rows, dtype=torch.float64)
    values = {
        "flat": zeros + 1,
        "3 decades": torch.logspace(0, -3, rows, dtype=torch.float64),
        "10 decades": torch.logspace(0, -10, rows, dtype=torch.float64),
        "rank 1": zeros.index_fill(0, torch.tensor([0]), 1.0),
    }
    return {"random": random} | {name: (left * value) @ right.mT for name, value in values.items()}


SHAPES = [(8, 64), (64, 256), (128, 256), (96, 768)]


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_gram_form_equals_plain_form_and_float64(rows, cols):
    assert ns.gram_is_cheaper(rows, cols, 5)
    for name, x in spectra(rows, cols).items():
        exact = ns.newton_schulz(x, 5, bf16=False)
        assert exact.dtype == torch.float64
        fast = ns.newton_schulz(x.float(), 5, bf16=False)
        unit = x.float() / (torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True) + ns.EPS)
        torch.testing.assert_close(fast, ns.plain(unit, 5), atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(fast.double(), exact, atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_without_its_restart_the_gram_form_would_fail_that_bound(monkeypatch):
    monkeypatch.setattr(ns, "GRAM_RESTART", 5)
    x = spectra(64, 256)["10 decades"]
    worst = (ns.gram((x / x.norm(dim=(1, 2), keepdim=True)).float(), 5).double() - ns.newton_schulz(x, 5, False)).abs().max()
    assert worst > 3e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_gram_form_of_any_number_of_steps(steps):
    x = spectra(16, 64)["random"]
    x = x / x.norm(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(ns.gram(x, steps), ns.plain(x, steps), atol=1e-12, rtol=0)


def test_square_matrices_take_the_plain_form():
    assert not ns.gram_is_cheaper(256, 256, 5)
    assert ns.gram_is_cheaper(512, 16384, 5)


def test_singular_values_end_near_one():
    for rows, cols in SHAPES:
        values = torch.linalg.svdvals(ns.newton_schulz(spectra(rows, cols)["random"], 5, False))
        assert values.min() > 0.6 and values.max() < 1.3


def test_bf16_is_the_plain_form_in_bfloat16_and_close():
    x = spectra(64, 256)["random"].float()
    rough = ns.newton_schulz(x, 5, bf16=True)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), ns.newton_schulz(x, 5, bf16=False), atol=2e-2, rtol=0)


def test_input_is_left_alone_scale_does_not_matter_and_zero_stays_zero():
    x = spectra(8, 64)["random"].float()
    before = x.clone()
    small = ns.newton_schulz(x * 0.01, 5, False)
    torch.testing.assert_close(ns.newton_schulz(x, 5, False), small, atol=1e-5, rtol=0)
    assert torch.equal(x, before)
    assert torch.equal(ns.newton_schulz(torch.zeros(2, 4, 8), 5, False), torch.zeros(2, 4, 8))


def test_one_bad_matrix_does_not_spoil_its_stack():
    x = spectra(8, 64)["random"].float()
    clean = ns.newton_schulz(x, 5, False)
    x[0, 0, 0] = float("nan")
    mixed = ns.newton_schulz(x, 5, False)
    assert mixed[0].isnan().any() and torch.equal(mixed[1], clean[1])


def test_auto_needs_native_bfloat16_and_a_clear_gain(monkeypatch):
    cpu = torch.device("cpu")
    for unit, ratio, expected in (("", 0.1, False), ("amx", 0.4, True), ("amx", 0.95, False)):
        ns.choose_bf16.cache_clear()
        monkeypatch.setattr(ns, "_native_bf16", lambda unit=unit: unit)
        monkeypatch.setattr(ns, "_trial", lambda ratio=ratio: ratio)
        chosen, reason = ns.choose_bf16(cpu)
        assert chosen is expected
        assert reason.startswith("bf16" if expected else "fp32")
    ns.choose_bf16.cache_clear()


def test_the_trial_restores_the_number_of_threads():
    before = torch.get_num_threads()
    assert ns._trial() > 0
    assert torch.get_num_threads() == before
