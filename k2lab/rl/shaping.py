"""What changes over an RL run besides the weights: the sampling temperature, and the price of long responses.

Axes: G rollouts of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from k2lab.core.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Sampling temperature from `start` to `end`, falling over all steps along a line or half a cosine.

    Kimi K2 (arXiv 2507.20534, section 3.2.3) samples hot at first, to explore, and cooler later; its schedule is unpublished.
    Log-probabilities are those of the untempered model whatever the temperature, in sampler and trainer.
    """

    start: float = 1.0
    end: float = 1.0
    decay: Literal["linear", "cosine"] = "linear"

    def check(self, where: str) -> None:
        """Raises RecipeError unless both ends are positive: greedy samples of a task would be equal."""
        for name, value in (("start", self.start), ("end", self.end)):
            if not value > 0:
                raise RecipeError("a group of samples needs a temperature above 0", where=f"{where}.{name}", got=value)

    def at(self, step: int, total: int) -> float:
        """The temperature of `step` (from 0) of `total`: `start` at the first, `end` at the last."""
        done = min(1.0, step / max(1, total - 1))
        if self.decay == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True, kw_only=True)
class Toggle:
    """Phases with and without a tight budget in turn (Kimi K2.5, arXiv 2602.02276): the first `every` steps are free, in the next
    `every` a response keeps its reward only if it is no longer than the task family's budget, or if the group's accuracy is below
    `accuracy`. The budget is the `percentile` of the lengths of right responses, measured once before training.
    """

    every: int = 10
    percentile: float = 50.0
    accuracy: float = 0.5

    def check(self, where: str) -> None:
        """Raises RecipeError for numbers out of range."""
        if self.every < 1 or not 0 < self.percentile <= 100 or not 0 <= self.accuracy <= 1:
            raise RecipeError(
                "no such toggle",
                where=where,
                got=f"every = {self.every}, percentile = {self.percentile:g}, accuracy = {self.accuracy:g}",
                allowed="every of at least 1, percentile in (0, 100], accuracy in [0, 1]",
            )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many tokens a response may take, and what it costs to want more.

    A response is cut off at its task family's budget (`tokens` by domain; others: the stage's `max_tokens`). From step `begin` on
    (Kimi K1.5, arXiv 2501.12599, warms its length penalty up) it also loses `penalty`: with `shape = "step"` all of it if it was
    cut off; with `"linear"` a growing part over the last `margin` of the budget, so that there is something to learn before the
    edge. Kimi's own numbers are unpublished; these are ours. A shaped reward may be negative.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    penalty: float = 0.25
    shape: Literal["step", "linear"] = "step"
    margin: float = 0.25
    begin: int = 0
    toggle: Toggle | None = None

    def check(self, where: str) -> None:
        """Raises RecipeError for numbers out of range."""
        for domain, tokens in self.tokens.items():
            if tokens < 1:
                raise RecipeError("a budget is at least 1 token", where=f"{where}.tokens.{domain}", got=tokens)
        if self.penalty < 0 or self.begin < 0 or not 0 < self.margin <= 1:
            raise RecipeError(
                "no such penalty",
                where=where,
                got=f"penalty = {self.penalty:g}, begin = {self.begin}, margin = {self.margin:g}",
                allowed="penalty and begin of at least 0, margin in (0, 1]",
            )
        if self.toggle is not None:
            self.toggle.check(f"{where}.toggle")

    def limit(self, domain: str, max_tokens: int) -> int:
        """Tokens at which responses of a family are cut off."""
        return min(self.tokens.get(domain, max_tokens), max_tokens)

    def shaped(
        self, rewards_G: np.ndarray, lengths_G: np.ndarray, cut_G: np.ndarray, limit: int, step: int, typical: float | None = None
    ) -> np.ndarray:
        """Rewards f64[G] of a group after budget and penalty.

        `lengths_G` tokens of the responses, `cut_G` whether they were cut off, `limit` their budget, `typical` the toggle's
        budget of the family (None: no right response was seen, so there is none)."""
        import numpy as np

        shaped_G = rewards_G.astype(np.float64)
        toggle = self.toggle
        tight = toggle is not None and typical is not None and step // toggle.every % 2 == 1
        if tight and rewards_G.mean() >= toggle.accuracy:  # type: ignore[union-attr]
            shaped_G = np.where(lengths_G <= typical, shaped_G, 0.0)
        if step < self.begin or not self.penalty:
            return shaped_G
        if self.shape == "step":
            return shaped_G - self.penalty * cut_G
        room = max(1.0, self.margin * limit)
        share_G = np.where(cut_G, 1.0, np.clip((lengths_G - (limit - room)) / room, 0.0, 1.0))
        return shaped_G - self.penalty * share_G
