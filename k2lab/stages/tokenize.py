"""Turn a data set's text into token shards with exact counts."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.stage import Dataset, Stage, StageContext, TokenizerRef


@dataclass(frozen=True, kw_only=True)
class Tokenize(Stage):
    """Encode every record as one document, [BOS] text [EOS], into memory-mapped shards with exact counts."""

    kind: ClassVar[str] = "tokens"

    corpus: Dataset = "corpus"
    tokenizer: TokenizerRef = "tokenizer"
    # Tokens per shard file.
    shard_tokens: int = 100_000_000

    def run(self, ctx: StageContext) -> None:
        from k2lab.data import shards
        from k2lab.data.records import text_of
        from k2lab.stages._chats import document_start
        from k2lab.text import tokenizer as text_tokenizer

        source = ctx.parent("tokenizer").path
        tokenizer = text_tokenizer.load(source)
        start = document_start(tokenizer)
        corpus = ctx.parent("corpus")
        total = sum(corpus.manifest.get("counts", {}).values()) or None
        counts: dict[str, Any] = {}
        done, last = 0, 0.0
        for split in ("train", "valid"):
            writer = shards.TokenWriter(
                ctx.work, split, tokenizer.vocab_size, shard_tokens=self.shard_tokens, tokenizer=tokenizer.fingerprint()
            )
            for batch in _batches(shards.read_records(corpus.path, split), 512):
                texts = [text_of(record) for record in batch]
                for record, text, ids in zip(batch, texts, tokenizer.encode_batch(texts), strict=True):
                    tokens = [start, *ids, tokenizer.eos_id]
                    writer.add(
                        tokens,
                        key=record["key"],
                        text_bytes=len(text.encode()),
                        domain=record.get("domain") or record["source"],
                        source=record["source"],
                    )
                done += len(batch)
                if time.perf_counter() - last > 0.5:
                    ctx.events.emit("progress", done=done, total=total, unit="documents")
                    last = time.perf_counter()
            counts[split] = writer.close()
        ctx.events.emit("progress", done=done, total=done, unit="documents")
        shutil.copytree(source, ctx.work / "tokenizer", ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
        ctx.facts["counts"] = counts
        ctx.facts["fingerprint"] = tokenizer.fingerprint()

    @staticmethod
    def examples() -> list[Tokenize]:
        return [Tokenize()]


def _batches(items: Any, size: int):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
