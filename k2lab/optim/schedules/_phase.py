"""What the schedules share: lengths in steps or shares, and the warmup ramp."""

from __future__ import annotations

from k2lab.core.errors import RecipeError


def check_length(name: str, value: int | float) -> None:
    """Raises RecipeError unless `value` is a number of steps (int >= 0) or a share of the run (float in 0..1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{name} is not a length", got=value, allowed=_ALLOWED)
    if (isinstance(value, int) and value < 0) or (isinstance(value, float) and not 0.0 <= value <= 1.0):
        raise RecipeError(f"{name} is not a length", got=value, allowed=_ALLOWED)


def check_ratio(name: str, value: float) -> None:
    """Raises RecipeError unless `value` is a share of the peak learning rate, 0..1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise RecipeError(f"{name} is not a share of the peak learning rate", got=value, allowed="a number from 0 to 1")


def length(value: int | float, total_steps: int) -> int:
    """Steps of a length that is given as steps (int) or as a share of `total_steps` (float, rounded)."""
    return value if isinstance(value, int) else round(value * total_steps)


def ramp(step: int, warmup: int) -> float:
    """1/w, 2/w, ..., 1 over the first `warmup` steps, then 1."""
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


_ALLOWED = "steps as an integer >= 0, or a share of the run as a float from 0.0 to 1.0"
