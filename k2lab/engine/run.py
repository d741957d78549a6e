"""One training run: which steps, where to resume, what to check, record and do after each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab.ckpt import step as checkpoints
from k2lab.core.artifacts import write_json
from k2lab.core.errors import CheckpointError, NumericsError
from k2lab.core.events import EventWriter
from k2lab.core.memory import rss_mb
from k2lab.core.types import Batch
from k2lab.dist import mesh
from k2lab.engine.step import StepMetrics, coefficient, forward_backward, forward_sums, means


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stops when validation has not improved by `min_delta` for `patience` validations, and restores the best weights."""

    patience: int = 3
    min_delta: float = 0.0


@dataclass
class TrainRun:
    """State of one training run that is not model, optimizer or feed.

    `work` is the stage's unfinished directory; checkpoints live in `work/checkpoints`. `valid` gives this rank's validation
    batches. `bias_rate` is the router bias rate (0 = off), `bias_rule` one of `models.router.RULES` (quantile: after
    `track_quantiles`). `flops_per_token` and `peak_flops` (per device; 0 = unknown) are for
    the TFLOP/s and MFU columns.
    """

    work: Path
    events: EventWriter
    total_steps: int
    microbatches: int
    max_grad_norm: float | None = 1.0
    rank: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    valid: Sequence[Batch] = ()
    valid_every: int = 0
    early_stop: EarlyStop | None = None
    bias_rate: float = 0.0
    bias_rule: str = "sign"
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    forward_backward: Callable[..., tuple[dict[str, float], StepMetrics]] = forward_backward
    after_step: list[Callable[..., None]] = field(default_factory=list)
    objective: Any = None
    facts: Callable[[], dict[str, float]] | None = None  # of a feed: what the step's event says about its rollouts
    best: float = math.inf
    best_step: int = 0
    bad: int = 0
    done: int = 0
    stopped: str = ""
    history: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.work / "checkpoints"
        self._began = self._mark = time.perf_counter()
        self._done_at_start = 0
        self.after_step = [self._balance_experts, self._validate, self._checkpoint, *self.after_step]

    # ------------------------------------------------------------ resume

    def resume(self, model: Any, optim: Any, feed: Any) -> int:
        """Restores the newest checkpoint of this stage, if there is one; the number of steps already done."""
        if self.rank == 0:
            checkpoints.discard_unfinished(self.folder)
        mesh.barrier()
        found = checkpoints.steps(self.folder)
        if found:
            weights, moments, state = checkpoints.load(self.folder, found[-1])
            model.load_state(weights)
            optim.load_state_tensors(moments)
            if state["table_hash"] != optim.table_hash():
                raise CheckpointError(
                    "the parameter -> optimizer table differs from the one this stage began with",
                    where=str(self.folder),
                    got=optim.table_hash(),
                    allowed=state["table_hash"],
                    next="Continue with the code version that began it, or start the stage afresh under another name",
                )
            feed.seek(state["cursor"])
            self.done, self.best, self.best_step, self.bad = state["step"], float(state["best"]), state["best_step"], state["bad"]
            self.stopped, self.history = state["stopped"], state["history"]
        self._done_at_start = self.done
        return self.done

    def steps(self) -> Iterator[int]:
        """Steps still to do, from 0; ends early when a stop was decided."""
        self._began = self._mark = time.perf_counter()
        while self.done < self.total_steps and not self.stopped:
            yield self.done

    # ------------------------------------------------------------ inside a step

    def global_counts(self, objective: Any, micro: Sequence[Batch]) -> dict[str, float]:
        """Counts per loss term over all ranks and micro-batches."""
        self.objective = objective
        totals: dict[str, float] = {}
        for batch in micro:
            for name, count in objective.counts(batch).items():
                totals[name] = totals.get(name, 0) + count
        return mesh.sum_values(totals)

    def require_finite(self, sums: dict[str, float], norm: float, step: int, micro: Sequence[Batch]) -> None:
        """NumericsError on every rank if a trained term or the gradient norm is not finite; nothing has moved yet.

        A metric that is not finite (an importance ratio that overflows, say) stops nothing: it is recorded as it is.
        """
        bad = [name for name, value in sums.items() if coefficient(self.objective, name) and not math.isfinite(value)]
        if not math.isfinite(norm):
            bad.append("gradient norm")
        if mesh.agree(bool(bad)):
            keys = [key for batch in micro for key in batch.keys]
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise NumericsError(
                f"{' and '.join(bad) or 'a value on another rank'} is not finite; the optimizer has not moved",
                where=f"{self.events.stage}, step {step + 1}",
                got=f"batch keys {shown}",
                next="Look at these records, or lower optim.lr; the same command continues from the last checkpoint",
            )

    def record(
        self,
        step: int,
        norm: float,
        info: Any,
        sums: dict[str, float],
        counts: dict[str, float],
        metrics: StepMetrics,
        micro: Sequence[Batch],
    ) -> None:
        """One `step` event."""
        self.done = step + 1
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        losses, others = means(self.objective, sums, counts)
        sizes = {"positions": sum(len(batch.tokens_T) for batch in micro), "trained": sum(batch.num_tokens for batch in micro)}
        sizes = mesh.sum_values(sizes)
        positions = sizes["positions"]
        left = (now - self._began) / max(1, self.done - self._done_at_start) * (self.total_steps - self.done)
        load = {name: (count / count.sum().clamp(min=1)).tolist() for name, count in metrics.expert_counts.items()}
        fields: dict[str, Any] = {
            "total": self.total_steps,
            "losses": {name: _digits(value) for name, value in losses.items()},
            "lr": info.lr,
            "grad_norm": _digits(norm),
            "tokens": int(sizes["trained"]),
            "tokens_per_s": round(positions / seconds, 1),
            "seconds": round(seconds, 4),
            "rss_mb": rss_mb(),
            "eta_s": round(left, 1),
        }
        if others:
            fields["metrics"] = {name: _digits(value) for name, value in others.items()}
        if self.facts is not None:
            fields["rollout"] = self.facts()
        if metrics.max_logits:
            fields["max_logits"] = {
                str(layer): [_digits(x) for x in values.tolist()] for layer, values in metrics.max_logits.items()
            }
        if info.clipped:
            fields["clipped"] = {str(layer): list(heads) for layer, heads in info.clipped.items()}
        if load:
            fields["expert_load"] = {name: [round(x, 5) for x in shares] for name, shares in load.items()}
        if self.flops_per_token:
            rate = positions / seconds * self.flops_per_token / mesh.world()
            fields["tflops"] = round(rate / 1e12, 4)
            if self.peak_flops:
                fields["mfu"] = round(rate / self.peak_flops, 4)
        self.events.emit("step", step=self.done, **fields)

    # ------------------------------------------------------------ after a step

    def _balance_experts(self, step: int, model: Any, optim: Any, feed: Any, metrics: StepMetrics) -> None:
        if not self.bias_rate or not metrics.expert_counts:
            return
        from k2lab.models.router import needed_biases, update_router_bias

        seen = metrics.expert_counts
        if self.bias_rule == "quantile":
            seen = needed_biases(model)
            mesh.reduce_tensors(seen, "sum")
        update_router_bias(model, seen, rate=self.bias_rate, rule=self.bias_rule)

    def _validate(self, step: int, model: Any, optim: Any, feed: Any, metrics: StepMetrics) -> None:
        due = self.valid_every and (self.done % self.valid_every == 0 or self.done == self.total_steps)
        if not due or not mesh.agree(len(self.valid) > 0):
            return
        sums, counts = forward_sums(model, self.objective, self.valid)
        losses, others = means(self.objective, sums, counts)
        found = {f"valid/{name}": mean for name, mean in losses.items()}
        found.update({f"held_out/{name}": number for name, number in others.items()})
        self.events.emit("valid", step=self.done, metrics=found, epoch=round(feed.epoch, 3))
        value = sum(coefficient(self.objective, name) * mean for name, mean in losses.items())
        self.history = {"last_valid": {name: number for name, number in found.items() if math.isfinite(number)}}
        if self.early_stop is None:
            self._mark = time.perf_counter()
            return
        if value < self.best - self.early_stop.min_delta:
            self.best, self.best_step, self.bad = value, self.done, 0
            if self.rank == 0:
                checkpoints.save(self.work / "best", self.done, model.state(), {}, {"loss": value}, keep=1)
        else:
            self.bad += 1
            if self.bad >= self.early_stop.patience:
                self.stopped = f"validation loss has not improved for {self.bad} validations; best was step {self.best_step}"
                self.events.emit("note", text=f"stopped early at step {self.done}: {self.stopped}")
        self._mark = time.perf_counter()

    def _checkpoint(self, step: int, model: Any, optim: Any, feed: Any, metrics: StepMetrics) -> None:
        due = self.done % self.checkpoint_every == 0 or self.done == self.total_steps or self.stopped
        if due and self.rank == 0:
            state = {
                "cursor": feed.cursor(),
                "table_hash": optim.table_hash(),
                "best": str(self.best),
                "best_step": self.best_step,
                "bad": self.bad,
                "stopped": self.stopped,
                "history": self.history,
            }
            checkpoints.save(self.folder, self.done, model.state(), optim.state_tensors(), state, keep=self.keep)
        self._mark = time.perf_counter()

    def finish(self, model: Any) -> dict[str, Any]:
        """Restores the best weights if early stopping kept some; what the manifest should say about this run."""
        if self.early_stop is not None and self.best_step and self.best_step != self.done:
            found = checkpoints.steps(self.work / "best")
            # A kill between a best save and the next step checkpoint leaves a newer "best" than the run knows of.
            if self.best_step not in found:
                raise CheckpointError(f"best weights of step {self.best_step} are not in {self.work / 'best'}")
            weights, _, _ = checkpoints.load(self.work / "best", self.best_step)
            model.load_state(weights)
        facts = {"steps": self.done, "best_step": self.best_step, "stopped": self.stopped, **self.history}
        if self.rank == 0:
            write_json(self.work / "training.json", facts)
        return facts


def _digits(value: float) -> float:
    return float(f"{value:.7g}")
