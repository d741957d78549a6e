"""Filters and the funnel."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from k2lab.core import slots
from k2lab.core.errors import DataError, RecipeError
from k2lab.core.rng import rng
from k2lab.data.filtering import run_filters, stream_filters
from k2lab.data.records import text_of
from k2lab.data.words import Words


def made(kind, /, **settings):
    return slots.load("filter", kind)(**settings)


def texts(*items):
    return [{"key": f"k{i}", "text": text, "source": "s"} for i, text in enumerate(items)]


def left(records, *filters):
    """(keys kept, rows)"""
    stream, rows = stream_filters(records, filters)
    return [record["key"] for record in stream], rows


def prose(seed, count):
    """`count` words without any pattern."""
    return " ".join(f"w{n}" for n in rng(seed, "prose").integers(0, 10**6, size=count))


# ---------------------------------------------------------------- funnel


def test_funnel_counts_and_examples():
    records = texts(*["short"] * 5, "long enough to stay", "long enough to stay", "another long text")
    kept, rows = run_filters(records, [made("length", min_chars=10), made("exact_dedup")])
    assert [record["key"] for record in kept] == ["k5", "k7"]
    first, second = rows
    assert (first.filter, first.seen, first.kept, first.dropped, first.changed) == ("length", 8, 3, 5, 0)
    assert (second.filter, second.seen, second.kept, second.dropped) == ("exact_dedup", 3, 2, 1)
    assert first.examples == [{"text": "short", "why": "5 characters, fewer than 10"}] * 3
    assert second.examples == [{"text": "long enough to stay", "why": "the same text as k5"}]
    assert json.loads(json.dumps(second.as_event()))["dropped"] == 1


def test_nothing_left_is_an_error_with_the_funnel():
    with pytest.raises(DataError) as caught:
        run_filters(texts("a", "b"), [made("exact_dedup"), made("length", min_chars=5)])
    assert "exact_dedup kept 2 of 2, length kept 0 of 2" in str(caught.value)
    assert "1 characters, fewer than 5" in str(caught.value)
    with pytest.raises(DataError, match="the sources gave no records"):
        run_filters([], [made("length")])


def test_no_filter_keeps_everything():
    assert run_filters(texts("a"), []) == (texts("a"), [])


def test_a_filter_that_loses_records_is_found_out():
    @dataclass(frozen=True)
    class Loses:
        def apply(self, records, log):
            yield next(records)
            yield from (record for record in records if False)

    with pytest.raises(DataError, match="lost count: 3 records seen, 1 kept, 0 logged"):
        run_filters(texts("a", "b", "c"), [Loses()])


def test_streaming_filters_do_not_hold_the_corpus():
    def endless():
        number = 0
        while True:
            yield {"key": str(number), "text": f"text number {number}"}
            number += 1

    stream, rows = stream_filters(endless(), [made("length"), made("exact_dedup"), made("pii")])
    assert [next(stream)["key"] for _ in range(3)] == ["0", "1", "2"]
    assert rows[0].seen == 3


# ---------------------------------------------------------------- length, exact_dedup


def test_length_limits_are_inclusive():
    keys, rows = left(texts("a" * 4, "a" * 5, "  " + "a" * 8 + "\n", "a" * 9), made("length", min_chars=5, max_chars=8))
    assert keys == ["k1", "k2"]
    assert rows[0].examples[1]["why"] == "9 characters, more than 8"
    with pytest.raises(RecipeError, match="cannot be met"):
        made("length", min_chars=5, max_chars=4)


def test_exact_dedup_looks_at_all_parts_of_a_record():
    records = [
        {"key": "a", "question": "q", "answer": "1"},
        {"key": "b", "question": "q", "answer": "2"},
        {"key": "c", "question": "Q ", "answer": "1"},
    ]
    assert left(records, made("exact_dedup"))[0] == ["a", "b"]
    assert left(records, made("exact_dedup", normalise=False))[0] == ["a", "b", "c"]


# ---------------------------------------------------------------- near_dedup


def shingle_set(text, n):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or {tuple(words)}


def test_near_dedup_equals_brute_force():
    base = [prose(seed, 60).split() for seed in range(40)]
    documents = []
    for i, words in enumerate(base):
        documents.append(" ".join(words))
        for edits in (1, 3, 8):  # near and not so near copies
            changed = list(words)
            for at in rng(i, "edit", edits).choice(60, size=edits, replace=False):
                changed[at] = f"x{at}"
            documents.append(" ".join(changed))
    kept, expected = [], []
    for i, text in enumerate(documents):
        own = shingle_set(text, 3)
        if all(len(own & other) / len(own | other) < 0.7 for other in kept):
            kept.append(own)
            expected.append(f"k{i}")
    keys, _ = left(texts(*documents), made("near_dedup", threshold=0.7, bands=40, rows=4))
    assert keys == expected
    assert 40 < len(keys) < 160


def test_near_dedup_keeps_the_first_and_says_whose_copy_it_was():
    text = prose(1, 100)
    keys, rows = left(texts(prose(2, 100), text, text + " end", text.upper()), made("near_dedup"))
    assert keys == ["k0", "k1"]
    assert rows[0].examples[0]["why"] == "similarity 0.99 with k1"


def test_near_dedup_handles_short_and_empty_texts():
    keys, _ = left(texts("one", "two", "one", "", "  ", "one two", "!!", "one two"), made("near_dedup"))
    assert keys == ["k0", "k1", "k3", "k4", "k5", "k6"]


def test_near_dedup_does_not_depend_on_chunks(monkeypatch):
    documents = [prose(i // 2, 30) for i in range(20)]
    whole = left(texts(*documents), made("near_dedup"))[0]
    module = __import__("k2lab.data.filters.near_dedup", fromlist=["_CHUNK"])
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert left(texts(*documents), made("near_dedup"))[0] == whole == [f"k{i}" for i in range(0, 20, 2)]


# ---------------------------------------------------------------- repetition


def duplicate_share(text, n):
    """Share of characters in words that lie in an n-gram which occurred before; the obvious way."""
    words = text.lower().split()
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered |= set(range(i, i + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


def top_share(text, n):
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = {gram: grams.count(gram) for gram in grams}
    most = max(counts.values())
    if most < 2:
        return 0.0
    return max(sum(map(len, gram)) * most for gram, count in counts.items() if count == most) / sum(map(len, words))


def test_repetition_shares_equal_brute_force():
    from k2lab.data.filters import repetition

    documents = []
    for i in range(30):
        words = [f"w{n}" for n in rng(i, "words").integers(0, 6 if i % 2 else 200, size=10 + 5 * i)]
        documents.append(" ".join(words + words[: int(rng(i, "again").integers(0, len(words)))]))
    words = Words(documents, split=repetition._NOT_BLANK)
    chars = np.bincount(words.text_N, weights=words.lengths_N)
    wanted = np.arange(30) != 7  # one text is left out
    for grams in repetition._repeated(words, wanted):
        run, reference = (repetition._top_chars, top_share) if grams.n < 5 else (repetition._duplicate_chars, duplicate_share)
        expected = [reference(text, grams.n) if i != 7 else 0 for i, text in enumerate(documents)]
        assert run(words, grams, 30) / chars == pytest.approx(expected)
    assert grams.n == 10
    assert len(grams.first) > 0


@pytest.mark.parametrize(
    "text, why",
    [
        ("\n".join(["buy this now dear friend"] * 10), "duplicate lines"),
        (
            prose(1, 10) + "\n" + "\n".join([prose(2, 9)] * 2 + [prose(k, 2) for k in range(3, 9)]),
            "characters in duplicate lines",
        ),
        ("spam ham " * 40, "most frequent 2-gram: 100%"),
        (prose(3, 30) + " " + prose(4, 12) + " " + prose(4, 12), "duplicate 5-grams"),
    ],
)
def test_repetition_drops_and_says_why(text, why):
    keys, rows = left(texts(text, prose(9, 80)), made("repetition"))
    assert keys == ["k1"]
    assert why in rows[0].examples[0]["why"]


def test_repetition_passes_short_texts_and_rules_can_be_off():
    spam = "spam " * 29
    assert left(texts(spam), made("repetition"))[0] == ["k0"]
    assert left(texts(spam), made("repetition", min_words=5))[0] == []
    off = {f"top_{n}gram": 1.0 for n in (2, 3, 4)} | {f"duplicate_{n}gram": 1.0 for n in range(5, 11)}
    assert left(texts(spam), made("repetition", min_words=5, **off))[0] == ["k0"]


# ---------------------------------------------------------------- pii

# Put together here, so that no scanner takes this file for a leak.
SECRETS = {
    "AKIA" + "ABCDEFGHIJKLMNOP": "<KEY>",
    "ghp_" + "a1B2" * 9: "<KEY>",
    "sk-" + "proj-" + "Zz09" * 8: "<KEY>",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIB\nAAAA\n-----END RSA " + "PRIVATE KEY-----": "<KEY>",
    "jane.doe+x@mail.example.co.uk": "<EMAIL>",
    "+49 170 1234567": "<PHONE>",
    "+1 (415) 555-2671": "<PHONE>",
    "(415) 555-2671": "<PHONE>",
    "415-555-2671": "<PHONE>",
    "4111 1111 1111 1111": "<CARD>",
    "5500-0000-0000-0004": "<CARD>",
    "378282246310005": "<CARD>",
    "3782 822463 10005": "<CARD>",
}


@pytest.mark.parametrize("secret, mask", SECRETS.items())
def test_pii_is_masked_and_never_shown(secret, mask):
    records = [{"key": "a", "instruction": f"Write to {secret}, now.", "input": "", "output": f"({secret})"}]
    kept, rows = run_filters(records, [made("pii")])
    assert kept[0]["instruction"] == f"Write to {mask}, now."
    assert kept[0]["output"] == f"({mask})"
    assert (rows[0].changed, rows[0].dropped) == (1, 0)
    assert rows[0].examples[0]["why"] == f"found 2 {mask[1:-1].lower()}"
    assert secret not in json.dumps([row.as_event() for row in rows])
    keys, rows = left([*records, *texts("clean")], made("pii", mode="drop"))
    assert keys == ["k0"]
    assert secret not in json.dumps(rows[0].as_event())


@pytest.mark.parametrize(
    "text",
    [
        "3.141592653589793238 is pi",
        "4111 1111 1111 1112 fails the check",
        "4111 1111 1111 1111 1111 1111 is too long",
        "version 3.11.7 of 2023-12-04, 12:34:56",
        "'{:+f}'.format(3.14) gives '+3.140000'",
        "@property and a @ b and user@host",
        "0x1234567890abcdef 1234567890",
        "sk-learn and task-force-of-many-long-words",
        "range(1000000, 2000000)",
        "2000000-400000=1600000 and 400000 * 4 = 1600000",
        "192.168.100.200 and 255.255.255.0",
    ],
)
def test_pii_leaves_other_text_alone(text):
    kept, rows = run_filters(texts(text), [made("pii")])
    assert text_of(kept[0]) == text
    assert rows[0].changed == 0


def test_pii_kinds_can_be_chosen_and_chats_are_masked():
    chat = {"key": "c", "messages": [{"role": "user", "content": "I am a@b.example, call 415-555-2671"}]}
    kept, _ = run_filters([chat], [made("pii", kinds=["email"])])
    assert kept[0]["messages"][0]["content"] == "I am <EMAIL>, call 415-555-2671"
    assert chat["messages"][0]["content"].startswith("I am a@b")  # the given record is untouched
    with pytest.raises(RecipeError, match="kinds must be known"):
        made("pii", kinds=("mail",))


# ---------------------------------------------------------------- contamination


def test_contamination_finds_shared_ngrams_whatever_the_punctuation():
    target = prose(1, 30)
    part = " ".join(target.split()[5:18])  # 13 words
    documents = texts(f"{prose(2, 20)} {part.upper().replace(' ', ', ')} {prose(3, 20)}", prose(2, 50), part.rsplit(" ", 1)[0])
    keys, rows = left(documents, made("contamination").with_targets([target]))
    assert keys == ["k1", "k2"]
    assert rows[0].examples[0]["why"] == "13 of its words (25%) lie in n-grams of an evaluation text"
    assert left(documents, made("contamination", max_share=0.3, texts=(target,)))[0] == ["k0", "k1", "k2"]


def test_contamination_looks_for_short_targets_whole():
    documents = texts("say what does copyfile do in python today", "what does copyfile do in rust", "does copyfile do in python")
    check = made("contamination", min_words=4).with_targets(["What does `copyfile` do in Python?", "Too short"])
    assert left(documents, check)[0] == ["k1", "k2"]


def test_contamination_needs_something_to_compare_with():
    with pytest.raises(DataError, match="no evaluation text of 6 or more words"):
        left(texts("a"), made("contamination").with_targets(["too short"]))
    with pytest.raises(RecipeError, match="do not fit"):
        made("contamination", ngram=3)


def test_contamination_reads_files_and_follows_them(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"question": prose(1, 20), "answer": "42"}) + "\n")
    check = made("contamination", path=str(path))
    assert left(texts(prose(1, 20), prose(2, 20)), check)[0] == ["k1"]
    before = check.fingerprint()
    assert check.with_targets(["x"]).fingerprint() != before
    path.write_text(json.dumps({"text": prose(2, 20)}) + "\n")
    assert check.fingerprint() != before
    path.write_text("{}\n")
    with pytest.raises(DataError, match="tasks.jsonl:1"):
        left(texts("a"), check)


# ---------------------------------------------------------------- words


def test_ngrams_stay_inside_their_text_and_know_their_length():
    words = Words(["a b c", "", "b c", "x"])
    two, first = words.ngrams(2)
    assert first.tolist() == [0, 1, 3]
    assert two[1] == two[2] != two[0]
    assert words.starts_S1.tolist() == [0, 3, 3, 5, 6]
    assert not set(words.ngrams(1)[0].tolist()) & set(two.tolist())
    assert len(words.ngrams(9)[0]) == len(Words([]).ngrams(1)[0]) == len(Words([""]).ngrams(1)[0]) == 0
    # The same in every process: not Python's salted hash.
    assert Words(["Hello"]).hashes_N[0] == int.from_bytes(
        __import__("hashlib").blake2b(b"hello", digest_size=8).digest(), "little"
    )
