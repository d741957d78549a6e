"""Your own JSON lines: text, question/answer, instruction, chat, reasoning, preference or response records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.data import files
from k2lab.data.records import Record, check_kind, check_record


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Your own JSON lines, one record a line; `.jsonl.gz` is unpacked.

    A line's keys tell its kind: {"text"}, {"question","answer"}, {"instruction","input","output"}, {"messages"} and others
    (see k2lab.data.records). Raises DataError `file:line: what` for a line that is no record.
    """

    path: str | tuple[str, ...]  # a file, a glob (`**` allowed), or a list of those
    kind: str = ""  # require this kind: text, qa, instruction, chat, reasoning, preference, response; "" = any
    name: str = "jsonl"  # begins every key, and is the source of records that name none; must differ between jsonl sources
    domain: str = ""  # tag for records that have none
    license: str = ""  # tag for records that have none

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(map(str, self.path)))
        check_kind(self.kind)

    def records(self) -> Iterator[Record]:
        """Records in order of file name and line; the key is `name:file:line` unless the record brings its own."""
        defaults = {"source": self.name, "domain": self.domain, "license": self.license}
        for name, path in files.expand(self.path):
            for number, value in files.read_jsonl(path):
                record = check_record(value, f"{path}:{number}", self.kind)
                tags = {tag: text for tag, text in defaults.items() if text and not record.get(tag)}
                yield {"key": f"{self.name}:{name}:{number}", **record, **tags}

    def fingerprint(self) -> str:
        """sha256 hex over the settings but `path`, and every file's name and bytes."""
        return files.digest_files(files.expand(self.path), self.kind, self.name, self.domain, self.license)

    @staticmethod
    def examples() -> list[Jsonl]:
        return [Jsonl(path="data/domain_sft.jsonl", kind="instruction"), Jsonl(path=("data/a.jsonl", "data/more/*.jsonl"))]
