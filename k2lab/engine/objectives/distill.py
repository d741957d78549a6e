"""Distillation: cross-entropy on the teacher's answers and divergence from the teacher's most probable tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.types import Batch


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation: cross-entropy on the teacher's tokens plus forward KL from its stored top-k, at temperature 1.

    The divergence is taken over the K tokens that the teacher named and one bucket for all others (`models/_distribution.py`), so
    it needs the teacher's vocabulary; the cross-entropy does not. With `kl_weight = 0` no teacher stream is needed at all.

    Streams: `teacher_ids` i64[T, K] and `teacher_logprobs` f32[T, K], best first, -inf = no such entry; `teacher`, 1 where they
    are known and 0 where not (plain samples that are mixed in carry zeros in all three). Terms: `lm`, by trained tokens; `kl`, in
    nats, by trained tokens whose teacher is known. A term of weight 0 is left out.
    """

    lm_weight: float = 1.0
    kl_weight: float = 1.0
    # Positions per piece of the chunked head.
    chunk: int = 1024

    STREAMS: ClassVar[tuple[str, ...]] = ("teacher_ids", "teacher_logprobs", "teacher")

    def __post_init__(self) -> None:
        from k2lab.core.errors import RecipeError

        if not (self.lm_weight >= 0 and self.kl_weight >= 0 and self.lm_weight + self.kl_weight > 0):
            got = f"lm_weight = {self.lm_weight}, kl_weight = {self.kl_weight}"
            raise RecipeError("there is nothing to train with these weights", got=got, allowed="none negative, one positive")

    @staticmethod
    def examples() -> list[Distill]:
        return [Distill(), Distill(lm_weight=0.0), Distill(kl_weight=0.0), Distill(lm_weight=0.5, kl_weight=2.0, chunk=64)]

    @property
    def needs(self) -> tuple[str, ...]:
        """Streams that must be there."""
        return self.STREAMS if self.kl_weight else ()

    @property
    def coefficients(self) -> dict[str, float]:
        """{term: weight}."""
        return {"lm": self.lm_weight, "kl": self.kl_weight}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Trained tokens for `lm`, those with a known teacher for `kl`."""
        counts = {"lm": batch.num_tokens} if self.lm_weight else {}
        if self.kl_weight:
            counts["kl"] = int(((batch.weight_T != 0) & (batch.streams_T["teacher"] != 0)).sum())
        return counts

    def sums(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Sums of the terms, with gradient."""
        from k2lab.models.losses import linear_cross_entropy, linear_logprobs_topk_kl, linear_topk_kl

        hidden, head, targets, weight = model.hidden(batch), model.head(), batch.targets_T, batch.weight_T
        if not self.kl_weight:
            return {"lm": linear_cross_entropy(hidden, head, targets, weight, chunk=self.chunk, rows=batch.num_tokens or None)[0]}
        ids, logprobs, teacher = (batch.streams_T[name] for name in self.STREAMS)
        if not self.lm_weight:
            known = weight * (teacher != 0)
            return {"kl": linear_topk_kl(hidden, head, ids, logprobs, known, chunk=self.chunk, rows=batch.num_tokens or None)[0]}
        logp, kl = linear_logprobs_topk_kl(
            hidden, head, targets, weight, ids, logprobs, teacher, chunk=self.chunk, rows=batch.num_tokens or None
        )
        return {"lm": -(logp * weight).sum(), "kl": (kl * weight).sum()}
