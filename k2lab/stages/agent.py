"""Measure what tools are worth: the same tasks with and without them, on the same model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, Slot, Stage, StageContext

if TYPE_CHECKING:
    from k2lab.core.types import PlanInput, Rollout
    from k2lab.eval.measured import Metrics
    from k2lab.eval.tasks import TaskRun

ROLLOUTS = "rollouts.jsonl"
JOURNAL = "journal"  # what a killed stage had done already; removed at the end


@dataclass(frozen=True, kw_only=True)
class Agent(Stage):
    """Tasks with and without tools: plan, call, observe, answer in Kimi's tool-call tokens; what the tools are worth.

    Writes `results.json` (as `evaluate` does: the model without tools is the "before" of the model with them) and
    `rollouts.jsonl`, every conversation with its reward and its use of tools. Without a sandbox it is reported as not run.
    """

    kind: ClassVar[str] = "report"
    version: ClassVar[int] = 1
    optional: ClassVar[bool] = True

    # The model that is measured.
    model: CheckpointRef
    # Data sets whose held-out records tasks are made from.
    data: list[Dataset]
    # Tasks made from these records.
    tasks: list[Annotated[Any, Slot("task")]] = field(default_factory=lambda: (load("task", "answered")(),))  # type: ignore[assignment]
    # What the model may call.
    tools: list[Annotated[Any, Slot("tool")]] = field(default_factory=lambda: (load("tool", "python")(),))  # type: ignore[assignment]
    # Samples per task, and how they are drawn; k > 1 needs a temperature.
    k: int = 1
    temperature: float = 0.0
    # Most tokens that the model may write per task, over all its turns.
    max_tokens: int = 256
    # Most turns (answers of the model) and tool calls per task.
    max_turns: int = 4
    max_tool_calls: int = 8
    # Rollouts that are sampled together. Rounding depends on what is in a batch, so it belongs to the stage's identity.
    batch: int = 256
    # A call that takes longer is given up, whatever the tool's own limit.
    tool_timeout: float = 60.0
    # Put Kimi's default system message before prompts that have none.
    default_system: bool = False
    # Conversations shown in the report; all of them are in rollouts.jsonl.
    shown: int = 4

    def check(self, where: str) -> None:
        if not self.tools or not self.tasks or not self.data:
            empty = next(name for name in ("data", "tasks", "tools") if not getattr(self, name))
            raise RecipeError("name at least one", where=f"{where}.{empty}")
        if self.k < 1 or (self.k > 1 and self.temperature <= 0):
            raise RecipeError("k samples need a temperature above 0, else all are equal", where=f"{where}.k", got=self.k)
        for name, least in (("max_tokens", 1), ("max_turns", 2), ("max_tool_calls", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"must be at least {least}", where=f"{where}.{name}", got=getattr(self, name))
        if not self.tool_timeout > 0:
            raise RecipeError("must be positive", where=f"{where}.tool_timeout", got=self.tool_timeout)

    def provision(self) -> str:
        """What the tools run in, in one line. Raises SandboxError if there is nothing."""
        return "; ".join(f"{type(tool).slot_name}: {tool.describe()}" for tool in self.tools if hasattr(tool, "describe"))

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        from k2lab.core.types import PlanInput

        notes = ("each task is done twice, with and without tools; the number of tasks follows from the data",)
        return PlanInput(
            stage=name,
            type=self.slot_name,
            kind="sample" if model is not None else "cpu",
            model=model,
            seq_len=512 + self.max_tokens,
            per_device_batch=self.batch,
            gpus=gpus,
            notes=(*notes, "the window is taken as 512 tokens of prompt and results, and the answer"),
        )

    def run(self, ctx: StageContext) -> None:
        from k2lab.dist import mesh
        from k2lab.eval import measured
        from k2lab.eval.results import Results
        from k2lab.sampling.local import LocalSampler
        from k2lab.stages import _task_groups
        from k2lab.stages._models import load_model
        from k2lab.text import tokenizer as text_tokenizer

        parent = ctx.parent("model")
        ctx.events.emit("note", text=f"tools run in {self.provision()}")
        model = load_model(parent.path, device=mesh.pick_device(ctx.device))
        tokenizer = text_tokenizer.load(parent.path)
        sampler = LocalSampler(model.hf, tokenizer.pad_id, eos_id=tokenizer.im_end_id)
        records = _task_groups.held_out_records(ctx, ("data",))
        jobs = [(type(item).slot_name, item.tasks(records)) for item in self.tasks]
        names = {False: f"{parent.name} without tools", True: f"{parent.name} with tools"}
        metrics: dict[bool, Metrics] = {False: {}, True: {}}
        results = Results()
        results.add_model(names[False], stage=None, label=f"{parent.name}, without tools")
        results.add_model(names[True], stage=ctx.name, label=f"{parent.name}, with tools")
        total = 2 * self.k * sum(len(tasks) for _, tasks in jobs)
        done = 0
        runs: list[TaskRun] = []
        with (ctx.work / ROLLOUTS).open("w", encoding="utf-8") as file:
            for name, tasks in jobs:
                for with_tools in (False, True):
                    run = self._run(ctx, tasks, with_tools, sampler, tokenizer, done, total)
                    done += self.k * len(tasks)
                    measured.merge(metrics[with_tools], measured.task_metrics(name, run))
                    results.add_samples(names[with_tools], _transcripts(run, _task_groups.shown(run, self.shown), tokenizer))
                    _task_groups.note_errors(ctx, f"{name}, {'with' if with_tools else 'without'} tools", run)
                    for rollout in run.rollouts():
                        file.write(json.dumps(_row(rollout, with_tools, tokenizer)) + "\n")
                    if with_tools:
                        measured.merge(metrics[True], use_of_tools(name, run))
                        runs.append(run)
        for with_tools, name in names.items():
            measured.add(results, name, metrics[with_tools])
        measured.add_step(results, (names[False], metrics[False]), (names[True], metrics[True]))
        results.write(ctx.work / "results.json")
        ctx.facts["tool_use"] = _counts(runs)
        ctx.facts["disjoint"] = _task_groups.disjoint_from_training(ctx, ("data",), records)
        ctx.events.emit("note", text=_said(ctx.facts["tool_use"]))
        for path in ctx.work.glob(f"{JOURNAL}-*.jsonl"):
            path.unlink()

    def _run(
        self, ctx: StageContext, tasks: Sequence[Any], with_tools: bool, sampler: Any, tokenizer: Any, done: int, total: int
    ) -> TaskRun:
        from k2lab.eval.tasks import run_tasks
        from k2lab.stages._journal import Journal

        if not with_tools:
            tasks = [replace(task, tools=(), max_turns=1) for task in tasks]
        with Journal(ctx.work / f"{JOURNAL}-{done}.jsonl") as journal:
            return run_tasks(
                tasks,
                sampler,
                tokenizer,
                k=self.k,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=ctx.seed,
                tools=self.tools if with_tools else (),
                max_turns=self.max_turns if with_tools else 1,
                max_tool_calls=self.max_tool_calls,
                tool_timeout=self.tool_timeout,
                default_system=self.default_system,
                progress=lambda ended, _: ctx.events.emit("progress", done=done + ended, total=total, unit="rollouts"),
                batch=self.batch,
                journal=journal,
            )

    @staticmethod
    def examples() -> list[Agent]:
        return [Agent(model="rl", data=("tasks",))]  # type: ignore[arg-type]


def use_of_tools(name: str, run: TaskRun) -> Metrics:
    """Share of answers that used a tool, and (if any did) share of its calls that did not succeed."""
    import numpy as np

    from k2lab.eval import stats
    from k2lab.eval.measured import Measured, share

    results_PK, errors_PK = run.usage_PK("tool_results"), run.usage_PK("tool_errors")
    used_PK = (results_PK > 0).astype(float)
    metrics = {f"{name}/tool_used": share(run, used_PK.mean(1), stats.avg_at_k(used_PK))}
    called = np.flatnonzero(results_PK.sum(1))
    if len(called):
        top, bottom = errors_PK.sum(1)[called], results_PK.sum(1)[called]
        failed = stats.ratio(top, bottom, 0, "tool_failed")
        metrics[f"{name}/tool_failed"] = Measured(failed, "fraction", "lower", run.settings, top, bottom)
    return metrics


def _transcripts(run: TaskRun, places: Sequence[int], tokenizer: Any) -> list[dict[str, str]]:
    """Whole conversations behind the prompt, for reading."""
    return [
        {
            "prompt": run.tasks[place].messages[-1].content,
            "completion": _behind_prompt(run.groups[place].rollouts[0], tokenizer),
            "stop": run.groups[place].rollouts[0].stop.value,
        }
        for place in places
    ]


def _behind_prompt(rollout: Rollout, tokenizer: Any) -> str:
    tokens = rollout.tokens[rollout.usage["prompt"] :].tolist()
    known = [token for token in tokens if 0 <= token < tokenizer.vocab_size]
    return tokenizer.decode(known)


def _row(rollout: Rollout, with_tools: bool, tokenizer: Any) -> dict[str, Any]:
    return {
        "task": rollout.task,
        "index": rollout.index,
        "tools": with_tools,
        "reward": rollout.reward,
        "rewards": rollout.rewards,
        "stop": rollout.stop.value,
        "error": rollout.error,
        "usage": rollout.usage,
        "text": _behind_prompt(rollout, tokenizer),
    }


def _counts(runs: Sequence[TaskRun]) -> dict[str, float]:
    """Use of tools over all rollouts that had them."""
    rollouts = [rollout for run in runs for rollout in run.rollouts()]
    names = ("turns", "tool_calls", "tool_results", "tool_errors", "prompt", "response", "context")
    counts: dict[str, float] = {name: sum(rollout.usage[name] for rollout in rollouts) for name in names}
    counts |= {"rollouts": len(rollouts), "rollouts_with_calls": sum(r.usage["tool_results"] > 0 for r in rollouts)}
    return counts | {f"{name}_s": round(sum(r.timings[name] for r in rollouts), 3) for name in ("sample", "tools")}


def _said(counts: dict[str, float]) -> str:
    calls = counts["tool_results"]
    text = f"tools were used in {counts['rollouts_with_calls']:.0f} of {counts['rollouts']:.0f} answers, {calls:.0f} calls in all"
    if not calls:
        return text
    return f"{text}, {counts['tool_errors']:.0f} of them failed; {1000 * counts['tools_s'] / calls:.0f} ms per call"
