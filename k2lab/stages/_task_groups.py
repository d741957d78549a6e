"""Tasks with decoding settings of their own: what evaluation stages ask, and the metrics that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import Slot, StageContext

if TYPE_CHECKING:
    from k2lab.eval.measured import Metrics
    from k2lab.eval.tasks import TaskRun
    from k2lab.gym.task import Task


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """Tasks that are asked with the same decoding settings."""

    tasks: list[Annotated[Any, Slot("task")]]
    # Samples per task, and how they are drawn; k > 1 needs a temperature.
    k: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    # Most tokens of a response; 0 = what each task says.
    max_tokens: int = 0
    # Also the chance that one of n samples is right, for each of these n (at most k).
    pass_at: list[int] = field(default_factory=tuple)  # type: ignore[assignment]
    # Name the best of k samples, too; never shown unless asked for here.
    best_of_n: bool = False
    # Ask only these of the stage's models; none named = all.
    models: list[str] = field(default_factory=tuple)  # type: ignore[assignment]

    def check(self, where: str) -> None:
        """Raises RecipeError for settings that contradict each other."""
        if self.k < 1 or (self.k > 1 and self.temperature <= 0):
            raise RecipeError("k samples need a temperature above 0, else all are equal", where=f"{where}.k", got=self.k)
        if self.best_of_n and self.k == 1:
            raise RecipeError("best_of_n needs k > 1", where=f"{where}.best_of_n")
        if any(not 1 <= n <= self.k for n in self.pass_at):
            raise RecipeError(
                "pass@n needs at least n samples", where=f"{where}.pass_at", got=list(self.pass_at), allowed=f"1 to k = {self.k}"
            )
        if self.max_tokens < 0:
            allowed = "1 or more, or 0 for what each task says"
            raise RecipeError("must not be negative", where=f"{where}.max_tokens", got=self.max_tokens, allowed=allowed)

    def asks(self, model: str) -> bool:
        """Whether the model of this name (a stage's, or the last part of a directory's path) is asked."""
        return not self.models or model in {Path(name).name for name in self.models}

    def run(self, tasks: Sequence[Task], sampler: Any, tokenizer: Any, *, seed: int, default_system: bool) -> TaskRun:
        """Asks these tasks with the group's settings."""
        from k2lab.eval.tasks import run_tasks

        return run_tasks(
            tasks,
            sampler,
            tokenizer,
            k=self.k,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens or None,
            seed=seed,
            default_system=default_system,
        )


def measure(
    groups: Sequence[TaskGroup],
    records: Sequence[dict[str, Any]],
    sampler: Any,
    tokenizer: Any,
    ctx: StageContext,
    *,
    default_system: bool,
) -> tuple[Metrics, list[dict[str, str]]]:
    """Metrics of all groups, and a few responses for reading. Says how many rollouts could not be judged or served."""
    from k2lab.eval import measured

    metrics: Metrics = {}
    samples: list[dict[str, str]] = []
    for group in groups:
        for item in group.tasks:
            name = type(item).slot_name
            run = group.run(item.tasks(records), sampler, tokenizer, seed=ctx.seed, default_system=default_system)
            measured.merge(metrics, measured.task_metrics(name, run, pass_at=group.pass_at, best_of_n=group.best_of_n))
            samples += run.only(shown(run, 4)).samples(8)
            note_errors(ctx, name, run)
    return metrics, samples


def note_errors(ctx: StageContext, name: str, run: TaskRun) -> None:
    """Says once how many rollouts could not be judged or served, and why the first one could not."""
    errors = run.errors()
    if errors:
        first, _ = errors.most_common(1)[0]
        ctx.events.emit("note", text=f"{name}: {errors.total()} of {len(run.rollouts())} answers could not be judged: {first}")


def shown(run: TaskRun, limit: int) -> list[int]:
    """Places of tasks to show: the first of each family, at most 8, or the first `limit`."""
    families = run.families()
    return [places[0] for places in families.values()][:8] if len(families) > 1 else list(range(min(limit, len(run.tasks))))


def held_out_records(ctx: StageContext, roles: Sequence[str]) -> list[dict[str, Any]]:
    """The held-out records of the data sets in these fields, in order. DataError for two that have the same key."""
    from k2lab.data import shards

    found: dict[str, dict[str, Any]] = {}
    for path in _folders(ctx, roles):
        for record in shards.read_records(path, "valid"):
            if record["key"] in found:
                raise DataError("two records have the same key", where=str(path), got=record["key"])
            found[record["key"]] = record
    return list(found.values())


def disjoint_from_training(ctx: StageContext, roles: Sequence[str], records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many held-out records there are, and how many share a canonical key (`group`) with training records of the data sets in
    `roles`."""
    from k2lab.data import shards
    from k2lab.data.records import group_of

    trained = {group_of(record) for path in _folders(ctx, roles) for record in shards.read_records(path, "train")}
    return {"held_out": len(records), "shared": sum(group_of(record) in trained for record in records)}


def _folders(ctx: StageContext, roles: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for role in roles:
        value = ctx.parents.get(role)
        for item in value if isinstance(value, list) else [value] if value is not None else []:
            if item.path not in found:
                found.append(item.path)
    return found
