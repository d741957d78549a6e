"""Where documents lie in a pack, and the order in which attention and KDA visit them. Built once per batch, used by every layer.

Legend: `T` packed tokens, `S` documents, `G` documents of one group, `P` padded length of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# Documents up to this length are gathered into padded groups; longer ones are visited one by one, without a copy.
SMALL = 64
# Queries per block of a long document: blocks below the diagonal are never computed, so smaller blocks save work.
BLOCK = 128
# Scores per head of branches that are done together.
SCORES = 1 << 22


@dataclass(frozen=True)
class Group:
    """Documents padded to one length on the right. A padded place repeats its document's last token, so a maximum over all
    places is one over real tokens only. `rows` i64[G, P] token of each place; `valid` i64[n] places (flat) that are real;
    `tokens` i64[n] the token of each of these."""

    rows: torch.Tensor
    valid: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Branches:
    """A block of queries of documents that continue the document `start .. end`, their stem, with the keys that these see in
    their own documents; the last queries and keys are the same tokens. `first` is True if no block of these documents comes
    before: a document's last block does, which sees all its keys."""

    start: int
    end: int
    queries: Group
    keys: Group
    first: bool

    @property
    def num_scores(self) -> int:
        """Scores per head."""
        return self.queries.rows.numel() * (self.end - self.start + self.keys.rows.shape[1])


class Ragged:
    """Boundaries of a pack's documents on its device, in a form that a kernel compiled for a shape can share among packs: the
    number of documents and the longest length are rounded up, empty documents fill the number. Copied once, without waiting.

    `cumulative` i32[num_documents + 1] where documents begin, in order, then `num_tokens`. `firsts` i32[num_documents + 1] and
    `lengths` i32[num_documents] name the documents from the longest to the shortest: work that begins early may take longest.
    `even`: all documents have the same length, a multiple of 128; then nothing is rounded up.
    """

    def __init__(self, starts: Sequence[int], device: torch.device) -> None:
        documents = sorted(zip(starts, starts[1:]), key=lambda bounds: bounds[0] - bounds[1])
        lengths = [end - start for start, end in documents]
        self.num_tokens, self.longest = starts[-1], lengths[0]
        self.even = lengths[0] == lengths[-1] and self.longest % 128 == 0
        self.num_documents = len(documents)
        if not self.even:
            self.num_documents, self.longest = _rounded(self.num_documents), max(128, 1 << (self.longest - 1).bit_length())
        fill = [starts[-1]] * (self.num_documents - len(documents))
        packed = torch.zeros(3, -(-(self.num_documents + 1) // 4) * 4, dtype=torch.int32)  # rows of whole 16 bytes
        for row, values in zip(packed, ([*starts, *fill], [start for start, _ in documents] + fill + [starts[-1]], lengths)):
            row[: len(values)] = torch.tensor(values, dtype=torch.int32)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        self.cumulative, self.firsts = packed[:2, : self.num_documents + 1]
        self.lengths = packed[2, : self.num_documents]
        self._offsets: dict[tuple[int, bool], torch.Tensor] = {}

    def offsets(self, stride: int, wide: bool = False) -> torch.Tensor:
        """`firsts` times `stride` elements per token, i32, or i64 if `wide`."""
        if (stride, wide) not in self._offsets:
            self._offsets[stride, wide] = (self.firsts.long() if wide else self.firsts) * stride
        return self._offsets[stride, wide]


def _rounded(count: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


@dataclass(frozen=True)
class Pack:
    """Document boundaries of `num_tokens` packed tokens: `starts[i] .. starts[i + 1]` is document i. On `device`.

    `parents` is empty, or names the document that each document continues (its stem), -1 for none: tokens of such a branch see
    the whole stem and what is before them in the branch. Only attention on the CPU knows branches.
    """

    starts: tuple[int, ...]
    device: torch.device
    parents: tuple[int, ...] = ()

    @staticmethod
    def of(starts_S1: Any, device: torch.device | str, parent_S: Any = None) -> Pack:
        """From a Batch's `starts_S1` (tensor, array or list). Empty documents are dropped, without branches."""
        values = starts_S1.tolist() if hasattr(starts_S1, "tolist") else list(starts_S1)
        kept = values[:1] + [end for start, end in zip(values, values[1:]) if end > start]
        assert kept and kept[0] == 0, "starts_S1 begins with 0"
        if parent_S is None:
            return Pack(tuple(kept), torch.device(device))
        parents = tuple(int(parent) for parent in parent_S)
        assert len(kept) == len(values) == len(parents) + 1, "no document is empty, and each has a parent or -1"
        assert all(parents[parent] < 0 for parent in parents if parent >= 0), "a stem continues nothing"
        return Pack(tuple(kept), torch.device(device), parents)

    @staticmethod
    def rows(batch: int, length: int, device: torch.device | str) -> Pack:
        """`batch` documents of `length` tokens each: an unpadded batch seen as a pack."""
        return Pack(tuple(range(0, batch * length + 1, length)), torch.device(device))

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in zip(self.starts, self.starts[1:]))

    @cached_property
    def ragged(self) -> Ragged:
        """The boundaries for kernels that read them on the device."""
        assert not self.parents, "branches are for the CPU"
        return Ragged(self.starts, self.device)

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(document start, first query, end of queries) of the blocks of long documents, each document's last block first:
        that one sees all its keys and can write their gradients where later blocks add."""
        found = []
        for n, (start, end) in enumerate(zip(self.starts, self.starts[1:])):
            if end - start > SMALL and not self._continues(n):
                firsts = range(start, end, BLOCK)
                found.extend((start, first, min(first + BLOCK, end)) for first in reversed(firsts))
        return tuple(found)

    @cached_property
    def small_groups(self) -> tuple[Group, ...]:
        """Documents of up to SMALL tokens, grouped by length rounded up to a multiple of 16."""
        return self._grouped({16 * n: 16 * n for n in range(1, SMALL // 16 + 1)})

    def _continues(self, document: int) -> bool:
        return bool(self.parents) and self.parents[document] >= 0

    @cached_property
    def branches(self) -> tuple[Branches, ...]:
        """Documents that continue a stem, by stem; their stems are among `blocks` and `small_groups`, as any document."""
        found = []
        for stem in sorted({parent for parent in self.parents if parent >= 0}):
            chosen = [n for n, parent in enumerate(self.parents) if parent == stem]
            longest = max(self.lengths[n] for n in chosen)
            block = -(-longest // max(1, round(longest / BLOCK)))
            together = max(1, SCORES // (block * (longest + self.lengths[stem])))
            for one in range(0, len(chosen), together):
                documents = chosen[one : one + together]
                for first in reversed(range(0, longest, block)):
                    end = min(first + block, longest)
                    queries, keys = self._group(documents, end, first), self._group(documents, end)
                    found.append(Branches(self.starts[stem], self.starts[stem + 1], queries, keys, end == longest))
        return tuple(found)

    @cached_property
    def times_T(self) -> torch.Tensor | None:
        """i64[T] how often each token would be there if every branch had its own copy of its stem; None if there are none."""
        if not self.parents:
            return None
        uses = [max(1, self.parents.count(n)) for n in range(len(self.lengths))]
        return torch.tensor(uses, device=self.device).repeat_interleave(torch.tensor(self.lengths, device=self.device))

    @cached_property
    def all_groups(self) -> tuple[Group, ...]:
        """All documents, grouped by length rounded up to 16, 32, 64, then by steps of a quarter of a power of two."""
        sizes, size = [16, 32], 64
        longest = max(self.lengths)
        while sizes[-1] < longest:
            sizes.extend((size, size * 5 // 4, size * 3 // 2, size * 7 // 4))
            size *= 2
        return self._grouped({limit: min(limit, longest) for limit in sizes})

    def _grouped(self, limits: dict[int, int]) -> tuple[Group, ...]:
        """One group per entry {largest length: padded length}; documents beyond the last limit are in none."""
        groups: list[Group] = []
        low = 0
        for limit, padded in limits.items():
            chosen = [n for n, length in enumerate(self.lengths) if low < length <= limit and not self._continues(n)]
            low = limit
            if chosen:
                groups.append(self._group(chosen, padded))
        return tuple(groups)

    def _group(self, documents: Sequence[int], padded: int, first: int = 0) -> Group:
        """Places `first` to `padded` of the documents."""
        starts = torch.tensor([self.starts[n] for n in documents], device=self.device)[:, None]
        lengths = torch.tensor([self.lengths[n] for n in documents], device=self.device)[:, None]
        place = torch.arange(first, padded, device=self.device)[None]
        rows = starts + torch.minimum(place, lengths - 1)
        valid = (place < lengths).flatten().nonzero()[:, 0]
        return Group(rows, valid, rows.flatten()[valid])
