"""Records: kinds, text, errors; files: globs and damaged JSON lines."""

import gzip
import json

import pytest

from k2lab.core.errors import DataError
from k2lab.data import files
from k2lab.data.records import check_record, group_of, kind_of, map_text, text_of

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize(
    "record, kind, text",
    [
        ({"text": "abc", "source": "s"}, "text", "abc"),
        ({"question": "1+1?", "answer": "2"}, "qa", "1+1?\n2"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "instruction", "Add\n1 1\n2"),
        ({"instruction": "Say hi", "input": "", "output": "hi"}, "instruction", "Say hi\nhi"),
        ({"instruction": "Say hi", "output": "hi"}, "instruction", "Say hi\nhi"),
        (CHAT, "chat", "Hi\nHello"),
        ({"prompt": "p", "reasoning": "r", "final": "f"}, "reasoning", "p\nr\nf"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference", "p\nc\nr"),
        ({"prompt": "p", "response": "r"}, "response", "p\nr"),
    ],
)
def test_kind_and_text(record, kind, text):
    assert kind_of(record) == kind
    assert text_of(check_record(record, "f:1")) == text
    assert text_of(map_text(record, str.upper)) == text.upper()
    assert text_of(record) == text  # map_text made a copy


@pytest.mark.parametrize(
    "record, kind, expected",
    [
        ([1], "", "must be a JSON object"),
        ({"txt": "a"}, "", "no known kind"),
        ({"text": "a"}, "qa", "lacks 'question', 'answer'"),
        ({"text": 3}, "", "'text' must be a text"),
        ({"text": None}, "", "'text' must be a text"),
        ({"instruction": "a", "input": [], "output": "b"}, "", "'input' must be a text"),
        ({"messages": []}, "", "at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "", "known 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, "", "'content' must be a text"),
        ({"text": "a", "domain": 4}, "", "tag 'domain'"),
    ],
)
def test_bad_records_are_refused_with_their_place(record, kind, expected):
    with pytest.raises(DataError, match=expected) as caught:
        check_record(record, "file.jsonl:7", kind)
    assert str(caught.value).startswith("file.jsonl:7")


def test_a_tool_call_may_have_no_content():
    record = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}
    assert text_of(check_record(record, "x")) == ""


def test_group_is_the_widest_name():
    assert group_of({"key": "k"}) == "k"
    assert group_of({"key": "k", "module": "m"}) == "m"
    assert group_of({"key": "k", "module": "m", "group": "g"}) == "g"


def test_expand_sorts_names_once_and_relative_to_the_common_folder(tmp_path):
    for name in ("b/2.txt", "a/1.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    found = files.expand((str(tmp_path / "b" / "2.txt"), str(tmp_path / "**" / "*.txt")))
    assert [name for name, _ in found] == ["a/1.txt", "b/2.txt"]
    with pytest.raises(DataError, match="no file matches") as caught:
        files.expand(str(tmp_path / "*.md"))
    assert "*.md" in str(caught.value)


def test_digest_follows_bytes_and_names(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = files.digest_files(files.expand(str(path)))
    assert first == files.digest_files(files.expand(str(path)))
    path.write_text("two")
    assert files.digest_files(files.expand(str(path))) != first
    path.write_text("one")
    path.rename(tmp_path / "b.txt")
    assert files.digest_files(files.expand(str(tmp_path / "b.txt"))) != first


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert list(files.read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(files.read_jsonl(packed)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"text": "a"', "not JSON"),
        (b"{'text': 'a'}", "not JSON"),
        (b"[", "not JSON.*one JSON array"),
        (b'{"text": "\xff"}', "not UTF-8: byte 11 is 0xff"),
        (b'{"text": "\\ud83d alone"}', "half of a character"),
    ],
)
def test_jsonl_errors_name_file_line_and_what(tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=expected) as caught:
        list(files.read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2")


def test_whole_surrogate_pairs_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "\U0001f600"}))  # written as \ud83d\ude00
    assert list(files.read_jsonl(path)) == [(1, {"text": "\U0001f600"})]


def test_a_torn_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 10_000)[:-20])
    with pytest.raises(DataError, match="gzip file is damaged"):
        list(files.read_jsonl(path))
