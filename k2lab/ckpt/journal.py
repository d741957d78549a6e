"""The state of a conversion in its target folder, so that a killed one continues and two different ones never mix.

    DST/.k2convert/plan.json         what is converted into what: pinned at the first start
    DST/.k2convert/<shard>.json      one file per finished shard: its sha256, size, tensors and what became of them
    DST/.k2convert/rank-<n>.lock     held while a process works
    DST/convert.json                 what plan.json pinned, kept in the finished folder
    DST/checksums.json               written last: without it the folder is not finished

A shard is written under a temporary name, synced, renamed, and then noted; one that is not noted is written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2lab.ckpt import integrity
from k2lab.ckpt.strict import read_object
from k2lab.core.artifacts import disk_errors
from k2lab.core.errors import CheckpointError, DataError, MachineError

FOLDER = ".k2convert"
PLAN, DONE = "plan.json", "convert.json"
VERSION = 1


class Journal:
    """The state in the folder `path`. `pinned` is plain JSON that says what is converted into what; two conversions are the same
    if their `pinned["identity"]` is."""

    def __init__(self, path: Path, pinned: dict[str, Any]) -> None:
        self.path, self.folder = path, path / FOLDER
        self.pinned = {"v": VERSION, **pinned}

    # ------------------------------------------------------------ begin

    def state(self) -> str:
        """One of "new" (nothing there), "begun" or "finished". Raises DataError if the folder holds anything else or another
        conversion, CheckpointError if a finished one lacks a file."""
        if not self.path.exists():
            return "new"
        if not self.path.is_dir():
            raise DataError(f"{self.path} is no folder", next="Give another target")
        if (self.path / integrity.CHECKSUMS).is_file() and (self.path / DONE).is_file():
            self._same(self.path / DONE)
            self._whole()
            return "finished"
        if (self.folder / PLAN).is_file():
            self._same(self.folder / PLAN)
            return "begun"
        if self.folder.is_dir() or not any(self.path.iterdir()):
            return "new"
        raise DataError(
            f"{self.path} holds files that no conversion wrote",
            got=", ".join(sorted(item.name for item in self.path.iterdir())[:5]),
            next="Give a folder that does not exist yet, or an empty one",
        )

    def begin(self) -> None:
        """Makes the folder and pins the conversion; several processes may do so at once."""
        with disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / PLAN).is_file():
                self.write(self.folder / PLAN, self.pinned)
        self.pinned = self._same(self.folder / PLAN)

    def _same(self, file: Path) -> dict[str, Any]:
        """What is pinned there. Raises DataError if it is another conversion, and says in what."""
        found = read_object(file)
        if found.get("v") == VERSION and found.get("identity") == self.pinned["identity"]:
            return found
        differ = [key for key in self.pinned if key != "identity" and found.get(key) != self.pinned[key]]
        readable = [key for key in differ if key not in ("plan", "files")]  # these are hashes: they follow from the others
        differ = readable or differ
        told = "; ".join(f"{key} was {_short(found.get(key))} and is {_short(self.pinned[key])}" for key in differ)
        raise DataError(
            f"{self.path} holds another conversion",
            got=told or "another source or other options",
            next="Give another target folder, or the same source and options as before",
        )

    def _whole(self) -> None:
        for name, facts in read_object(self.path / integrity.CHECKSUMS).items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts.get("size"):
                raise CheckpointError(
                    "this file of a finished conversion is missing or was changed",
                    where=str(file),
                    got="nothing" if size is None else f"{size} bytes",
                    allowed=f"{facts.get('size')} bytes",
                    next="Remove the folder and convert again",
                )

    @contextlib.contextmanager
    def lock(self, rank: int) -> Iterator[None]:
        """Held while this process works; MachineError if another one works as the same rank."""
        with disk_errors(self.folder), (self.folder / f"rank-{rank}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MachineError(
                    f"another command is converting into {self.path}",
                    next="Wait for it, or end it; this one can continue its work",
                ) from None
            yield

    # ------------------------------------------------------------ shards

    def note(self, shard: str, facts: dict[str, Any]) -> None:
        """A shard is finished: its file lies under its name."""
        self.write(self.folder / f"{shard}.json", facts)

    def noted(self, shard: str) -> dict[str, Any] | None:
        """What was noted of a finished shard, None if it is not finished (or the note is damaged: then it is written again)."""
        file = self.folder / f"{shard}.json"
        try:
            facts = read_object(file)
        except CheckpointError:
            return None
        data = self.path / shard
        return facts if data.is_file() and data.stat().st_size == facts.get("size") else None

    # ------------------------------------------------------------ end

    def write(self, path: Path, value: Any) -> None:
        """Writes JSON through a temporary file of this process and a rename, synced."""
        self.put(path, json.dumps(value, indent=1, ensure_ascii=True).encode())

    def put(self, path: Path, data: bytes) -> None:
        """As `write`, for bytes. The temporary file lies among the state, so that a kill leaves nothing beside the weights."""
        temporary = self.folder / f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
        with disk_errors(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def discard(self, shards: list[str]) -> None:
        """Removes all that the conversion wrote: its source proved to be damaged."""
        for shard in shards:
            for name in (shard, shard + ".tmp"):
                (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # it was there before, with something in it
            self.path.rmdir()

    def close(self) -> None:
        """Removes the state of a finished conversion."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
