"""Linear schedule."""

from __future__ import annotations

from dataclasses import dataclass

from k2lab.optim.schedules._phase import check_length, check_ratio, length, ramp


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Warms up, then falls on a straight line to `min_ratio` at the end of the run."""

    warmup: int | float = 0.05  # steps (int) or share of the run (float)
    min_ratio: float = 0.0  # share of the peak learning rate at the end

    def __post_init__(self) -> None:
        check_length("warmup", self.warmup)
        check_ratio("min_ratio", self.min_ratio)

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate for the update that follows `step` finished ones; `min_ratio` from `total_steps` on."""
        warmup = length(self.warmup, total_steps)
        if step < warmup:
            return ramp(step, warmup)
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 1.0 - (1.0 - self.min_ratio) * done

    @staticmethod
    def examples() -> list[Linear]:
        return [Linear(), Linear(warmup=10, min_ratio=0.1)]
