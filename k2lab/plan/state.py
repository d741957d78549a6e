"""Optimizer state that is kept otherwise than by default: what the planner needs to know of an optimizer's settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from k2lab.core.types import PlanInput


@dataclass(frozen=True)
class StateInput(PlanInput):
    """A training stage whose optimizer says so: `momentum` bytes of Muon's momentum per element, `master` auto, off or stochastic
    (of 16-bit weights), `offload`: masters, momenta and moments in the host's memory."""

    momentum: int = 4
    master: str = "auto"
    offload: bool = False


def planned(optim: Any, plan: PlanInput) -> PlanInput:
    """What the planner is told of a stage that trains by `optim`, an optimizer's slot."""
    known = {item.name: getattr(plan, item.name) for item in fields(plan)}
    usual = StateInput(**known)
    changed = StateInput(
        **known,
        momentum=2 if getattr(optim, "momentum_dtype", "fp32") == "bf16" else usual.momentum,
        master=getattr(optim, "master", usual.master),
        offload=getattr(optim, "offload", "off") == "cpu",
    )
    return plan if changed == usual else changed


def of(inp: PlanInput) -> StateInput:
    """The stage's settings; the defaults if it has none."""
    if isinstance(inp, StateInput):
        return inp
    return StateInput(**{item.name: getattr(inp, item.name) for item in fields(PlanInput)})
