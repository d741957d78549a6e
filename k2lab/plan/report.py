"""The plan of a recipe on a machine: every number with its formula, and whether it was given, computed, assumed or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lab.core.errors import RecipeError
from k2lab.core.types import PlanInput
from k2lab.plan import adapters, analysis, beside, compute, lines, long_context, machines, memory
from k2lab.plan.compute import Money, Speed, Throughput
from k2lab.plan.lines import Section
from k2lab.plan.machines import Machine
from k2lab.specs import FORMATS, ModelSpec


@dataclass(frozen=True)
class StagePlan:
    """One stage: its tables; `seconds` and `dollars` of the whole stage are None if its length or the price is not known."""

    stage: str
    type: str
    kind: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    seconds: float | None = None
    dollars: float | None = None
    measured: bool = False

    def text(self) -> list[str]:
        """As lines of text."""
        unplanned = self.kind == "cpu" and not self.sections
        rows = [f"Stage {self.stage} ({self.type})" + (": runs on the CPU, not planned" if unplanned else "")]
        rows += [f"  note: {note}" for note in self.notes]
        for section in self.sections:
            rows += ["", *(f"  {row}" for row in section.text())]
        return rows


@dataclass(frozen=True)
class Plan:
    """What `k2 plan` prints."""

    machine: Machine
    models: tuple[tuple[str, tuple[Section, ...]], ...]
    stages: tuple[StagePlan, ...]
    totals: Section

    def text(self) -> str:
        """The whole plan as readable tables: label, number, origin, formula."""
        rows = [f"Machine {self.machine.name}: {self.machine.describe()}", f"  source: {self.machine.source}"]
        for _, sections in self.models:
            for section in sections:
                rows += ["", *section.text()]
        for stage in self.stages:
            rows += ["", *stage.text()]
        return "\n".join([*rows, "", *self.totals.text()])

    def json(self) -> dict[str, Any]:
        """The same as plain data: machine, models, stages, totals; each number with value, shown, origin and formula."""
        return {
            "machine": {name: getattr(self.machine, name) for name in Machine.__dataclass_fields__},
            "models": {name: [section.json() for section in sections] for name, sections in self.models},
            "stages": [
                {
                    "stage": stage.stage,
                    "type": stage.type,
                    "kind": stage.kind,
                    "notes": list(stage.notes),
                    "seconds": stage.seconds,
                    "dollars": stage.dollars,
                    "measured": stage.measured,
                    "sections": [section.json() for section in stage.sections],
                }
                for stage in self.stages
            ],
            "totals": self.totals.json(),
        }


def plan(
    inputs: Sequence[PlanInput],
    machine: Machine | str,
    measured: Path | str | Mapping[str, Throughput] | None = None,
    recipe: beside.Recipe | None = None,
) -> Plan:
    """The plan of the stages `inputs` on `machine` (or the shipped machine of that name). With `recipe` (the stages' tables and
    the models they name) it also says what stages need beside the model that they train.

    `measured`: a run directory (or what `compute.measure` gave) whose throughput replaces the assumed one for stages of the same
    name; the others stay assumed and say so. Raises RecipeError for unknown machines and impossible numbers, DataError for a run
    without events.
    """
    machine = machines.get(machine) if isinstance(machine, str) else machine
    rates = compute.measure(Path(measured)) if isinstance(measured, (str, Path)) else dict(measured or {})
    if rates and not any(inp.stage in rates for inp in inputs):
        raise RecipeError(
            "the measured run has none of this recipe's stages",
            got=", ".join(sorted(rates)),
            allowed=", ".join(inp.stage for inp in inputs if inp.kind == "train"),
            next="Give a run of the same recipe, or plan without --measured",
        )
    specs: dict[str, ModelSpec] = {}
    for inp in inputs:
        if isinstance(inp.model, ModelSpec) and inp.kind != "cpu":
            specs.setdefault(inp.model.name, inp.model)
    stages = tuple(_stage(inp, machine, rates, recipe or beside.Recipe()) for inp in inputs)
    models = tuple((name, (_model(spec), *analysis.sections(spec))) for name, spec in specs.items())
    return Plan(machine, models, stages, _totals(stages, machine))


def _model(spec: ModelSpec) -> Section:
    section = Section(f"Model {spec.name} ({spec.family})")
    for group, number in spec.parameters().items():
        section.add(
            f"parameters_{group}", group.replace("_", " "), number, lines.parameters(number), "computed", "sum of its tensors"
        )
    section.add("total", "total parameters", spec.total(), lines.parameters(spec.total()), "computed", "sum of the groups")
    section.add(
        "active",
        "active per token",
        spec.active(),
        lines.parameters(spec.active()),
        "computed",
        "routed experts: only those chosen",
    )
    doing = spec.matmul_active()
    section.add(
        "matmul_active",
        "doing matrix work",
        doing,
        lines.parameters(doing),
        "computed",
        "active without embedding look-up and norms",
    )
    if spec.n_routed_experts:
        ratio = spec.n_routed_experts / spec.num_experts_per_tok
        section.add(
            "sparsity",
            "sparsity",
            ratio,
            f"{ratio:g}",
            "computed",
            f"{spec.n_routed_experts} / {spec.num_experts_per_tok} experts",
        )
    for format in FORMATS:
        if format != "int4_group" or spec.n_routed_experts:
            number = spec.bytes(format)
            section.add(
                f"bytes_{format}",
                f"weights as {format}",
                number,
                lines.size(number),
                "computed",
                "tensor by tensor, scales included",
            )
    each = spec.kv_bytes_per_token()
    section.add(
        "kv_bytes_per_token", "key-value cache per token", each, f"{each:,} B", "computed", "2 B per cached value, all layers"
    )
    if spec.state_bytes():
        state = spec.state_bytes()
        section.add("state_bytes", "KDA state per sequence", state, lines.size(state), "computed", "layers x heads x d^2 x 4 B")
    return section


def _stage(inp: PlanInput, machine: Machine, rates: Mapping[str, Throughput], recipe: beside.Recipe) -> StagePlan:
    more = beside.sections(inp, recipe, machine)
    if inp.kind == "cpu":
        return StagePlan(inp.stage, inp.type, inp.kind, tuple(more), inp.notes)
    if inp.kind == "sample":
        return StagePlan(inp.stage, inp.type, inp.kind, (_sampling(inp, machine), *more), inp.notes)
    if inp.kind != "train":
        raise RecipeError(
            "there is no such kind of stage", where=f"stage.{inp.stage}", got=inp.kind, allowed="train, sample, cpu"
        )
    rate = rates.get(inp.stage)
    if rate is not None:
        speed = compute.measured_speed(inp, machine, rate.tokens_per_s, rate.steps)
    else:
        speed = compute.assumed_speed(inp, machine)
    length, steps = _length(inp)
    cost = compute.money(steps * speed.seconds_per_step, inp.gpus, machine) if steps else None
    sections = [length, _memory(inp, machine), _time(inp, machine, speed, steps, cost, bool(rates) and rate is None)]
    extra = [section for section in (long_context.section(inp, machine), *more) if section is not None]
    seconds = steps * speed.seconds_per_step if steps else None
    dollars = cost.dollars if cost else None
    return StagePlan(inp.stage, inp.type, inp.kind, (*sections, *extra), inp.notes, seconds, dollars, speed.measured)


def _length(inp: PlanInput) -> tuple[Section, int | None]:
    section = Section("Length")
    per_step = compute.tokens_per_step(inp)
    product = f"{inp.gpus} gpus x {inp.per_device_batch} per_device_batch x {inp.grad_acc} grad_acc x {inp.seq_len:,} seq_len"
    section.add("tokens_per_step", "tokens per step", per_step, f"{per_step:,}", "computed", product)
    steps = inp.steps
    if inp.token_target is not None:
        section.add("token_target", "token target", inp.token_target, f"{inp.token_target:,}", "given", "recipe: token_target")
        steps = compute.steps_for(inp.token_target, per_step)
        section.add("steps", "steps", steps, f"{steps:,}", "computed", "token_target / tokens per step, rounded up")
    elif steps is not None:
        section.add("steps", "steps", steps, f"{steps:,}", "given", "recipe: steps")
    if steps is None:
        section.remarks.append("The number of steps follows from the data: no total time or price before the tokens are counted.")
        return section, None
    tokens = compute.tokens_for(steps, per_step)
    section.add("tokens", "tokens", tokens, f"{tokens:,}", "computed", "steps x tokens per step")
    return section, steps


def _memory(inp: PlanInput, machine: Machine) -> Section:
    section = Section("Memory per GPU" if machine.gpus else "Memory")
    found = memory.training_memory(inp, machine)
    for term in found.terms:
        section.add(term.key, term.label, term.bytes, lines.size(term.bytes), term.origin, term.formula)
    limit = 1e9 * machine.memory_gb
    whole, divided = found.replicated(), found.sharded()
    section.add(
        "replicated", "total, state on every GPU", whole, lines.size(whole), "assumed", "sum of the terms (data parallel)"
    )
    if inp.gpus > 1:
        text = f"(weights + gradients + master + optimizer) / {inp.gpus} + one gathered layer + the rest (FSDP, ZeRO-3)"
        section.add("sharded", "total, state divided", divided, lines.size(divided), "assumed", text)
    section.add("available", "available", limit, lines.size(limit), "given", f"machine table: {machine.name}")
    saved = found.activations_checkpointed
    text = "instead of the activations above, if every layer were checkpointed: layer inputs + one layer"
    section.add("activations_checkpointed", "activations, checkpointed", saved, lines.size(saved), "assumed", text)
    section.remarks += _verdict(found, limit, whole, divided, inp.gpus)
    return section


TODAY = (
    "This version keeps the whole state on every GPU (data parallel); dividing it, expert and context parallelism do not exist "
    "yet, so this stage is a plan only."
)


def _verdict(found: memory.Memory, limit: float, whole: float, divided: float, gpus: int) -> list[str]:
    return [*_fits(found, limit, whole, divided, gpus), *([] if whole <= limit else [TODAY])]


def _fits(found: memory.Memory, limit: float, whole: float, divided: float, gpus: int) -> list[str]:
    if whole <= limit:
        return [f"Fits: {lines.size(whole)} of {lines.size(limit)} with the state on every GPU."]
    if gpus > 1 and divided <= limit:
        return [
            f"Does not fit with the state on every GPU; fits with the state divided over {gpus} GPUs ({lines.size(divided)})."
        ]
    needed = found.gpus_needed(limit)
    if needed is None:
        return [
            f"Does not fit: activations, logits and buffers alone take {lines.size(found.other())}. "
            "Shorten seq_len or per_device_batch, use activation checkpointing, or shard the sequence. "
            + _checkpointed(found, limit)
        ]
    return [f"Does not fit. The state divided over GPUs of {lines.size(limit)} would need at least {needed:,} of them."]


def _checkpointed(found: memory.Memory, limit: float) -> str:
    needed = found.gpus_needed(limit, checkpointed=True)
    if needed is None:
        return "Checkpointing alone is not enough."
    return f"With every layer checkpointed, the state divided over at least {needed:,} GPUs of {lines.size(limit)} would fit."


def _time(inp: PlanInput, machine: Machine, speed: Speed, steps: int | None, cost: Money | None, unmeasured: bool) -> Section:
    section = Section("Compute, time and money")
    spec = memory.check_input(inp)
    per_step = compute.tokens_per_step(inp)
    passes = 3 if adapters.of(inp) is None else 2
    formulas = {
        "matmul": f"{passes} x 2 x {lines.parameters(spec.matmul_active())} per token" + ("" if passes == 3 else ", frozen"),
        "adapters": "3 x 2 x adapters' parameters that meet a token",
        "mla": "3 x layers x heads x (qk + v) x seq_len per token (causal half)",
        "attention": "3 x layers x heads x (qk + v) x seq_len per token (causal half)",
        "kda": "3 x layers x (heads (6 d^2 + 3 C d + C^2) + convolutions) per token",
    }
    for term, value in compute.model_flops(inp).items():
        if value:
            number = value * per_step
            section.add(f"flops_{term}", f"model flops per step, {term}", number, lines.flop(number), "computed", formulas[term])
    orthogonalising, sharing = compute.optimizer_flops(inp, machine)
    if orthogonalising:
        text = f"Newton-Schulz per GPU, 5 x (4 m^2 n + 2 m^3) per matrix, {sharing}"
        section.add("flops_optimizer", "optimizer flops per step", orthogonalising, lines.flop(orthogonalising), "computed", text)
    origin: lines.Origin = "measured" if speed.measured else "assumed"
    section.add(
        "tokens_per_s", "tokens per second", speed.tokens_per_s, f"{lines.significant(speed.tokens_per_s)}", origin, speed.formula
    )
    section.add(
        "mfu",
        "model flops / dense peak",
        speed.mfu,
        f"{100 * speed.mfu:.1f} %",
        origin,
        "flops per token x tokens/s / (gpus x peak)",
    )
    seconds = speed.seconds_per_step
    section.add(
        "seconds_per_step", "time per step", seconds, lines.duration(seconds), origin, "tokens per step / tokens per second"
    )
    if steps is None:
        _per_billion(section, inp, machine, seconds * 1e9 / per_step, origin)
    elif cost is not None:
        whole = steps * seconds
        section.add("seconds", "time of the stage", whole, lines.duration(whole), origin, f"{steps:,} steps x time per step")
        if cost.dollars is not None:
            text = f"{cost.machines} x {machine.name} x {cost.hours:,.3g} h x ${machine.dollars_per_hour:g}/h (whole machines)"
            section.add("dollars", "price of the stage", cost.dollars, lines.money(cost.dollars), origin, text)
        else:
            section.remarks.append(f"No price: {machine.name} has no dollars_per_hour in the machine table.")
        if whole > 365.25 * 86400:
            section.remarks.append("More than a year: use more GPUs, fewer tokens or shorter sequences.")
    if unmeasured:
        section.remarks.append("The measured run has no stage of this name; its speed is ASSUMED.")
    return section


def _per_billion(section: Section, inp: PlanInput, machine: Machine, seconds: float, origin: lines.Origin) -> None:
    """Time and price of 10^9 tokens, for stages whose length follows from data that are not counted yet."""
    cost = compute.money(seconds, inp.gpus, machine)
    text = "10^9 tokens / tokens per second"
    section.add("seconds_per_billion", "time per 10^9 tokens", seconds, lines.duration(seconds), origin, text)
    if cost.dollars is not None:
        text = f"{cost.machines} x {machine.name} x {cost.hours:,.3g} h x ${machine.dollars_per_hour:g}/h (whole machines)"
        section.add("dollars_per_billion", "price per 10^9 tokens", cost.dollars, lines.money(cost.dollars), origin, text)


def _sampling(inp: PlanInput, machine: Machine) -> Section:
    spec = memory.check_input(inp)
    section = Section("Sampling, per GPU")
    weights = spec.bytes(inp.precision)
    cache = inp.per_device_batch * inp.seq_len * spec.kv_bytes_per_token(4 if inp.precision == "fp32" else 2)
    state = inp.per_device_batch * (spec.state_bytes() + spec.conv_state_bytes())
    section.add("weights", "weights", weights, lines.size(weights), "computed", f"all parameters as {inp.precision}")
    text = f"{inp.per_device_batch} x {inp.seq_len:,} tokens x cache per token"
    section.add("kv_bytes", "key-value cache", cache, lines.size(cache), "computed", text)
    if state:
        section.add(
            "state_bytes", "KDA state", state, lines.size(state), "computed", "recurrent and convolution state per sequence"
        )
    flops = sum(spec.flops_per_token(inp.seq_len, training=False).values())
    section.add(
        "flops", "flops per token", flops, lines.flop(flops), "computed", f"forward, averaged over {inp.seq_len:,} tokens"
    )
    limit = 1e9 * machine.memory_gb
    section.add("available", "available", limit, lines.size(limit), "given", f"machine table: {machine.name}")
    if weights + cache + state > limit:
        section.remarks.append(
            "Does not fit on one GPU, and the embedded sampler divides no model: serve it elsewhere, and name an endpoint where "
            "the stage takes one."
        )
    return section


def _totals(stages: tuple[StagePlan, ...], machine: Machine) -> Section:
    section = Section("All stages")
    train = [stage for stage in stages if stage.kind == "train"]
    timed = [stage for stage in train if stage.seconds is not None]
    if timed:
        seconds = sum(stage.seconds or 0.0 for stage in timed)
        names = " + ".join(stage.stage for stage in timed)
        origin: lines.Origin = "measured" if all(stage.measured for stage in timed) else "assumed"
        section.add("seconds", "time", seconds, lines.duration(seconds), origin, f"{names}, one after the other")
        if machine.dollars_per_hour is not None:
            dollars = sum(stage.dollars or 0.0 for stage in timed)
            section.add("dollars", "price", dollars, lines.money(dollars), origin, "sum of the stages")
    missing = [stage.stage for stage in stages if stage not in timed]
    if missing:
        section.remarks.append("Not in these totals: " + ", ".join(missing) + ".")
    for stage in timed:
        for line in (line for table in stage.sections for line in table.lines if line.key == "sampling_seconds_least"):
            section.remarks.append(f"Without the sampling of {stage.stage}, which takes at least {line.shown} per step.")
    if machine.dollars_per_hour is None:
        section.remarks.append(f"No price: put dollars_per_hour of {machine.name} into your own machine table.")
    return section
