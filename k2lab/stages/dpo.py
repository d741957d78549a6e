"""Direct preference optimisation against a frozen reference model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, StageContext
from k2lab.stages._fine_tuning import FineTuning, fine_tune, records_of

REPORT = "preference.json"


@dataclass(frozen=True, kw_only=True)
class Dpo(FineTuning):
    """Train a policy to prefer chosen over rejected answers, relative to a reference model (DPO, arXiv 2305.18290).

    The reference's log-probabilities are computed once, before training. Both sides of a pair stay in one row, so
    seq_len bounds the two together. `preference.json` says how held-out pairs are ranked before and after.
    """

    version: ClassVar[int] = 1
    uses_model: ClassVar[bool] = False

    # The policy.
    start: CheckpointRef = "reasoning_sft"  # type: ignore[assignment]
    # The model that the policy is kept close to, by name, e.g. the domain SFT; "none" = the policy's own start.
    reference: CheckpointRef | None = None
    data: Dataset = "pairs"
    # Strength of the pull towards the reference: the implicit reward is beta x (log p - log p of the reference).
    beta: float = 0.1
    # Share of labels taken to be wrong (conservative DPO); below 0.5.
    label_smoothing: float = 0.0
    # Use log-probabilities per token instead of sums, so that length does not enter the reward.
    length_normalised: bool = False
    # Weight of next-token cross-entropy on the chosen side, which keeps its likelihood from falling.
    sft_weight: float = 0.0

    def check(self, where: str) -> None:
        super().check(where)
        if self.over_length == "truncate":
            raise RecipeError("a pair is not cut off: its sides would lose their ends", where=f"{where}.over_length")
        if self.beta <= 0:
            raise RecipeError("must be positive", where=f"{where}.beta", got=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise RecipeError("a share of wrong labels under 0.5", where=f"{where}.label_smoothing", got=self.label_smoothing)
        if self.sft_weight < 0:
            raise RecipeError("must not be negative", where=f"{where}.sft_weight", got=self.sft_weight)

    def run(self, ctx: StageContext) -> None:
        from k2lab.stages._preference import units_of, with_reference
        from k2lab.text import tokenizer as text_tokenizer

        source = ctx.parent("start").path
        tokenizer = text_tokenizer.load(source)
        reference = self._reference(ctx, tokenizer)
        train, held_out = (units_of(self, ctx, records_of(ctx, "data", split), split, tokenizer) for split in ("train", "valid"))
        sides = [side for unit in (*train, *held_out) for side in unit]
        logprobs = self._logprobs(ctx, "reference", reference, sides)
        cut = 2 * len(train)
        fine_tune(
            self,
            ctx,
            tokenizer,
            source,
            train=with_reference(train, logprobs[:cut]),
            held_out=with_reference(held_out, logprobs[cut:]),
            objective=load("objective", "dpo")(
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                length_normalised=self.length_normalised,
                sft_weight=self.sft_weight,
            ),
        )
        self._judge(ctx, held_out, sides[cut:], logprobs[cut:], same=reference == source)

    def _reference(self, ctx: StageContext, tokenizer: Any) -> Path:
        """The reference's folder. RecipeError if its tokens are not the policy's."""
        from k2lab.models import build
        from k2lab.text import tokenizer as text_tokenizer

        source = ctx.parent("start").path
        if self.reference is None or ctx.parent("reference").path == source:
            return source
        path = ctx.parent("reference").path
        other = text_tokenizer.load(path)
        sizes = [build.read_config(folder).get("vocab_size") for folder in (source, path)]
        if other.fingerprint() != tokenizer.fingerprint() or sizes[0] != sizes[1]:
            raise RecipeError(
                "policy and reference have different vocabularies, so their log-probabilities cannot be compared",
                where=f"stage.{ctx.name}.reference",
                got=f"{sizes[1]} entries, tokenizer {other.fingerprint()[:12]}",
                allowed=f"{sizes[0]} entries, tokenizer {tokenizer.fingerprint()[:12]}",
                next="Name a reference of the same family, or leave `reference` out to use the policy's own start",
            )
        return path

    def _logprobs(self, ctx: StageContext, name: str, folder: Path, sides: list[Any]) -> list[Any]:
        import torch

        from k2lab.stages._logprobs import logprobs_of

        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        return logprobs_of(ctx, name, folder, sides, batch_tokens=self.per_device_batch * self.seq_len, dtype=dtype)

    def _judge(self, ctx: StageContext, held_out: list[Any], sides: list[Any], reference: list[Any], same: bool) -> None:
        """Writes `preference.json`: how the policy ranked the held-out pairs when it started, and how it does now."""
        from k2lab.core.artifacts import write_json
        from k2lab.stages._preference import judge_pairs

        start = reference if same else self._logprobs(ctx, "start", ctx.parent("start").path, sides)
        end = self._logprobs(ctx, "end", ctx.work, sides)
        if ctx.rank == 0:
            found = judge_pairs(held_out, start, end, None if same else reference)
            write_json(ctx.work / REPORT, found)
            ctx.facts["preference"] = found

    @staticmethod
    def examples() -> list[Dpo]:
        return [
            Dpo(
                optim=load("optimizer", "adamw")(lr=1e-4),
                steps=2,
                global_batch=2,
                per_device_batch=1,
                seq_len=256,
                valid_every=2,
                valid_tokens=512,
            )
        ]
