"""Next-token cross-entropy, summed over trained tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.types import Batch


@dataclass(frozen=True, kw_only=True)
class LM:
    """Next-token cross-entropy in nats, weighted per token; its count is the number of trained tokens."""

    needs: ClassVar[tuple[str, ...]] = ()
    # Positions per piece of the chunked loss: logits exist for one piece at a time.
    chunk: int = 1024

    @staticmethod
    def examples() -> list[LM]:
        return [LM(), LM(chunk=256)]

    def counts(self, batch: Batch) -> dict[str, int]:
        """{"lm": trained tokens of the batch}."""
        return {"lm": batch.num_tokens}

    def sums(self, model: Any, batch: Batch) -> dict[str, Any]:
        """{"lm": sum of weight x negative log-likelihood}, a scalar with gradient."""
        from k2lab.models.losses import linear_cross_entropy

        total, _ = linear_cross_entropy(
            model.hidden(batch), model.head(), batch.targets_T, batch.weight_T, chunk=self.chunk, rows=batch.num_tokens or None
        )
        return {"lm": total}
