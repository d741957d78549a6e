"""What an RL stage needs before its first step: tasks, those of moderate difficulty among them, and samples beside the
rollouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from k2lab.core.errors import DataError
from k2lab.core.stage import StageContext

if TYPE_CHECKING:
    from k2lab.gym.task import Task
    from k2lab.rl.feed import PtxStream, Settings
    from k2lab.stages.rl import Rl

JOURNAL = "pass_answers.jsonl"  # what the measurement asked, piece by piece
RATES = "pass_rates.jsonl"  # what came of it, a line per task
BINS = 10


@dataclass
class Measured:
    """Pass rates of the starting model: `rates` {task: share}, `kept` tasks used, `typical` {family: tokens}
    of right responses; `bounds` of the rates that are used. Nothing was measured if `bounds` is None."""

    bounds: tuple[float, float] | None = None
    rates: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)
    typical: dict[str, float] = field(default_factory=dict)

    def histogram(self) -> dict[str, int]:
        """Tasks by pass rate, in tenths; the last bin holds 1."""
        counts, _ = np.histogram(list(self.rates.values()), bins=BINS, range=(0.0, 1.0))
        return {f"{n / BINS:.1f}-{(n + 1) / BINS:.1f}": int(count) for n, count in enumerate(counts)}

    def tell(self, ctx: StageContext) -> None:
        """The funnel of tasks as an event."""
        if self.bounds is not None:
            low, high = self.bounds
            ctx.events.emit(
                "funnel",
                filter=f"pass rate of the starting model within {low:g} and {high:g}",
                seen=len(self.rates),
                kept=self.kept,
                dropped=len(self.rates) - self.kept,
                changed=0,
                examples=self.examples,
            )


def tasks_of(stage: Rl, ctx: StageContext, tokenizer: Any) -> list[Task]:
    """The train tasks of the chosen families and difficulties, each with its budget as `max_tokens` and its family in `meta`.

    Raises DataError if there are none, or if prompt and budget of one do not fit into seq_len tokens (unless such are dropped).
    """
    from k2lab.data.records import is_task
    from k2lab.stages import _asking
    from k2lab.stages._fine_tuning import note_dropped, records_of
    from k2lab.text.chat import render

    records = [record for record in records_of(ctx, "tasks", "train") if is_task(record)]
    families = sorted({str(record.get("domain", "")) for record in records})
    fitting = [record for record in records if _fits(stage, record)]
    if not fitting:
        raise DataError(
            "no task is left",
            where=f"stage.{ctx.name}.tasks",
            got=f"{len(records)} records with an answer; families " + (", ".join(families) or "none"),
            next="Look at domains, min_difficulty and max_difficulty",
        )
    tasks, dropped = [], 0
    for record, task in zip(fitting, _asking.tasks_of(fitting, stage.max_tokens, judged=True), strict=True):
        domain = str(record.get("domain", ""))
        task = replace(task, max_tokens=stage.budget.limit(domain, stage.max_tokens), meta={"domain": domain})
        prompt = render(list(task.messages), tokenizer, add_generation_prompt=True, default_system=stage.default_system).tokens
        if len(prompt) + task.max_tokens > stage.seq_len:
            if stage.over_length == "error":
                raise DataError(
                    f"a prompt of {len(prompt)} tokens and a response of up to {task.max_tokens} do not fit into seq_len = "
                    f"{stage.seq_len}",
                    where=f"stage.{ctx.name}: {task.key}",
                    next="Raise seq_len, lower max_tokens, or set over_length to drop",
                )
            dropped += 1
            continue
        tasks.append(task)
    note_dropped(stage, ctx, dropped, "task")
    if not tasks:
        raise DataError(
            f"no task is left: with {stage.max_tokens} tokens of response all {dropped} exceed seq_len = {stage.seq_len}",
            where=f"stage.{ctx.name}.tasks",
            next="Raise seq_len or lower max_tokens",
        )
    return tasks


def _fits(stage: Rl, record: dict[str, Any]) -> bool:
    if stage.domains and record.get("domain") not in stage.domains:
        return False
    if stage.min_difficulty is None and stage.max_difficulty is None:
        return True
    level = record.get("difficulty")
    if not isinstance(level, (int, float)) or isinstance(level, bool):
        return False
    low, high = stage.min_difficulty, stage.max_difficulty
    return (low is None or level >= low) and (high is None or level <= high)


# ---------------------------------------------------------------- moderate difficulty


def moderate(stage: Rl, ctx: StageContext, tokenizer: Any, tasks: list[Task], rank: int) -> tuple[list[Task], Measured]:
    """The tasks whose pass rate lies within the stage's bounds. Rank 0 measures, and all read what it wrote.

    Raises DataError, with the histogram of pass rates, if none does.
    """
    from k2lab.dist import mesh

    if stage.pass_rates is None and not stage.pass_samples:
        return tasks, Measured(kept=len(tasks))
    if rank == 0 and not (ctx.work / RATES).exists():
        lines = _read(stage, ctx, tasks) if stage.pass_rates is not None else _measure(stage, ctx, tokenizer, tasks)
        _write(ctx, lines)
    mesh.barrier()
    lines = [json.loads(line) for line in (ctx.work / RATES).read_text(encoding="utf-8").splitlines()]
    low, high = stage.pass_rate
    measured = Measured(bounds=(low, high), rates={line["key"]: line["pass_rate"] for line in lines})
    chosen = [task for task in tasks if low <= measured.rates.get(task.key, -1.0) <= high]
    measured.kept = len(chosen)
    left_out = [task for task in tasks if task.key in measured.rates and not low <= measured.rates[task.key] <= high]
    measured.examples = [
        {"text": task.messages[-1].content[:160], "why": f"pass rate {measured.rates[task.key]:g}"} for task in left_out[:3]
    ]
    if stage.budget.toggle is not None:
        lengths: dict[str, list[int]] = {}
        for line in lines:
            lengths.setdefault(line["domain"], []).extend(line["right_lengths"])
        measured.typical = {
            domain: float(np.percentile(each, stage.budget.toggle.percentile)) for domain, each in lengths.items() if each
        }
    if rank == 0:
        ctx.facts["tasks"] = {"measured": len(lines), "used": len(chosen), "pass_rates": measured.histogram()}
    if not chosen:
        shown = ", ".join(f"{span}: {count}" for span, count in measured.histogram().items() if count)
        raise DataError(
            f"none of {len(lines)} tasks has a pass rate within [{low:g}, {high:g}]",
            where=f"stage.{ctx.name}.pass_rate",
            got=f"tasks by pass rate {shown or 'none'}",
            next="Choose easier or harder tasks, a better start, or other bounds",
        )
    return chosen, measured


def _measure(stage: Rl, ctx: StageContext, tokenizer: Any, tasks: list[Task]) -> list[dict[str, Any]]:
    """Asks the starting model; what was asked before a kill is not asked again."""
    from k2lab.core.rng import derive
    from k2lab.core.types import SampleParams
    from k2lab.dist import mesh
    from k2lab.gym.rollouts import roll_out
    from k2lab.sampling.local import LocalSampler
    from k2lab.stages._journal import Journal
    from k2lab.stages._models import load_model

    if stage.pass_tasks and len(tasks) > stage.pass_tasks:
        ranked = sorted(tasks, key=lambda task: derive(ctx.seed, ctx.name, "measured", task.key))
        tasks = ranked[: stage.pass_tasks]
    size = max(1, stage.sample_batch // stage.pass_samples)
    pieces = [tasks[first : first + size] for first in range(0, len(tasks), size)]
    sampler = None
    lines: list[dict[str, Any]] = []
    with Journal(ctx.work / JOURNAL) as journal:
        for number, piece in enumerate(pieces):
            if number >= len(journal.entries):
                if sampler is None:
                    model = load_model(ctx.parent("start").path, device=mesh.pick_device(ctx.device))
                    sampler = LocalSampler(model.hf, tokenizer.pad_id, stage.sample_batch, eos_id=tokenizer.im_end_id)
                groups = roll_out(
                    piece,
                    sampler,
                    tokenizer,
                    k=stage.pass_samples,
                    params=SampleParams(max_tokens=0, temperature=stage.temperature.start, top_p=stage.top_p),
                    seed=ctx.seed,
                    tools=tuple(stage.tools),
                    max_turns=stage.max_turns,
                    default_system=stage.default_system,
                    keys_prefix=f"{ctx.name}/pass/",
                )
                journal.add([_line(task, group) for task, group in zip(piece, groups, strict=True)])
            lines += journal.entries[number]
            ctx.events.emit("progress", done=len(lines), total=len(tasks), unit="tasks measured")
    (ctx.work / JOURNAL).unlink()
    return [line for line in lines if line["samples"]]


def _line(task: Task, group: Any) -> dict[str, Any]:
    judged = [rollout for rollout in group.rollouts if not rollout.error]
    rate = sum(rollout.reward for rollout in judged) / len(judged) if judged else 0.0
    right = [int(np.count_nonzero(rollout.weight)) for rollout in judged if rollout.reward >= 1]
    return {
        "key": task.key,
        "pass_rate": round(rate, 6),
        "samples": len(judged),
        "domain": task.meta["domain"],
        "right_lengths": right,
    }


def _read(stage: Rl, ctx: StageContext, tasks: list[Task]) -> list[dict[str, Any]]:
    """The pass rates that another stage measured, of the tasks that are here."""
    path = ctx.parent("pass_rates").path / RATES
    if not path.is_file():
        raise DataError(
            f"{ctx.parent('pass_rates').path} holds no {RATES}",
            where=f"stage.{ctx.name}.pass_rates",
            allowed="a data set made by a stage of type preference_data",
        )
    known = {task.key for task in tasks}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["key"] in known]


def _write(ctx: StageContext, lines: list[dict[str, Any]]) -> None:
    """All lines at once: the file is there whole or not at all."""
    from k2lab.core.artifacts import disk_errors

    path = ctx.work / RATES
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)


# ---------------------------------------------------------------- the feed's parts


def ptx_stream(stage: Rl, ctx: StageContext, tokenizer: Any) -> PtxStream | None:
    """The samples that are trained beside the rollouts, if the stage names some."""
    from k2lab.data.mixture import epoch_order
    from k2lab.rl.feed import PtxStream
    from k2lab.stages._fine_tuning import conversation, domains_of, records_of, samples_of, weights_of

    if not stage.ptx:
        return None
    samples = samples_of(stage, ctx, records_of(ctx, "ptx", "train"), "ptx", conversation(stage, tokenizer))
    domains, weights = domains_of(samples), weights_of(stage, ctx, samples)

    def order(epoch: int) -> np.ndarray:
        return epoch_order(ctx.seed, f"{ctx.name}/ptx", epoch, domains, weights)

    return PtxStream(samples, order, stage.ptx_tokens)


def settings(stage: Rl, ctx: StageContext, measured: Measured) -> Settings:
    """The feed's settings of a stage."""
    from k2lab.rl.feed import Settings

    return Settings(
        name=ctx.name,
        seed=ctx.seed,
        total_steps=stage.steps,
        group_size=stage.group_size,
        tasks_per_step=stage.tasks_per_step,
        seq_len=stage.seq_len,
        tokens_per_batch=stage.per_device_batch * stage.seq_len,
        temperature=stage.temperature,
        top_p=stage.top_p,
        budget=stage.budget,
        advantages=stage.advantages,
        drop_zero_signal=stage.drop_zero_signal,
        refill_rounds=stage.refill_rounds,
        max_policy_lag=stage.max_policy_lag,
        default_system=stage.default_system,
        tools=tuple(stage.tools),
        max_turns=stage.max_turns,
        sample_batch=stage.sample_batch,
        typical=measured.typical,
    )
