"""The data set format: records, tokens, splits, and the check that finds every damage."""

import json

import numpy as np
import pytest

from k2lab.core.errors import DataError
from k2lab.data import shards

RECORDS = [
    {"key": "a", "text": "h\u00e4llo", "source": "s", "domain": "x"},
    {"key": "b", "text": "line\nbreak \u2028 and\u0085more", "source": "s", "domain": "y"},
    {"key": "c", "question": "q", "answer": "a", "source": "t"},
]


def write_tokens(folder, split, documents, vocab_size=300, **settings):
    with shards.TokenWriter(folder, split, vocab_size, **settings) as writer:
        for i, tokens in enumerate(documents):
            writer.add(tokens, key=f"{split}{i}", text_bytes=10 * i, domain="even" if i % 2 == 0 else "odd", source="s")


DOCUMENTS = [[1, 2, 3], [299], [0, 0], list(range(100))]


@pytest.fixture
def folder(tmp_path):
    """A data set with records and tokens, two splits, several shards."""
    shards.write_records(tmp_path, RECORDS, "train", shard_bytes=1)
    shards.write_records(tmp_path, [{"key": "v", "text": "valid"}], "valid")
    write_tokens(tmp_path, "train", DOCUMENTS, shard_tokens=4)
    write_tokens(tmp_path, "valid", [[5, 6]])
    return tmp_path


# ---------------------------------------------------------------- records


def test_records_come_back_as_written_with_exact_counts(tmp_path):
    section = shards.write_records(tmp_path, iter(RECORDS), "train")
    assert list(shards.read_records(tmp_path, "train")) == RECORDS
    assert (section["records"], section["chars"], section["text_bytes"]) == (3, 5 + 21 + 3, 6 + 24 + 3)
    assert section["domains"] == {
        "": {"records": 1, "chars": 3, "text_bytes": 3},
        "x": {"records": 1, "chars": 5, "text_bytes": 6},
        "y": {"records": 1, "chars": 21, "text_bytes": 24},
    }
    assert section["sources"]["s"]["records"] == 2
    (shard,) = section["shards"]
    assert shard["file_bytes"] == (tmp_path / "train" / "records-00000.jsonl").stat().st_size
    assert json.loads((tmp_path / "train" / "index.json").read_text())["format"] == 1


def test_records_are_split_into_shards_and_bytes_repeat(tmp_path):
    many = [{"key": str(i), "text": "x" * 100} for i in range(50)]
    for name in ("one", "two"):
        section = shards.write_records(tmp_path / name, many, "train", shard_bytes=1000)
    assert len(section["shards"]) > 3
    assert sum(shard["records"] for shard in section["shards"]) == 50
    assert list(shards.read_records(tmp_path / "one", "train")) == many
    for path in (tmp_path / "one" / "train").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()


def test_writing_again_leaves_no_old_shards(tmp_path):
    shards.write_records(tmp_path, RECORDS, "train", shard_bytes=1)
    shards.write_records(tmp_path, RECORDS[:1], "train")
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["index.json", "records-00000.jsonl"]
    assert shards.check(tmp_path) == []


@pytest.mark.parametrize(
    "records, expected",
    [
        ([], "no record for the split"),
        ([{"text": "a"}], "has no key"),
        ([{"key": "a", "text": "1"}, {"key": "a", "text": "2"}], "two records have the same key"),
        ([{"key": "a", "text": "\ud800"}], "cannot be written as JSON"),
        ([{"key": "a", "text": "x", "score": float("nan")}], "cannot be written as JSON"),
        ([{"key": "a", "body": "x"}], "no known kind"),
    ],
)
def test_bad_records_are_not_written(tmp_path, records, expected):
    with pytest.raises(DataError, match=expected):
        shards.write_records(tmp_path, records, "train")
    assert not (tmp_path / "train" / "index.json").exists()


def test_reading_names_what_is_wrong(folder):
    with pytest.raises(DataError, match="no split 'test'.*train, valid"):
        list(shards.read_records(folder, "test"))
    path = folder / "train" / "records-00001.jsonl"
    original = path.read_bytes()
    path.write_bytes(original[:-5] + b"\n")
    with pytest.raises(DataError, match="not JSON") as caught:
        list(shards.read_records(folder, "train"))
    assert f"{path}:1" in str(caught.value)
    path.write_bytes(original * 2)
    with pytest.raises(DataError, match="changed.*2 records"):
        list(shards.read_records(folder, "train"))
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        list(shards.read_records(folder, "train"))


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_tokens_come_back_as_written(tmp_path, vocab_size, dtype):
    documents = [[vocab_size - 1, 0], [7], list(range(50))]
    write_tokens(tmp_path, "train", documents, vocab_size, shard_tokens=2, tokenizer="sha")
    reader = shards.TokenReader(tmp_path, "train")
    assert [document.tolist() for document in reader] == documents
    assert all(document.dtype.name == dtype and not document.flags.writeable for document in reader)
    assert reader[-1].tolist() == documents[-1]
    assert [d.tolist() for d in reader[:2]] == documents[:2]
    assert (len(reader), reader.num_tokens, reader.vocab_size) == (3, 53, vocab_size)
    assert reader.lengths.tolist() == [2, 1, 50]
    assert reader.text_bytes.tolist() == [0, 10, 20]
    assert (reader.key(1), reader.domain(1), reader.source(1)) == ("train1", "odd", "s")
    assert reader.domains == ["even", "odd", "even"]
    with pytest.raises(IndexError):
        reader[3]
    section = shards.read_index(tmp_path, "train", "tokens")
    assert (section["documents"], section["tokens"], section["text_bytes"], section["tokenizer"]) == (3, 53, 30, "sha")
    assert section["domains"]["even"] == {"documents": 2, "tokens": 52, "text_bytes": 20}
    assert [shard["documents"] for shard in section["shards"]] == [1, 2]
    raw = np.fromfile(tmp_path / "train" / "tokens-00000.bin", dtype="<u2" if dtype == "uint16" else "<u4")
    assert raw.tolist() == documents[0]


@pytest.mark.parametrize(
    "tokens, expected",
    [([300], "outside the vocabulary.*300.*0 to 299"), ([-1], "outside"), ([], "at least one token"), ([[1]], "shape")],
)
def test_bad_documents_are_refused(tmp_path, tokens, expected):
    writer = shards.TokenWriter(tmp_path, "train", 300)
    with pytest.raises(DataError, match=expected):
        writer.add(tokens, key="a", text_bytes=1)
    writer.add([1], key="a", text_bytes=1)
    with pytest.raises(DataError, match="same key"):
        writer.add([1], key="a", text_bytes=1)


def test_a_split_without_documents_or_with_an_exception_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="no document"):
        shards.TokenWriter(tmp_path, "train", 10).close()

    def interrupted():
        with shards.TokenWriter(tmp_path, "train", 10) as writer:
            writer.add([1], key="a", text_bytes=1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(DataError, match="no split 'train'"):
        shards.TokenReader(tmp_path, "train")


def test_records_and_tokens_may_share_a_split(folder):
    assert len(list(shards.read_records(folder, "train"))) == 3
    assert len(shards.TokenReader(folder, "train")) == 4
    shards.write_records(folder / "other", RECORDS, "train")
    with pytest.raises(DataError, match="holds no tokens"):
        shards.TokenReader(folder / "other", "train")


# ---------------------------------------------------------------- check


def test_a_good_data_set_has_no_problems(folder):
    assert shards.check(folder) == []


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def save_npy(path, values):
    with path.open("wb") as file:
        np.save(file, np.array(values, dtype="<i8"))


def replace_in(path, old, new):
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))


DAMAGE = {
    "torn line": (
        lambda d: replace_in(d / "train/records-00000.jsonl", b'"}', b""),
        "records-00000.jsonl:1: the line is not JSON",
    ),
    "not a record": (
        lambda d: replace_in(d / "train/records-00000.jsonl", b'"text"', b'"txet"'),
        "records-00000.jsonl:1: .*known kind",
    ),
    "changed text": (lambda d: replace_in(d / "train/records-00000.jsonl", b"llo", b"lloo"), "chars is 6, the index says 5"),
    "tag changed": (lambda d: replace_in(d / "train/records-00000.jsonl", b'"x"', b'"z"'), "domains is .*'z'"),
    "line lost": (lambda d: (d / "train/records-00002.jsonl").write_text(""), "records is 0, the index says 1"),
    "shard lost": (lambda d: (d / "train/records-00002.jsonl").unlink(), "records-00002.jsonl: missing"),
    "key twice": (lambda d: replace_in(d / "train/records-00002.jsonl", b'"key":"c"', b'"key":"a"'), "key 'a' occurs twice"),
    "key in both splits": (
        lambda d: replace_in(d / "valid/records-00000.jsonl", b'"v"', b'"a"'),
        "'a' occurs twice .also in train",
    ),
    "no key": (lambda d: replace_in(d / "valid/records-00000.jsonl", b'"key"', b'"kez"'), "records-00000.jsonl:1: no key"),
    "count edited": (
        lambda d: edit_json(d / "train/index.json", lambda v: v["records"].update(text_bytes=1)),
        "text_bytes is 33, the index says 1",
    ),
    "index torn": (lambda d: (d / "valid/index.json").write_text("{"), "index.json: not JSON"),
    "index format": (lambda d: edit_json(d / "valid/index.json", lambda v: v.update(format=9)), "format is not 1"),
    "index key lost": (
        lambda d: edit_json(d / "valid/index.json", lambda v: v["records"].pop("shards")),
        "section 'records' is damaged",
    ),
    "tokens cut": (lambda d: (d / "train/tokens-00000.bin").write_bytes(b"\0\0"), "tokens-00000.bin: the shard was changed"),
    "tokens lost": (lambda d: (d / "valid/tokens-00000.bin").unlink(), "tokens-00000.bin: .*missing"),
    "token too large": (
        lambda d: (d / "valid/tokens-00000.bin").write_bytes(b"\x05\x00\xff\xff"),
        "token 1 is 65535, not under 300",
    ),
    "offsets fall": (lambda d: save_npy(d / "train/tokens-00000.idx", [0, 5, 4]), "offsets must rise"),
    "offsets short": (lambda d: save_npy(d / "train/tokens-00000.idx", [0, 3, 3]), "offsets must rise"),
    "offsets missing": (lambda d: save_npy(d / "train/tokens-00000.idx", [0, 4]), r"got: int64\[2\]|Got: int64\[2\]"),
    "idx no npy": (lambda d: (d / "train/tokens-00000.idx").write_bytes(b"junk"), "tokens-00000.idx: .*not an npy"),
    "offsets moved": (lambda d: save_npy(d / "train/tokens-00000.idx", [0, 2, 4]), "domains is"),
    "text bytes": (lambda d: save_npy(d / "train/tokens-00000.bytes", [0, 11]), "text_bytes is 61, the index says 60"),
    "names lost": (lambda d: (d / "valid/tokens-00000.docs").write_text(""), "docs files were changed"),
    "token key twice": (lambda d: replace_in(d / "valid/tokens-00000.docs", b"valid0", b"train0"), "'train0' occurs twice"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds(folder, name):
    import re

    damage, expected = DAMAGE[name]
    damage(folder)
    problems = shards.check(folder)
    assert any(re.search(expected, problem) for problem in problems), problems


def test_check_of_an_empty_folder(tmp_path):
    assert "no split" in shards.check(tmp_path)[0]


# ---------------------------------------------------------------- splits


def test_whole_groups_are_held_out_and_the_share_is_met():
    records = [{"key": f"k{i}", "module": f"m{i // 4}"} for i in range(8000)]
    splits = [shards.split_of(record, 0.1, seed=3) for record in records]
    by_module = {}
    for record, split in zip(records, splits):
        by_module.setdefault(record["module"], set()).add(split)
    assert all(len(found) == 1 for found in by_module.values())
    assert 0.08 < splits.count("valid") / 8000 < 0.12
    assert set(splits) == set(shards.SPLITS)


def test_split_depends_on_group_and_seed_only_and_grows_with_the_share():
    groups = [{"key": str(i)} for i in range(500)]
    small = {g["key"] for g in groups if shards.split_of(g, 0.1, 0) == "valid"}
    large = {g["key"] for g in groups if shards.split_of(g, 0.2, 0) == "valid"}
    other = {g["key"] for g in groups if shards.split_of(g, 0.1, 1) == "valid"}
    assert small < large
    assert small != other
    assert shards.split_of({"key": "x", "module": "m"}, 0.5, 0) == shards.split_of(
        {"key": "y", "group": "m", "text": "z"}, 0.5, 0
    )
    assert not [g for g in groups if shards.split_of(g, 0.0, 0) == "valid"]
    with pytest.raises(DataError, match="valid_share"):
        shards.split_of(groups[0], 1.0, 0)


def test_a_record_may_name_its_own_split():
    records = [{"key": str(i), "split": split} for i in range(50) for split in ("train", "valid")]
    assert [shards.split_of(record, 0.1, 0) for record in records] == ["train", "valid"] * 50
