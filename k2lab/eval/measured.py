"""Measurements with the per-item values that paired changes need, and the metrics of a task run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from k2lab.eval import stats
from k2lab.eval.results import Results
from k2lab.eval.tasks import ENDS, NO_OTHER_SPECIAL, NON_EMPTY, TaskRun

SHAPES = {ENDS: "eos_rate", NON_EMPTY: "non_empty", NO_OTHER_SPECIAL: "no_other_special"}


@dataclass(frozen=True)
class Measured:
    """One metric of one model: its estimate, how to read it, and its per-item values (`bottom` None: a mean of `top`; else a
    ratio of sums). `key` says on which items; two measurements are paired only if their keys are equal."""

    estimate: stats.Estimate
    unit: str
    better: Literal["lower", "higher"]
    settings: str
    top: Any
    bottom: Any = None
    key: tuple[str, ...] = ()

    def change_from(self, old: Measured | None) -> stats.Change | None:
        """The paired change since `old`, or None where the two were not measured on the same items."""
        if old is None or len(old.top) != len(self.top) or old.key != self.key:
            return None
        if self.bottom is None:
            return stats.paired_change(old.top, self.top)
        if (old.bottom != self.bottom).any():  # another tokenizer: counts of tokens differ
            return None
        return stats.paired_ratio_change(old.top, self.top, self.bottom, 0, "change")


Metrics = dict[str, Measured]


def add(results: Results, model: str, metrics: Mapping[str, Measured]) -> None:
    """The metrics of one model, into the results."""
    for name, item in metrics.items():
        results.add_metric(model, name, item.estimate, unit=item.unit, better=item.better, settings=item.settings)


def add_step(results: Results, before: tuple[str, Metrics], after: tuple[str, Metrics]) -> None:
    """`after` came from `before` (each a model's name and its metrics): the link, and the paired change of common metrics."""
    results.add_step(before[0], after[0])
    for name, item in after[1].items():
        change = item.change_from(before[1].get(name))
        if change is not None:
            results.add_change(before[0], after[0], name, change)


def task_metrics(name: str, run: TaskRun, *, pass_at: Sequence[int] = (), best_of_n: bool = False) -> Metrics:
    """`<name>/avg@k`, `<name>/pass@n` for each n of `pass_at`, and the shape of responses.

    Where the tasks are of several families (`meta.domain`), `<family>/avg@k` and `<family>/pass@n`, too; where all are of one,
    the family's name stands in place of `name`.
    """
    families = run.families()
    if len(families) == 1 and sum(map(len, families.values())) == len(run.tasks):
        name, families = next(iter(families)), {}
    metrics = _scores(name, run, pass_at)
    if best_of_n:
        best = stats.best_of_n(run.scores_PK)
        metrics[f"{name}/best of {run.k}"] = share(run, run.scores_PK.max(1), best)
    for shape, table_PK in run.shape_PK.items():
        metrics[f"{name}/{SHAPES[shape]}"] = share(run, table_PK.mean(1), stats.avg_at_k(table_PK))
    for family, places in families.items():
        metrics |= _scores(family, run.only(places), pass_at)
    return metrics


def _scores(name: str, run: TaskRun, pass_at: Sequence[int]) -> Metrics:
    metrics = {f"{name}/avg@{run.k}": share(run, run.scores_PK.mean(1), run.avg_at_k())}
    for n in pass_at:
        metrics[f"{name}/pass@{n}"] = share(run, stats.passes(run.scores_PK, n), stats.pass_at_k(run.scores_PK, n))
    return metrics


def share(run: TaskRun, values_P: np.ndarray, estimate: stats.Estimate) -> Measured:
    """A fraction measured on the items of `run`, better if higher."""
    return Measured(estimate, "fraction", "higher", run.settings, values_P, key=tuple(task.key for task in run.tasks))


def merge(into: Metrics, more: Metrics) -> None:
    """Adds `more` to `into`; a metric that is there already, measured with other settings, gets these into its name."""
    for name, item in more.items():
        if name in into:
            old, new = into[name].settings.split(", "), item.settings.split(", ")
            own = [part for part in new if part not in old]
            name = f"{name} ({', '.join(own) or len(into)})"
        into[name] = item
