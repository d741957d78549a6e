"""Blocks on several threads: every block once, the same bits, errors seen, forked processes, modes of the calling thread."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from k2lab.core.errors import CheckpointError
from k2lab.quant import _blocks, fp8, int4


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def weights() -> torch.Tensor:
    return torch.randn(3000, 512, generator=torch.Generator().manual_seed(0))


def everything(w: torch.Tensor) -> list[torch.Tensor]:
    codes, scales = int4.int4_grid(w)
    packed, _ = int4.quantise(w)
    codes8, scales8 = fp8.fp8_grid(w)
    found = [codes, scales, packed, int4.values(w), int4.values(w, dtype=w.dtype), int4.pack(codes), int4.unpack(packed)]
    found += [int4.dequantise(packed, scales), int4.dequantise(packed, scales, dtype=torch.float32)]
    return [*found, codes8.view(torch.uint8), scales8, fp8.dequantise(codes8, scales8), fp8.dequantise(codes8, scales8, w.dtype)]


def test_threads_give_the_same_bits_as_one() -> None:
    w = weights()
    ours = everything(w)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(ours, everything(w), strict=True))


def test_every_span_is_done_once_by_several_threads_that_do_not_split_work() -> None:
    done: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    both = threading.Barrier(2, timeout=30)

    def worker():
        both.wait()  # two workers are there at once

        def work(span: int) -> None:
            done[span] += 1
            seen.add((threading.get_ident(), torch.get_num_threads()))

        return work

    _blocks.each(range(100), worker)
    assert done == dict.fromkeys(range(100), 1)
    assert {count for _, count in seen} == {1} and threading.get_ident() not in {ident for ident, _ in seen}
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2]  # threads that begin later are not held to one


def test_spans_cover_the_rows() -> None:
    device = torch.device("cpu")
    assert _blocks.spans(10, 4, 12, device) == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]
    assert _blocks.spans(2, 100, 12, device) == [slice(0, 1), slice(1, 2)]
    assert _blocks.spans(10, 4, 12, torch.device("meta")) == [slice(0, 10)]


def test_errors_of_threads_are_raised_when_all_are_done() -> None:
    codes = torch.zeros(4096, 1024, dtype=torch.int8)
    codes[-1, -1] = 8
    with pytest.raises(CheckpointError, match="-8 to 7"):
        int4.pack(codes)


def test_modes_of_the_calling_thread_hold() -> None:
    w = weights().requires_grad_()
    assert not int4.values(w).requires_grad
    out = int4.fake_quant(w)
    (grad,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(grad, torch.ones_like(w))
    with torch.inference_mode():
        inside = int4.values(w)
    assert inside.is_inference() and torch.equal(inside, int4.values(w))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    w = weights()
    expected = int4.values(w)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # PyTorch's own threads did not come along either
        try:
            pool = _blocks._threads(2)
            torch.set_num_threads(1)
            found = pool.submit(lambda: torch.equal(int4.values(w), expected)).result(timeout=60)
            os._exit(0 if found else 1)
        except BaseException:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
