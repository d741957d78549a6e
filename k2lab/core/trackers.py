"""Trackers as readers of events: TensorBoard and Weights & Biases. Off unless the user asks through the environment.

`K2_TENSORBOARD=1` writes `<run>/tensorboard/` (extra `k2lab[tensorboard]`); `K2_WANDB=project` logs to that project (extra
`k2lab[wandb]`; its own environment variables, such as WANDB_MODE=offline, apply). Neither changes what is computed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k2lab.core.errors import MachineError

Listener = Callable[[dict[str, Any]], None]


def from_environment(run_dir: Path) -> list[Listener]:
    """The trackers that the environment asks for."""
    found: list[Listener] = []
    if os.environ.get("K2_TENSORBOARD"):
        found.append(tensorboard(run_dir))
    if os.environ.get("K2_WANDB"):
        found.append(wandb(run_dir, os.environ["K2_WANDB"]))
    return found


def scalars(event: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every plain number worth a curve in one event."""
    stage = event["stage"]
    if event["kind"] == "step":
        for name, value in event["losses"].items():
            if isinstance(value, float):
                yield f"{stage}/loss/{name}", value
        for name, value in event.get("metrics", {}).items():
            yield f"{stage}/{name}", float(value)
        for name, value in event.get("rollout", {}).items():
            yield f"{stage}/rollout/{name}", float(value)
        for name in ("lr", "grad_norm", "tokens_per_s", "rss_mb", "mfu", "tflops"):
            if isinstance(event.get(name), (int, float)):
                yield f"{stage}/{name}", float(event[name])
        logits = event.get("max_logits")
        if logits:
            yield f"{stage}/max_logit", max(max(values) for values in logits.values())
        if "clipped" in event:
            yield f"{stage}/clipped_heads", float(sum(len(heads) for heads in event["clipped"].values()))
        for router, shares in event.get("expert_load", {}).items():
            yield f"{stage}/expert_load_max/{router}", max(shares) * len(shares)
    elif event["kind"] == "valid":
        for name, value in event["metrics"].items():
            yield f"{stage}/{name}", float(value)


def tensorboard(run_dir: Path) -> Listener:
    """Writes scalars with TensorBoard's own event writer."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MachineError(
            "K2_TENSORBOARD is set and tensorboard is not installed", next="pip install 'k2lab[tensorboard]'"
        ) from error
    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def listen(event: dict[str, Any]) -> None:
        for name, value in scalars(event):
            writer.add_scalar(name, value, event["step"])
        if event["kind"] == "stage_end":
            writer.flush()

    return listen


def wandb(run_dir: Path, project: str) -> Listener:
    """Logs scalars to Weights & Biases."""
    try:
        import wandb as library
    except ImportError as error:
        raise MachineError("K2_WANDB is set and wandb is not installed", next="pip install 'k2lab[wandb]'") from error
    run = library.init(project=project, name=run_dir.name, dir=str(run_dir))

    def listen(event: dict[str, Any]) -> None:
        values = dict(scalars(event))
        if values:
            run.log({**values, f"{event['stage']}/step": event["step"]})

    return listen
