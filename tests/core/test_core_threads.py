"""Work on threads: everything once; the first error stops the others, drops what waits and is raised when all have returned."""

from __future__ import annotations

import threading

import pytest

from k2lab.core import threads


@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_item_is_worked_on_once(count: int) -> None:
    done: list[int] = []
    stop = threading.Event()
    threads.each(range(20), done.append, count, stop)
    assert sorted(done) == list(range(20)) and not stop.is_set()
    threads.each([], done.append, count, stop)
    assert len(done) == 20


def test_the_first_error_stops_the_rest() -> None:
    stop, began, returned = threading.Event(), [], []
    both = threading.Barrier(2, timeout=30)

    def work(item: int) -> None:
        began.append(item)
        if item < 2:
            both.wait()
        if item == 1:
            raise ValueError("item 1")
        assert stop.wait(30)
        returned.append(item)

    with pytest.raises(ValueError, match="item 1"):
        threads.each(range(40), work, 2, stop)
    # the thread that is free again may have taken one more before anybody heard of the error
    assert set(began) <= {0, 1, 2} and 0 in returned and sorted(returned) == sorted(set(began) - {1})
