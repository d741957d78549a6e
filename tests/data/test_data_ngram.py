"""N-gram baselines against a plain reference written from the formula."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from k2lab.core.rng import rng
from k2lab.data.ngram import NgramModel, ngram_bits

TRAIN = [[0, 1, 2, 1, 0], [3, 3, 1], [2], [0, 1, 2, 2, 4, 1, 0, 1]]
VALID = [[0, 1, 5], [], [3, 3, 3, 2, 1, 0, 5, 5], [2]]
VOCAB = 6


class Reference:
    """p(w | h) by recursion over dictionaries, in exact fractions."""

    def __init__(self, train, vocab, order):
        self.vocab, self.order = vocab, order
        self.counts = {}
        for doc in train:
            for context, symbol in self.events(doc):
                for k in range(order):
                    self.counts.setdefault(context[len(context) - k :], Counter())[symbol] += 1

    def events(self, doc):
        symbols = ["bos"] * (self.order - 1) + list(doc) + ["eos"]
        for i in range(self.order - 1, len(symbols)):
            yield tuple(symbols[i - self.order + 1 : i]), symbols[i]

    def p(self, symbol, context):
        lower = self.p(symbol, context[1:]) if context else Fraction(1, self.vocab + 1)
        if context not in self.counts:
            return lower
        seen = self.counts[context]
        return (seen[symbol] + len(seen) * lower) / (seen.total() + len(seen))

    def bits(self, docs):
        return -sum(math.log2(self.p(symbol, context)) for doc in docs for context, symbol in self.events(doc))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bits_equal_the_reference(order):
    reference = Reference(TRAIN, VOCAB, order)
    assert ngram_bits(TRAIN, VALID, VOCAB, order) == pytest.approx(reference.bits(VALID), rel=1e-12)
    assert ngram_bits(TRAIN, TRAIN, VOCAB, order) == pytest.approx(reference.bits(TRAIN), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("context", [[], [0], [0, 1], [3, 3], [5, 5], [1, 5, 2]])
def test_probabilities_sum_to_one_and_agree_with_the_reference(order, context):
    p = NgramModel(TRAIN, VOCAB, order).next_probabilities(context)
    assert p.shape == (VOCAB + 1,)
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()
    reference = Reference(TRAIN, VOCAB, order)
    seen = tuple((["bos"] * (order - 1) + context)[len(context) :]) if order > 1 else ()
    assert p == pytest.approx([float(reference.p(w, seen)) for w in [*range(VOCAB), "eos"]])


def test_random_documents_of_a_larger_vocabulary():
    lengths = rng(0, "lengths").integers(0, 40, size=60)
    docs = [rng(0, "doc", i).zipf(1.3, size=n).clip(max=500) - 1 for i, n in enumerate(lengths)]
    for order in (2, 3):
        assert ngram_bits(docs[:40], docs[40:], 500, order) == pytest.approx(Reference(docs[:40], 500, order).bits(docs[40:]))


def test_more_context_helps_where_there_is_structure():
    docs = [[0, 1, 2, 3] * 5 + [0, 2, 1, 3] * 5 for _ in range(5)]
    bits = [ngram_bits(docs, docs, 4, order) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_a_vocabulary_of_kimis_size_fits():
    assert ngram_bits([[163_839, 5]], [[163_839, 5]], 163_840, 3) < ngram_bits([[1, 2]], [[163_839, 5]], 163_840, 3)


def test_probabilities_are_per_token_and_eos():
    model = NgramModel(TRAIN, VOCAB, 2)
    p = model.probabilities(VALID)
    assert len(p) == sum(map(len, VALID)) + len(VALID)
    assert model.bits(VALID) == pytest.approx(-np.log2(p).sum())
    assert model.bits([]) == 0.0


@pytest.mark.parametrize(
    "train, vocab, order, expected",
    [
        ([[6]], 6, 1, "0 to 5"),
        ([[-1]], 6, 1, "0 to 5"),
        ([], 6, 1, "at least one"),
        (TRAIN, 6, 0, "order 0"),
        (TRAIN, 3_000_000, 3, "does not fit"),
    ],
)
def test_bad_input(train, vocab, order, expected):
    with pytest.raises(ValueError, match=expected):
        ngram_bits(train, [[0]], vocab, order)
