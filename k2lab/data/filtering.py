"""Running filters over records and counting what each did: the funnel.

A filter is a slot of `k2lab/data/filters/` (or a user's file): a frozen dataclass with

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]

which yields what it keeps, calls `log.drop(record, why)` for what it does not, and `log.change(record, why)` for a record
that it altered (the altered one is yielded). Filters are streams: none needs the whole corpus at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from k2lab.core.errors import DataError
from k2lab.data.records import Record, text_of

EXAMPLES = 3
EXCERPT = 160  # characters


@dataclass
class FunnelRow:
    """What one filter did: records `seen = kept + dropped`; `changed` of the kept ones were altered.

    `examples` are up to three `{"text", "why"}` of dropped or changed records.
    """

    filter: str
    seen: int = 0
    kept: int = 0
    dropped: int = 0
    changed: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def as_event(self) -> dict[str, Any]:
        """The fields of a `funnel` event."""
        return asdict(self)


class Log:
    """Takes a filter's decisions down in its `FunnelRow`."""

    def __init__(self, row: FunnelRow) -> None:
        self._row = row

    def drop(self, record: Record, why: str, excerpt: str | None = None) -> None:
        """Notes that `record` goes. Give `excerpt` where the record's own text must not be shown."""
        self._row.dropped += 1
        self._example(record, why, excerpt)

    def change(self, record: Record, why: str, excerpt: str | None = None) -> None:
        """Notes that `record` (as it is now) was altered."""
        self._row.changed += 1
        self._example(record, why, excerpt)

    def _example(self, record: Record, why: str, excerpt: str | None) -> None:
        if len(self._row.examples) < EXAMPLES:
            text = " ".join((excerpt if excerpt is not None else text_of(record)).split())
            shown = text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "..."
            self._row.examples.append({"text": shown, "why": why})


class Filter(Protocol):
    """What a filter slot offers."""

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]: ...


def stream_filters(records: Iterable[Record], filters: Sequence[Filter]) -> tuple[Iterator[Record], list[FunnelRow]]:
    """Chains the filters without holding the corpus. The rows are complete once the iterator is exhausted."""
    rows = []
    stream = iter(records)
    for each in filters:
        row = FunnelRow(getattr(type(each), "slot_name", None) or type(each).__module__.rpartition(".")[2])
        rows.append(row)
        stream = _kept(each.apply(_seen(stream, row), Log(row)), row)
    return stream, rows


def _seen(records: Iterator[Record], row: FunnelRow) -> Iterator[Record]:
    for record in records:
        row.seen += 1
        yield record


def _kept(records: Iterator[Record], row: FunnelRow) -> Iterator[Record]:
    for record in records:
        row.kept += 1
        yield record
    if row.seen != row.kept + row.dropped:
        raise DataError(
            f"the filter {row.filter!r} lost count: {row.seen} records seen, {row.kept} kept, {row.dropped} logged as dropped",
            next="Make its apply() call log.drop() exactly once for every record that it does not yield",
        )


def run_filters(records: Iterable[Record], filters: Sequence[Filter]) -> tuple[list[Record], list[FunnelRow]]:
    """Applies `filters` in order: (kept records, one FunnelRow per filter).

    Raises DataError with the funnel in the message if nothing is left.
    """
    stream, rows = stream_filters(records, filters)
    kept = list(stream)
    if not kept:
        raise DataError(nothing_left(rows), next="Loosen the filter that dropped most, or give more data")
    return kept, rows


def nothing_left(rows: Sequence[FunnelRow]) -> str:
    """The message for a funnel that ends with no record."""
    if not rows or not rows[0].seen:
        return "the sources gave no records"
    steps = ", ".join(f"{row.filter} kept {row.kept} of {row.seen}" for row in rows)
    first = next((row for row in rows if row.examples), None)
    shown = f"; {first.filter} says, for one, {first.examples[0]['why']!r}" if first else ""
    return f"no record is left after the filters: {steps}{shown}"
