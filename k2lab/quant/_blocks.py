"""Work on the rows of a tensor, block by block, on as many threads as PyTorch would use.

PyTorch's own threads meet after every operation. These sums of a dozen short operations per block would meet hundreds of times,
and where another program takes a core for a moment, all wait for it each time (measured beside five busy processes on two cores:
0.2 to 2 s instead of 20 ms). Here each thread takes the next block and runs all operations on it alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

Span = TypeVar("Span")


def spans(num: int, columns: int, elements: int, device: torch.device) -> list[slice]:
    """Blocks of about `elements` of `num` rows; all rows at once on other devices than a CPU."""
    step = max(1, elements // columns) if device.type == "cpu" else max(1, num)
    return [slice(first, min(first + step, num)) for first in range(0, num, step)]


def each(spans: Iterable[Span], worker: Callable[[], Callable[[Span], None]]) -> None:
    """Calls `worker()`, once per thread, for a function (with memory of its own), and that function on every span. Returns
    when all threads are done; raises what one of them raised."""
    left = list(spans)
    count = min(torch.get_num_threads(), len(left))
    if count <= 1:
        work = worker()
        for span in left:
            work(span)
        return
    inference, taking = torch.is_inference_mode_enabled(), iter(left)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are known to the calling thread only
            work = worker()
            for span in taking:  # a list's iterator gives each element to one thread
                work(span)

    futures = [_threads(torch.get_num_threads()).submit(run) for _ in range(count)]
    wait(futures)
    for future in futures:
        future.result()


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations run on one thread each."""
    met = threading.Barrier(count + 1, timeout=60)

    def begin() -> None:
        torch.get_num_threads()  # a thread takes the process's number when it first asks, and keeps its own only from then on
        torch.set_num_threads(1)  # for this thread, and for all that are yet to begin: see below
        met.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="k2-quant")
    started = [pool.submit(begin) for _ in range(count)]
    met.wait()
    for future in started:
        future.result()
    torch.set_num_threads(count)
    return pool


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of its parent's threads
