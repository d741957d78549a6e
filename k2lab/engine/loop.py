"""The loop. Pretraining, fine-tuning and everything after them differ only in `feed` and `objective`."""

from __future__ import annotations

from typing import Any

from k2lab.core.types import Feed
from k2lab.engine.run import TrainRun


def train(model: Any, optim: Any, feed: Feed, objective: Any, run: TrainRun) -> None:
    """Trains until `run` says that it is over; a killed run continues here as if it had never stopped."""
    for step in run.steps():  # knows where to resume and when to stop
        micro = feed.take(run.microbatches)  # host batches of this rank; the cursor moves past all ranks' rows
        counts = run.global_counts(objective, micro)  # per term, over ranks, before any backward
        sums, metrics = run.forward_backward(model, objective, micro, counts)  # the only backward
        norm = optim.clip(run.max_grad_norm)
        run.require_finite(sums, norm, step, micro)  # before the optimizer moves
        info = optim.step(step, run.total_steps, metrics.max_logits)  # update, then QK-Clip
        optim.zero_grad()
        run.record(step, norm, info, sums, counts, metrics, micro)  # one event
        for act in run.after_step:  # router bias, validation, checkpoint: fixed order
            act(step, model, optim, feed, metrics)
