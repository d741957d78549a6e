"""Supervised fine-tuning on reasoning traces, several data sets at once, earlier data mixed in against forgetting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, StageContext
from k2lab.stages._fine_tuning import Replaying, conversation, fine_tune, records_of, replayed, samples_of


@dataclass(frozen=True, kw_only=True)
class ReasoningSft(Replaying):
    """Fine-tune on reasoning traces, {"prompt","reasoning","final"}, also {"prompt","response"} and chats with tool calls.

    Thoughts are rendered as `<think>...</think>` before the answer and trained like it. A trace without an answer is refused.
    """

    version: ClassVar[int] = 1

    start: CheckpointRef = "sft"  # type: ignore[assignment]
    # Data sets of traces, one after the other; `mixture` weighs their domains.
    data: list[Dataset]

    def check(self, where: str) -> None:
        super().check(where)
        if not self.data:
            raise RecipeError("name at least one data set of traces", where=f"{where}.data")

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        source = ctx.parent("start").path
        tokenizer = text_tokenizer.load(source)
        render = conversation(self, tokenizer)

        def coded(record: dict[str, Any]) -> Iterator[Any]:
            check_trace(record)
            return render(record)

        train, held_out = (samples_of(self, ctx, records_of(ctx, "data", split), split, coded) for split in ("train", "valid"))
        train += replayed(self, ctx, tokenizer)
        objective = load("objective", "lm")()
        fine_tune(self, ctx, tokenizer, source, train=train, held_out=held_out, objective=objective)

    @staticmethod
    def examples() -> list[ReasoningSft]:
        return [
            ReasoningSft(
                data=("reasoning",),  # type: ignore[arg-type]
                optim=load("optimizer", "muonclip")(lr=1e-3),
                steps=2,
                global_batch=2,
                per_device_batch=1,
                seq_len=128,
                valid_every=2,
                valid_tokens=256,
            )
        ]


def check_trace(record: dict[str, Any]) -> None:
    """DataError if the record's conversation does not end with an answer: text, or a tool call, behind the thoughts."""
    from k2lab.core.types import ToolCall
    from k2lab.stages._chats import messages_of

    last = messages_of(record)[-1]
    calls = any(isinstance(part, ToolCall) for part in last.parts)
    if last.role != "assistant" or not (calls or last.content.strip()):
        raise DataError(
            "the trace has no answer" if last.role == "assistant" else "the conversation does not end with an answer",
            where=str(record.get("key")),
            got=str(record.get("reasoning") or record.get("response") or last.content)[-120:],
            allowed='"final", or a "response" or last message of the assistant with text behind its thoughts, or a tool call',
            next="Remove the record or complete it",
        )
