"""Warmup-stable-decay schedule (MiniCPM, arXiv 2404.06395; the `sqrt` decay of Haegele et al., arXiv 2405.18392)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from k2lab.core.errors import RecipeError
from k2lab.optim.schedules._phase import check_length, check_ratio, length, ramp


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warms up, stays at the peak, then decays; the decay can start from any stable step of an earlier run.

    Up to the start of the decay the rate does not depend on where the run will end. So a run with `decay = 0` can be resumed
    from any of its stable checkpoints with `anneal_at = <that step>`, a decay length and a new total, and (with `warmup` in
    steps) gives the same model as a run that had planned this end from the start. Several ends can grow from one stable run.

    An anneal as a stage of its own, which starts from a stable checkpoint's weights and counts its steps anew, has no stable
    part left: `warmup = 0, decay = 1.0` with the checkpoint's own peak as `lr` leaves that rate with the first step.
    """

    warmup: int | float = 0.05  # steps (int) or share of the run (float)
    decay: int | float = 0.2  # steps (int) or share of the run (float); 0 = no decay
    shape: Literal["linear", "cosine", "sqrt"] = "linear"  # of the decay: 1-p, half a cosine, 1-sqrt(p)
    min_ratio: float = 0.0  # share of the peak learning rate at the end of the decay
    anneal_at: int | None = None  # step at which the decay starts; None = so that it ends with the run

    def __post_init__(self) -> None:
        check_length("warmup", self.warmup)
        check_length("decay", self.decay)
        check_ratio("min_ratio", self.min_ratio)
        if self.shape not in ("linear", "cosine", "sqrt"):
            raise RecipeError("unknown shape of the decay", got=self.shape, allowed="linear, cosine, sqrt")
        if self.anneal_at is not None and (isinstance(self.anneal_at, bool) or self.anneal_at < 0):
            raise RecipeError("anneal_at is not a step", got=self.anneal_at, allowed="an integer >= 0")
        if self.anneal_at is not None and self.decay == 0:
            raise RecipeError("anneal_at starts a decay of no steps", got="decay = 0", next="Give decay a length")

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate for the update that follows `step` finished ones; `min_ratio` once the decay is over.

        A decay that would start inside the warmup is shortened to start at its end; an explicit `anneal_at` inside the warmup
        raises RecipeError, because there is no stable point.
        """
        warmup, decay = length(self.warmup, total_steps), length(self.decay, total_steps)
        if self.anneal_at is None:
            start = max(warmup, total_steps - decay)
            decay = total_steps - start
        else:
            start = self.anneal_at
            if start < warmup:
                raise RecipeError(
                    "anneal_at lies inside the warmup",
                    got=start,
                    allowed=f"a step from {warmup} on",
                    next="Anneal later or warm up shorter",
                )
        if step < warmup:
            return ramp(step, warmup)
        if step < start or decay <= 0:
            return 1.0
        done = min(1.0, (step - start) / decay)
        if self.shape == "linear":
            left = 1.0 - done
        elif self.shape == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            left = 1.0 - math.sqrt(done)
        return self.min_ratio + (1.0 - self.min_ratio) * left

    @staticmethod
    def examples() -> list[WSD]:
        return [
            WSD(),
            WSD(warmup=10, decay=0),
            WSD(warmup=10, decay=20, shape="sqrt", min_ratio=0.01, anneal_at=60),
            WSD(shape="cosine", min_ratio=0.1),
        ]
