"""Work dealt to threads that ends as a whole: the first error stops everything."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")


def each(items: Sequence[Item], work: Callable[[Item], None], threads: int, stop: threading.Event) -> None:
    """Calls `work` on every item, in their order, on at most `threads` threads. The first error (or an interrupt) sets `stop`,
    which `work` should look at now and then; items that wait are dropped, and it is raised when those that run have returned."""
    if not items:
        return
    with ThreadPoolExecutor(max(1, min(threads, len(items)))) as pool:
        waiting = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(waiting):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # nothing begins any more, then those that run are told
            stop.set()
            raise
