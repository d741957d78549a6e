"""The FP8 grid: against float64, every code, transformers' dequantisation, ragged blocks, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import fp8

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(torch.float32).max
TINY = 2.0**-126


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(E4M3)


def e4m3(code: int) -> float:
    """The value of a code by the format's definition."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def test_every_code_is_decoded() -> None:
    expected = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
    for scale in (1.0, 2.0**-126, 3.7e-5, 7.59e35):
        factor = torch.tensor(scale)
        found = fp8.dequantise(every_code()[None], factor.expand(1, 2).contiguous())[0]
        exact = (expected * factor.double()).float()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0), exact.nan_to_num(0)) and torch.equal(found.signbit()[:127], exact.signbit()[:127])


def test_the_rule_against_float64() -> None:
    w = draw(300, 200) * torch.logspace(-4, 2, 300)[:, None]
    codes, scales = fp8.fp8_grid(w)
    assert codes.dtype == E4M3 and scales.shape == (3, 2) and scales.dtype == torch.float32
    numbers = np.array([e4m3(code) for code in range(127)])
    for i in range(3):
        for j in range(2):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            block = w[rows, columns].double()
            scale = (block.abs().max() / 448).float()
            assert scales[i, j] == scale
            quotient = (block / scale.double()).float().double().clamp(-448, 448).numpy()
            # the nearest number of the format; of two, the one with the even mantissa
            distance = np.abs(np.abs(quotient)[..., None] - numbers)
            nearest = distance.min(-1, keepdims=True)
            candidates = np.where(distance == nearest, np.arange(127) % 2, 2).argmin(-1)
            found = codes[rows, columns].contiguous().view(torch.uint8).numpy()
            assert np.array_equal(found & 127, candidates)
            assert np.array_equal((found >> 7).astype(bool), np.signbit(quotient))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 1), (3, 5, 200), (2, 2, 129, 128)])
def test_the_grid_keeps_its_values(shape: tuple[int, ...]) -> None:
    w = draw(*shape)
    codes, scales = fp8.fp8_grid(w)
    values = fp8.dequantise(codes, scales)
    again, scales_again = fp8.fp8_grid(values)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8)) and torch.equal(scales, scales_again)
    assert torch.equal(fp8.dequantise(again, scales_again), values)
    assert float((values - w).abs().max() / w.abs().max()) < 0.04
    # through bf16 the codes survive
    rounded, _ = fp8.fp8_grid(values.to(torch.bfloat16))
    assert torch.equal(rounded.view(torch.uint8), codes.view(torch.uint8))


def test_every_mantissa_of_the_largest_weight_is_kept() -> None:
    """2^19 of the 2^23 fp32 mantissas, the first and last 2^18, each as largest weight of a block of its own."""
    part = torch.arange(1 << 18)
    mantissas = torch.cat([part, (1 << 23) - 1 - part]).to(torch.int32)
    top = (mantissas + (127 << 23)).view(torch.float32)
    for piece in top.split(1 << 15):
        w = torch.stack([piece, *(piece * share for share in (-1.0, 0.9, 0.3, 0.01, -0.003, 1e-5))], dim=1)
        blocks = torch.zeros(len(piece), 1, 8)
        blocks[:, 0, :7] = w
        amax = blocks.abs().amax((1, 2))
        scales = amax / 448
        codes = (blocks / scales[:, None, None]).clamp(-448, 448).to(E4M3)
        values = codes.float() * scales[:, None, None]
        assert torch.equal(values.abs().amax((1, 2)) / 448, scales)
    some = torch.cat([top[:: 1 << 12], top[-64:]])[:, None, None]
    codes, scales = fp8.fp8_grid(some)
    assert torch.equal(scales.flatten(), (some / 448).flatten()) and bool((codes.float() == 448).all())


def test_limits() -> None:
    w = torch.zeros(128, 512)
    w[3, 130], w[4, 260], w[5, 400] = LARGEST, 2.0**-149, -448 * TINY
    codes, scales = fp8.fp8_grid(w)
    assert scales[0].tolist() == [1.0, 9586980 * 2.0**96, TINY, TINY]
    values = fp8.dequantise(codes, scales)
    assert values.isfinite().all()
    assert values[3, 130] == torch.tensor(448.0) * scales[0, 1] and values[5, 400] == -448 * TINY
    assert not values[:, :128].any() and values[4, 260] == 0
    again, scales_again = fp8.fp8_grid(values)
    # a block whose values all became 0 is one of zeros
    assert scales_again[0].tolist() == [1.0, 9586980 * 2.0**96, 1.0, TINY]
    assert torch.equal(again.float(), codes.float())


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_seen(odd: float) -> None:
    w = draw(200, 300)
    w[150, 140] = odd
    codes, scales = fp8.fp8_grid(w)
    assert scales.isnan().tolist() == [[False] * 3, [False, True, False]]
    values = fp8.dequantise(codes, scales)
    where = torch.zeros(200, 300, dtype=torch.bool)
    where[128:, 128:256] = True
    assert torch.equal(values.isnan(), where)
    with pytest.raises(NumericsError, match=r"1 blocks with NaN or infinity, the first at \[1, 1\]"):
        fp8.quantise(w)


def test_dequantisation_equals_transformers() -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    codes, scales = fp8.fp8_grid(draw(256, 384))
    op = finegrained.Fp8Dequantize(None)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = op._dequantize_one(codes, scales, output_dtype=dtype)
        assert torch.equal(fp8.dequantise(codes, scales, dtype), theirs)


def test_quantise_gives_the_grid() -> None:
    w = draw(130, 70).to(torch.bfloat16)
    codes, scales = fp8.quantise(w)
    expected, expected_scales = fp8.fp8_grid(w.float())
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(scales, expected_scales)


def test_what_is_refused() -> None:
    codes, scales = fp8.fp8_grid(draw(200, 300))
    with pytest.raises(CheckpointError, match=r"do not fit.*\[2, 3\]"):
        fp8.dequantise(codes, scales[:, :2].contiguous())
    with pytest.raises(CheckpointError, match="float32 scales"):
        fp8.dequantise(codes, scales.to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        fp8.dequantise(codes.float(), scales)
    with pytest.raises(CheckpointError, match="floating-point matrix"):
        fp8.fp8_grid(torch.zeros(128))
    with pytest.raises(CheckpointError, match="floating-point matrix"):
        fp8.fp8_grid(torch.zeros(4, 4, dtype=torch.int32))
