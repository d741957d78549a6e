"""Kimi Delta Attention by segments (any device) and by flash-linear-attention's kernels (CUDA): against the recurrence and the
layer in one piece, boundaries, states handed over, both gate forms, kernel choices, messages."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from model_samples import LINEAR, make, relative

from k2lab.models import conv_gpu, kda_gpu, slower
from k2lab.models.conv import ShortConv, short_conv
from k2lab.models.delta import WORK_ROWS, FastKDA
from k2lab.models.kda import chunk_kda, decay_gate, recurrent_kda
from k2lab.models.kda_segments import Cost, plan
from k2lab.models.kernels import kda_choices
from k2lab.models.pack import Pack

LENGTHS = (70, 5, 1, 300, 2, 3, 64, 200)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def packed(lengths: tuple[int, ...], device: str = "cpu") -> Pack:
    return Pack.of(torch.tensor([0, *lengths]).cumsum(0), device)


def layer_of(dtype: torch.dtype, device: str = "cpu", width: int = 16) -> FastKDA:
    """A layer with 2 heads and weights that make every part matter."""
    model = make(LINEAR.replace(linear_head_dim=width), dtype=dtype)
    layer = next(module for module in model.hf.modules() if isinstance(module, FastKDA))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return layer.to(device)


def gradients(layer: FastKDA, x: torch.Tensor, pack: Pack, whole: bool, tokens: int = 64) -> list[torch.Tensor]:
    """Output, gradient of x, gradients of the parameters; whole or in segments of about `tokens` tokens."""
    row = layer.num_heads * layer.head_dim * x.element_size()
    layer.k2_keep_bytes = 1e15 if whole else 0.0
    state = layer.num_heads * layer.head_dim**2
    layer.k2_work_bytes = tokens * WORK_ROWS * row + tokens // 64 * 2 * state * x.element_size() + 16 * state
    inputs = [x.detach().requires_grad_(), *layer.parameters()]
    y = layer._packed(inputs[0], pack)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


# ---------------------------------------------------------------- segments


@pytest.mark.parametrize("tokens", [1, 64, 130, 260])
def test_segments_equal_one_piece(tokens: int) -> None:
    layer, pack = layer_of(torch.float64), packed(LENGTHS)
    x = torch.randn(pack.num_tokens, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direct = layer(x[None], k2_pack=pack)[0]  # the CPU path, which has no segments
    whole, parts = gradients(layer, x, pack, True), gradients(layer, x, pack, False, tokens)
    segments = list(pack.__dict__["_segments"].values())[-1]
    assert len(segments) > 2 and any(segment.begun for segment in segments)
    assert relative(parts[0], direct.detach()) < 1e-12
    for a, b in zip(parts, whole):
        assert relative(a, b) < 1e-12


def test_segments_need_no_gradient_of_frozen_parts() -> None:
    layer, pack = layer_of(torch.float64), packed((100, 90))
    x = torch.randn(190, 48, dtype=torch.float64)
    layer.k2_keep_bytes, layer.k2_work_bytes = 0.0, 1.0
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "o_proj.weight")
    layer._packed(x, pack).square().sum().backward()
    grads = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert grads == {"o_proj.weight"}
    with torch.no_grad():
        assert not layer._packed(x, pack).requires_grad


@pytest.mark.parametrize("budget", [1.0, 100.0, 333.0, 5000.0, 1e9])
def test_plan_covers_every_token_once_within_its_budget(budget: float) -> None:
    pack, cost = packed((70, 5, 1, 1300, 2, 3, 64, 200, *[1] * 50)), Cost(token=1.0, chunk=3.0, document=2.0)
    segments = plan(pack, cost, budget, reach=3)
    assert [segments[0].start, *(segment.end for segment in segments)] == [
        *(segment.start for segment in segments),
        pack.num_tokens,
    ]
    for segment, after in zip(segments, segments[1:]):
        assert segment.goes_on == after.begun == (segment.end not in pack.starts)
    for segment in segments:
        lengths = segment.pack.lengths
        assert sum(lengths) == segment.end - segment.start == segment.window.num_tokens - segment.reach
        start = max(place for place in pack.starts if place <= segment.start)
        assert segment.reach == min(3, segment.start - start)
        work = sum(n * cost.token + -(-n // 64) * cost.chunk + cost.document for n in lengths)
        assert work <= max(budget, 64 + 3 + 2)
    if budget >= 1e9:
        assert len(segments) == 1


# ---------------------------------------------------------------- kernel choices and messages


def tuner_of(keys: list[str], kwargs: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(keys=keys, configs=[SimpleNamespace(kwargs=kwargs)], cache={})


def test_choices_hold_for_any_number_of_heads_but_not_for_another_width() -> None:
    tuner = tuner_of(["H", "K", "BT", "BV"], {"BV": 64})
    table = kda_choices.Table(tuner, {(128, 64, "torch.bfloat16"): "chosen"})
    key = (32, 128, 64, "torch.bfloat16", "torch.float32")
    assert key in table and table[key] == "chosen"
    assert (16, 128, 64, "torch.bfloat16") in table
    assert (32, 64, 64, "torch.bfloat16") not in table
    assert (32, 128, 64, "torch.float32") not in table
    assert (32, 128, 64, 1, "torch.bfloat16") not in table  # a key of another form


def test_shipped_choices_are_complete() -> None:
    files = sorted(kda_choices.FOLDER.glob("*.json"))
    assert files
    for path in files:
        stored = json.loads(path.read_text())
        assert path == kda_choices._file(stored["device"])
        assert stored["format"] == kda_choices.FORMAT and stored["fla"].startswith(kda_gpu.VERSIONS) and stored["triton"]
        for rows in stored["kernels"].values():
            assert all(row["num_warps"] >= 1 and row["dtype"].startswith("torch.") for row in rows)


def test_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    slower.say.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.kda.chunk_bwd", None)
    with pytest.warns(UserWarning, match=r"slower path.*k2lab\[gpu\]"):
        assert kda_gpu.kernels.__wrapped__() is None
    monkeypatch.setitem(sys.modules, "k2lab.models.kernels.kda_triton", None)
    monkeypatch.delattr("k2lab.models.kernels.kda_triton", raising=False)
    with pytest.warns(UserWarning, match="triton cannot be used.*slower path"):
        assert conv_gpu.kernels.__wrapped__() is None


def test_the_cpu_never_asks_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kda_gpu, "kernels", lambda: pytest.fail("asked"))
    monkeypatch.setattr(conv_gpu, "kernels", lambda: pytest.fail("asked"))
    layer, pack = layer_of(torch.bfloat16), packed((9, 4))
    assert layer(torch.randn(1, 13, 48, dtype=torch.bfloat16), k2_pack=pack).isfinite().all()


def test_tables_of_a_pack() -> None:
    found = kda_gpu.tables(packed((70, 5, 130)))
    assert found.starts.tolist() == [0, 70, 75, 205]
    assert found.chunks.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [2, 2]]
    assert found.offsets.tolist() == [0, 2, 3, 6]
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in (found.starts, found.chunks, found.offsets))
    assert conv_gpu.first_tokens(packed((2, 3))).tolist() == [0, 0, 2, 2, 2]


# ---------------------------------------------------------------- CUDA


def needs_kernels() -> None:
    if kda_gpu.kernels() is None:
        pytest.skip("needs flash-linear-attention")


def kda_inputs(lengths: tuple[int, ...], lower_bound: float | None, heads: int = 2) -> list[torch.Tensor]:
    """query, key, value, z, beta, log_rate, bias, states; 128 wide, bf16 where the layer's are."""
    T, D, draw = sum(lengths), 128, torch.Generator().manual_seed(7)
    q, k, v, z = (torch.randn(1, T, heads, D, generator=draw).bfloat16() for _ in range(4))
    beta, rate = torch.rand(1, T, heads, generator=draw), torch.rand(heads, generator=draw)
    bias = torch.randn(heads * D, generator=draw) - (3.0 if lower_bound is None else 1.0)
    states = torch.randn(len(lengths), heads, D, D, generator=draw)
    return [x.cuda().requires_grad_() for x in (q, k, v, z, beta, rate, bias, states)]


@on_gpu
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_kernels_equal_the_recurrence(lower_bound: float | None) -> None:
    needs_kernels()
    lengths = (70, 3, 129)
    pack, inputs = packed(lengths, "cuda"), kda_inputs(lengths, lower_bound)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for x, chosen in ((inputs, None), (exact, recurrent_kda)):
        states = {"initial_state": x[7], "output_final_state": True, "pack": pack}
        if chosen is None:
            out, final = kda_gpu.gated_kda(*x[:7], lower_bound, **states)
        else:
            g = decay_gate(x[3], x[5].view(-1, 1), x[6].view(-1, 128), lower_bound)
            out, final = chosen(*x[:3], g, x[4], use_qk_l2norm_in_kernel=True, **states)
        value = (out.double() ** 2).sum() + (final.double() ** 2).sum()
        results.append([out.detach(), final.detach(), *torch.autograd.grad(value, x)])
    for ours, true in zip(*results):
        assert relative(ours.double(), true) < 1.5e-2


@on_gpu
@pytest.mark.parametrize("strength", [0.5, 3.0, 20.0])
def test_backward_kernels_equal_the_recurrence_for_gates_of_any_strength(strength: float) -> None:
    """Mild gates go in whole chunks, stronger ones by blocks of 16 tokens, the strongest pair by pair."""
    needs_kernels()
    lengths = (100, 30)
    q, k, v, z, beta, *_ = kda_inputs(lengths, None)
    g = (-strength * (0.5 + z.detach().float().sigmoid())).requires_grad_()
    pack, results = packed(lengths, "cuda"), []
    for inputs, kernel in (
        ([q, k, v, g, beta], kda_gpu.chunk_kda),
        ([x.detach().double() for x in (q, k, v, g, beta)], recurrent_kda),
    ):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, _ = kernel(*inputs, use_qk_l2norm_in_kernel=True, pack=pack)
        results.append([out.detach(), *torch.autograd.grad((out.double() ** 2).sum(), inputs)])
    for ours, true in zip(*results):
        assert relative(ours.double(), true) < 1.5e-2


@on_gpu
def test_same_signature_as_on_the_cpu() -> None:
    needs_kernels()
    q, k, v, z, beta, *_ = kda_inputs((150, 50), None)
    g, pack = -z.detach().float().sigmoid(), packed((150, 50), "cuda")
    fast, final = chunk_kda(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True, pack=pack)
    wide = [x.detach().double().cpu() for x in (q, k, v, g, beta)]
    slow, last = chunk_kda(*wide, output_final_state=True, use_qk_l2norm_in_kernel=True, pack=packed((150, 50)))
    assert fast.dtype == torch.bfloat16 and final is not None and last is not None
    assert relative(fast.detach().double().cpu(), slow) < 1e-2
    assert relative(final.detach().double().cpu(), last) < 1e-2


@on_gpu
def test_documents_see_nothing_of_their_neighbours() -> None:
    needs_kernels()
    lengths = (70, 3, 129, 40)
    pack, inputs = packed(lengths, "cuda"), [x.detach() for x in kda_inputs(lengths, None)[:7]]
    changed = [x.clone() for x in inputs]
    for x in changed[:5]:
        x[:, :73] = x[:, :73].flip(1)
        x[:, 202:] *= 0.5
    a, b = (kda_gpu.gated_kda(*x, pack=pack)[0][:, 73:202] for x in (inputs, changed))
    assert torch.equal(a, b)
    alone, _ = kda_gpu.gated_kda(*(x[:, 73:202] for x in inputs[:5]), *inputs[5:], pack=packed((129,), "cuda"))
    assert torch.equal(a, alone)


@on_gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_layer_on_a_gpu_in_segments_equals_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    pack, x = packed(LENGTHS, "cuda"), torch.randn(sum(LENGTHS), 48, generator=torch.Generator().manual_seed(2))
    layer = layer_of(dtype, "cuda", width=128)
    parts, whole = (gradients(layer, x.cuda().to(dtype), pack, piece, 130) for piece in (False, True))
    exact = gradients(layer.double().cpu(), x.to(dtype).double(), packed(LENGTHS), True)
    for a, b, c in zip(parts, whole, exact):
        assert relative(a.cpu().double(), c) < tolerance
        assert relative(a, b) < tolerance


@on_gpu
def test_convolution_on_a_gpu() -> None:
    if conv_gpu.kernels() is None:
        pytest.skip("needs triton")
    draw, lengths = torch.Generator().manual_seed(0), (1, 2, 3, 4, 5, 400, 1, 90)
    for length, skip in ((4, 0), (3, 2)):
        x = torch.randn(sum(lengths), 200, generator=draw)
        weight, grad = torch.randn(200, length, generator=draw), torch.randn(sum(lengths) - skip, 200, generator=draw)
        true = [t.double().requires_grad_() for t in (x, weight)]
        expected = ShortConv.apply(*true, packed(lengths))[skip:]
        inputs = [t.cuda().requires_grad_() for t in (x, weight)]
        found = short_conv(*inputs, packed(lengths, "cuda"), skip)
        assert relative(found.detach().cpu().double(), expected.detach()) < 1e-6
        for a, b in zip(torch.autograd.grad(found, inputs, grad.cuda()), torch.autograd.grad(expected, true, grad.double())):
            assert relative(a.cpu().double(), b) < 1e-6
