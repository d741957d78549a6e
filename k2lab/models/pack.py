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


@dataclass(frozen=True)
class Group:
    """Documents padded to one length on the right. A padded place repeats its document's last token, so a maximum over all
    places is one over real tokens only. `rows` i64[G, P] token of each place; `valid` i64[n] places (flat) that are real;
    `tokens` i64[n] the token of each of these."""

    rows: torch.Tensor
    valid: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class Pack:
    """Document boundaries of `num_tokens` packed tokens: `starts[i] .. starts[i + 1]` is document i. On `device`."""

    starts: tuple[int, ...]
    device: torch.device

    @staticmethod
    def of(starts_S1: Any, device: torch.device | str) -> Pack:
        """From a Batch's `starts_S1` (tensor, array or list). Empty documents are dropped."""
        values = starts_S1.tolist() if hasattr(starts_S1, "tolist") else list(starts_S1)
        kept = values[:1] + [end for start, end in zip(values, values[1:]) if end > start]
        assert kept and kept[0] == 0, "starts_S1 begins with 0"
        return Pack(tuple(kept), torch.device(device))

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
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(document start, first query, end of queries) of the blocks of long documents, each document's last block first:
        that one sees all its keys and can write their gradients where later blocks add."""
        found = []
        for start, end in zip(self.starts, self.starts[1:]):
            if end - start > SMALL:
                firsts = range(start, end, BLOCK)
                found.extend((start, first, min(first + BLOCK, end)) for first in reversed(firsts))
        return tuple(found)

    @cached_property
    def small_groups(self) -> tuple[Group, ...]:
        """Documents of up to SMALL tokens, grouped by length rounded up to a multiple of 16."""
        return self._grouped({16 * n: 16 * n for n in range(1, SMALL // 16 + 1)})

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
            chosen = [n for n, length in enumerate(self.lengths) if low < length <= limit]
            low = limit
            if chosen:
                groups.append(self._group(chosen, padded))
        return tuple(groups)

    def _group(self, documents: Sequence[int], padded: int) -> Group:
        starts = torch.tensor([self.starts[n] for n in documents], device=self.device)[:, None]
        lengths = torch.tensor([self.lengths[n] for n in documents], device=self.device)[:, None]
        place = torch.arange(padded, device=self.device)[None]
        rows = starts + torch.minimum(place, lengths - 1)
        valid = (place < lengths).flatten().nonzero()[:, 0]
        return Group(rows, valid, rows.flatten()[valid])
