"""`k2 convert` beside a plain read and write of the same bytes: MB/s (read + written), their ratio, and peak memory.

    python bench/convert.py [--spec k2-slice] [--folder DIR] [--shard-mb 256] [--repeat 3] [--no-sync]

The source is made up (full widths of Kimi K2, one dense and one MoE layer of 16 experts). Per pair of formats, and in turns: the
conversion; a plain copy by as many threads that reads the source's files and writes as many files of the target's sizes; and the
same with the sha256 of what it writes, which a conversion owes too. All from the page cache, all synced to the disk at the end of
each file (or none, with --no-sync). Speeds are the best of the turns; "cpu" is processor time over that of the copy with sha256,
which a busy machine does not change. Peak memory is that of a fresh process, above what it had when it began to convert.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PAIRS = (("bf16", "int4"), ("int4", "bf16"), ("fp8", "bf16"), ("bf16", "fp8"), ("bf16", "bf16"))
PIECE = 8 << 20


def weights(folder: Path) -> list[Path]:
    """The files with tensors."""
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    """Bytes of the tensors' files."""
    return sum(file.stat().st_size for file in weights(folder))


def copy(source: Path, like: Path, target: Path, workers: int, hashed: bool = False) -> tuple[float, float]:
    """(seconds, processor seconds) to read all of `source` and to write files of the sizes of those in `like` into `target`: a
    thread reads and writes its share, piece by piece; `hashed` takes the sha256 of what is written."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    sources, likes = weights(source), weights(like)
    count = max(len(sources), len(likes))
    began, used = time.perf_counter(), time.process_time()

    def one(number: int) -> None:
        buffer, digest = bytearray(PIECE), hashlib.sha256()
        view = memoryview(buffer)
        reads = sources[number].stat().st_size if number < len(sources) else 0
        writes = likes[number].stat().st_size if number < len(likes) else 0
        handle = sources[number].open("rb", buffering=0) if reads else None
        out = (target / f"{number}").open("wb", buffering=0) if writes else None
        while reads > 0 or writes > 0:
            if handle is not None and reads > 0:
                reads -= handle.readinto(view[: min(PIECE, reads)]) or 0
            if out is not None and writes > 0:
                written = out.write(view[: min(PIECE, writes)]) or 0
                writes -= written
                if hashed:
                    digest.update(view[:written])
        if out is not None:
            os.fsync(out.fileno())
            out.close()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(count)))
    return time.perf_counter() - began, time.process_time() - used


def convert(source: Path, target: Path, to: str, shard_bytes: int, workers: int) -> tuple[float, float]:
    """(seconds, processor seconds) of one conversion, files beside the weights included."""
    from k2lab.ckpt import convert as converting

    shutil.rmtree(target, ignore_errors=True)
    began, used = time.perf_counter(), time.process_time()
    job = converting.Job(converting.Request(source, target, to, shard_bytes=shard_bytes, workers=workers))
    converting.run(job)
    job.close()
    return time.perf_counter() - began, time.process_time() - used


PEAK = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from k2lab.ckpt import convert
import torch; torch.ones(4096, 4096).bfloat16().float()
def status(key): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
job = convert.Job(convert.Request(Path({source!r}), Path({target!r}), {to!r}, shard_bytes={shard}, workers={workers}))
convert.run(job)
print(status("VmHWM") - before)
"""


def peak(source: Path, target: Path, to: str, shard_bytes: int, workers: int) -> int:
    """Bytes that a fresh process grows to, above what it had before."""
    shutil.rmtree(target, ignore_errors=True)
    program = PEAK.format(path=sys.path[:2], source=str(source), target=str(target), to=to, shard=shard_bytes, workers=workers)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


def measure(root: Path, format: str, to: str, shard: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one pair of formats."""
    source, out = root / format, root / "out"
    turns = []
    for _ in range(args.repeat):
        ours = convert(source, out, to, shard, args.workers)
        turns.append([ours, *(copy(source, out, root / "copy", args.workers, hashed) for hashed in (False, True))])
    seconds = [min(turn[side][0] for turn in turns) for side in range(3)]
    used = [min(turn[side][1] for turn in turns) for side in range(3)]
    moved = size(source) + size(out)
    row = {"pair": f"{format}-{to}", "read": size(source), "written": size(out)}
    row |= {f"{name}_MBps": moved / each / 1e6 for name, each in zip(("convert", "copy", "hashed"), seconds)}
    row |= {"ratio": seconds[0] / seconds[1], "ratio_hashed": seconds[0] / seconds[2], "cpu": used[0] / used[2]}
    row["peak"] = peak(source, out, to, shard, args.workers)
    row["shards"] = row["peak"] / max(file.stat().st_size for file in weights(out))
    shutil.rmtree(out)
    shutil.rmtree(root / "copy")
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"{row['pair']:10} {row['read'] / 1e6:>6,.0f}MB {row['written'] / 1e6:>6,.0f}MB {row['convert_MBps']:>6,.0f}MB/s "
        f"{row['copy_MBps']:>6,.0f}MB/s {row['ratio']:>6.2f} {row['hashed_MBps']:>6,.0f}MB/s {row['ratio_hashed']:>6.2f} "
        f"{row['cpu']:>5.2f} {row['peak'] / 1e6:>7,.0f}MB {row['shards']:>6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", default="k2-slice", help="k2-slice, linear-slice, small-k2, ...")
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--shard-mb", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="threads of both sides (default: those of k2 convert)")
    parser.add_argument("--no-sync", action="store_true", help="neither side syncs its files: arithmetic and memory copies alone")
    parser.add_argument("--pairs", nargs="*", metavar="FROM-TO", help="e.g. bf16-int4 (default: five pairs)")
    parser.add_argument("--json", metavar="FILE", help="the figures for programs")
    args = parser.parse_args()
    import made_up_checkpoints as made
    import torch

    from k2lab.ckpt.convert import workers_here
    from k2lab.quant import compiled

    args.workers = args.workers or workers_here()
    if args.no_sync:
        os.fsync = lambda handle: None
    pairs = [tuple(pair.split("-")) for pair in args.pairs] if args.pairs else PAIRS
    shard = args.shard_mb * 1_000_000
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, ", end="")
    print(f"torch {torch.__version__}, {'with' if compiled.module('_loops') else 'without'} numba")
    synced = "not synced" if args.no_sync else "synced"
    print(f"{args.spec}, shards of {args.shard_mb} MB, {args.workers} threads, {synced}, best of {args.repeat}")
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root, rows = Path(name), []
        for format in dict.fromkeys(pair[0] for pair in pairs):
            made.make(root / format, args.spec, format, shard_bytes=shard)
        print(
            f"{'':10} {'read':>8} {'written':>8} {'convert':>10} {'copy':>10} {'ratio':>6} {'+ sha256':>10} {'ratio':>6}", end=""
        )
        print(f" {'cpu':>5} {'peak RSS':>9} {'shards':>6}")
        for format, to in pairs:
            rows.append(measure(root, format, to, shard, args))
            print(line(rows[-1]), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
