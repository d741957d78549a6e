"""Tokens, flops, time and money of a training stage, and measured throughput from a run's events."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from k2lab.core import events
from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import PlanInput
from k2lab.plan import adapters
from k2lab.plan.machines import Machine
from k2lab.plan.memory import check_input, training_memory, uses_muon
from k2lab.specs import ModelSpec, recomputation

# What attention scores and values cost in a training step, in forward passes: a flash backward computes the scores
# again, 1 + 2.5. Model flops (for MFU) count 3.
ATTENTION_PASSES = 3.5
ATTENTION_PASSES_RECOMPUTED = 4.5  # with activation checkpointing the forward pass runs once more
WARMUP_STEPS = 3  # first step events of a stage that say little about its speed


def tokens_per_step(inp: PlanInput) -> int:
    """gpus x per_device_batch x grad_acc x seq_len."""
    check_input(inp)
    return inp.gpus * inp.per_device_batch * inp.grad_acc * inp.seq_len


def steps_for(tokens: int, per_step: int) -> int:
    """Steps that reach `tokens`: the quotient rounded up."""
    if tokens < 1 or per_step < 1:
        raise RecipeError("tokens and tokens per step must be positive", got=f"{tokens} and {per_step}")
    return -(-tokens // per_step)


def tokens_for(steps: int, per_step: int) -> int:
    """Tokens that `steps` steps read."""
    if steps < 1 or per_step < 1:
        raise RecipeError("steps and tokens per step must be positive", got=f"{steps} and {per_step}")
    return steps * per_step


@dataclass(frozen=True)
class Speed:
    """Seconds of one optimizer step, and where they come from."""

    seconds_per_step: float
    tokens_per_s: float  # of all GPUs together
    measured: bool
    formula: str
    mfu: float  # model flops over dense peak, all terms


@dataclass(frozen=True)
class Money:
    """Machines, hours and dollars of a stage; `dollars` is None if the machine has no price."""

    machines: int
    hours: float
    dollars: float | None


def model_flops(inp: PlanInput) -> dict[str, float]:
    """Model flops per token of a training step, by term: forward and backward, 3 forward passes; matrices that are frozen under
    adapters 2, since they have no gradient, and the adapters' own 3."""
    spec, low = check_input(inp), adapters.of(inp)
    terms = spec.flops_per_token(inp.seq_len)
    if low is None:
        return terms
    return {**terms, "matmul": terms["matmul"] * 2 / 3, "adapters": 6.0 * adapters.active(low, spec)}


def executed_flops(inp: PlanInput) -> tuple[float, float]:
    """Flops per token that a training step executes: (matrix work and KDA as `model_flops`, attention 3.5 forward passes), and
    one forward pass more of what is computed again."""
    terms, spec = model_flops(inp), check_input(inp)
    attention = terms["mla"] + terms["attention"]
    element = 4 if inp.precision == "fp32" else 2
    again = recomputation.recomputed(spec, inp.recompute, inp.seq_len, element, f"stage.{inp.stage}.recompute")
    layers = recomputation.blocks(spec, inp.seq_len, element)
    all_flops = sum(getattr(layer, name).flops for layer, names in zip(layers, again) for name in names)
    each = {kind: attention_flops / 3.0 / max(1, len(spec.layers_of(kind))) for kind, attention_flops in terms.items()}
    scores = sum(each[kind] for kind, names in zip(spec.layer_types, again) if kind != "kda" and "mixer" in names)
    return sum(terms.values()) - attention + all_flops - scores, ATTENTION_PASSES * attention / 3.0 + scores


def newton_schulz_flops(spec: ModelSpec, steps: int = 5) -> float:
    """Flops of orthogonalising every Muon matrix (m <= n) once: steps x (4 m^2 n + 2 m^3), that is X X^T, its square and the
    product with X per Newton-Schulz step. Matrices are taken whole; split by heads they cost less."""
    flops = 0.0
    for tensor in spec.tensors():
        if tensor.kind in ("linear", "expert", "router"):
            m, n = sorted(tensor.shape)
            flops += tensor.count * steps * (4.0 * m * m * n + 2.0 * m**3)
    return flops


def optimizer_flops(inp: PlanInput, machine: Machine) -> tuple[float, str]:
    """(flops per GPU and step, how they are shared) of Newton-Schulz; 0 without Muon. If the state fits on every GPU each does
    all the matrices, as plain data parallelism does; else the state must be divided, and with it the matrices."""
    spec = check_input(inp)
    if not uses_muon(inp.optimizer) or adapters.of(inp) is not None:
        return 0.0, ""
    flops = newton_schulz_flops(spec)
    if inp.gpus > 1 and training_memory(inp, machine).replicated() > 1e9 * machine.memory_gb:
        return flops / inp.gpus, f"divided over {inp.gpus} GPUs"
    return flops, "all matrices on every GPU" if inp.gpus > 1 else "all matrices"


def assumed_speed(inp: PlanInput, machine: Machine) -> Speed:
    """Time of a step if matrix work reaches `assumed_mfu` of the peak and attention `assumed_attention_mfu`:
    tokens x (3 (matmul + kda) / mfu + 3.5 attention / attention_mfu) / (gpus x peak), and Newton-Schulz at `assumed_mfu`.
    Communication and data are not in it."""
    tokens, peak = tokens_per_step(inp), machine.peak(inp.precision) * inp.gpus
    matrix, attention = executed_flops(inp)
    seconds = tokens * (matrix / machine.assumed_mfu + attention / machine.assumed_attention_mfu) / peak
    seconds += optimizer_flops(inp, machine)[0] / (machine.assumed_mfu * machine.peak(inp.precision))
    formula = (
        f"{100 * machine.assumed_mfu:g} % of {inp.gpus} x {machine.peak(inp.precision) / 1e12:g} TFLOP/s for matrix work, "
        f"{100 * machine.assumed_attention_mfu:g} % for attention; no communication"
    )
    return Speed(seconds, tokens / seconds, False, formula, _mfu(inp, tokens / seconds, peak))


def measured_speed(inp: PlanInput, machine: Machine, tokens_per_s: float, steps: int) -> Speed:
    """Time of a step at the measured throughput (tokens/s of the whole job)."""
    tokens, peak = tokens_per_step(inp), machine.peak(inp.precision) * inp.gpus
    formula = f"median of {steps} step events of the measured run"
    return Speed(tokens / tokens_per_s, tokens_per_s, True, formula, _mfu(inp, tokens_per_s, peak))


def _mfu(inp: PlanInput, tokens_per_s: float, peak: float) -> float:
    return tokens_per_s * sum(model_flops(inp).values()) / peak


def money(seconds: float, gpus: int, machine: Machine) -> Money:
    """Whole machines are paid: ceil(gpus / GPUs per machine) x hours x price."""
    machines = math.ceil(gpus / machine.devices)
    hours = seconds / 3600
    price = machine.dollars_per_hour
    return Money(machines, hours, None if price is None else machines * hours * price)


@dataclass(frozen=True)
class Throughput:
    """Median tokens per second of a stage's step events, and how many were used."""

    tokens_per_s: float
    steps: int


def measure(run: Path) -> dict[str, Throughput]:
    """Throughput by stage name from a run directory's events: the median of `tokens_per_s` over step events, leaving out
    the first three of a stage where there are more. Raises DataError if the directory has no such events."""
    run = Path(run)
    folder = run / "events"
    if not folder.is_dir():
        raise DataError(f"{run} is not a run directory: it has no events/", next="Give a directory that `k2 run` wrote")
    rates: dict[str, list[float]] = {}
    for event in events.read(folder):
        rate = event.get("tokens_per_s")
        if event["kind"] == "step" and isinstance(rate, (int, float)) and rate > 0:
            rates.setdefault(event["stage"], []).append(float(rate))
    if not rates:
        raise DataError(
            f"{run} holds no step events with a throughput", next="Measure with a run of at least a few training steps"
        )
    kept = {stage: values[WARMUP_STEPS:] or values for stage, values in rates.items()}
    return {stage: Throughput(statistics.median(values), len(values)) for stage, values in kept.items()}
