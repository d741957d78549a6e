"""Packing and feed: alignment, each token predicted once, rows independent of ranks, O(1) exact resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from k2lab.core.batches import check_batch
from k2lab.core.errors import DataError, RecipeError
from k2lab.core.rng import rng
from k2lab.core.types import Sample
from k2lab.data.feed import PackedFeed
from k2lab.data.pack import cut, pack, piece
from k2lab.data.samples import preference_unit, valid_batches
from k2lab.text.chat import Rendered


def sample(length: int, key: str = "s", first: int = 0, **streams) -> Sample:
    weight = np.ones(length, dtype=np.float32)
    weight[0] = 0
    return Sample(tokens=np.arange(first, first + length, dtype=np.int32), weight=weight, key=key, source="d", streams=streams)


def documents(count: int, seed: int = 0) -> list[Sample]:
    draw = rng(seed, "lengths")
    return [sample(int(n), f"doc{i}", first=1000 * i) for i, n in enumerate(draw.integers(2, 90, count))]


def feed(docs, **kwargs) -> PackedFeed:
    settings = {"seq_len": 32, "global_batch": 4, "per_device_batch": 4} | kwargs
    return PackedFeed(docs, lambda epoch: rng(0, "order", epoch).permutation(len(docs)), **settings)


def test_alignment_is_shifted_once_and_streams_follow():
    a = sample(4, first=10, logprobs=np.array([0.0, -1.0, -2.0, -3.0], dtype=np.float32))
    b = sample(3, first=50, logprobs=np.array([0.0, -5.0, -6.0], dtype=np.float32))
    batch = pack([a, b])
    assert batch.tokens_T.tolist() == [10, 11, 12, 13, 50, 51, 52]
    assert batch.targets_T.tolist()[:3] == [11, 12, 13]
    assert batch.targets_T.tolist()[4:6] == [51, 52]
    assert batch.weight_T.tolist() == [1, 1, 1, 0, 1, 1, 0]
    assert batch.streams_T["logprobs"].tolist() == [-1, -2, -3, 0, -5, -6, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.starts_S1.tolist() == [0, 4, 7]
    assert batch.num_tokens == 5


def test_streams_of_one_pack_must_be_the_same():
    with pytest.raises(DataError, match="different streams"):
        pack([sample(3), sample(3, logprobs=np.zeros(3, dtype=np.float32))])


def test_cut_predicts_each_token_exactly_once():
    whole = sample(100)
    pieces = cut(whole, 32)
    trained = np.concatenate([p.tokens[p.weight > 0] for p in pieces])
    assert trained.tolist() == list(range(1, 100))
    assert all(len(p.tokens) <= 32 for p in pieces)
    assert piece(whole, 0, 100) is whole


def test_streams_of_columns_and_of_integers_are_shifted_like_the_others():
    ids = np.arange(8, dtype=np.int32).reshape(4, 2)
    a = sample(4, teacher_ids=ids, teacher_logprobs=-ids.astype(np.float64))
    b = sample(2, teacher_ids=ids[:2], teacher_logprobs=np.zeros((2, 2), np.float16))
    streams = pack([a, b]).streams_T
    assert streams["teacher_ids"].dtype == np.int64 and streams["teacher_logprobs"].dtype == np.float32
    assert streams["teacher_ids"].tolist() == [[2, 3], [4, 5], [6, 7], [0, 0], [2, 3], [0, 0]]
    assert streams["teacher_logprobs"][:3].tolist() == [[-2, -3], [-4, -5], [-6, -7]]
    with pytest.raises(DataError, match="another shape") as caught:
        pack([a, sample(2, "other", teacher_ids=ids[:2, :1], teacher_logprobs=np.zeros((2, 1)))])
    assert "other" in str(caught.value) and "(2, 2)" in str(caught.value)
    with pytest.raises(DataError, match="another shape"):
        pack([sample(4, logprobs=np.zeros(3, np.float32))])


def units(count: int, longest: int = 20) -> list[tuple[Sample, Sample]]:
    found = []
    for n in range(count):
        sizes = rng(3, "unit", n).integers(4, longest, 2)
        sides = [Rendered(list(range(1000 * n + 500 * side, 1000 * n + 500 * side + size)), [False, False] + [True] * (size - 2))
                 for side, size in enumerate(map(int, sizes))]  # fmt: skip
        found.append(preference_unit(*sides, key=f"p{n}", source="pairs"))
    return found


def test_a_preference_unit_is_two_samples_of_one_pair():
    chosen, rejected = preference_unit(Rendered([1, 2, 3], [False, False, True]), Rendered([1, 2, 4], [False, False, True]), "k")
    assert (chosen.key, rejected.key) == ("k#chosen", "k#rejected")
    assert chosen.pair[0] == rejected.pair[0] >= 0 and (chosen.pair[1], rejected.pair[1]) == (1, -1)
    assert chosen.weight.tolist() == [0, 0, 1]
    assert units(2)[0][0].pair[0] != units(2)[1][0].pair[0]
    with pytest.raises(DataError, match="are equal") as caught:
        preference_unit(Rendered([1, 2], [False, True]), Rendered([1, 2], [False, True]), "same")
    assert "same" in str(caught.value)
    with pytest.raises(DataError, match="rejected side .* no trained token"):
        preference_unit(Rendered([1, 2], [False, True]), Rendered([1, 3], [True, False]), "k")


def test_pairs_travel_with_the_batch_and_are_there_without_pairs():
    pairs = units(3)
    batch = pack([side for unit in pairs for side in unit] + [sample(5)])
    assert batch.pair_S.dtype == np.int64 and batch.sign_S.dtype == np.float32
    assert batch.pair_S.tolist() == [side.pair[0] for unit in pairs for side in unit] + [-1]
    assert batch.sign_S.tolist() == [1, -1, 1, -1, 1, -1, 0]
    plain = pack([sample(5), sample(4)])
    assert plain.pair_S.tolist() == [-1, -1] and plain.sign_S.tolist() == [0, 0]
    with pytest.raises(AssertionError, match="without the other"):
        pack([pairs[0][0], pairs[1][1]])


def test_units_stay_in_one_row_over_ranks_and_micro_batches():
    pairs = units(30)
    whole = feed(pairs, seq_len=64, fill="whole").take()[0]
    assert len(whole.keys) % 2 == 0
    parts = feed(pairs, seq_len=64, fill="whole", per_device_batch=1).take()
    parts2 = [feed(pairs, seq_len=64, fill="whole", per_device_batch=2, world=2, rank=r).take()[0] for r in (0, 1)]
    for some in (parts, parts2):
        assert [key for part in some for key in part.keys] == list(whole.keys)
        for part in some:
            assert part.keys[::2] == tuple(key.replace("rejected", "chosen") for key in part.keys[1::2])
            assert len(part.tokens_T) <= 64 * (4 // len(some))
    assert feed(pairs, seq_len=64, fill="whole").gives == {"pairs"}
    assert feed([sample(4, logprobs=np.zeros(4))]).gives == {"logprobs"}


def test_every_unit_is_seen_once_an_epoch_and_the_last_may_meet_the_first_again():
    pairs = units(7)
    stream = feed(pairs, seq_len=64, fill="whole")
    seen: list[str] = []
    while stream.cursor()["epoch"] < 3:
        seen += [key for batch in stream.take() for key in batch.keys]
    firsts = seen[: 2 * len(pairs)]
    assert sorted(firsts) == sorted(side.key for unit in pairs for side in unit)


def test_a_unit_that_does_not_fit_is_refused_with_both_numbers():
    too_long = units(1, longest=200)
    with pytest.raises(DataError, match="more than seq_len = 16"):
        feed(too_long, seq_len=16, fill="whole").take()
    with pytest.raises(DataError, match="more than seq_len = 16"):
        valid_batches(too_long, 16, 64, 100, seed=0, stage="s")


def test_validation_keeps_units_whole_and_gives_idle_ranks_a_batch_that_counts_nothing():
    pairs = units(8)
    batches = valid_batches(pairs, 64, 64, 10_000, seed=1, stage="s")
    assert sum(int((b.sign_S > 0).sum()) for b in batches) == 8
    few = [valid_batches(pairs[:2], 64, 1000, 10_000, seed=1, stage="s", rank=r, world=3) for r in range(3)]
    assert [len(rank) for rank in few] == [1, 1, 1]
    assert [rank[0].num_tokens > 0 for rank in few] == [True, False, False]
    assert not few[1][0].weight_T.any() and not few[1][0].sign_S.any() and (few[1][0].pair_S == -1).all()


def test_split_feed_trains_every_token_of_an_epoch_once():
    docs = documents(50)
    stream = feed(docs)
    seen: dict[int, int] = {}
    while stream.cursor()["epoch"] == 0:
        for batch in stream.take():
            for token, weight in zip(batch.targets_T, batch.weight_T, strict=True):
                if weight:
                    seen[int(token)] = seen.get(int(token), 0) + 1
    expected = {1000 * i + t for i, doc in enumerate(docs) for t in range(1, len(doc.tokens))}
    first_epoch = set(seen)
    assert expected <= first_epoch
    # the last step runs over into the second epoch, nothing else is seen twice
    assert sum(count - 1 for count in seen.values()) < 4 * 32


def test_rows_do_not_depend_on_ranks_or_micro_batches():
    docs = documents(60)

    def rows_of(**kwargs):
        return feed(docs, **kwargs).take()

    whole = rows_of()[0]
    halves = [rows_of(per_device_batch=2, world=2, rank=r)[0] for r in (0, 1)]
    quarters = rows_of(per_device_batch=1)
    for parts in (halves, quarters):
        assert np.concatenate([p.tokens_T for p in parts]).tolist() == whole.tokens_T.tolist()
        assert sum(p.num_tokens for p in parts) == whole.num_tokens
        assert [key for p in parts for key in p.keys] == list(whole.keys)


def test_cursor_is_json_and_resumes_exactly_even_on_other_ranks():
    docs = documents(40)
    one = feed(docs)
    for _ in range(7):
        one.take()
    cursor = json.loads(json.dumps(one.cursor()))
    expected = one.take()[0].tokens_T.tolist()
    two = [feed(docs, world=2, rank=r, per_device_batch=2) for r in (0, 1)]
    for other in two:
        other.seek(cursor)
    assert np.concatenate([other.take()[0].tokens_T for other in two]).tolist() == expected


def test_whole_feed_never_splits_and_refuses_what_does_not_fit():
    docs = [sample(n, f"d{n}") for n in (10, 20, 30, 5)]
    stream = feed(docs, fill="whole")
    for batch in stream.take():
        assert set(np.diff(batch.starts_S1)) <= {10, 20, 30, 5}
    with pytest.raises(DataError, match="longer than seq_len"):
        feed([sample(40)], fill="whole").take()


def test_batch_arithmetic_is_explained():
    with pytest.raises(RecipeError, match="multiple of 6") as caught:
        check_batch(16, 2, 3, "stage.x")
    assert "Set global_batch to 12 or 18" in str(caught.value)
    check_batch(16, 4, 2, "stage.x")


def test_validation_batches_are_fixed_and_sum_up_over_ranks():
    docs = documents(30)
    alone = valid_batches(docs, 32, 128, 400, seed=1, stage="s")
    again = valid_batches(docs, 32, 128, 400, seed=1, stage="s")
    assert [b.tokens_T.tolist() for b in alone] == [b.tokens_T.tolist() for b in again]
    split = [batch for r in (0, 1) for batch in valid_batches(docs, 32, 128, 400, seed=1, stage="s", rank=r, world=2)]
    assert sorted(b.tokens_T.tolist() for b in split) == sorted(b.tokens_T.tolist() for b in alone)
