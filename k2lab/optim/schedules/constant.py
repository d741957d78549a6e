"""Constant schedule."""

from __future__ import annotations

from dataclasses import dataclass

from k2lab.optim.schedules._phase import check_length, length, ramp


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Warms up, then keeps the peak learning rate for good."""

    warmup: int | float = 0  # steps (int) or share of the run (float)

    def __post_init__(self) -> None:
        check_length("warmup", self.warmup)

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate for the update that follows `step` finished ones."""
        return ramp(step, length(self.warmup, total_steps))

    @staticmethod
    def examples() -> list[Constant]:
        return [Constant(), Constant(warmup=10)]
