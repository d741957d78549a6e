"""Train a byte-level BPE tokenizer in Kimi's layout, or take over a user's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from k2lab.core.errors import RecipeError
from k2lab.core.stage import Dataset, Stage, StageContext


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Stage):
    """Train a BPE tokenizer with Kimi's special tokens and chat template, or load one (Kimi's tiktoken files, or HF files)."""

    kind: ClassVar[str] = "tokenizer"

    # The data set whose training part the vocabulary is learnt from.
    corpus: Dataset | None = None
    # Data sets of instructions or chats to learn from, too, role names included: their words become whole tokens.
    chats: list[Dataset] = field(default_factory=tuple)  # type: ignore[assignment]
    # Size including special tokens; must be the model's vocabulary.
    vocab_size: int = 2048
    # Special tokens at the end of the vocabulary, in Kimi K2's order.
    num_special: int = 32
    # Whether two or three digits may become one token, as in Kimi's own vocabulary; without, small models learn sums sooner.
    digit_merges: bool = True
    # A directory with a tokenizer to take over instead of training one.
    path: str | None = None

    def check(self, where: str) -> None:
        if (self.corpus is None) == (self.path is None):
            raise RecipeError("give either `corpus` (train one) or `path` (take one over)", where=where)
        if self.path is not None and self.chats:
            raise RecipeError("a tokenizer that is taken over learns from nothing: leave `chats` out", where=f"{where}.chats")
        if self.path is None and self.vocab_size < 256 + self.num_special:
            raise RecipeError(
                "too small: all 256 bytes and the special tokens must fit",
                where=f"{where}.vocab_size",
                got=self.vocab_size,
                allowed=f"at least {256 + self.num_special}",
            )

    def fingerprint(self) -> str:
        """Identity of the files taken over."""
        from k2lab.core.artifacts import file_sha256

        if self.path is None:
            return ""
        names = ("tokenizer.json", "tokenizer_config.json", "tiktoken.model")
        files = [Path(self.path) / name for name in names]
        return "".join(file_sha256(file) for file in files if file.is_file())

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        if self.path is not None:
            if not Path(self.path).is_dir():
                raise RecipeError(
                    "there is no such directory on this machine",
                    where=f"stage.{ctx.name}.path",
                    got=self.path,
                    next="Give a directory with tokenizer.json or tiktoken.model",
                )
            made = text_tokenizer.load(Path(self.path))
        else:
            ctx.events.emit("progress", done=0, total=1, unit="vocabulary")
            made = text_tokenizer.train_bpe(self._texts(ctx), self.vocab_size, self.num_special, self.digit_merges)
        made.save(ctx.work)
        ctx.facts["vocab_size"] = made.vocab_size
        ctx.facts["fingerprint"] = made.fingerprint()
        ctx.events.emit("progress", done=1, total=1, unit="vocabulary")

    @staticmethod
    def _texts(ctx: StageContext) -> Iterator[str]:
        from k2lab.core.types import Reasoning
        from k2lab.data import shards
        from k2lab.data.records import text_of
        from k2lab.stages._chats import messages_of

        for record in shards.read_records(ctx.parent("corpus").path, "train"):
            yield text_of(record)
        for parent in ctx.parents.get("chats", []):
            for record in shards.read_records(parent.path, "train"):
                for message in messages_of(record):
                    yield message.role
                    yield message.content
                    yield from (part.text for part in message.parts if isinstance(part, Reasoning))

    @staticmethod
    def examples() -> list[Tokenizer]:
        return [Tokenizer(corpus="corpus", vocab_size=512)]
