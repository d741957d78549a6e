"""What the GPU benchmarks share: models filled on the device, feeds of committed lengths, timing, a profile by kind of kernel.

A weight is normal(0, initializer_range) from a generator that is seeded with its name, so two sides that build the same shape
hold the same bits without passing them to each other; norms are 1, router biases 0. (`models.build.from_spec` draws on the host.)

Legend: `T` packed tokens, `S` documents, `B` rows, `R` tokens of a row.
"""

from __future__ import annotations

import gc
import platform
import re
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from k2lab.core.rng import rng
from k2lab.core.types import Batch, Sample
from k2lab.data.pack import pack
from k2lab.engine.objectives.lm import LM
from k2lab.engine.step import forward_backward, means
from k2lab.models import build
from k2lab.models.router import update_router_bias
from k2lab.models.wrap import ALWAYS_FP32, TrainModel
from k2lab.specs import ModelSpec

# ---------------------------------------------------------------- models


@torch.no_grad()
def blank(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of this shape with weights in `dtype`, filled on the device."""
    hf = build.blank(spec, device)
    for name, parameter in hf.named_parameters():
        last = name.rsplit(".", 2)[-2:]
        if last[-1] not in ALWAYS_FP32:
            parameter.data = parameter.data.to(dtype)
        if last[-1] in ALWAYS_FP32 or last[-1] == "bias":
            parameter.zero_()
        elif "norm" in last[0]:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(0.0, spec.initializer_range, generator=generator)
    return hf


def ours(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> TrainModel:
    """Our model; the same weights as `blank`."""
    return TrainModel(blank(spec, device, dtype), spec).train()


def forget() -> None:
    """Gives memory of models that are no longer referenced back to the device."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- feeds

MEDIAN, SPREAD, SHORTEST, LONGEST = 600, 0.8, 16, 4096  # log-normal document lengths of feed (b)


@dataclass(frozen=True)
class Feed:
    """One micro-batch for both sides: `lengths` of its documents; `batch` is ours (numpy), `rows` the rival's: documents dealt to
    rows so that the fullest is as short as possible, each row then padded to `width`."""

    lengths: tuple[int, ...]
    batch: Batch
    rows: tuple[tuple[int, ...], ...]  # documents of each row, as indices
    width: int

    def rival_arrays(self) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and shift_labels [B, R]. Padding is a document of its own without labels."""
        ids, positions, labels = (np.zeros((len(self.rows), self.width), np.int64) for _ in range(3))
        labels -= 100
        positions += np.arange(self.width)
        for row, documents in enumerate(self.rows):
            at = 0
            for n in documents:
                part = slice(int(self.batch.starts_S1[n]), int(self.batch.starts_S1[n + 1]))
                place = slice(at, at + self.lengths[n])
                ids[row, place], positions[row, place] = self.batch.tokens_T[part], self.batch.positions_T[part]
                labels[row, place] = np.where(self.batch.weight_T[part] != 0, self.batch.targets_T[part], -100)
                at += self.lengths[n]
            positions[row, at:] = np.arange(self.width - at)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "shift_labels": torch.from_numpy(labels),
        }


def lognormal_lengths(tokens: int, number: int) -> tuple[int, ...]:
    """Document lengths of micro-batch `number` of feed (b), summing to `tokens`."""
    draw, lengths = rng(0, "bench", "lengths", number), []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(MEDIAN), SPREAD), SHORTEST, LONGEST)))
    lengths[-1] -= sum(lengths) - tokens
    return tuple(lengths)


def _dealt(lengths: Sequence[int], num_rows: int) -> tuple[tuple[int, ...], ...]:
    """Longest document first, each to the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = filled.index(min(filled))
        rows[row].append(n)
        filled[row] += lengths[n]
    return tuple(tuple(row) for row in rows)


def _packed(lengths: Sequence[int], vocab: int, number: int) -> Batch:
    draw = rng(0, "bench", "tokens", number)
    samples = []
    for n, length in enumerate(lengths):
        weight = np.ones(length, np.float32)
        weight[0] = 0
        samples.append(Sample(tokens=draw.integers(0, vocab, length, dtype=np.int32), weight=weight, key=f"{number}-{n}"))
    return pack(samples)


def feeds(kind: str, number: int, tokens: int, row: int, vocab: int) -> list[Feed]:
    """`number` micro-batches of `tokens` tokens. "a": full rows of `row` tokens; "b": documents of log-normal lengths."""
    num_rows = tokens // row
    each = [(row,) * num_rows if kind == "a" else lognormal_lengths(tokens, n) for n in range(number)]
    dealt = [_dealt(lengths, num_rows) for lengths in each]
    fullest = max(sum(lengths[n] for n in part) for lengths, rows in zip(each, dealt) for part in rows)
    width = -(-fullest // 64) * 64
    return [Feed(lengths, _packed(lengths, vocab, n), dealt[n], width) for n, lengths in enumerate(each)]


def model_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Forward and backward of these documents: `spec.flops_per_token(n)` x n summed over documents of n tokens, that is
    6 x matmul_active x n + 3 x layers x heads x (qk + v) x n^2 (half of the square: causal)."""
    return sum(n * sum(spec.flops_per_token(n).values()) for n in lengths)


# ---------------------------------------------------------------- a whole optimizer step


@dataclass
class Step:
    """Our whole step as the loop does it: forward and backward of all micro-batches, gradient norm and clipping, update and
    QK-Clip, router bias, and every observation read to the host. `parts` {name: seconds} are taken if `wait` is set, which makes
    the host wait for the device after each part."""

    model: TrainModel
    optim: Any
    wait: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    said: str = ""
    done: int = 0

    def __call__(self, batches: Sequence[Batch]) -> None:
        objective = LM()
        now = time.perf_counter()
        counts = {"lm": float(sum(batch.num_tokens for batch in batches))}
        sums, metrics = forward_backward(self.model, objective, batches, counts)
        now = self._mark("forward and backward", now)
        norm = self.optim.clip(1.0)
        now = self._mark("norm and clipping", now)
        info = self.optim.step(self.done, 10_000, metrics.max_logits)
        self.optim.zero_grad()
        now = self._mark("update", now)
        update_router_bias(self.model, metrics.expert_counts)
        losses, _ = means(objective, sums, counts)
        tops = [max(values.tolist()) for values in metrics.max_logits.values()]
        loads = [max(count.tolist()) / sum(count.tolist()) for count in metrics.expert_counts.values()]
        self._mark("router bias and metrics", now)
        self.done += 1
        self.said = (
            f"loss {losses['lm']:.4f}, norm {norm:.3f}, largest logit {max(tops, default=0):.1f}, "
            f"largest expert load {100 * max(loads, default=0):.1f} %, {len(info.clipped)} layers clipped"
        )

    def _mark(self, name: str, began: float) -> float:
        if self.wait and self.model.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - began
        return now


# ---------------------------------------------------------------- measuring


def timed(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds of each call, one after the other without waiting for the device in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:])]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    events[0].record()
    for call, event in zip(calls, events[1:]):
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:])]


class Clocks:
    """Samples the GPU's clock (MHz) and power (W) while it runs, ten times a second; `said` for a line."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.samples = device, []
        self._stop = threading.Event()

    def __enter__(self) -> Clocks:
        if self.device.type == "cuda":
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self.samples.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3))
            except Exception:  # no NVML: the line says nothing of clocks
                return

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        if self.device.type == "cuda":
            self._thread.join()

    @property
    def said(self) -> str:
        if not self.samples:
            return ""
        clock, power = (np.median([sample[n] for sample in self.samples]) for n in (0, 1))
        return f"SM clock {clock:.0f} MHz, {power:.0f} W"


_BEGAN = time.perf_counter()


def clock() -> str:
    """Seconds since the benchmark began, for its lines."""
    return f"[{time.perf_counter() - _BEGAN:5.1f} s]"


def peak_gb(device: torch.device) -> float:
    """Largest memory of tensors since `reset_peak`, GB (10^9)."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def about(device: torch.device) -> str:
    """Device and versions, one line."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    more = [f"torch {torch.__version__}", f"transformers {transformers.__version__}", f"python {platform.python_version()}"]
    if device.type == "cuda":
        more.append(f"cuDNN {torch.backends.cudnn.version()}")
        try:
            import triton

            more.append(f"triton {triton.__version__}")
        except ImportError:
            more.append("no triton")
    return ", ".join([name, *more])


def syncs(call: Callable[[], Any]) -> None:
    """Prints where the host waits for the device during `call`."""
    torch.cuda.synchronize()
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
    places: dict[str, int] = {}
    for warning in seen:
        if "synchronizing" in str(warning.message):
            place = f"{'/'.join(warning.filename.rsplit('/', 3)[-3:])}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    print(
        f"  waits for the device: {sum(places.values())}; " + "; ".join(f"{count} at {place}" for place, count in places.items())
    )


# First match wins.
KINDS = (
    ("kda", r"kda|delta_rule|chunk_(gla|local|fwd|bwd|scaled)|causal_conv|short_conv|l2norm"),
    ("attention", r"sdpa|flash|fmha|attn|attention|mla|rope|rotar"),
    ("loss", r"cross_entropy|nll|log_softmax|_ce_|cunn_SoftMax"),
    ("optimizer", r"multi_tensor|foreach|newton|muon|adam|lpnorm|symm"),
    ("grouped gemm", r"group|Group|ragged|moe_gemm|expert.*(gemm|mm)|_gg_"),
    ("dense gemm", r"gemm|nvjet|cutlass|xmma|cublas|splitK|_mm_|addmm"),
    ("routing", r"sort|radix|scan|histogram|bincount|topk|scatter|gather|index|expert|moe|route|permut|swiglu|silu"),
    ("norm", r"norm"),
    ("memory", r"Memcpy|Memset|copy|cat|fill|Fill"),
    ("elementwise", r"elementwise|triton|reduce|add|mul|softmax"),
)


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def profile(call: Callable[[], Any], repeats: int = 2, rows: int = 25) -> None:
    """Prints the CUDA kernels of one call by time and by kind, and how long the device was busy."""
    from torch.profiler import ProfilerActivity

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - began) / repeats
    found = [(e.key, e.self_device_time_total / 1e3 / repeats, e.count / repeats) for e in seen.key_averages()]
    found = sorted((row for row in found if row[1] > 0), key=lambda row: -row[1])
    busy = sum(ms for _, ms, _ in found)
    print(f"{clock()} profile: kernels {busy:.1f} ms of {wall * 1e3:.1f} ms, {sum(n for *_, n in found):.0f} launches")
    kinds: dict[str, list[float]] = {}
    for key, ms, count in found:
        total = kinds.setdefault(kind_of(key), [0.0, 0.0])
        total[0] += ms
        total[1] += count
    print("  " + "; ".join(f"{kind} {ms:.1f} ms ({n:.0f})" for kind, (ms, n) in sorted(kinds.items(), key=lambda k: -k[1][0])))
    for key, ms, count in found[:rows]:
        print(f"  {ms:8.2f} ms {count:6.0f}x {ms / count * 1e3:9.1f} us  {kind_of(key):13s} {key[:96]}")
