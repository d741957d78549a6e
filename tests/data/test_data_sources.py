"""Sources of the user's files: jsonl, text folder, parquet, hub; and every shipped slot's examples."""

import dataclasses
import json
import sys
import types

import pytest

from k2lab.core import slots
from k2lab.core.errors import DataError, MachineError, RecipeError


def source(kind, /, **settings):
    return slots.load("source", kind)(**settings)


@pytest.mark.parametrize("kind, count", [("source", 8), ("filter", 6)])
def test_every_slot_has_help_and_examples(kind, count):
    names = slots.names(kind)
    assert len(names) >= count
    for name in names:
        cls = slots.load(kind, name)
        assert len(slots.first_line(cls)) > 20
        assert len(cls.examples()) >= 1
        for example in cls.examples():
            assert isinstance(example, cls)
            assert dataclasses.replace(example) == example


# ---------------------------------------------------------------- jsonl


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_jsonl_gives_keys_and_default_tags(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"question": "q", "answer": "a", "source": "gsm8k", "key": "own"})
    found = list(source("jsonl", path=path, name="mine", domain="math").records())
    assert found == [
        {"key": "mine:a.jsonl:1", "text": "x", "source": "mine", "domain": "math"},
        {"key": "own", "question": "q", "answer": "a", "source": "gsm8k", "domain": "math"},
    ]


def test_jsonl_reads_lists_and_globs_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        write_lines(tmp_path / f"{name}.jsonl", {"text": name})
    everything = source("jsonl", path=[str(tmp_path / "c.jsonl"), str(tmp_path / "[ab].jsonl")])
    assert [record["text"] for record in everything.records()] == ["a", "b", "c"]


def test_jsonl_errors_name_file_line_and_keys(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"}, {"body": "y", "id": 1})
    with pytest.raises(DataError) as caught:
        list(source("jsonl", path=path).records())
    assert f"{path}:2" in str(caught.value)
    assert "body, id" in str(caught.value)
    with pytest.raises(DataError, match="lacks 'instruction', 'output'"):
        list(source("jsonl", path=path, kind="instruction").records())
    with pytest.raises(RecipeError, match="Did you mean 'instruction'"):
        source("jsonl", path=path, kind="instructions")


def test_jsonl_fingerprint_follows_the_content_not_the_place(tmp_path):
    (tmp_path / "x").mkdir()
    first = write_lines(tmp_path / "a.jsonl", {"text": "x"})
    moved = write_lines(tmp_path / "x" / "a.jsonl", {"text": "x"})
    before = source("jsonl", path=first).fingerprint()
    assert source("jsonl", path=moved).fingerprint() == before
    assert source("jsonl", path=first, domain="d").fingerprint() != before
    write_lines(tmp_path / "a.jsonl", {"text": "y"})
    assert source("jsonl", path=first).fingerprint() != before


# ---------------------------------------------------------------- text folder


def test_text_folder_reads_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.md").write_text("zwei \u00e4", encoding="utf-8")
    (tmp_path / "deep" / "a.md").write_text("eins", encoding="utf-8")
    for path in (tmp_path, tmp_path / "**" / "*.md"):
        found = list(source("text_folder", path=str(path), license="CC0-1.0").records())
        assert [(r["key"], r["text"]) for r in found] == [
            ("text_folder:b.md", "zwei \u00e4"),
            ("text_folder:deep/a.md", "eins"),
        ]
        assert all(r["license"] == "CC0-1.0" and r["source"] == "text_folder" for r in found)


@pytest.mark.parametrize("raw, expected", [(b"abc\0def", "byte 4 is NUL"), (b"ok\nab\xe4", r"byte 6 \(line 2\) is 0xe4")])
def test_text_folder_refuses_or_skips_what_is_no_text(tmp_path, raw, expected):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(raw)
    with pytest.raises(DataError, match=expected) as caught:
        list(source("text_folder", path=str(tmp_path)).records())
    assert "bad.txt" in str(caught.value)
    with pytest.warns(UserWarning, match="1 files were left out.*bad.txt"):
        kept = list(source("text_folder", path=str(tmp_path), errors="skip").records())
    assert [record["text"] for record in kept] == ["good"]


# ---------------------------------------------------------------- parquet


def test_parquet_maps_columns_and_reads_in_batches(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"content": ["a", "b", "c"], "n": [1, 2, 3]}), path)
    mapped = source("parquet", path=path, columns={"text": "content"}, batch_rows=2)
    assert [(r["key"], r["text"]) for r in mapped.records()] == [(f"parquet:a.parquet:{i}", t) for i, t in enumerate("abc")]
    with pytest.raises(DataError, match="no column 'body'") as caught:
        list(source("parquet", path=path, columns={"text": "body"}).records())
    assert "content, n" in str(caught.value)
    with pytest.raises(DataError, match="no known kind") as caught:
        list(source("parquet", path=path).records())
    assert "row 0" in str(caught.value)


def test_parquet_damage_and_nulls_are_errors(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match="row 1"):
        list(source("parquet", path=str(path)).records())
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not readable as parquet"):
        list(source("parquet", path=str(path)).records())


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MachineError, match=r"k2lab\[parquet\]"):
        list(source("parquet", path=str(tmp_path / "a.parquet")).records())


# ---------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fake_datasets(monkeypatch, rows, calls):
    def load_dataset(repo, config, **settings):
        calls.append((repo, config, settings))
        return rows() if callable(rows) else rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hf_streams_a_pinned_commit(monkeypatch):
    calls = []
    fake_datasets(monkeypatch, [{"content": t, "id": 1} for t in "abc"], calls)
    hub = source("hf", repo="org/x", revision=COMMIT, columns={"text": "content"}, limit=2, domain="web")
    assert [(r["key"], r["text"], r["domain"], r["source"]) for r in hub.records()] == [
        ("hf:org/x::train:0", "a", "web", "org/x"),
        ("hf:org/x::train:1", "b", "web", "org/x"),
    ]
    assert calls == [("org/x", None, {"split": "train", "revision": COMMIT, "streaming": True})]


def test_hf_turns_a_branch_into_a_commit(monkeypatch):
    sha = [COMMIT]

    class Api:
        def dataset_info(self, repo, revision):
            assert (repo, revision) == ("org/x", "main")
            return types.SimpleNamespace(sha=sha[0])

    module = types.ModuleType("huggingface_hub")
    module.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    before = source("hf", repo="org/x").fingerprint()
    assert before == source("hf", repo="org/x", revision=COMMIT).fingerprint()
    sha[0] = "f" * 40
    assert source("hf", repo="org/x").fingerprint() != before


def test_hf_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MachineError, match=r"k2lab\[hf\]"):
        list(source("hf", repo="org/x", revision=COMMIT).records())

    def offline():
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, offline, [])
    with pytest.raises(MachineError, match="ConnectionError: no route to host"):
        list(source("hf", repo="org/x", revision=COMMIT).records())

    def breaks():
        yield {"text": "a"}
        raise TimeoutError("slow")

    fake_datasets(monkeypatch, breaks, [])
    records = source("hf", repo="org/x", revision=COMMIT).records()
    assert next(records)["text"] == "a"
    with pytest.raises(MachineError, match="row 1"):
        next(records)
    fake_datasets(monkeypatch, [{"body": "a"}], [])
    with pytest.raises(DataError, match="no column 'content'"):
        list(source("hf", repo="org/x", revision=COMMIT, columns={"text": "content"}).records())
