"""Supervised fine-tuning on instructions or chats; only the assistant's tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, StageContext
from k2lab.stages._fine_tuning import FineTuning, conversation, fine_tune, records_of, samples_of


@dataclass(frozen=True, kw_only=True)
class Sft(FineTuning):
    """Fine-tune on {"instruction","input","output"} or {"messages"} records in Kimi's chat format, loss on the assistant only."""

    version: ClassVar[int] = 1

    start: CheckpointRef = "pretrain"  # type: ignore[assignment]
    data: Dataset = "instructions"

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        source = ctx.parent("start").path
        tokenizer = text_tokenizer.load(source)
        render = conversation(self, tokenizer)
        train, held_out = (samples_of(self, ctx, records_of(ctx, "data", split), split, render) for split in ("train", "valid"))
        objective = load("objective", "lm")()
        fine_tune(self, ctx, tokenizer, source, train=train, held_out=held_out, objective=objective)

    @staticmethod
    def examples() -> list[Sft]:
        return [
            Sft(
                optim=load("optimizer", "muonclip")(lr=1e-3),
                steps=2,
                global_batch=2,
                per_device_batch=1,
                seq_len=128,
                valid_every=2,
                valid_tokens=256,
                over_length="drop",
            )
        ]
