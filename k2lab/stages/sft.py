"""Supervised fine-tuning on instructions or chats; only the assistant's tokens are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, StageContext
from k2lab.stages._training import Training, execute


@dataclass(frozen=True, kw_only=True)
class Sft(Training):
    """Fine-tune on {"instruction","input","output"} or {"messages"} records in Kimi's chat format, loss on the assistant only."""

    version: ClassVar[int] = 1

    start: CheckpointRef = "pretrain"  # type: ignore[assignment]
    data: Dataset = "instructions"
    # Expected repeats per epoch by domain or source, e.g. { general = 0.3 }; others count 1.
    mixture: dict[str, float] = field(default_factory=dict)
    # A sample longer than seq_len is an error, dropped (and counted), or cut off at the end.
    over_length: Literal["error", "drop", "truncate"] = "error"
    # Put Kimi's default system message before conversations that have none.
    default_system: bool = False

    def run(self, ctx: StageContext) -> None:
        from k2lab.data.feed import PackedFeed
        from k2lab.data.mixture import epoch_order
        from k2lab.data.samples import valid_batches
        from k2lab.text import tokenizer as text_tokenizer
        from k2lab.text.template import chat_template

        source = ctx.parent("start").path
        tokenizer = text_tokenizer.load(source)
        train = self._samples(ctx, tokenizer, "train")
        held_out = self._samples(ctx, tokenizer, "valid")
        domains = [sample.source for sample in train]
        unknown = set(self.mixture) - set(domains)
        if unknown:
            raise RecipeError(
                f"the data has no domain {sorted(unknown)[0]!r}",
                where=f"stage.{ctx.name}.mixture",
                allowed=", ".join(sorted(set(domains))),
            )

        def order(epoch: int) -> Any:
            return epoch_order(ctx.seed, ctx.name, epoch, domains, self.mixture)

        def feed(rank: int, world: int) -> PackedFeed:
            return PackedFeed(
                train,
                order,
                seq_len=self.seq_len,
                global_batch=self.global_batch,
                per_device_batch=self.per_device_batch,
                fill="whole",
                rank=rank,
                world=world,
            )

        def valid(rank: int, world: int) -> list[Any]:
            return valid_batches(
                held_out, self.seq_len, self.per_device_batch * self.seq_len, self.valid_tokens, ctx.seed, ctx.name, rank, world
            )

        weights = [self.mixture.get(domain, 1.0) for domain in domains]
        execute(
            self,
            ctx,
            make_feed=feed,
            valid=valid,
            tokens_in_data=int(sum(w * len(sample.tokens) for w, sample in zip(weights, train, strict=True))),
            tokenizer_source=source,
            vocab_size=tokenizer.vocab_size,
            objective=load("objective", "lm")(),
        )
        if ctx.rank == 0 and "<|im_middle|>" in tokenizer.special:
            # Other servers must render chats as this stage did: the template says whether a system message is put in.
            tokenizer.save(ctx.work, chat_template=chat_template(default_system=self.default_system))

    def _samples(self, ctx: StageContext, tokenizer: Any, split: str) -> list[Any]:
        from k2lab.data import shards
        from k2lab.data.samples import chat_sample
        from k2lab.stages._chats import messages_of
        from k2lab.text.chat import render, training_views

        samples, dropped, longest = [], 0, 0
        folder = ctx.parent("data").path
        for record in shards.read_records(folder, split):
            for n, view in enumerate(training_views(messages_of(record))):
                rendered = render(view, tokenizer, tools=record.get("tools"), default_system=self.default_system)
                tokens, trained = rendered.tokens, rendered.trained
                if len(tokens) > self.seq_len:
                    longest = max(longest, len(tokens))
                    if self.over_length == "error":
                        raise DataError(
                            f"a sample of {len(tokens)} tokens is longer than seq_len = {self.seq_len}",
                            where=f"stage.{ctx.name}: {record['key']}",
                            next="Raise seq_len, or set over_length to drop or truncate",
                        )
                    if self.over_length == "drop":
                        dropped += 1
                        continue
                    tokens, trained = tokens[: self.seq_len], trained[: self.seq_len]
                if not any(trained[1:]):
                    dropped += 1
                    continue
                key = record["key"] if n == 0 else f"{record['key']}@{n}"
                samples.append(chat_sample(tokens, trained, key, record.get("domain", record.get("source", ""))))
        if dropped:
            ctx.events.emit(
                "note", text=f"{dropped} {split} samples without a trained token or over {self.seq_len} tokens were left out"
            )
        if not samples:
            raise DataError(f"no {split} sample is left", where=f"stage.{ctx.name}", next="Raise seq_len or look at the data")
        return samples

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
