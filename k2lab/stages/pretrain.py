"""Pretrain on packed documents: from a fresh model, or continually from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import StageContext, Tokens
from k2lab.stages._training import Training, execute


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """Next-token training on packed documents, from a spec or (continual pretraining) from a checkpoint."""

    version: ClassVar[int] = 1

    data: Tokens = "tokenize"
    # Expected repeats per epoch by domain, e.g. { reference = 1.0, docstrings = 0.5 }; domains not named count 1.
    mixture: dict[str, float] = field(default_factory=dict)

    def run(self, ctx: StageContext) -> None:
        from k2lab.data import shards
        from k2lab.data.feed import PackedFeed
        from k2lab.data.mixture import epoch_order
        from k2lab.data.samples import TokenSamples, valid_batches
        from k2lab.text import tokenizer as text_tokenizer

        data = ctx.parent("data")
        source = data.path / "tokenizer"
        tokenizer = text_tokenizer.load(source)
        if self.start is not None:
            have = text_tokenizer.load(ctx.parent("start").path).fingerprint()
            if have != tokenizer.fingerprint():
                raise RecipeError(
                    "the data was encoded with another tokenizer than the checkpoint's",
                    where=f"stage.{ctx.name}.data",
                    got=tokenizer.fingerprint()[:12],
                    allowed=have[:12],
                    next="Give the tokenize stage the checkpoint's tokenizer",
                )
        train = TokenSamples(shards.TokenReader(data.path, "train"))
        held_out = TokenSamples(shards.TokenReader(data.path, "valid"))
        unknown = set(self.mixture) - set(train.domains)
        if unknown:
            raise RecipeError(
                f"the data has no domain {sorted(unknown)[0]!r}",
                where=f"stage.{ctx.name}.mixture",
                allowed=", ".join(sorted(set(train.domains))),
            )

        def order(epoch: int) -> Any:
            return epoch_order(ctx.seed, ctx.name, epoch, train.domains, self.mixture)

        def feed(rank: int, world: int) -> PackedFeed:
            return PackedFeed(
                train,
                order,
                seq_len=self.seq_len,
                global_batch=self.global_batch,
                per_device_batch=self.per_device_batch,
                rank=rank,
                world=world,
            )

        def valid(rank: int, world: int) -> list[Any]:
            return valid_batches(
                held_out, self.seq_len, self.per_device_batch * self.seq_len, self.valid_tokens, ctx.seed, ctx.name, rank, world
            )

        execute(
            self,
            ctx,
            make_feed=feed,
            valid=valid,
            tokens_in_data=train.num_tokens,
            tokenizer_source=source,
            vocab_size=tokenizer.vocab_size,
            objective=load("objective", "lm")(),
        )

    @staticmethod
    def examples() -> list[Pretrain]:
        optim = load("optimizer", "muonclip")(lr=1e-3)
        return [Pretrain(optim=optim, steps=2, global_batch=2, per_device_batch=1, seq_len=64, valid_every=2, valid_tokens=256)]
