"""numba's loops against PyTorch's operations, bit for bit, on whatever numbers there are; when they are taken; without numba."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import k2lab.quant
from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.quant import compiled, fp8, int4

PATHS = ("numba",)
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
LOADED = ("k2lab.quant._loops", "k2lab.quant._int4_numba", "k2lab.quant._fp8_numba")


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], object]:
    """Calls a function while PyTorch's operations compute."""

    def call(function: Callable[[], object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "wanted", lambda tensor: False)
            return function()

    return call


def same(found: object, expected: object) -> None:
    """Equal types, shapes and bits, but one NaN is as good as another."""
    if isinstance(found, tuple):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
        return
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype.is_floating_point and found.element_size() > 1:
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        found, expected = found.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert torch.equal(found.view(whole), expected.view(whole))


def any_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of random bits: all sizes, subnormal ones, NaN and infinities."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.float64:  # mostly those that fp32 can hold, or nothing would be left but zeros and infinities
        return any_bits(torch.float32, *shape, seed=seed).double() * (1 + torch.rand(shape, generator=draw).double() * 2**-25)
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(whole)
    return torch.randint(limits.min, limits.max + 1, shape, generator=draw).to(whole).view(dtype)


def weights(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of different sizes: ordinary ones, huge, subnormal, of random bits, of zeros, with a NaN or an infinity."""
    draw = torch.Generator().manual_seed(1)
    w = torch.randn(shape, generator=draw, dtype=torch.float64)
    w *= torch.exp2(torch.randint(-150, 128, (*shape[:-1], 1), generator=draw).double())
    w = w.clamp(-3.3e38, 3.3e38)
    rows = w.reshape(-1, shape[-1])
    rows[1::7] = any_bits(torch.float32, len(rows[1::7]), shape[-1]).double()
    rows[2::7] *= 2.0 ** -(torch.randint(0, 140, (len(rows[2::7]), 1), generator=draw).double())
    rows[3, :], rows[4, 3], rows[5, 9], rows[6, 1] = 0, float("nan"), float("inf"), -0.0
    return rows.view(shape).to(dtype)


# ---------------------------------------------------------------- INT4


@TYPES
@pytest.mark.parametrize("group", [32, 8, 24, 48, 80, 240])
def test_the_int4_grid(dtype: torch.dtype, group: int, reference) -> None:
    w = weights(dtype, 3, 40, 480)
    with_any = torch.cat([w, any_bits(dtype, 3, 40, 480, seed=3)])
    for matrix in (w, with_any[:, 1], with_any):
        same(int4.int4_grid(matrix, group), reference(lambda matrix=matrix: int4.int4_grid(matrix, group)))
        for out in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
            same(int4.values(matrix, group, out), reference(lambda matrix=matrix, out=out: int4.values(matrix, group, out)))
    finite = w.float().nan_to_num(1.0, 2.0, 3.0).clamp(-3e38, 3e38).to(dtype).nan_to_num(1.0, 2.0, 3.0)
    same(int4.quantise(finite, group), reference(lambda: int4.quantise(finite, group)))


def test_all_bf16_numbers_beside_each_other(reference) -> None:
    """Every number of the type: as the only one of its group, beside a larger one, and in a group of like ones."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    alone = torch.zeros(len(every), 32, dtype=torch.bfloat16)
    alone[:, 5] = every
    beside = alone.clone()
    beside[:, 8] = (every.float() * 3.25).to(torch.bfloat16)
    for w in (alone, beside, every.view(-1, 512), every.view(512, -1).t()):
        same(int4.int4_grid(w), reference(lambda w=w: int4.int4_grid(w)))
        same(int4.values(w), reference(lambda w=w: int4.values(w)))


def test_every_pair_of_mantissas(reference) -> None:
    """Each quotient of two bf16 numbers that differ by a factor of up to 16, where ties are."""
    top = (torch.arange(128, 256).float() * 2.0**-7).to(torch.bfloat16)
    parts = torch.cat([top * 2.0**-n for n in range(5)]).to(torch.bfloat16)
    w = torch.cat([top[:, None].expand(-1, len(parts))[..., None], parts.expand(128, -1)[..., None]], -1)
    w = torch.cat([w, -w, w * 0.5, torch.zeros(128, len(parts), 2, dtype=torch.bfloat16)], -1).view(128, -1)
    for scale in (1.0, 2.0**-127, 2.0**120):
        part = (w.float() * scale).to(torch.bfloat16)
        same(int4.int4_grid(part, 8), reference(lambda part=part: int4.int4_grid(part, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group", [32, 1, 2, 4, 12, 96])
def test_dequantising_with_any_scales(group: int, dtype: torch.dtype, reference) -> None:
    draw = torch.Generator().manual_seed(2)
    packed = torch.randint(-(1 << 31), 1 << 31, (2, 70, 24), generator=draw).to(torch.int32)
    scales = any_bits(torch.bfloat16, 2, 70, 192 // group)
    scales[0, 0, :1], scales[0, 1, :1], scales[0, 2, :1] = float("inf"), float("nan"), 2.0**-133
    same(int4.dequantise(packed, scales, dtype=dtype), reference(lambda: int4.dequantise(packed, scales, dtype=dtype)))


def test_packing_and_unpacking(reference) -> None:
    codes = torch.randint(-8, 8, (3, 50, 640), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    for part in (codes, codes[:, ::2], codes.transpose(0, 1), codes[..., 32:96], codes[1, :1, :8]):
        packed = int4.pack(part)
        same(packed, reference(lambda part=part: int4.pack(part)))
        assert torch.equal(int4.unpack(packed), part)
    words = torch.randint(-(1 << 31), 1 << 31, (30, 64), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for some in (words, words[::3], words[:, 8:16], words.t()[:, :8]):
        same(int4.unpack(some), reference(lambda some=some: int4.unpack(some)))


@pytest.mark.parametrize("odd", [8, -9, 127, -128, 24, -25])
def test_codes_that_four_bits_do_not_hold(odd: int, reference) -> None:
    codes = torch.zeros(5, 64, dtype=torch.int8)
    codes[2, 3], codes[3, 11] = odd, -3
    with pytest.raises(CheckpointError) as found:
        int4.pack(codes)
    with pytest.raises(CheckpointError) as expected:
        reference(lambda: int4.pack(codes))
    assert str(found.value) == str(expected.value) and str(odd) in str(found.value)


def test_weights_that_are_not_finite_are_named_alike(reference) -> None:
    w = torch.ones(4, 96)
    w[2, 70] = float("nan")
    for module, where in ((int4, "[2, 2]"), (fp8, "[0, 0]")):
        with pytest.raises(NumericsError) as found:
            module.quantise(w)
        with pytest.raises(NumericsError) as expected:
            reference(lambda module=module: module.quantise(w))
        assert str(found.value) == str(expected.value) and where in str(found.value)


# ---------------------------------------------------------------- FP8


@TYPES
@pytest.mark.parametrize("block", [128, 32, 5])
def test_the_fp8_grid(dtype: torch.dtype, block: int, reference) -> None:
    w = weights(dtype, 2, 150, 300)
    blocks = torch.randn(3, 260, 200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    blocks[1] *= torch.logspace(-46, 36, 200, dtype=torch.float64)
    blocks[2, :140] = 0
    for matrix in (w, blocks.to(dtype), blocks.to(dtype)[:, ::2, 7:], blocks.to(dtype).transpose(1, 2), w[0, :1, :1]):
        same(fp8.fp8_grid(matrix, block), reference(lambda matrix=matrix: fp8.fp8_grid(matrix, block)))


def test_every_way_to_round_to_e4m3(reference) -> None:
    """All bf16 numbers up to 448 and their neighbours in fp32, in blocks whose scale is 1."""
    every = torch.arange(0, 0x43E0, dtype=torch.int16).view(torch.bfloat16).float()
    near = torch.cat([every, every.nextafter(torch.tensor(1e9)), every.nextafter(torch.tensor(-1.0))])
    near = torch.cat([near, -near]).clamp(-448, 448)
    w = torch.full((len(near) // 100 + 1, 128), 448.0)
    w[:, 1:101] = torch.nn.functional.pad(near, (0, w[:, 1:101].numel() - len(near))).view(-1, 100)
    found = fp8.fp8_grid(w)
    assert bool((found[1] == 1).all())
    same(found, reference(lambda: fp8.fp8_grid(w)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_fp8_code_by_any_scale(dtype: torch.dtype, reference) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 40, 1).view(torch.float8_e4m3fn)
    for block in (128, 8, 3):
        scales = any_bits(torch.float32, *fp8.scale_shape(codes.shape, block), seed=block)
        scales.view(-1)[:3] = torch.tensor([0x7FFFFFFF, 0x7F800000, 3], dtype=torch.int32).view(torch.float32)
        same(fp8.dequantise(codes, scales, dtype, block), reference(lambda s=scales, b=block: fp8.dequantise(codes, s, dtype, b)))
    part = codes[:, :, 64:192]
    some = any_bits(torch.float32, 2, 1, 2)[..., :1]
    same(fp8.dequantise(part, some, dtype), reference(lambda: fp8.dequantise(part, some, dtype)))


# ---------------------------------------------------------------- when


def everything(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    packed, scales = int4.quantise(w)
    codes8, scales8 = fp8.quantise(w)
    found = (packed, scales, int4.unpack(packed), int4.values(w), int4.dequantise(packed, scales), codes8, scales8)
    return (*found, fp8.dequantise(codes8, scales8), int4.pack(int4.unpack(packed)))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not needed numba yet."""
    for name in LOADED:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(k2lab.quant, name.rpartition(".")[2], raising=False)
    compiled.module.cache_clear()
    yield
    compiled.module.cache_clear()


def test_all_works_without_numba(unloaded: None, monkeypatch: pytest.MonkeyPatch, reference) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    expected = reference(lambda: everything(w))
    monkeypatch.setitem(sys.modules, "numba", None)
    same(everything(w), expected)
    assert not any(compiled.module(name.rpartition(".")[2]) for name in LOADED) and not set(LOADED) & set(sys.modules)


def test_small_tensors_do_not_wait_for_numba(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WORTH", 20_000)
    small, large = torch.ones(64, 256), torch.ones(128, 256)
    int4.values(small)
    fp8.fp8_grid(small)
    assert "k2lab.quant._loops" not in sys.modules
    int4.values(large)
    assert "k2lab.quant._loops" in sys.modules and compiled.wanted(small)


def test_tensors_of_other_classes_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Traced(torch.Tensor):
        pass

    assert compiled.wanted(torch.nn.Parameter(torch.ones(2, 32)))
    assert not compiled.wanted(torch.ones(2, 32).as_subclass(Traced)) and not compiled.wanted(torch.ones(2, 32, device="meta"))


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither the installation nor a home folder can be written to: numba then refuses to keep a function."""
    from numba.core import caching

    from k2lab.quant import _loops

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert _loops._compiled(_loops._e4m3.py_func)(448.0) == 0x7E
