"""Tensors judged by their bits: the largest number, zeros, what is not finite; results in memory that is given."""

from __future__ import annotations

import pytest
import torch

from k2lab.quant import bits, fp8, int4

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_the_largest_number_is_found_wherever_it_is(dtype: torch.dtype, count: int) -> None:
    w = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    assert bits.largest(w) == int(w.abs().max().view(whole))
    for at in {0, count // 2, count - 1}:
        for odd, above in ((float("inf"), 0), (-float("inf"), 0), (float("nan"), 1)):
            bad = w.clone()
            bad[at] = odd
            found, limit = bits.largest(bad), bits.LIMITS[dtype]
            assert found > limit if above else found == limit
        alone = torch.zeros_like(w)
        alone[at] = -torch.finfo(dtype).smallest_normal
        assert 0 < bits.largest(alone) < bits.LIMITS[dtype]
    assert bits.largest(torch.full_like(w, -0.0)) == 0


def test_fp8_codes_and_tensors_that_do_not_lie_in_a_row() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert bits.largest(codes.view(torch.float8_e4m3fn)) == 0x7F == bits.LIMITS[torch.float8_e4m3fn]
    assert bits.largest(codes[128:200].view(torch.float8_e4m3fn)) == 71
    w = torch.ones(6, 8)
    w[:, 5] = 7
    assert bits.largest(w[:, :5]) < bits.largest(w[:, 3:]) == bits.largest(w.t())
    assert bits.largest(w[:0]) == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_come_in_the_memory_that_is_given(dtype: torch.dtype) -> None:
    w = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for module in (int4, fp8):
        expected = module.quantise(w)
        room = tuple(torch.full_like(part.view(torch.uint8), 1).view(part.dtype) for part in expected)
        found = module.quantise(w, out=room)
        for part, own, wanted in zip(found, room, expected, strict=True):
            assert part.data_ptr() == own.data_ptr() and torch.equal(own.view(torch.uint8), wanted.view(torch.uint8))
        values, to = module.dequantise(*expected, dtype=dtype), torch.ones(300, 256, dtype=dtype)
        assert module.dequantise(*expected, dtype=dtype, out=to) is to and torch.equal(to, values)
