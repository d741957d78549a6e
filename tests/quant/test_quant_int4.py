"""The INT4 grid and its packing: the rule against a float64 reference, every bf16 number, compressed-tensors, what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import int4

TINY = 2.0**-126


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def positive_bf16() -> torch.Tensor:
    """Every finite bf16 number above 0, subnormal ones too."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)


def test_the_rule_in_exact_arithmetic() -> None:
    w = draw(64, 64, seed=1) * torch.logspace(-6, 4, 64)[:, None]
    codes, scales = int4.int4_grid(w)
    rounded = w.to(torch.bfloat16).double().unflatten(1, (2, 32))
    # float64 quotients of fp32 numbers, rounded to fp32, are fp32 quotients: 53 bits are more than twice 24
    divided = (rounded.abs().amax(-1) / 7).float().to(torch.bfloat16)
    assert torch.equal(bits(scales), bits(divided))
    exact = (rounded / divided.double()[..., None]).float().numpy()
    assert np.array_equal(codes.unflatten(1, (2, 32)).numpy(), np.clip(np.rint(exact), -7, 7).astype(np.int8))
    for row, column in ((0, 5), (17, 40), (63, 63)):
        value = Fraction(int(codes[row, column])) * Fraction(float(scales[row, column // 32]))
        assert float(int4.values(w)[row, column]) == float(torch.tensor(float(value)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_rounded_to_bf16_first(dtype: torch.dtype) -> None:
    w = draw(4, 64, dtype=dtype)
    codes, scales = int4.int4_grid(w)
    again, scales_again = int4.int4_grid(w.to(torch.bfloat16))
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)


def test_rounding_first_changes_codes() -> None:
    """A weight just above a tie in fp32 lies on it in bf16: the order of roundings is part of the rule."""
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 7.0, 2.5 + 2.0**-12
    assert int4.int4_grid(w)[0][0, :2].tolist() == [7, 2]


def test_ties_go_to_even_codes() -> None:
    w = torch.zeros(1, 32)
    w[0, :15] = torch.tensor([7, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, -0.5, -1.5, -2.5, -3.5, -4.5, -5.5, -6.5])
    codes, scales = int4.int4_grid(w)
    assert scales.item() == 1.0
    assert codes[0, :15].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 0, -2, -2, -4, -4, -6, -6]


def test_every_bf16_number_as_largest_of_a_group_is_kept_by_its_own_grid() -> None:
    """All 32639 positive numbers as largest weight, beside 31 parts of it: value -> grid gives the same codes, scales, values."""
    top = positive_bf16()
    parts = torch.cat([torch.ones(1), -torch.ones(1), torch.linspace(-1, 1, 30)])
    w = (top.double()[:, None] * parts.double()).to(torch.bfloat16)
    codes, scales = int4.int4_grid(w)
    values = int4.values(w)
    assert values.isfinite().all() and scales.isfinite().all()
    # zero or normal: nothing that an engine could flush
    assert bool(((values == 0) | (values.abs() >= TINY)).all()) and bool((scales >= TINY).all())
    again, scales_again = int4.int4_grid(values)
    assert torch.equal(codes, again) and torch.equal(bits(scales), bits(scales_again))
    assert torch.equal(bits(values), bits(int4.values(values)))
    assert torch.equal(bits(values), bits(int4.dequantise(*int4.quantise(w))))


def test_every_scale_that_the_rule_gives_keeps_every_code() -> None:
    """All scales that fresh weights can have, with all 15 codes: the round trip returns the same."""
    given = torch.unique(int4.int4_grid(positive_bf16()[:, None].expand(-1, 32))[1].flatten().float()).to(torch.bfloat16)
    codes = torch.tensor([[*range(-7, 8), *range(-7, 8), 7, -7]], dtype=torch.int8).expand(len(given), -1)
    values = int4.dequantise(int4.pack(codes), given[:, None])
    again, scales = int4.int4_grid(values)
    assert torch.equal(again, codes) and torch.equal(bits(scales[:, 0]), bits(given))


def test_the_scales_that_the_rule_never_gives() -> None:
    """Exactly 14 of 128 mantissas, and with code 7 in the group these are exactly the scales that a round trip changes."""
    top = (torch.arange(128, 256).float() * 2.0**-7).to(torch.bfloat16)
    reached = int4.int4_grid((torch.cat([top, top * 8])[:, None]).expand(-1, 32))[1].float()
    mantissas = set((reached / 2.0 ** reached.log2().floor() * 128).int().flatten().tolist())
    assert sorted(set(range(128, 256)) - mantissas) == list(range(148, 256, 8))
    codes = torch.tensor([[7] + [0] * 31], dtype=torch.int8).expand(128, -1)
    _, scales = int4.int4_grid(int4.dequantise(int4.pack(codes), top[:, None]))
    assert [m for m in range(128) if scales[m, 0] != top[m]] == list(range(20, 128, 8))


@pytest.mark.parametrize(
    ("top", "scale", "code"),
    [
        (0.0, TINY, 0),
        (2.0**-133, TINY, 0),  # the smallest bf16 number
        (2.0**-127, TINY, 0),  # half a scale: the tie goes to 0
        (2.0**-127 + 2.0**-133, TINY, 1),
        (3 * TINY, TINY, 3),
        (7 * TINY, TINY, 7),
        (14 * TINY, 2 * TINY, 7),
        (float(torch.finfo(torch.bfloat16).max), 145 * 2.0**118, 7),  # a scale of 146 x 2^118 would make 7 x scale infinite
    ],
)
def test_groups_at_the_limits_of_bf16(top: float, scale: float, code: int) -> None:
    w = torch.zeros(1, 32)
    w[0, 3] = -top
    codes, scales = int4.int4_grid(w)
    assert scales.item() == scale and codes[0, 3].item() == -code and codes.abs().sum() == code
    assert torch.equal(bits(int4.values(w)), bits(int4.dequantise(*int4.quantise(w))))


def test_zero_codes_are_positive_zeros() -> None:
    w = torch.full((1, 32), -1e-3)
    w[0, 0] = 1.0
    assert int4.values(w)[0, 1:].tolist() == [0.0] * 31
    assert not int4.values(w)[0, 1:].signbit().any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_seen(odd: float) -> None:
    w = draw(3, 96)
    w[1, 40] = odd
    codes, scales = int4.int4_grid(w)
    where = torch.zeros(3, 3, dtype=torch.bool)
    where[1, 1] = True
    assert torch.equal(scales.isnan(), where)
    assert not codes[1, 32:64].any() and codes[1, :32].any()
    values = int4.values(w)
    assert torch.equal(values.isnan(), where.repeat_interleave(32, dim=1))
    assert int4.fake_quant(w).isnan().sum() == 32
    with pytest.raises(NumericsError, match=r"1 groups with NaN or infinity, the first at \[1, 1\]"):
        int4.quantise(w)


# ---------------------------------------------------------------- packing


def test_packing_equals_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (37, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = int4.pack(codes)
    assert torch.equal(packed, helpers.pack_to_int32(codes, 4))
    assert torch.equal(int4.unpack(packed, 96), codes)
    noise = torch.randint(-(2**31), 2**31 - 1, (37, 12), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert torch.equal(int4.unpack(noise), helpers.unpack_from_int32(noise, 4, torch.Size((37, 96))))


def test_dequantisation_equals_compressed_tensors() -> None:
    """Its own arithmetic in bf16, where both define the result."""
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    codes = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = draw(16, 4, dtype=torch.bfloat16).abs() + 1e-3
    theirs = lifecycle.dequantize(codes, scales, args=args, dtype=torch.bfloat16)
    assert torch.equal(bits(theirs.to(torch.bfloat16)), bits(int4.dequantise(int4.pack(codes), scales)))


def test_all_words_and_the_order_of_columns() -> None:
    assert int4.pack(torch.tensor([[-8, 7, -7, 0, 1, -1, 2, 3]], dtype=torch.int8)).tolist() == [[0xBA7981F0 - 2**32]]
    every = torch.arange(256, dtype=torch.int32)
    codes = int4.unpack(every[:, None])
    assert torch.equal(codes[:, 0], ((every & 15) - 8).to(torch.int8))
    assert torch.equal(codes[:, 1], ((every >> 4) - 8).to(torch.int8))
    assert torch.equal(int4.pack(codes)[:, 0], every)


@pytest.mark.parametrize("scale", [1.0, TINY, 2.0**-130, 3.3895e38 / 8, 0.0])
def test_reading_takes_code_minus_8_and_any_scale(scale: float) -> None:
    scales = torch.tensor([[scale]], dtype=torch.bfloat16)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(1, 2)
    found = int4.dequantise(int4.pack(codes), scales)
    exact = codes.double() * scales.double()
    assert torch.equal(found.double(), exact.to(torch.bfloat16).double())
    assert found[0, 0].item() == -8 * scales.item()


@pytest.mark.parametrize("rows", [1, 7, 5000])
def test_blocks_do_not_show(rows: int) -> None:
    """More rows than fit a block, and fewer; each row by itself gives the same."""
    w = draw(rows, 256, seed=rows)
    packed, scales = int4.quantise(w)
    values, codes = int4.values(w), int4.unpack(packed)
    for row in (0, rows // 2, rows - 1):
        own = w[row : row + 1]
        assert torch.equal(int4.quantise(own)[0][0], packed[row]) and torch.equal(int4.quantise(own)[1][0], scales[row])
        assert torch.equal(int4.values(own)[0], values[row]) and torch.equal(int4.int4_grid(own)[0][0], codes[row])
        assert torch.equal(int4.dequantise(packed[row : row + 1], scales[row : row + 1])[0], values[row])
    assert torch.equal(int4.dequantise(packed, scales), values)
    assert torch.equal(int4.pack(codes), packed)


def test_leading_axes_and_other_groups() -> None:
    w = draw(2, 3, 8, 128)
    for group in (32, 64, 8):
        packed, scales = int4.quantise(w, group)
        assert packed.shape == (2, 3, 8, 16) and scales.shape == (2, 3, 8, 128 // group)
        values = int4.dequantise(packed, scales, (2, 3, 8, 128))
        assert torch.equal(values, int4.values(w, group))
        assert torch.equal(values[1, 2], int4.values(w[1, 2], group))
        assert torch.equal(int4.unpack(packed), int4.int4_grid(w, group)[0])
    strided = w.transpose(0, 1)[:, 1]
    assert torch.equal(int4.values(strided), int4.values(w)[1])
    columns = draw(8, 256)[:, 64:192]
    assert torch.equal(int4.quantise(columns)[0], int4.quantise(columns.clone())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_hold_the_bf16_values(dtype: torch.dtype) -> None:
    w = draw(4, 64)
    packed, scales = int4.quantise(w)
    assert torch.equal(int4.dequantise(packed, scales, dtype=dtype), int4.values(w).to(dtype))
    assert torch.equal(int4.values(w, dtype=dtype), int4.values(w).to(dtype))


def test_what_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"groups of 32.*\[4, 48\]"):
        int4.int4_grid(torch.zeros(4, 48))
    with pytest.raises(CheckpointError, match="empty"):
        int4.values(torch.zeros(0, 32))
    with pytest.raises(CheckpointError, match="matrices"):
        int4.quantise(torch.zeros(64))
    with pytest.raises(CheckpointError, match="floating-point"):
        int4.int4_grid(torch.zeros(4, 32, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="whole words"):
        int4.int4_grid(torch.zeros(4, 36), group=12)
    with pytest.raises(CheckpointError, match="int8 with whole words"):
        int4.pack(torch.zeros(4, 12, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"-8 to 7.*\[-9, 3\]"):
        int4.pack(torch.tensor([[-9, 3, 0, 0, 0, 0, 0, 0]], dtype=torch.int8))
    packed, scales = int4.quantise(draw(4, 64))
    with pytest.raises(CheckpointError, match="another width"):
        int4.unpack(packed, 72)
    with pytest.raises(CheckpointError, match="another shape"):
        int4.dequantise(packed, scales, (4, 32))
    with pytest.raises(CheckpointError, match="do not fit"):
        int4.dequantise(packed, scales[:3])
    with pytest.raises(CheckpointError, match="do not fit"):
        int4.dequantise(packed, scales.float())
    with pytest.raises(CheckpointError, match="equally long"):
        int4.dequantise(packed, torch.ones(4, 3, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="int32"):
        int4.unpack(packed.long())


def test_fake_quant_is_straight_through() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        w = draw(4, 64, dtype=dtype).requires_grad_()
        out = int4.fake_quant(w)
        assert out.dtype == dtype and torch.equal(out.detach(), int4.values(w).to(dtype))
        grad = draw(4, 64, seed=3, dtype=dtype)
        assert torch.equal(torch.autograd.grad(out, w, grad)[0], grad)
