"""The head's losses on CUDA. Kernels are checked on a GPU; everything around them (pieces, selection, buckets, gradients) is
checked on the CPU too, with the kernels' definitions written out in PyTorch."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from k2lab.models import losses, losses_gpu, norm, slower
from k2lab.models._distribution import LinearLogprobs, LinearTopkKL

T, D, W, K = 300, 16, 83, 5
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _cross_entropy(logits, grads, targets, weights, nll):
    counts = weights != 0
    safe = torch.where(counts, targets, 0).unsqueeze(1)
    p = logits.float().softmax(-1)
    nll.copy_(torch.where(counts, -p.gather(1, safe).log()[:, 0], 0.0))
    if grads is not None:
        p.scatter_add_(1, safe, torch.full_like(p[:, :1], -1.0)).mul_(weights.unsqueeze(1))
        grads.copy_(p)


def _two_softmaxes(logits, grads, first, second):
    (a, x), (b, y) = ([part.unsqueeze(1) for part in pair] for pair in (first, second))
    grads.copy_(x * (logits.float() - a).exp() - y * (logits.float() - b).exp())


PLAIN = SimpleNamespace(
    cross_entropy=_cross_entropy,
    log_sum_exp=lambda logits, out: out.copy_(logits.float().logsumexp(-1)),
    two_softmaxes=_two_softmaxes,
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_gpu, "BUFFER", 0)
    monkeypatch.setattr(losses_gpu, "ROWS", 1)


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request.node, "callspec", None) is not None and request.node.callspec.params.get("device") == "cpu":
        monkeypatch.setattr(losses_gpu, "_kernels", lambda: PLAIN)


def sample(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    head = torch.randn(W, D, generator=generator).to(dtype)
    weight = torch.rand(T, generator=generator) + 0.1
    weight[::3], weight[5] = 0, -0.4
    targets = torch.randint(0, W, (T,), generator=generator)
    teacher = torch.randn(T, W, generator=generator).mul(2).log_softmax(-1)
    named, ids = teacher.topk(K, -1)
    named, ids = named.clone(), ids.clone()
    named[4, 3:] = -torch.inf  # entries that are not there
    ids[7, 2] = targets[7]  # a target that the teacher names, wherever else it does
    known = (torch.arange(T) % 4 != 1).float()
    # What positions of weight 0 hold must not matter.
    targets[weight == 0], ids[weight == 0] = 10**9, -7
    found = SimpleNamespace(
        hidden=hidden,
        head=head,
        weight=weight,
        targets=targets,
        ids=ids,
        named=named,
        known=known,
        upstream=torch.arange(T).sin(),
    )
    for name, value in vars(found).items():
        setattr(found, name, value.to(device))
    found.leaves = (found.hidden.requires_grad_(), found.head.requires_grad_())
    found.exact = tuple(leaf.detach().cpu().double().requires_grad_() for leaf in found.leaves)
    return found


def close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], bound: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert float((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()) < bound


def with_gradients(values: tuple[torch.Tensor, ...], scalar: torch.Tensor, of: tuple[torch.Tensor, ...]):
    return (*values, *torch.autograd.grad(scalar, of))


ROWS = pytest.mark.parametrize("rows", [None, 200], ids=["all rows", "chosen rows"])


@DEVICES
@ROWS
@pytest.mark.parametrize("chunk", [64, 1000])
def test_cross_entropy(device: str, rows: int | None, chunk: int) -> None:
    x = sample(device)
    values = losses_gpu.CrossEntropy.apply(*x.leaves, x.targets, x.weight, chunk, rows)
    rest = (x.targets.cpu(), x.weight.cpu().double())
    expected = losses.LinearCrossEntropy.apply(*x.exact, *rest, 64)
    close(with_gradients(values, 3 * values[0], x.leaves), with_gradients(expected, 3 * expected[0], x.exact))
    assert not values[1].requires_grad and not bool(values[1][x.weight == 0].any())


@DEVICES
@ROWS
def test_logprobs_and_any_upstream_gradient(device: str, rows: int | None) -> None:
    x = sample(device)
    logp, none = losses_gpu.LogProbs.apply(*x.leaves, x.targets, x.weight, None, None, None, 64, rows)
    assert none is None
    expected = LinearLogprobs.apply(*x.exact, x.targets.cpu(), x.weight.cpu(), None, None, None, 64)[0]
    want = with_gradients((expected,), expected @ x.upstream.cpu().double(), x.exact)
    close(with_gradients((logp,), logp @ x.upstream, x.leaves), want)


@DEVICES
@ROWS
def test_topk_kl(device: str, rows: int | None) -> None:
    x = sample(device)
    values = losses_gpu.TopkKL.apply(*x.leaves, x.ids, x.named, x.weight, 64, rows)
    expected = LinearTopkKL.apply(*x.exact, x.ids.cpu(), x.named.cpu().double(), x.weight.cpu().double(), 64)
    close(with_gradients(values, values[0], x.leaves), with_gradients(expected, expected[0], x.exact))


@DEVICES
@ROWS
def test_both_from_the_same_logits(device: str, rows: int | None) -> None:
    x = sample(device)
    logp, kl = losses_gpu.LogProbs.apply(*x.leaves, x.targets, x.weight, x.ids, x.named, x.known, 64, rows)
    teacher = (x.ids.cpu(), x.named.cpu().double(), x.known.cpu())
    want = LinearLogprobs.apply(*x.exact, x.targets.cpu(), x.weight.cpu(), *teacher, 64)
    scalar = want[0] @ x.upstream.cpu().double() + 0.7 * (want[1] * x.weight.cpu()).sum()
    found = with_gradients((logp, kl), logp @ x.upstream + 0.7 * (kl * x.weight).sum(), x.leaves)
    close(found, with_gradients(want, scalar, x.exact))


@DEVICES
def test_all_tokens_named_by_a_certain_teacher_stays_finite(device: str) -> None:
    x = sample(device)
    generator = torch.Generator().manual_seed(1)
    named, ids = torch.randn(T, W, generator=generator).mul(100).log_softmax(-1).topk(W, -1)
    loud = (x.hidden.detach() * 1e3).requires_grad_()
    kl = losses_gpu.TopkKL.apply(loud, x.head, ids.to(device), named.to(device), x.weight, 64, None)
    assert all(bool(torch.isfinite(value).all()) for value in with_gradients(kl, kl[0], (loud, x.head)))


def test_pieces_fill_half_a_gigabyte_unless_more_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert losses_gpu.piece_rows(32768, 2) == 8192
    assert losses_gpu.piece_rows(163840, 2) == 4096
    assert losses_gpu.piece_rows(4096, 4) == 32768
    hidden, head = torch.empty(9000, 4), torch.empty(32768, 4)
    monkeypatch.setattr(losses_gpu, "ROWS", 16)
    monkeypatch.setattr(losses_gpu, "BUFFER", 1 << 27)
    assert [losses_gpu._Logits(hidden, head, chunk).chunk for chunk in (None, 7, 1500)] == [1024, 1024, 1500]
    assert losses_gpu._Logits(hidden[:5], head, None).chunk == 5


@pytest.mark.parametrize("room", [losses_gpu, norm], ids=["losses", "norms"])
def test_a_type_that_no_kernel_takes_is_said_once(room, recwarn: pytest.WarningsRecorder) -> None:
    slower.say.cache_clear()
    half = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float16, shape=(3, 8))
    assert not room.takes(half, half) and not room.takes(half, half)
    assert [("float16" in str(each.message), "slower path" in str(each.message)) for each in recwarn.list] == [(True, True)]
    assert not room.takes(torch.ones(3, 8), torch.ones(8)) and len(recwarn.list) == 1


@pytest.mark.parametrize("device", [CUDA])
def test_cuda_tensors_come_here_and_half_precision_sums_in_fp32(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample(device, torch.bfloat16)
    seen = []
    real = losses_gpu._Logits.pieces
    monkeypatch.setattr(losses_gpu._Logits, "pieces", lambda self: seen.append(self.logits.dtype) or real(self))
    found = losses.linear_cross_entropy(*x.leaves, x.targets, x.weight, chunk=64)
    grads = torch.autograd.grad(found[0], x.leaves)
    expected = losses.linear_cross_entropy(*x.exact, x.targets.cpu(), x.weight.cpu().double())
    close((*found, *grads), with_gradients(expected, expected[0], x.exact), 1e-2)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2 and found[1].dtype == torch.float32
    logp = losses.linear_logprobs(*x.leaves, x.targets, x.weight, chunk=64)
    close((-logp,), (expected[1],), 1e-5)  # from fp32 logits
    assert seen == [torch.bfloat16, torch.float32]
    every = losses.token_logprobs(*x.leaves, x.targets.clamp(max=W - 1), chunk=64)
    assert torch.equal(every[x.weight != 0], logp[x.weight != 0])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("held, width", [(True, 61), (True, 5003), (False, 5003), (False, 70001)])
def test_kernels_on_ragged_widths(device: str, held: bool, width: int) -> None:
    from k2lab.models.kernels import losses_triton

    rows = 40
    room = torch.randn(rows, width + 9 - width % 2, device=device).mul(3)
    logits = room[:, :width]
    targets = torch.randint(0, width, (rows,), device=device)
    weights = torch.rand(rows, device=device)
    weights[3] = 0
    exact = logits.double()
    nll = torch.full((rows,), torch.nan, device=device)
    kwargs = {} if held else {"held": 1, "tile": 2048}
    want = exact.softmax(-1)
    want[torch.arange(rows), targets] -= 1
    want *= weights.unsqueeze(1)
    loss = F.cross_entropy(exact, targets, reduction="none") * (weights != 0)
    sums = torch.empty(rows, device=device)
    losses_triton.log_sum_exp(logits, sums)
    close((sums,), (exact.logsumexp(-1).cpu(),))
    apart = (torch.full_like(logits, torch.nan), torch.full_like(logits, torch.nan).bfloat16())
    for out in (*apart, room.view(torch.bfloat16)[:, :width], logits):  # apart, then in the logits' memory
        logits.copy_(exact)
        losses_triton.cross_entropy(logits, out, targets, weights, nll, **kwargs)
        close((nll,), (loss.cpu(),))
        close((out,), (want.cpu(),), 5e-3 if out.dtype == torch.bfloat16 else 1e-5)
        logits.copy_(exact)
        shift, scale = exact.logsumexp(-1).float(), torch.linspace(0, 1, rows, device=device)
        losses_triton.two_softmaxes(logits, out, (shift, scale), (shift + 1, scale), **({} if held else {"tile": 2048}))
        both = exact.softmax(-1) * scale.unsqueeze(1) * (1 - math.exp(-1))
        close((out,), (both.cpu(),), 5e-3 if out.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("device", [CUDA])
def test_nothing_waits_for_the_device(device: str) -> None:
    x = sample(device, torch.bfloat16)
    every = lambda: (  # noqa: E731
        losses.linear_cross_entropy(*x.leaves, x.targets, x.weight, chunk=99, rows=200)[0]
        + losses.linear_topk_kl(*x.leaves, x.ids, x.named, x.weight, chunk=99)[0]
        + sum(part.sum() for part in losses.linear_logprobs_topk_kl(*x.leaves, x.targets, x.weight, x.ids, x.named, x.known, 99))
    ).backward()
    every()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every()
    finally:
        torch.cuda.set_sync_debug_mode("default")
