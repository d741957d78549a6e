"""A teacher's most probable tokens beside its answers, on disk.

    <artifact>/teacher/00000.ids.npy        i32[N, K]  most probable token first
    <artifact>/teacher/00000.logprobs.npy   f16 or f32[N, K]; -inf = no such entry

A record's `top = [shard, first]` says where its rows are: row `first + t` of the shard belongs to token t of `response_tokens`.

Legend: `N` tokens of a shard, `T` tokens of an answer, `K` most probable tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2lab.core.artifacts import disk_errors
from k2lab.core.errors import DataError

FOLDER = "teacher"
Top = Sequence[tuple[Sequence[int], Sequence[float]]]  # per token: ids, log-probabilities


class Remembering:
    """A sampler that keeps each request's `Completion.top` until it is asked for."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.top: dict[str, Top] = {}

    def sample(self, prompts: Any, params: Any, keys: Sequence[str]) -> list[Any]:
        done = self.sampler.sample(prompts, params, keys)
        self.top |= {key: completion.top for key, completion in zip(keys, done, strict=True)}
        return done


def write_shard(work: Path, shard: int, tops: Sequence[Top], top_k: int, precision: str) -> list[int]:
    """Writes the rows of several answers as one shard, atomically; where each answer's rows begin."""
    first, total = [], 0
    for top in tops:
        first.append(total)
        total += len(top)
    ids_NK = np.zeros((total, top_k), "<i4")
    logprobs_NK = np.full((total, top_k), -np.inf, "<f2" if precision == "fp16" else "<f4")
    for row, (ids, logprobs) in enumerate(one for top in tops for one in top):
        count = min(top_k, len(ids))
        ids_NK[row, :count] = ids[:count]
        logprobs_NK[row, :count] = logprobs[:count]
    folder = work / FOLDER
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        for name, array in (("ids", ids_NK), ("logprobs", logprobs_NK)):
            temporary = folder / f"{shard:05d}.{name}.tmp.npy"
            np.save(temporary, array)
            temporary.replace(folder / f"{shard:05d}.{name}.npy")
    return first


class Teacher:
    """The stored rows of a data set, memory-mapped: `rows(record)` -> (ids i32[T, K], log-probabilities [T, K])."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Raises DataError if the rows are not there."""
        shard, first = record["top"]
        if shard not in self._shards:
            try:
                self._shards[shard] = tuple(  # type: ignore[assignment]
                    np.load(self.folder / f"{shard:05d}.{name}.npy", mmap_mode="r") for name in ("ids", "logprobs")
                )
            except (OSError, ValueError) as error:
                raise DataError(f"the teacher's rows cannot be read: {error}", where=record["key"]) from None
        end = first + len(record["response_tokens"])
        ids_NK, logprobs_NK = self._shards[shard]
        if end > len(ids_NK):
            raise DataError("the teacher's rows end before the answer does", where=record["key"], got=f"{len(ids_NK)} rows")
        return ids_NK[first:end], logprobs_NK[first:end]
