"""Advantages of the rollouts of one task: reward less a baseline that the group itself gives.

Axes: G rollouts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

SAME = 1e-9  # rewards that differ by less are equal: float sums of the same parts must not look like a signal


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """How rewards become advantages.

    `baseline = "mean"`: the group's mean (Kimi K1.5, arXiv 2501.12599; GRPO, arXiv 2402.03300). `"leave_one_out"`: the mean of
    the others (RLOO, arXiv 2402.14740), which is G / (G - 1) times the former. `divide_by_std`: also by the group's standard
    deviation (population, plus 1e-4), as GRPO does and Kimi does not: it weighs easy and hard tasks like middling ones (Dr. GRPO,
    arXiv 2503.20783)."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    divide_by_std: bool = False

    def of(self, rewards_G: np.ndarray) -> np.ndarray:
        """f64[G]; zeros where all rewards are equal. A group needs two rollouts."""
        assert len(rewards_G) > 1, "one rollout has nobody to be compared with"
        if not has_signal(rewards_G):
            return rewards_G * 0.0
        gaps_G = rewards_G - rewards_G.mean()
        if self.baseline == "leave_one_out":
            gaps_G = gaps_G * (len(rewards_G) / (len(rewards_G) - 1))
        return gaps_G / (rewards_G.std() + 1e-4) if self.divide_by_std else gaps_G


def has_signal(rewards_G: np.ndarray) -> bool:
    """Whether the rewards differ, so that the group says what to do more and what less."""
    return len(rewards_G) > 1 and bool(rewards_G.max() - rewards_G.min() > SAME)
