"""What tests of `k2 convert` share: conversions in this process or a forked one, hashes of folders, edited checkpoints."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from k2lab.ckpt import convert
from k2lab.ckpt.folder import Folder, open_folder
from k2lab.ckpt.safefile import NAMES, SafeFile, Writer

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
SHARD = 200_000


def run(source: Path, target: Path, to: str, shard_bytes: int = SHARD, **options: Any) -> convert.Result:
    """A conversion, planned and done."""
    job = convert.Job(convert.Request(source, target, to, shard_bytes=shard_bytes, **options))
    try:
        return convert.run(job)
    finally:
        job.close()


def hashes(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file of a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{stored name: (dtype, shape, bytes)} of all tensors."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with SafeFile(file) as opened:
            for name, entry in opened.entries.items():
                found[name] = (entry.dtype, entry.shape, bytes(opened.bytes(name)))
    return found


def values(folder: Folder) -> Iterator[tuple[str, torch.Tensor]]:
    """Decoded tensors by logical name."""
    for name in folder.names():
        yield name, folder.read(name)


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Writes the folder's shards again, each stored tensor as `change(stored name, tensor)` gives it."""
    for file in sorted(folder.glob("*.safetensors")):
        with SafeFile(file) as opened:
            tensors = {name: change(name, opened.tensor(name)) for name in opened.entries}
        with Writer(file, {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)


def forked(do: Callable[[], None]) -> int:
    """Runs `do` in a forked process; 0, 1 after an error, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def dies_at(event: int) -> None:
    """Makes this process kill itself, as by `kill -9`, right before the given sync, rename or write to a shard."""
    seen = 0

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    Writer._put = counted(Writer._put)  # type: ignore[method-assign]


__all__ = ["EXPERT", "SHARD", "dies_at", "forked", "hashes", "open_folder", "rewrite", "run", "stored", "values"]
