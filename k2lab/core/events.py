"""Events: one JSON line each, the only thing that meters, the progress bar, the report and trackers read.

`<run>/events/<writer>.jsonl`, one file per process. Every line has `v, run, stage, attempt, step, seq, t, kind`. An attempt
starts with the step it resumed from (`kind: "stage_start"`, `step`), and readers drop older attempts' later steps, so a run
that was killed and resumed reads like one that never was.

Kinds and their fields (all numbers are plain JSON; non-finite floats are written as strings):
  run_start    recipe, versions, device, stages {name: identity}
  stage_start  type, identity, total (steps or null), unit, resumed (bool)
  step         total, losses {term: mean}, lr, grad_norm, tokens, tokens_per_s, seconds, rss_mb, eta_s, and when known
               max_logits {layer: [per head]}, clipped {layer: [head, ...]}, expert_load {router: [share per expert]},
               metrics {name: value}: what the objective reports besides its trained terms,
               rollout {name: value}: about the rollouts that were trained, see rl.feed.RolloutFeed.facts
  valid        metrics {name: value}: validation inside training; valid/<term> of trained terms, held_out/<name> of metrics
  progress     done, total, unit, eta_s: stages that have no optimizer steps
  funnel       filter, seen, kept, dropped, changed, examples [{text, why}]
  note         text: a slow path taken, an early stop, a fallback; said once
  stage_end    seconds, peak_rss_mb, artifact
  stage_failed error
  stage_skipped reason: the machine lacks what the stage needs (a sandbox), and the run can do without the stage
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VERSION = 1


class EventWriter:
    """Appends events of one process to `<folder>/<writer>.jsonl` and hands each to the `listeners` (progress, trackers)."""

    def __init__(self, folder: Path, writer: str = "rank0", run: str = "", enabled: bool = True) -> None:
        self.run, self.stage, self.attempt, self.step, self.seq = run, "", 0, 0, 0
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self._file = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / f"{writer}.jsonl"
            self.attempt = 1 + max((e.get("attempt", 0) for e in read_file(self.path)), default=0)
            _end_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def emit(self, kind: str, step: int | None = None, **fields: Any) -> None:
        """Writes one event; `step` defaults to the last one given. The line is flushed, so readers see it at once."""
        if step is not None:
            self.step = step
        self.seq += 1
        event = {
            "v": VERSION,
            "run": self.run,
            "stage": self.stage,
            "attempt": self.attempt,
            "step": self.step,
            "seq": self.seq,
            "t": round(time.time(), 3),
            "kind": kind,
            **_clean(fields),
        }
        if self._file is not None:
            self._file.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")
            self._file.flush()
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return value


def _end_torn_line(path: Path) -> None:
    """A killed process may leave half a line; end it, so that the next event starts on its own line."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """All well-formed events of one file, in order; a torn line is skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("v") == VERSION:
                yield event


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of a run directory's `events/` folder as one history: per stage and writer, an attempt that resumed at step s
    replaces what earlier attempts wrote for steps > s (and everything, if it started afresh)."""
    history: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        kept: list[dict[str, Any]] = []
        for event in read_file(path):
            if event["kind"] == "stage_start":
                stage, at = event["stage"], event["step"]
                kept = [e for e in kept if e["stage"] != stage or (event.get("resumed") and e["step"] <= at)]
            kept.append(event)
        history += kept
    return sorted(history, key=lambda e: e["t"])  # stable: the order within one writer stays
