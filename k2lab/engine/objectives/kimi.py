"""Kimi's policy optimisation: squared distance of advantage and scaled log-ratio, per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.types import Batch


@dataclass(frozen=True, kw_only=True)
class Kimi:
    """Kimi's RL objective: (A - tau x log pi/pi_old)^2 / (2 tau) per sequence, and cross-entropy on PTX samples.

    Kimi K1.5 (arXiv 2501.12599, section 2.3) and K2 (arXiv 2507.20534, section 3.2): A = reward - mean reward of the group, which
    the feed computes; the log-ratio is the sum over the sequence's trained tokens; no clipping, no division by a deviation, no
    critic. The reports do not divide by 2 tau. We do: then the gradient at pi = pi_old is -A x gradient of log pi, that of
    REINFORCE with the group's mean as baseline, whatever tau; undivided it would be 2 tau times that, and a PTX term beside it
    would have to be scaled along with tau.

    `tau` and `ptx_weight` are ours: Kimi's are unpublished. A sequence's term is smallest where its log-ratio is A / tau, so tau
    says how far one batch may move the policy: with advantages up to 1, 0.1 pulls back from 10 nats per sequence on. It matters
    once the policy has moved away from pi_old (several updates per batch, old samples): smaller lets it run, larger holds it.
    OpenKimi's 0.01 belongs to a loss that is also divided by the sequence's length.

    Streams: `logprobs` under pi_old, as they were drawn; `advantages`, the same at all tokens of a sequence; `ptx`, 1 on PTX
    samples, else 0. Terms: `kimi`, by sequences; `ptx`, by PTX tokens. Reported: `mismatch` and `mismatch_max`, mean and largest
    |log pi - log pi_old| of a token, which is the difference of trainer and sampler as long as the policy has not moved;
    `log_ratio` of a sequence; `kl`, an estimate of KL(pi_old || pi) per token (k3 of Schulman 2020); `entropy`, the mean of
    -log pi over drawn tokens.
    """

    tau: float = 0.1
    # Weight of the PTX term; 0 = only reported.
    ptx_weight: float = 0.1
    # Positions per piece of the chunked head.
    chunk: int = 1024

    needs: ClassVar[tuple[str, ...]] = ("logprobs", "advantages", "ptx")
    maxima: ClassVar[tuple[str, ...]] = ("mismatch_max",)

    def __post_init__(self) -> None:
        from k2lab.core.errors import RecipeError

        if not self.tau > 0:
            raise RecipeError("tau must be positive", got=self.tau)
        if self.ptx_weight < 0:
            raise RecipeError("ptx_weight must not be negative", got=self.ptx_weight)

    @staticmethod
    def examples() -> list[Kimi]:
        return [Kimi(), Kimi(tau=0.5, ptx_weight=1.0)]

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: weight}; metrics have 0."""
        return {"ptx": self.ptx_weight, "mismatch": 0.0, "log_ratio": 0.0, "kl": 0.0, "entropy": 0.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Sequences with a trained token that is not PTX; PTX tokens; counts of the metrics."""
        from k2lab.engine.objectives._sequences import policy_counts

        counts = policy_counts(batch)
        del counts["tokens"]
        return {"kimi": counts.pop("sequences"), **counts}

    def sums(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Sums of both terms, with gradient, and of the metrics."""
        from k2lab.engine.objectives._sequences import policy, policy_metrics

        parts = policy(model, batch, self.chunk)
        gap_S = parts.means(parts.advantage_T) - self.tau * parts.sums(parts.delta_T)
        return {"kimi": gap_S.square().sum() / (2 * self.tau), "ptx": parts.ptx, **policy_metrics(parts)}
