"""Checks of optimizer settings that both slots share. Torch-free: recipes are checked before torch is imported."""

from __future__ import annotations

import math

from k2lab.core import slots
from k2lab.core.errors import RecipeError


def default_schedule() -> object:
    """The schedule of a recipe that names none: `wsd`. Loaded as a slot, so that the resolved recipe can write its name."""
    return slots.load("schedule", "wsd")()


def check(
    lr: float,
    weight_decay: float,
    betas: tuple[float, ...],
    eps: float,
    schedule: object,
    max_grad_norm: float | None,
    adamw_lr: float | None = None,
) -> None:
    """Raises RecipeError for the first setting that cannot be trained with."""
    for name, value in (("lr", lr), ("adamw_lr", lr if adamw_lr is None else adamw_lr), ("eps", eps)):
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name} must be positive", got=value, allowed="a finite number above 0")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise RecipeError("weight_decay must not be negative", got=weight_decay, allowed="a finite number from 0 on")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise RecipeError("betas are two decay rates", got=list(betas), allowed="two numbers from 0 up to, but not, 1")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise RecipeError("max_grad_norm must be positive", got=max_grad_norm, allowed='a number above 0, or "none"')
    if not callable(getattr(schedule, "factor", None)):
        raise RecipeError(
            "schedule has no method factor(step, total_steps)", got=schedule, allowed=", ".join(slots.names("schedule"))
        )
