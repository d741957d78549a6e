"""Group-relative policy optimisation with clipped importance ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from k2lab.core.types import Batch


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """GRPO: -min(ratio x A, clipped ratio x A) per token, with DAPO's normalisation and clip range, or GSPO's ratios.

    Shao et al. 2024 (arXiv 2402.03300); advantages A come from the feed as a stream, divided by a deviation or not. `clip_low`
    and `clip_high` bound the ratio to [1 - clip_low, 1 + clip_high] (DAPO, arXiv 2503.14476, clips higher at 0.28).
    `importance = "token"`: pi/pi_old of each token; `"sequence"`: one ratio per sequence, the geometric mean over its tokens
    (GSPO, arXiv 2507.18071, where clip ranges are below 1e-3). `normalise`: the sum is divided once, over all ranks and
    micro-batches, by the number of trained `"tokens"` (DAPO; TRL's `dapo`), or of `"sequences"`, with the mean over each
    sequence's tokens (the paper's; TRL's `grpo`), or of sequences x `constant_length` (Dr. GRPO, arXiv 2503.20783; TRL's
    `dr_grpo`). Log-ratios are bounded to +-20.

    Streams: those of `kimi`, and `ref_logprobs` with `kl_weight`. Terms: `grpo`; `ref_kl`, the k3 estimate of KL(pi || pi_ref)
    with the same normalisation, times `kl_weight`; `ptx`, by PTX tokens, times `ptx_weight`. Reported: `clip_share`, the share of
    tokens whose gradient is clipped away, and what `kimi` reports.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    # Weight of the divergence from a reference policy; 0 = no reference is needed.
    kl_weight: float = 0.0
    normalise: Literal["tokens", "sequences", "constant"] = "tokens"
    # Tokens that a sequence counts as, for normalise = "constant".
    constant_length: int = 0
    importance: Literal["token", "sequence"] = "token"
    # Weight of the cross-entropy on PTX samples; 0 = only reported.
    ptx_weight: float = 0.1
    # Positions per piece of the chunked head.
    chunk: int = 1024

    maxima: ClassVar[tuple[str, ...]] = ("mismatch_max",)

    def __post_init__(self) -> None:
        from k2lab.core.errors import RecipeError

        if not (0 < self.clip_low <= 1 and self.clip_high > 0):
            raise RecipeError(
                "no clip range", got=f"clip_low = {self.clip_low}, clip_high = {self.clip_high}", allowed="0 < clip_low <= 1"
            )
        if self.kl_weight < 0 or self.ptx_weight < 0:
            raise RecipeError("weights must not be negative", got=f"kl_weight {self.kl_weight}, ptx_weight {self.ptx_weight}")
        if (self.constant_length > 0) != (self.normalise == "constant"):
            raise RecipeError(
                "constant_length goes with normalise = 'constant'",
                got=f"normalise = {self.normalise!r}, constant_length = {self.constant_length}",
            )

    @staticmethod
    def examples() -> list[GRPO]:
        return [
            GRPO(),
            GRPO(normalise="sequences", importance="sequence", clip_low=3e-4, clip_high=4e-4, kl_weight=0.05),
            GRPO(normalise="constant", constant_length=32, ptx_weight=1.0),
        ]

    @property
    def needs(self) -> tuple[str, ...]:
        """Streams that must be there."""
        return ("logprobs", "advantages", "ptx", *(("ref_logprobs",) if self.kl_weight else ()))

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: weight}; metrics have 0."""
        metrics = dict.fromkeys(("clip_share", "mismatch", "log_ratio", "kl", "entropy"), 0.0)
        return {"ref_kl": self.kl_weight, "ptx": self.ptx_weight, **metrics}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens, sequences or sequences x constant_length for `grpo` and `ref_kl`; PTX tokens; counts of the metrics."""
        from k2lab.engine.objectives._sequences import policy_counts

        counts = policy_counts(batch)
        tokens, sequences = counts.pop("tokens"), counts.pop("sequences")
        count = {"tokens": tokens, "sequences": sequences, "constant": sequences * self.constant_length}[self.normalise]
        return {"grpo": count, **({"ref_kl": count} if self.kl_weight else {}), **counts, "clip_share": tokens}

    def sums(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Sums of the terms, with gradient, and of the metrics."""
        import torch

        from k2lab.engine.objectives._sequences import MAX_LOG_RATIO, policy, policy_metrics, spread

        parts = policy(model, batch, self.chunk)
        log_ratio_T = parts.delta_T
        if self.importance == "sequence":
            log_ratio_T = spread(parts.means(parts.delta_T), parts.starts_S1, len(parts.delta_T))
        ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain_T = torch.minimum(ratio_T * parts.advantage_T, clipped_T * parts.advantage_T)
        normalised = parts.means if self.normalise == "sequences" else parts.sums
        sums = {"grpo": -normalised(gain_T).sum(), "ptx": parts.ptx, **policy_metrics(parts)}
        low_T = (ratio_T < 1 - self.clip_low) & (parts.advantage_T < 0)
        high_T = (ratio_T > 1 + self.clip_high) & (parts.advantage_T > 0)
        sums["clip_share"] = ((low_T | high_T) & (parts.weight_T != 0)).sum()
        if self.kl_weight:
            back_T = torch.where(parts.weight_T != 0, batch.streams_T["ref_logprobs"] - parts.logp_T, 0.0)
            sums["ref_kl"] = normalised(torch.expm1(back_T.clamp(max=MAX_LOG_RATIO)) - back_T).sum()
        return sums
