"""What a stage needs beside the model that it trains: reference and teacher models, rollouts, stored log-probabilities.

Sizes follow the stage's own table (plain data, as the recipe gives it) and the formats on disk: reference log-probabilities are
fp32 per token; a teacher's top-k is an int32 id and an fp16 or fp32 log-probability per entry.

Legend: `K` most probable tokens kept, `k` samples per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from k2lab.core.types import PlanInput
from k2lab.plan import lines
from k2lab.plan.lines import Section
from k2lab.plan.machines import Machine
from k2lab.specs import ModelSpec

ID_BYTES = 4  # a token id on disk
TOP_BYTES = {"fp16": 2, "fp32": 4}
STREAM_BYTES = 12  # one of K entries in a batch: i64 id and fp32 log-probability
LOGPROB_BYTES = 4
RL_STREAM_BYTES = 12  # per token of a rollout: log-probability, advantage and PTX mark, fp32 each

Table = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What a plan knows of the recipe beside `PlanInput`s: the stages' tables by name, and by stage the models that its fields
    name (`{"dpo": {"reference": spec}}`; a list field's models as `models[0]`, ...)."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    roles: Mapping[str, Mapping[str, ModelSpec]] = field(default_factory=dict)

    def table(self, stage: str) -> Table:
        """The table of a stage; empty if it is not known."""
        return self.tables.get(stage, {})


def sections(inp: PlanInput, recipe: Recipe, machine: Machine) -> list[Section]:
    """Tables of what this kind of stage needs beside its training; none for kinds that need nothing."""
    make = _MAKERS.get(inp.type)
    return [make(inp, recipe, machine)] if make is not None and inp.stage in recipe.tables else []


def weights_line(section: Section, key: str, label: str, spec: ModelSpec, precision: str, text: str) -> float:
    """Adds the bytes of a model's weights; their number."""
    number = spec.bytes(precision)
    section.add(key, label, number, lines.size(number), "computed", f"{spec.name} as {precision}; {text}")
    return number


def decode_seconds(spec: ModelSpec, precision: str, positions: float, machine: Machine) -> float:
    """The least time that `positions` decoding steps of a full batch take on one device: each reads all weights once."""
    return positions * spec.bytes(precision) / (1e9 * machine.memory_gb_per_s)


def _dpo(inp: PlanInput, recipe: Recipe, machine: Machine) -> Section:
    roles = recipe.roles.get(inp.stage, {})
    section = Section("Reference model and its log-probabilities")
    spec = roles.get("reference", inp.model)
    same = "reference" not in roles
    what = "the policy's own start" if same else "the model named as reference"
    weights = weights_line(
        section, "reference_weights", "reference weights", spec, inp.precision, f"{what}; freed before training"
    )
    per_step = inp.gpus * inp.per_device_batch * inp.grad_acc * inp.seq_len
    section.add(
        "pairs_per_step",
        "pairs per step, at least",
        inp.gpus * inp.per_device_batch * inp.grad_acc,
        f"{inp.gpus * inp.per_device_batch * inp.grad_acc:,}",
        "computed",
        "both sides of a pair lie in one row; short pairs share rows",
    )
    stored = LOGPROB_BYTES * per_step
    section.add(
        "reference_bytes_per_step",
        "reference log-probabilities per step",
        stored,
        lines.size(stored),
        "computed",
        f"{LOGPROB_BYTES} B x {per_step:,} tokens, computed once, kept as a stream",
    )
    forward = sum(spec.flops_per_token(inp.seq_len, training=False).values())
    rate = machine.peak(inp.precision) * machine.assumed_mfu * inp.gpus
    seconds = forward * per_step / rate
    section.add(
        "reference_seconds_per_step",
        "reference pass for the tokens of a step",
        seconds,
        lines.duration(seconds),
        "assumed",
        f"one forward pass at {100 * machine.assumed_mfu:g} % of the peak; once per epoch's worth of data, not per epoch",
    )
    if weights > 1e9 * machine.memory_gb:
        section.remarks.append(
            f"The reference ({lines.size(weights)}) does not fit on one GPU, and this version does not divide it."
        )
    return section


def _asking(inp: PlanInput, recipe: Recipe, machine: Machine) -> Section:
    table = recipe.table(inp.stage)
    section = Section("Answers to be sampled and stored")
    k, longest, limit = int(table["k"]), int(table["max_tokens"]), int(table["limit"])
    per_prompt = k * longest
    section.add(
        "tokens_per_prompt",
        "tokens per prompt, at most",
        per_prompt,
        f"{per_prompt:,}",
        "computed",
        f"k = {k} x {longest:,} tokens",
    )
    kept = int(table.get("top_k", 0))
    if kept:
        each = kept * (ID_BYTES + TOP_BYTES[table["top_precision"]])
        text = f"K = {kept} x ({ID_BYTES} B id + {TOP_BYTES[table['top_precision']]} B log-probability)"
        section.add("top_k_bytes_per_token", "stored top-k per token", each, f"{each:,} B", "computed", text)
    if not limit:
        section.remarks.append("The number of prompts follows from the data: set `limit` to bound it.")
    else:
        tokens = limit * per_prompt
        section.add("tokens", "tokens in all, at most", tokens, f"{tokens:,}", "computed", f"{limit:,} prompts x the above")
        if kept:
            section.add(
                "top_k_bytes", "stored top-k, at most", tokens * each, lines.size(tokens * each), "computed", "tokens x the above"
            )
        if inp.kind == "sample" and isinstance(inp.model, ModelSpec) and machine.memory_gb_per_s:
            batches = -(-limit * k // inp.per_device_batch)
            seconds = decode_seconds(inp.model, inp.precision, batches * longest, machine)
            text = f"{batches:,} batches x {longest:,} positions x weights / memory bandwidth; one device"
            section.add("seconds_least", "time, at least", seconds, lines.duration(seconds), "assumed", text)
    if table.get("endpoint"):
        section.remarks.append("An endpoint answers: its memory, time and price are not in this plan.")
    return section


def _rl(inp: PlanInput, recipe: Recipe, machine: Machine) -> Section:
    section = Section("Rollouts")
    table = recipe.table(inp.stage)
    tasks, group, longest = (int(table[name]) for name in ("tasks_per_step", "group_size", "max_tokens"))
    rollouts = tasks * group
    section.add(
        "rollouts_per_step", "rollouts per step", rollouts, f"{rollouts:,}", "computed", f"{tasks} tasks x {group} responses each"
    )
    drawn = rollouts * longest
    text = f"rollouts x {longest:,} tokens; prompts come on top"
    section.add("tokens_drawn", "tokens drawn per step, at most", drawn, f"{drawn:,}", "computed", text)
    kept = RL_STREAM_BYTES * rollouts * inp.seq_len
    text = f"{RL_STREAM_BYTES} B (fp32 log-probability, advantage, PTX mark) x rollouts x {inp.seq_len:,} tokens"
    section.add("rollout_stream_bytes", "streams of a step, at most", kept, lines.size(kept), "computed", text)
    section.add("sampler_weights", "sampler's weights", 0, "0 B", "computed", "it computes with the trainer's own tensors")
    spec = inp.model
    assert isinstance(spec, ModelSpec)
    own = -(-rollouts // inp.gpus)
    at_once = min(int(table["sample_batch"]), own)
    cache = at_once * inp.seq_len * spec.kv_bytes_per_token(4 if inp.precision == "fp32" else 2)
    cache += at_once * (spec.state_bytes() + spec.conv_state_bytes())
    text = f"{at_once} responses at a time x {inp.seq_len:,} tokens, per GPU; freed before the update"
    section.add("sampler_cache", "cache while sampling", cache, lines.size(cache), "computed", text)
    if machine.memory_gb_per_s:
        positions = -(-own // at_once) * longest
        seconds = decode_seconds(spec, inp.precision, positions, machine)
        text = f"{positions:,} decoding positions x weights / memory bandwidth, per GPU; not in the time of the stage"
        section.add("sampling_seconds_least", "sampling, per step, at least", seconds, lines.duration(seconds), "assumed", text)
    asked = int(table["pass_tasks"]) * int(table["pass_samples"]) * longest
    if asked:
        text = f"{table['pass_tasks']} tasks x {table['pass_samples']} samples x {longest:,} tokens, before the first step"
        section.add("tokens_measured", "tokens drawn to measure pass rates, at most", asked, f"{asked:,}", "computed", text)
    section.remarks.append("No reference model is held: log-probabilities of the old policy are stored as they are drawn.")
    if 1e9 * machine.memory_gb < spec.bytes(inp.precision):
        section.remarks.append(
            "The embedded sampler needs the whole model on every GPU; a served one does not exist for this stage."
        )
    return section


def _distill(inp: PlanInput, recipe: Recipe, machine: Machine) -> Section:
    table = recipe.table(inp.stage)
    section = Section("What the student is taught by")
    section.add("teacher_bytes", "teacher in memory", 0, "0 B", "computed", "its answers and log-probabilities come from disk")
    if not table.get("kl_weight"):
        section.remarks.append(
            "Cross-entropy on the teacher's answers only (kl_weight = 0). KL compares probabilities token by token and needs one "
            "vocabulary; across tokenizers it does not exist in this version."
        )
        return section
    kept = int(recipe.table(str(table.get("data"))).get("top_k", 0))
    if not kept:
        section.remarks.append("How many of the teacher's tokens are stored (K) is not in this recipe: no size of its rows.")
        return section
    rows = inp.per_device_batch * inp.seq_len
    number = STREAM_BYTES * kept * rows
    text = f"{STREAM_BYTES} B (i64 id, fp32 log-probability) x K = {kept} x {rows:,} tokens"
    section.add("teacher_stream_bytes", "teacher's rows of a micro-batch", number, lines.size(number), "computed", text)
    return section


def _measuring(inp: PlanInput, recipe: Recipe, machine: Machine) -> Section:
    section = Section("Models that are measured, one after the other")
    for name, spec in recipe.roles.get(inp.stage, {}).items():
        weights_line(section, f"weights_{name}", name, spec, inp.precision, "loaded whole on one device")
    return section


_MAKERS: dict[str, Callable[[PlanInput, Recipe, Machine], Section]] = {
    "dpo": _dpo,
    "rl": _rl,
    "preference_data": _asking,
    "teacher_data": _asking,
    "distill": _distill,
    "evaluate": _measuring,
}
