"""`k2 convert`: a checkpoint from one format to another, shard by shard, in little memory, continued after a kill.

Whatever the source is (released FP8 or INT4, bf16, fp32, a DCP folder), it is read tensor by tensor and written under released
names with the config.json that serving engines need. Tensors that already are in the target's format are copied byte for byte;
those that training did not change take their original packed bytes (`origin.py`). Work is dealt by shards: to threads, and to
processes or machines by RANK and WORLD_SIZE over a shared disk. What lies on the disk, and when it is complete: `journal.py`.

Of a vision-language checkpoint vision tensors are carried over as they are. Left-over tensors that no model of ours has (layers
for multi-token prediction, rotary tables) are carried over only where the format stays; else they are named and left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2lab.ckpt import dcp, integrity, origin, outputs, sources
from k2lab.ckpt.encode import Done, Encoder
from k2lab.ckpt.journal import DONE, Journal
from k2lab.ckpt.layout import INDEX
from k2lab.ckpt.outputs import SHARD_BYTES, TARGETS, Plan, Shard
from k2lab.ckpt.safefile import Writer
from k2lab.core import threads
from k2lab.core.artifacts import disk_errors, file_sha256
from k2lab.core.errors import CheckpointError, DataError, MachineError
from k2lab.dist import mesh
from k2lab.quant import compiled
from k2lab.text.layout import IM_END

GENERATION = "generation_config.json"
MAX_WORKERS = 16
SEEN_WITHIN = 120.0  # seconds until a file that another machine wrote is seen on a shared disk


@dataclass(frozen=True)
class Request:
    """What is asked for: `source` -> `target` as one of `outputs.TARGETS`; `original` the quantised checkpoint whose bytes
    unchanged tensors take (default: that of the source's origin.json, if it is still there); `adapter` a PEFT LoRA folder to be
    merged; `shard_bytes` at most per file, unless one tensor is larger; `workers` threads (0: two per core, at most 16); `rank`
    of `world` processes that share the work."""

    source: Path
    target: Path
    to: str
    original: Path | None = None
    adapter: Path | None = None
    shard_bytes: int = SHARD_BYTES
    workers: int = 0
    rank: int = 0
    world: int = 1

    def check(self) -> None:
        """Raises DataError for what cannot be meant."""
        if self.to not in TARGETS:
            raise DataError(f"there is no target {self.to!r}", where="--to", allowed=", ".join(TARGETS))
        if self.shard_bytes < 1 or self.workers < 0 or not 0 <= self.rank < self.world:
            raise DataError("--shard-bytes is 1 or more, --workers 0 or more, and RANK below WORLD_SIZE")
        if self.original is not None and TARGETS[self.to] == "plain":
            raise DataError(f"--original holds packed bytes, and --to {self.to} packs nothing", allowed="--to fp8 or int4")
        one, other = self.source.resolve(), self.target.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise DataError("source and target must lie apart", got=f"{self.source} and {self.target}")


@dataclass
class Result:
    """What a conversion did: `state` "done", "already" (it was done before) or "partial" (other ranks' shards are missing);
    `plan`; `done` counts over all shards finished so far; `missing` shards; `moved` bytes that this call read and wrote, and the
    `seconds` it took; `notes` for people."""

    state: str
    plan: Plan
    done: Done = field(default_factory=Done)
    missing: int = 0
    moved: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


Progress = Callable[[int, int, int, int], None]  # (bytes written, bytes in all, shards done, shards in all)


class Job:
    """A conversion, planned: everything that can be wrong about it was found when it was made, before anything is written."""

    def __init__(self, request: Request) -> None:
        request.check()
        self.request, self.notes = request, list[str]()
        self.source = sources.open_source(request.source)
        self.origin = origin.read(request.source)
        self.template = self._open_original()
        self.adapter = _open_adapter(request.adapter)
        merged = frozenset[str]()
        if self.adapter is not None:
            matrices = [name.removesuffix(".weight") for name in self.source.names() if name.endswith(".weight")]
            merged = frozenset(f"{name}.weight" for name in self.adapter.of(matrices))
        self.plan = outputs.make(self.source, request.to, request.shard_bytes, self.template, merged)
        self.journal = Journal(request.target, self._pinned())
        if self._computes() and compiled.module("_loops") is None:
            self.notes.append(
                "numba is not installed: PyTorch's operations compute INT4 and FP8, the same bytes in up to twice the time "
                "(pip install 'k2lab[cpu]')"
            )
        if self.plan.dropped:
            self.notes.append(
                f"{len(self.plan.dropped)} tensors are left out, because no model here has them: {self.plan.dropped[0]}, ..."
            )

    def _open_original(self) -> Any:
        """The opened original if it is of use: in the target's format, which the source is not."""
        request, format = self.request, TARGETS[self.request.to]
        if format == "plain":
            return None
        path = request.original
        if path is None:
            if self.origin is None or self.source.format == format or self.origin.format != format:
                return None
            path = Path(self.origin.source)
            if not (path / "config.json").is_file():
                self.notes.append(f"the original {path} is not there; every tensor is quantised (--original says where it is)")
                return None
        folder = sources.open_source(path)
        if folder.format != format:
            raise CheckpointError(
                f"the original is not in the format of --to {request.to}", where=str(path), got=folder.format, allowed=format
            )
        shapes = {name: self.source.info(name).shape for name in self.source.names()}
        packed = [name for name in folder.names() if folder.info(name).format != "plain"]
        if shapes.keys() != set(folder.names()) or any(folder.info(name).shape != shapes[name] for name in packed):
            raise CheckpointError("the original is another model", where=str(path), got=f"other tensors than {request.source}")
        return folder

    def _computes(self) -> bool:
        """True if a tensor is put on a grid or taken from one."""
        items = (item for shard in self.plan.shards for item in shard.items if item.how != "copy")
        return any(item.how != "plain" or self.source.info(item.name).format != "plain" for item in items)

    def _pinned(self) -> dict[str, Any]:
        request = self.request
        told = {
            "source": str(request.source.resolve()),
            "format": self.source.format,
            "to": request.to,
            "original": str(self.template.path.resolve()) if self.template is not None else None,
            "adapter": str(request.adapter.resolve()) if request.adapter is not None else None,
            "shard_bytes": request.shard_bytes,
            "plan": self.plan.digest(),
        }
        prints = {"source": sources.fingerprint(request.source)}
        if self.template is not None:
            prints["original"] = sources.fingerprint(self.template.path)
        if request.adapter is not None:
            prints["adapter"] = sources.fingerprint(request.adapter)
        text = json.dumps({**prints, "to": request.to, "shard_bytes": request.shard_bytes, "plan": told["plan"]}, sort_keys=True)
        return {"identity": hashlib.sha256(text.encode()).hexdigest(), **told, "files": prints}

    def size(self) -> int:
        """Bytes that will be written, of weights."""
        return self.plan.size

    def require_space(self) -> None:
        """MachineError if the disk cannot hold what is still to be written."""
        target = self.request.target
        there = next(path for path in (target.resolve(), *target.resolve().parents) if path.exists())
        left = sum(shard.size for shard in self.plan.shards if self.journal.noted(shard.file) is None)
        free = shutil.disk_usage(there).free
        if left > free:
            raise MachineError(
                f"{left:,} bytes are still to be written and the disk has {free:,} free",
                where=str(target),
                next="Free space, or give a target on another disk",
            )

    def close(self) -> None:
        """Closes what was opened."""
        for folder in (self.source, self.template):
            if folder is not None:
                folder.close()


def _open_adapter(path: Path | None) -> Any:
    if path is None:
        return None
    from k2lab.ckpt.peft import Adapter

    return Adapter.open(path)


# ---------------------------------------------------------------- doing it


def run(job: Job, progress: Progress = lambda *_: None) -> Result:
    """Does this process's share of the job, and finishes the target if nothing is missing any more. Raises CheckpointError for
    a damaged source (a target that this process alone has begun is removed), MachineError for a full disk or a missing
    permission (finished shards are kept; the same call goes on)."""
    began = time.perf_counter()
    request, plan = job.request, job.plan
    if job.journal.state() == "finished":
        job.journal.close()
        return Result("already", plan, notes=job.notes)
    together = request.world > 1 and "MASTER_ADDR" in os.environ
    if together:
        mesh.init("cpu")
    share = _work(job, progress)
    if together:
        mesh.barrier()
    notes = _notes(job, wait=together)
    missing = sum(note is None for note in notes)
    result = Result("partial" if missing else "done", plan, missing=missing, moved=share.moved, notes=job.notes)
    for note in notes:
        if note is not None:
            result.done.add(Done(**note["done"]))
    if not missing and (not together or request.rank == 0):
        _finish(job, [note for note in notes if note is not None])
    if together:
        mesh.barrier()
    result.seconds = time.perf_counter() - began
    return result


def _work(job: Job, progress: Progress) -> _Share:
    request = job.request
    job.require_space()
    try:
        job.journal.begin()
        with job.journal.lock(request.rank), _single_threads():
            share = _Share(job, progress)
            share.run()
    except CheckpointError:
        if request.world == 1:
            job.journal.discard([shard.file for shard in job.plan.shards])
        raise
    except MachineError as error:
        if error.next and "--run-dir" in error.next:  # there is none here
            raise MachineError(error.what, where=error.where, next="Give another target") from error
        raise
    return share


@contextlib.contextmanager
def _single_threads() -> Iterator[None]:
    """Threads work on shards of their own, so torch's own threads would only be in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _notes(job: Job, wait: bool) -> list[dict[str, Any] | None]:
    """What is noted of each shard. After a barrier all shards exist, but a shared disk may show them later."""
    until = time.monotonic() + (SEEN_WITHIN if wait else 0.0)
    while True:
        found = [job.journal.noted(shard.file) for shard in job.plan.shards]
        if all(found) or time.monotonic() >= until:
            return found
        time.sleep(0.2)


class _Stopped(Exception):
    """Another thread failed."""


class _Share:
    """This process's shards, dealt to threads."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        request = job.request
        self.shards = [shard for n, shard in enumerate(job.plan.shards) if n % request.world == request.rank]
        original = origin.Original(job.template, job.origin) if job.template is not None else None
        to_grid = job.source.qat is not None and request.to == "fp8"
        self.encoder = Encoder(job.source, original, job.adapter, to_grid)
        self.sums = sources.stated_sums(request.source)
        self._verified: dict[Path, threading.Lock] = {}
        self._right: set[Path] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.written, self.finished, self.moved = 0, 0, 0

    def run(self) -> None:
        """Writes every shard that is not finished yet."""
        left = []
        for shard in self.shards:
            if self.job.journal.noted(shard.file) is None:
                left.append(shard)
            else:
                self._count(shard.size, 1)
        workers = self.job.request.workers or workers_here()
        threads.each(left, self._shard, workers, self._stop)

    def _shard(self, shard: Shard) -> None:
        torch.set_num_threads(1)
        with disk_errors(self.job.request.target):
            for item in shard.items:
                self._verify(item.name)
            done = Done()
            facts = (self._dcp if self.job.request.to == "dcp" else self._safetensors)(shard, done)
            told = asdict(done)
            records = told.pop("records")
            self.job.journal.note(shard.file, {**facts, "done": told, "records": records})
        with self._lock:
            self.moved += done.read + done.written
        self._count(0, 1)

    def _safetensors(self, shard: Shard, done: Done) -> dict[str, Any]:
        entries = {name: entry for item in shard.items for name, entry in item.entries.items()}
        with Writer(self.job.request.target / shard.file, entries, {"format": "pt"}, digest=True) as writer:
            for item in shard.items:
                self._check_stop()
                self.encoder.encode(item, writer.write, done)
                self._count(item.size, 0)
        sizes = {name: entry.size for name, entry in writer.entries.items()}
        return {"sha256": writer.sha256, "size": writer.size, "tensors": sizes}

    def _dcp(self, shard: Shard, done: Done) -> dict[str, Any]:
        tensors = {}
        with dcp.PieceWriter(self.job.request.target / shard.file) as writer:
            for item in shard.items:
                self._check_stop()
                ((name, (dtype, shape)),) = item.entries.items()
                found: list[list[Any]] = []

                def put(first: int, values: torch.Tensor, found: list[list[Any]] = found) -> None:
                    start, length = writer.write(values)
                    offsets = [first, *[0] * (values.ndim - 1)] if values.ndim else []
                    found.append([offsets, list(values.shape), start, length])

                self.encoder.encode_rows(item, put, done)
                tensors[name] = [dtype, list(shape), found]
                self._count(item.size, 0)
        return {"sha256": writer.sha256, "size": writer.size, "tensors": tensors}

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _verify(self, name: str) -> None:
        """The sha256 of the files that hold a tensor, where it is known; each file once."""
        source = self.job.source
        for path in sources.files_of(source, name):
            if path not in self.sums:
                continue
            with self._lock:
                lock = self._verified.setdefault(path, threading.Lock())
            with lock:
                if path in self._right:
                    continue
                if file_sha256(path) != self.sums[path]:
                    raise CheckpointError(
                        "this file was changed after it was written: its sha256 differs", where=str(path), next="Fetch it again"
                    )
                self._right.add(path)

    def _count(self, size: int, shards: int) -> None:
        with self._lock:
            self.written += size
            self.finished += shards
            self.progress(self.written, sum(shard.size for shard in self.shards), self.finished, len(self.shards))


def workers_here() -> int:
    """Threads by default: two per core of this rank, since one that waits for the disk leaves its core to another."""
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, 2 * cores // local))


# ---------------------------------------------------------------- files beside the weights


def _finish(job: Job, notes: list[dict[str, Any]]) -> None:
    """Writes what lies beside the weights, checksums.json last."""
    target, journal, plan = job.request.target, job.journal, job.plan
    sums = {shard.file: {"sha256": note["sha256"], "size": note["size"]} for shard, note in zip(plan.shards, notes)}
    small: dict[str, bytes] = {file.name: file.read_bytes() for file in sources.beside(job.source.path)}
    if plan.to == "dcp":
        small[dcp.METADATA] = _dcp_metadata(plan, notes)
    elif len(plan.shards) > 1:
        small[INDEX] = _json(outputs.index_of({s.file: note["tensors"] for s, note in zip(plan.shards, notes)}))
    if GENERATION not in small:
        small[GENERATION] = _json(_generation(job.source.spec, small.get(integrity.TOKENIZER_CONFIG)))
    if (found := _origin(job, notes)) is not None:
        small[origin.ORIGIN] = _json(found.json())
    pinned = {key: value for key, value in journal.pinned.items() if key != "files"}
    small[DONE] = _json(pinned)
    small["config.json"] = _json(outputs.config_of(job.source, plan, job.template))
    for name, data in small.items():
        journal.put(target / name, data)
        sums[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    journal.write(target / integrity.CHECKSUMS, dict(sorted(sums.items())))
    with disk_errors(target):
        handle = os.open(target, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    journal.close()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=True) + "\n").encode()


def _generation(spec: Any, tokenizer_config: bytes | None) -> dict[str, Any]:
    """Where neither a generation config nor the model names an end token, it is the one that ends a turn of a chat: engines would
    otherwise stop at the tokenizer's eos only, which ends documents."""
    table = spec.config()
    ids = {key: table[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if table.get(key) is not None}
    if "eos_token_id" not in ids and tokenizer_config is not None:
        added = json.loads(tokenizer_config).get("added_tokens_decoder", {})
        ends = [int(token_id) for token_id, token in added.items() if token.get("content") == IM_END]
        if ends:
            ids["eos_token_id"] = ends[0]
    return ids


def _origin(job: Job, notes: list[dict[str, Any]]) -> origin.Origin | None:
    """The origin of what was written: for plain weights the source, if it was quantised, else what the source says of itself."""
    if TARGETS[job.plan.to] != "plain":
        return None
    if job.source.format not in ("fp8_block", "int4_group"):
        return job.origin
    records = {name: origin.Record(*record) for note in notes for name, record in note["records"].items()}
    return origin.Origin(job.journal.pinned["source"], job.source.format, records)


def _dcp_metadata(plan: Plan, notes: list[dict[str, Any]]) -> bytes:
    tensors = {}
    for shard, note in zip(plan.shards, notes):
        for name, (dtype, shape, found) in note["tensors"].items():
            pieces = [dcp.Piece(tuple(at), tuple(sizes), shard.file, start, length) for at, sizes, start, length in found]
            tensors[name] = (dtype, tuple(shape), pieces)
    return dcp.metadata_bytes(tensors)
