"""The Triton versions of the grids are equal to the plain ones bit for bit."""

from __future__ import annotations

import pytest
import torch

from k2lab.core.errors import NumericsError
from k2lab.quant import fp8, int4

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PATHS = ("torch",)
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, but one NaN is as good as another."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    found, expected = found.cpu(), expected.cpu()
    if expected.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = (t.float().nan_to_num(nan=0.0) for t in (found, expected))
        assert torch.equal(found.signbit(), expected.signbit())
    assert torch.equal(found, expected)


def weights(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Many sizes; groups of zeros, of subnormal and of huge numbers, with NaN and infinity."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(3, 70, 256, generator=draw) * torch.exp2(torch.randint(-24, 12, (3, 70, 1), generator=draw).float())
    if dtype != torch.float16:
        w[0, 0], w[0, 3], w[0, 6] = 0, 3.38e38, -3e38
        for row, size in ((1, -126), (2, -132), (7, -124)):
            w[0, row] *= 2.0**size / w[0, row].abs().max()
        w[0, 4, 5], w[0, 5, 40], w[1, 5, 64:96] = float("nan"), -float("inf"), float("nan")
    return w.to(dtype)


@TYPES
def test_int4_on_a_gpu_has_the_same_bits(dtype: torch.dtype) -> None:
    w = weights(dtype)
    codes, scales = int4.int4_grid(w)
    found = int4.int4_grid(w.cuda())
    same(found[0], codes)
    same(found[1], scales)
    same(int4.values(w.cuda()), int4.values(w))
    packed = int4.pack(codes)
    same(int4.pack(codes.cuda()), packed)
    same(int4.unpack(packed.cuda()), codes)
    for out in (torch.bfloat16, torch.float32, torch.float16):
        same(int4.dequantise(packed.cuda(), scales.cuda(), dtype=out), int4.dequantise(packed, scales, dtype=out))


def test_every_bf16_number_as_the_largest_of_its_group() -> None:
    tops = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    rest = torch.rand(len(tops), 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    w = (rest * tops[:, None]).to(torch.bfloat16)
    w[:, 7] = tops.to(torch.bfloat16)
    packed, scales = int4.quantise(w)
    found = int4.quantise(w.cuda())
    same(found[0], packed)
    same(found[1], scales)
    same(int4.values(w.cuda()), int4.values(w))
    same(int4.values(int4.values(w.cuda())), int4.values(w))


def test_all_codes_are_read_by_all_scales() -> None:
    scales = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16).view(-1, 1)
    packed = (
        torch.tensor([0x76543210, -0x01234568, 0x13579BDF, 0x2468ACE0], dtype=torch.int32).expand(len(scales), 4).contiguous()
    )
    same(int4.dequantise(packed.cuda(), scales.cuda()), int4.dequantise(packed, scales))


def test_other_groups() -> None:
    w = weights()[1:, :5, :240]
    for group in (8, 16, 24, 48, 80):
        codes, scales = int4.int4_grid(w, group)
        same(int4.int4_grid(w.cuda(), group)[0], codes)
        same(int4.values(w.cuda(), group), int4.values(w, group))
        same(int4.dequantise(int4.pack(codes).cuda(), scales.cuda()), int4.dequantise(int4.pack(codes), scales))
    packed, scales = int4.pack(codes), torch.randn(2, 5, 60).to(torch.bfloat16)  # groups of 4: two scales in a word
    same(int4.dequantise(packed.cuda(), scales.cuda()), int4.dequantise(packed, scales))


def test_views_are_read_as_they_are_seen() -> None:
    w = weights()[1]
    same(int4.values(w.cuda()[:, 32:160]), int4.values(w[:, 32:160].contiguous()))
    same(int4.values(w.cuda()[::2]), int4.values(w[::2].contiguous()))


def test_what_is_not_finite_is_not_written() -> None:
    with pytest.raises(NumericsError, match=r"\[0, 4, 0\]"):
        int4.quantise(weights().cuda())


def test_tensors_beyond_32_bit_offsets() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    rows = (1 << 31) // 4096 + 64
    w = torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda")
    w[-64:] = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2)).to(w)
    packed, scales = int4.quantise(w)
    expected = int4.quantise(w[-64:].cpu())
    same(packed[-64:], expected[0])
    same(scales[-64:], expected[1])
    tail = int4.values(w[-64:].cpu())
    same(int4.values(w)[-64:], tail)
    same(int4.dequantise(packed, scales)[-64:], tail)
    codes = int4.unpack(packed)
    same(codes[-64:], int4.unpack(expected[0]))
    assert torch.equal(int4.pack(codes), packed)
    del packed, scales, codes
    codes8, scale8 = fp8.fp8_grid(w)
    expected = fp8.fp8_grid(w[-128:].cpu())
    same(codes8[-128:], expected[0])
    same(fp8.dequantise(codes8, scale8, torch.bfloat16)[-128:], fp8.dequantise(*expected, torch.bfloat16))


@TYPES
def test_fp8_on_a_gpu_has_the_same_bits(dtype: torch.dtype) -> None:
    w = torch.randn(2, 300, 270, generator=torch.Generator().manual_seed(3))
    w[0, :128, :128] = 0
    if dtype != torch.float16:
        w[0, 129:, :] *= 2.0**-130
        w[1, 3, 3], w[1, 150, 150], w[1, :, 256:] = float("inf"), float("nan"), 3e38
    w = w.to(dtype)
    codes, scale_inv = fp8.fp8_grid(w)
    found = fp8.fp8_grid(w.cuda())
    same(found[1], scale_inv)
    same(found[0], codes)
    for out in (torch.bfloat16, torch.float32):
        same(fp8.dequantise(codes.cuda(), scale_inv.cuda(), out), fp8.dequantise(codes, scale_inv, out))


def test_every_fp8_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).expand(128, 256).contiguous()
    scale_inv = torch.tensor([[2.0**-120, 1.7e36]])
    same(fp8.dequantise(codes.cuda(), scale_inv.cuda()), fp8.dequantise(codes, scale_inv))
