"""`k2 convert` and `k2 diff`: what a person sees of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from k2lab.core.progress import clock
from k2lab.plan.lines import size as bytes_text

DIFFER = 5  # exit code of `k2 diff --exit-code` if two checkpoints are not equal; no other command gives it


class Meter:
    """Prints how far a command is: a line that is overwritten on a terminal, one every ten seconds elsewhere."""

    def __init__(self, unit: str, quiet: bool) -> None:
        self.unit, self.quiet = unit, quiet
        self.began, self.last = time.monotonic(), 0.0
        self.first: int | None = None
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, total: int, files: int = 0, all_files: int = 0) -> None:
        """`done` of `total` bytes, and files likewise. What was there before the first call counts neither for speed nor ETA."""
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        finished = done >= total and files >= all_files
        if self.quiet or (now - self.last < (0.5 if self.live else 10.0) and not finished):
            return
        self.last = now
        rate = (done - self.first) / max(1e-9, now - self.began)
        text = f"  {bytes_text(done)} of {bytes_text(total)}"
        text += f", {files} of {all_files} {self.unit}" if all_files else ""
        if rate:
            text += f", {rate / 1e6:,.0f} MB/s" + ("" if finished else f", ETA {clock((total - done) / rate)}")
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"\r{text:<78}" + ("\n" if finished else "") if self.live else text + "\n")
            sys.stderr.flush()


def convert(args: argparse.Namespace) -> int:
    """`k2 convert`."""
    from k2lab.ckpt import convert as converting
    from k2lab.dist import mesh

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    request = converting.Request(
        source=_folder(args.source),
        target=Path(args.target),
        to=args.to,
        original=_folder(args.original) if args.original else None,
        adapter=_adapter(args.adapter) if args.adapter else None,
        shard_bytes=args.shard_bytes,
        workers=args.workers,
        rank=rank,
        world=world,
    )
    job = converting.Job(request)
    try:
        state = job.journal.state()
        if rank == 0 and state != "finished":
            _say_job(job, state, args.dry_run)
        if args.dry_run:
            print(f"{request.target} is done" if state == "finished" else "nothing was written (--dry-run)")
            return 0
        result = converting.run(job, Meter("files", args.quiet or rank != 0))
    finally:
        job.close()
        if world > 1:
            mesh.close()
    by_hand = "MASTER_ADDR" not in os.environ  # then ranks know nothing of each other, and whichever ends last says so
    if rank == 0 or (result.state == "done" and by_hand):
        _say_result(request, result)
    return 0


def _folder(text: str) -> Path:
    """The model directory that a path names, which may also be RUN or RUN/STAGE."""
    path = Path(text)
    in_run = any((folder / "recipe.resolved.toml").is_file() for folder in (path, path.parent))
    if not in_run or (path / "config.json").is_file():
        return path
    from k2lab.chat import model_directory

    return model_directory(path)


def _adapter(text: str) -> Path:
    """The adapter folder that a path names, which may also be a stage that left its adapter beside the merged model."""
    path, config = _folder(text), "adapter_config.json"
    return path / "adapter" if not (path / config).is_file() and (path / "adapter" / config).is_file() else path


def _say_job(job: Any, state: str, dry_run: bool) -> None:
    request, plan = job.request, job.plan
    counts: dict[str, int] = {}
    for shard in plan.shards:
        for item in shard.items:
            counts[item.how] = counts.get(item.how, 0) + 1
    told = {
        "copy": "copied",
        "plain": "decoded or cast",
        "fp8_block": "put on the FP8 grid",
        "int4_group": "put on the INT4 grid",
    }
    print(f"{request.source} ({job.source.format}) -> {request.target} ({request.to})", flush=True)
    print("  tensors: " + ", ".join(f"{number} {told[how]}" for how, number in counts.items()))
    if job.template is not None:
        print(f"  those that did not change take their bytes from {job.template.path}")
    if job.adapter is not None:
        print(f"  with the adapter {request.adapter} merged into {len(job.adapter.modules())} matrices")
    done = sum(job.journal.noted(shard.file) is not None for shard in plan.shards)
    print(f"  {len(plan.shards)} files, {bytes_text(plan.size)}" + (f"; continuing: {done} are finished" if done else ""))
    for note in job.notes:
        print(f"  note: {note}")
    if dry_run:
        there = next(path for path in (request.target.resolve(), *request.target.resolve().parents) if path.exists())
        print(f"  disk: {bytes_text(shutil.disk_usage(there).free)} free at {there}")
    sys.stdout.flush()


def _say_result(request: Any, result: Any) -> None:
    done = result.done
    if result.state == "already":
        print(f"{request.target} is done: nothing was touched")
        return
    parts = [
        (done.kept, "unchanged, with their original bytes"),
        (done.copied, "copied byte for byte"),
        (done.decoded, "decoded or cast"),
        (done.quantised, "quantised"),
        (done.merged, "of these with an adapter merged"),
    ]
    print("\n  " + "\n  ".join(f"{number:>8,} {what}" for number, what in parts if number))
    rate = result.moved / max(result.seconds, 1e-9) / 1e6
    print(f"  {bytes_text(done.read)} read, {bytes_text(done.written)} written", end="")
    print(f"; this command {clock(result.seconds)}, {rate:,.0f} MB/s read and written")
    if result.state == "partial":
        print(f"{result.missing} of {len(result.plan.shards)} files are missing: those of the other ranks of {request.world}.")
        print("next:     the same command with another RANK; whichever ends last writes what lies beside the weights")
        return
    print(f"\ndone:     {request.target}   (checksums.json has every file's sha256)")
    print(f"next:     k2 diff {request.source} {request.target}")


# ---------------------------------------------------------------- diff


def diff(args: argparse.Namespace) -> int:
    """`k2 diff`."""
    from k2lab.ckpt import diff as comparing

    report = comparing.compare(_folder(args.a), _folder(args.b), Meter("", args.quiet or args.json))
    if args.json:
        print(json.dumps(report.json(), indent=1))
    else:
        print("\n".join(_diff_lines(report, args)))
    return DIFFER if args.exit_code and not report.equal() else 0


_STATES = {
    "bytes": "stored alike, byte for byte",
    "bits": "stored otherwise, with the same values bit for bit",
    "values": "equal but for signs of zero",
    "differs": "of other values",
    "shape": "of another shape or type",
}


def _diff_lines(report: Any, args: argparse.Namespace) -> list[str]:
    states = report.states()
    lines = [f"A {args.a} ({report.formats[0]})", f"B {args.b} ({report.formats[1]})", ""]
    lines += [f"  {states[state]:>8,} tensors {told}" for state, told in _STATES.items() if state in states]
    for whose, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            lines.append(f"  {len(names):>8,} tensors in {whose} alone: {shown}")
    if (codes := report.codes()) is not None:
        lines.append(f"  {codes[0]:>8,} codes and {codes[1]:,} scales differ (a plain side is put on the grid for this)")
    if (share := report.on_grid()) is not None:
        lines.append(f"  {share:>8.2%} of the plain side's values lie on the quantised side's grid")
    lines += [f"  config: {key}: {left!r} and {right!r}" for key, (left, right) in report.config.items()]
    if report.files:
        lines.append("  beside the weights differ: " + ", ".join(report.files))
    worst = report.worst()
    if worst:
        width = max(len(tensor.name) for tensor in worst)
        lines += [
            "",
            f"  {'the most different tensors':<{width}}  {'A':>10} {'B':>10} {'unequal':>9} {'bf16 ulps':>9}  max |A-B|  rms/rms",
        ]
        lines += [_worst_line(tensor, width) for tensor in worst]
    lines += ["", "equal: every value has the same bits" if report.equal() else "not equal"]
    if not report.equal() and not args.json:
        lines.append(f"next:     k2 diff {args.a} {args.b} --json   has every tensor")
    return lines


def _worst_line(tensor: Any, width: int) -> str:
    left, right = tensor.formats
    start = f"  {tensor.name:<{width}}  {left:>10} {right:>10}"
    if tensor.state == "shape":
        return f"{start}   another shape or type"
    ulps = "NaN, inf" if tensor.ulps < 0 else f"{tensor.ulps:,}"
    return f"{start} {tensor.unequal / max(1, tensor.count):>9.2%} {ulps:>9}  {tensor.max_abs:>9.2e}  {tensor.rms:.1e}"
