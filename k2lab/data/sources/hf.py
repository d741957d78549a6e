"""A data set of the Hugging Face hub, streamed. Needs the extra `k2lab[hf]` and, unless cached, the network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.data.records import Record, check_kind, check_record

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Hf:
    """A data set of the Hugging Face hub, streamed. Needs the extra `k2lab[hf]`.

    A branch or tag may move, so `revision` is turned into a commit (one question to the hub); give a commit to work without it.
    """

    repo: str  # e.g. "org/name"
    revision: str = "main"  # a commit of 40 hex digits is exact and needs no look-up
    config: str = ""  # the data set's configuration; "" = its default
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)  # record key -> column, e.g. { text = "content" }; {} = all as they are
    kind: str = ""  # require this kind of record; "" = any
    limit: int = 0  # at most this many records; 0 = all
    domain: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.limit < 0:
            raise RecipeError("limit must not be negative", got=self.limit, allowed="0 (all) or more")

    def records(self) -> Iterator[Record]:
        """Records in the data set's order; the key is `hf:repo:config:split:row`.

        Raises MachineError if `datasets` is not installed or the hub is out of reach, DataError for a row that is no record.
        """
        load = _library("datasets").load_dataset
        commit = self._commit()
        try:
            rows = iter(load(self.repo, self.config or None, split=self.split, revision=commit, streaming=True))
        except Exception as error:  # the library raises many kinds: not found, gated, offline
            raise self._unreachable(error) from error
        tags = {t: text for t, text in (("domain", self.domain), ("license", self.license)) if text}
        for row, value in islice(self._guarded(rows), self.limit or None):
            for key, column in self.columns.items():
                if column not in value:
                    what = f"there is no column {column!r} for {key!r}"
                    raise DataError(what, where=f"{self.repo}, row {row}", allowed=", ".join(value), next="Correct `columns`")
            picked = {key: value[column] for key, column in self.columns.items()} if self.columns else value
            record = check_record({k: v for k, v in picked.items() if v is not None}, f"{self.repo}, row {row}", self.kind)
            base = {"key": f"hf:{self.repo}:{self.config}:{self.split}:{row}", "source": self.repo}
            yield {**base, **record, **{tag: text for tag, text in tags.items() if not record.get(tag)}}

    def _guarded(self, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        row = 0
        while True:
            try:
                value = next(rows)
            except StopIteration:
                return
            except Exception as error:  # a connection that breaks while streaming
                raise self._unreachable(error, row) from error
            yield row, value
            row += 1

    def _unreachable(self, error: Exception, row: int | None = None) -> MachineError:
        return MachineError(
            f"the hub's data set cannot be read: {type(error).__name__}: {error}",
            where=self.repo + (f", row {row}" if row is not None else ""),
            next="Check its name, your access and the network, or download it and use the source jsonl or parquet",
        )

    def _commit(self) -> str:
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        hub = _library("huggingface_hub")
        try:
            return hub.HfApi().dataset_info(self.repo, revision=self.revision).sha
        except Exception as error:
            raise MachineError(
                f"the hub does not say which commit {self.revision!r} is: {type(error).__name__}: {error}",
                where=self.repo,
                next="Check the name and the network, or set `revision` to a commit",
            ) from error

    def fingerprint(self) -> str:
        """sha256 hex over the settings and the commit that `revision` stands for."""
        settings = (self.repo, self._commit(), self.config, self.split, sorted(self.columns.items()), self.kind, self.limit)
        return hashlib.sha256(repr((*settings, self.domain, self.license)).encode()).hexdigest()

    @staticmethod
    def examples() -> list[Hf]:
        return [Hf(repo="org/name", limit=1000), Hf(repo="org/name", revision="0" * 40, columns={"text": "content"})]


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MachineError(
            f"reading from the hub needs the library {name!r}", where="hf", next="pip install 'k2lab[hf]'"
        ) from None
