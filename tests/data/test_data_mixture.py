"""The mixture's global order."""

import numpy as np
import pytest

from k2lab.core.errors import DataError
from k2lab.data.mixture import epoch_order

DOMAINS = ["a"] * 10 + ["b"] * 7 + ["c"] * 20


def counts(order):
    return np.bincount(order, minlength=len(DOMAINS))


def test_without_weights_every_document_comes_once_in_another_order_each_epoch():
    first, second = (epoch_order(1, "pretrain", epoch, DOMAINS) for epoch in (0, 1))
    assert first.dtype == np.int64
    assert sorted(first) == sorted(second) == list(range(37))
    assert first.tolist() != second.tolist() != sorted(second)


def test_order_is_a_function_of_its_arguments():
    order = epoch_order(1, "pretrain", 3, DOMAINS, {"a": 0.5}).tolist()
    assert order == epoch_order(1, "pretrain", 3, np.array(DOMAINS), {"a": 0.5}).tolist()
    assert order != epoch_order(2, "pretrain", 3, DOMAINS, {"a": 0.5}).tolist()
    assert order != epoch_order(1, "sft", 3, DOMAINS, {"a": 0.5}).tolist()


def test_weights_are_repeats():
    seen = counts(epoch_order(0, "s", 0, DOMAINS, {"a": 2.0, "b": 0.0, "c": 1.5}))
    assert set(seen[:10]) == {2}
    assert set(seen[10:17]) == {0}
    assert sorted(seen[17:]) == [1] * 10 + [2] * 10


def test_fractions_cover_everything_before_they_repeat():
    weights = {"a": 0.5, "b": 0.25, "c": 0.0}
    halves = [counts(epoch_order(0, "s", epoch, DOMAINS, weights)) for epoch in range(4)]
    assert [half[:10].sum() for half in halves] == [5, 5, 5, 5]
    assert set((halves[0] + halves[1])[:10]) == set((halves[2] + halves[3])[:10]) == {1}
    assert set(sum(halves)[10:17]) == {1}
    assert [half[10:17].sum() for half in halves] == [1, 2, 2, 2]
    # The half is drawn, not the first five.
    assert halves[0][:5].sum() not in (0, 5) or counts(epoch_order(1, "s", 0, DOMAINS, weights))[:5].sum() not in (0, 5)


def test_decimal_weights_are_exact_over_epochs():
    total = sum(counts(epoch_order(0, "s", epoch, DOMAINS, {"b": 0.0, "c": 0.1, "a": 0.7})) for epoch in range(10))
    assert set(total[:10]) == {7}
    assert set(total[17:]) == {1}


@pytest.mark.parametrize(
    "weights, expected",
    [
        ({"aa": 1.0}, "no document has the domain 'aa'"),
        ({"a": -1.0}, "number of repeats"),
        ({"a": float("nan")}, "number of repeats"),
        ({"a": float("inf")}, "number of repeats"),
        ({"a": 0.0, "b": 0.0, "c": 0.0}, "holds no document"),
    ],
)
def test_bad_weights(weights, expected):
    with pytest.raises(DataError, match=expected):
        epoch_order(0, "s", 0, DOMAINS, weights)


def test_no_documents():
    with pytest.raises(DataError, match="holds no document"):
        epoch_order(0, "s", 0, [])
