"""The feed: one global order of samples -> rows of at most `seq_len` tokens -> micro-batches of each rank.

Rows are formed from one global order, never per rank, and dealt to ranks in contiguous slices, so the tokens of an optimizer
step don't depend on the number of ranks or micro-batches. The cursor is a position in that order: plain JSON, O(1) to restore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from k2lab.core.batches import check_batch
from k2lab.core.errors import DataError
from k2lab.core.types import Batch, Sample
from k2lab.data.pack import pack, piece, unit_length

MIN_PIECE = 2  # rows are filled to the last token but one: equal lengths are faster, for kernels that are compiled per shape


class Samples(Protocol):
    """An indexable collection of samples, or of units (token shards on disk, or a list)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample | tuple[Sample, ...]: ...


def gives_of(item: Sample | tuple[Sample, ...]) -> frozenset[str]:
    """Names of the streams that an item of a data set carries, and "pairs" if it is a preference pair."""
    sample = item[0] if isinstance(item, tuple) else item
    return frozenset(sample.streams) | (frozenset({"pairs"}) if sample.pair is not None else frozenset())


class PackedFeed:
    """Rows from `samples` in the order `order(epoch) -> indices`.

    `fill="split"` cuts documents so that rows are full (pretraining; pieces overlap by one context token); `fill="whole"` never
    splits a sample (fine-tuning). An item of `samples` may be a *unit*: a tuple of samples that stay together in one row, in
    their order (the two sides of a preference pair); units need `fill="whole"`. `gives` names the streams that the samples
    carry, and "pairs" if they are sides of pairs; it is compared with what an objective needs.

    Each step consumes `global_batch` rows; rank r gets rows [r*n, (r+1)*n) of them with n = global_batch / world, in
    micro-batches of `per_device_batch` rows.
    """

    def __init__(
        self,
        samples: Samples,
        order: Callable[[int], np.ndarray],
        *,
        seq_len: int,
        global_batch: int,
        per_device_batch: int,
        fill: Literal["split", "whole"] = "split",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_batch(global_batch, per_device_batch, world, "batch")
        if len(samples) == 0:
            raise DataError("there is nothing to train on: the data set is empty")
        self.samples, self.order = samples, order
        self.seq_len, self.global_batch, self.per_device_batch = seq_len, global_batch, per_device_batch
        self.fill, self.rank, self.world = fill, rank, world
        self.gives = gives_of(samples[0])
        self._epoch, self._index, self._offset = 0, 0, 0
        self._indices = order(0)

    @property
    def microbatches(self) -> int:
        """Micro-batches per rank and step (gradient accumulation)."""
        return self.global_batch // (self.world * self.per_device_batch)

    def take(self, num: int | None = None) -> list[Batch]:
        """This rank's micro-batches of the next step; the cursor moves past all ranks' rows."""
        rows = [self._row() for _ in range(self.global_batch)]
        share = self.global_batch // self.world
        mine = rows[self.rank * share : (self.rank + 1) * share]
        step = self.per_device_batch
        groups = [mine[n : n + step] for n in range(0, len(mine), step)]
        assert num is None or num == len(groups)
        return [pack([sample for row in group for sample in row]) for group in groups]

    def _row(self) -> list[Sample]:
        row: list[Sample] = []
        room = self.seq_len
        while room >= (MIN_PIECE if self.fill == "split" and row else 1):
            item = self.samples[int(self._current())]
            if isinstance(item, tuple):
                assert self.fill == "whole", "a unit of samples cannot be split"
                length = unit_length(item, self.seq_len)
                if length > room:
                    break
                row += item
                room -= length
                self._advance()
                continue
            sample = item
            length = len(sample.tokens) - self._offset
            if self.fill == "whole":
                if length > self.seq_len:
                    raise DataError(
                        f"sample of {length} tokens is longer than seq_len = {self.seq_len}",
                        where=sample.key,
                        next="Raise seq_len, or choose over_length = 'drop' or 'truncate'",
                    )
                if length > room:
                    break
            end = min(len(sample.tokens), self._offset + room)
            # One token predicts nothing; a lone last token is already covered by the overlap.
            if end - self._offset >= 2:
                row.append(piece(sample, self._offset, end))
                room -= end - self._offset
            if end == len(sample.tokens):
                self._advance()
            else:
                self._offset = end - 1
        return row

    def _current(self) -> int:
        while self._index >= len(self._indices):
            self._epoch, self._index = self._epoch + 1, 0
            self._indices = self.order(self._epoch)
            if len(self._indices) == 0:
                raise DataError("an epoch is empty: every mixture weight is 0")
        return self._indices[self._index]

    def _advance(self) -> None:
        self._index, self._offset = self._index + 1, 0

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self._epoch + self._index / max(1, len(self._indices))

    def cursor(self) -> dict[str, Any]:
        """Position in the global order; valid for any number of ranks."""
        return {"epoch": self._epoch, "index": self._index, "offset": self._offset}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Continues from `cursor`."""
        self._epoch, self._index, self._offset = cursor["epoch"], cursor["index"], cursor["offset"]
        self._indices = self.order(self._epoch)
