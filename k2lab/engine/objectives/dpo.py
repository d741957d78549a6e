"""Direct preference optimisation on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.types import Batch


@dataclass(frozen=True, kw_only=True)
class DPO:
    """DPO: -log sigmoid(beta x (log-ratio of the chosen answer - log-ratio of the rejected one)), summed over pairs.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7. A log-ratio is the sum over an answer's trained tokens of log pi -
    log pi_ref; pi_ref comes as the stream `ref_logprobs`. With `label_smoothing` e the loss is (1 - e) x that of the pair and e x
    that of the pair turned round (cDPO, Mitchell 2023, "A note on DPO with noisy preferences"; TRL 1.16 knows it as part of `aot`
    only, its `sigmoid` ignores the setting). With `length_normalised` a log-ratio is the mean over the answer's trained tokens
    (Tulu 3, arXiv 2411.15124, section 5; TRL's `sigmoid_norm`), for which beta is about an answer's length times larger.

    Terms: `dpo`, by pairs; `lm`, the chosen answers' cross-entropy, by their trained tokens, times `sft_weight`. Reported by
    pairs: `accuracy` (implicit reward of the chosen answer is larger; ties 0.5), `margin` (of implicit rewards, beta included),
    `chosen_logprob` and `rejected_logprob` (sums over an answer), `logprob_accuracy` (mean log-probability per token of the
    chosen answer is larger; ties 0.5; no reference involved).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    # Weight of the chosen answers' cross-entropy; 0 = only reported.
    sft_weight: float = 0.0
    # Positions per piece of the chunked head.
    chunk: int = 1024

    needs: ClassVar[tuple[str, ...]] = ("ref_logprobs", "pairs")
    METRICS: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "chosen_logprob", "rejected_logprob", "logprob_accuracy")

    def __post_init__(self) -> None:
        from k2lab.core.errors import RecipeError

        if not self.beta > 0:
            raise RecipeError("beta must be positive", got=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise RecipeError("label_smoothing is the share of wrong labels", got=self.label_smoothing, allowed="0 up to 0.5")
        if self.sft_weight < 0:
            raise RecipeError("sft_weight must not be negative", got=self.sft_weight)

    @staticmethod
    def examples() -> list[DPO]:
        return [DPO(), DPO(beta=2.0, length_normalised=True, label_smoothing=0.1, sft_weight=0.5)]

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: weight}; metrics have 0."""
        return {"lm": self.sft_weight, **dict.fromkeys(self.METRICS, 0.0)}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pairs for all but `lm`, which has the chosen answers' trained tokens."""
        import numpy as np

        chosen_T = np.repeat(batch.sign_S > 0, np.diff(batch.starts_S1))
        pairs = int(np.count_nonzero(batch.sign_S > 0))
        return {"dpo": pairs, "lm": int(np.count_nonzero(batch.weight_T[chosen_T])), **dict.fromkeys(self.METRICS, pairs)}

    def sums(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Sums of both terms, with gradient, and of the metrics."""
        import torch.nn.functional as F

        from k2lab.engine.objectives._sequences import sequence_sums, sides
        from k2lab.models.losses import linear_logprobs

        logp_T = linear_logprobs(
            model.hidden(batch), model.head(), batch.targets_T, batch.weight_T, chunk=self.chunk, rows=batch.num_tokens or None
        )
        weight_T = batch.weight_T
        chosen, rejected = sides(batch)
        logp_S = sequence_sums(logp_T * weight_T, batch.starts_S1)
        # Token by token, so that the difference of two long sums loses no digits.
        ratio_S = sequence_sums((logp_T - batch.streams_T["ref_logprobs"]) * weight_T, batch.starts_S1)
        length_S = sequence_sums(weight_T, batch.starts_S1).clamp(min=1e-30)
        reward_S = self.beta * (ratio_S / length_S if self.length_normalised else ratio_S)
        margin_P = reward_S[chosen] - reward_S[rejected]
        loss_P = -(1 - self.label_smoothing) * F.logsigmoid(margin_P) - self.label_smoothing * F.logsigmoid(-margin_P)
        margin_P, mean_S, logp_P = margin_P.detach(), (logp_S / length_S).detach(), logp_S.detach()
        return {
            "dpo": loss_P.sum(),
            "lm": -logp_S[chosen].sum(),
            "accuracy": _wins(margin_P),
            "margin": margin_P.sum(),
            "chosen_logprob": logp_P[chosen].sum(),
            "rejected_logprob": logp_P[rejected].sum(),
            "logprob_accuracy": _wins(mean_S[chosen] - mean_S[rejected]),
        }


def _wins(difference_P: Any) -> Any:
    """Number of positive differences; ties count half."""
    return ((difference_P.sign() + 1) / 2).sum()
