"""Parquet files, read row group by row group. Needs pyarrow (`pip install 'k2lab[parquet]'`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.errors import DataError, MachineError
from k2lab.data import files
from k2lab.data.records import Record, check_kind, check_record


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Parquet files, one record per row. Needs the extra `k2lab[parquet]`.

    Raises MachineError without pyarrow; DataError for a file that is no parquet, lacks a column, or a row that is no record.
    """

    path: str | tuple[str, ...]  # a file, a glob, or a list of those
    columns: dict[str, str] = field(default_factory=dict)  # record key -> column, e.g. { text = "content" }; {} = all as they are
    kind: str = ""  # require this kind of record; "" = any
    name: str = "parquet"  # source of records that name none, and begin of their keys
    domain: str = ""
    license: str = ""
    batch_rows: int = 1024  # rows held in memory at once

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(map(str, self.path)))
        check_kind(self.kind)

    def records(self) -> Iterator[Record]:
        """Records in order of file name and row; the key is `name:file:row` with rows from 0."""
        defaults = {"source": self.name, "domain": self.domain, "license": self.license}
        for name, path in files.expand(self.path):
            for row, value in self._rows(str(path)):
                record = check_record(value, f"{path}, row {row}", self.kind)
                tags = {tag: text for tag, text in defaults.items() if text and not record.get(tag)}
                yield {"key": f"{self.name}:{name}:{row}", **record, **tags}

    def _rows(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise MachineError("reading parquet needs pyarrow", where=path, next="pip install 'k2lab[parquet]'") from None
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"the file is not readable as parquet: {error}", where=path) from None
        present = file.schema_arrow.names
        for key, column in self.columns.items():
            if column not in present:
                what = f"there is no column {column!r} for {key!r}"
                raise DataError(what, where=path, allowed=", ".join(present), next="Correct `columns`")
        row = 0
        batches = file.iter_batches(batch_size=self.batch_rows, columns=list(self.columns.values()) or None)
        for batch in batches:
            for value in batch.to_pylist():
                if self.columns:
                    value = {key: value[column] for key, column in self.columns.items()}
                yield row, {key: v for key, v in value.items() if v is not None}
                row += 1

    def fingerprint(self) -> str:
        """sha256 hex over the settings but `path` and `batch_rows`, and every file's name and bytes."""
        settings = (sorted(self.columns.items()), self.kind, self.name, self.domain, self.license)
        return files.digest_files(files.expand(self.path), *settings)

    @staticmethod
    def examples() -> list[Parquet]:
        return [Parquet(path="data/*.parquet"), Parquet(path="web.parquet", columns={"text": "content"})]
