"""What fine-tuning stages share: records -> samples, replay of earlier data against forgetting, feed, validation and wiring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import Dataset, StageContext
from k2lab.stages._training import Training, execute

Coded = tuple[list[int], list[bool]]  # tokens, and for each whether it is trained
Render = Callable[[dict[str, Any]], Iterator[Coded]]
REPLAY = "replay/"  # goes before the domains of replayed data


@dataclass(frozen=True, kw_only=True)
class FineTuning(Training):
    """Fields of every stage that trains on conversations."""

    # Expected repeats per epoch by domain or source, e.g. { general = 0.3 }; others count 1.
    mixture: dict[str, float] = field(default_factory=dict)
    # A sample longer than seq_len is an error, dropped (and counted), or cut off at the end.
    over_length: Literal["error", "drop", "truncate"] = "error"
    # Put Kimi's default system message before conversations that have none.
    default_system: bool = False


@dataclass(frozen=True, kw_only=True)
class Replaying(FineTuning):
    """Fields of stages that mix earlier data in, so that what was learnt before is not forgotten."""

    uses_model: ClassVar[bool] = False

    # Data sets of earlier stages (conversations, or plain text) of which a part is shown again.
    replay: list[Dataset] = field(default_factory=tuple)  # type: ignore[assignment]
    # Share of an epoch's tokens that comes from `replay`.
    replay_share: float = 0.1

    def check(self, where: str) -> None:
        super().check(where)
        if not 0 < self.replay_share < 1:
            raise RecipeError("must lie between 0 and 1", where=f"{where}.replay_share", got=self.replay_share)


# ---------------------------------------------------------------- records -> samples


def conversation(stage: FineTuning, tokenizer: Any) -> Render:
    """Renders a record as a chat, one sequence per answer where answers have thoughts, else one; trained on the assistant."""
    from k2lab.stages._asking import own_tokens, rendered_answer
    from k2lab.stages._chats import messages_of
    from k2lab.text.chat import render, training_views

    def coded(record: dict[str, Any]) -> Iterator[Coded]:
        if own_tokens(record, ("response_tokens",), tokenizer):  # a model's own tokens are never encoded again
            own = rendered_answer(record, record["response"], record["response_tokens"], tokenizer, stage.default_system)
            yield own.tokens, own.trained
            return
        for view in training_views(messages_of(record)):
            rendered = render(view, tokenizer, tools=record.get("tools"), default_system=stage.default_system)
            yield rendered.tokens, rendered.trained

    return coded


def document_or_conversation(stage: FineTuning, tokenizer: Any) -> Render:
    """As `conversation`, and text records as documents, cut to seq_len, every token but the first trained."""
    from k2lab.data.records import kind_of, text_of
    from k2lab.stages._chats import document_start

    chat = conversation(stage, tokenizer)

    def coded(record: dict[str, Any]) -> Iterator[Coded]:
        if kind_of(record) != "text":
            yield from chat(record)
            return
        tokens = [document_start(tokenizer), *tokenizer.encode(text_of(record)), tokenizer.eos_id]
        # neighbouring pieces share a token, which is context in the second: each token is predicted once
        for begin in range(0, len(tokens) - 1, stage.seq_len - 1):
            part = tokens[begin : begin + stage.seq_len]
            yield part, [False] + [True] * (len(part) - 1)

    return coded


def samples_of(
    stage: FineTuning, ctx: StageContext, records: Iterable[dict[str, Any]], split: str, render: Render, prefix: str = ""
) -> list[Any]:
    """The records' sequences as samples within seq_len, in order; `prefix` goes before their source.

    Raises DataError for a sequence that is too long (where `over_length` says so) and if nothing is left.
    """
    from k2lab.data.samples import chat_sample

    samples, dropped = [], 0
    for record in records:
        for n, (tokens, trained) in enumerate(render(record)):
            if len(tokens) > stage.seq_len:
                if stage.over_length == "error":
                    raise DataError(
                        f"a sample of {len(tokens)} tokens is longer than seq_len = {stage.seq_len}",
                        where=f"stage.{ctx.name}: {record['key']}",
                        next="Raise seq_len, or set over_length to drop or truncate",
                    )
                if stage.over_length == "drop":
                    dropped += 1
                    continue
                tokens, trained = tokens[: stage.seq_len], trained[: stage.seq_len]
            if not any(trained[1:]):
                dropped += 1
                continue
            key = record["key"] if n == 0 else f"{record['key']}@{n}"
            samples.append(chat_sample(tokens, trained, key, prefix + record.get("domain", record.get("source", ""))))
    note_dropped(stage, ctx, dropped, split)
    if not samples:
        raise DataError(f"no {split} sample is left", where=f"stage.{ctx.name}", next="Raise seq_len or look at the data")
    return samples


def note_dropped(stage: FineTuning, ctx: StageContext, dropped: int, split: str) -> None:
    """Says once how many samples were left out."""
    if dropped:
        ctx.events.emit(
            "note", text=f"{dropped} {split} samples without a trained token or over {stage.seq_len} tokens were left out"
        )


def records_of(ctx: StageContext, role: str, split: str) -> Iterator[dict[str, Any]]:
    """The records of the data set, or of all data sets one after the other, in field `role`."""
    from k2lab.data import shards

    parent = ctx.parents.get(role, [])
    for artifact in parent if isinstance(parent, list) else [parent]:
        yield from shards.read_records(artifact.path, split)


def replayed(stage: Replaying, ctx: StageContext, tokenizer: Any) -> list[Any]:
    """Samples of the data sets in `replay`, their sources marked by `REPLAY`; none if there are none."""
    if not stage.replay:
        return []
    render = document_or_conversation(stage, tokenizer)
    return samples_of(stage, ctx, records_of(ctx, "replay", "train"), "replay", render, prefix=REPLAY)


# ---------------------------------------------------------------- samples -> training


def tokens_of(sample: Any) -> int:
    """Tokens of a sample, or of all members of a unit (a tuple of samples that stay together)."""
    return sum(len(one.tokens) for one in sample) if isinstance(sample, tuple) else len(sample.tokens)


def domains_of(samples: list[Any]) -> list[str]:
    """The domain of each sample or unit."""
    return [(sample[0] if isinstance(sample, tuple) else sample).source for sample in samples]


def weights_of(stage: FineTuning, ctx: StageContext, samples: list[Any]) -> dict[str, float]:
    """Repeats per epoch by domain: the recipe's mixture, and such for replayed domains that they make `replay_share` of the
    tokens (their own entries in the mixture weigh them among each other). Raises RecipeError for a domain that is not there."""
    sizes: dict[str, int] = {}
    for domain, sample in zip(domains_of(samples), samples, strict=True):
        sizes[domain] = sizes.get(domain, 0) + tokens_of(sample)
    unknown = set(stage.mixture) - set(sizes)
    if unknown:
        raise RecipeError(
            f"the data has no domain {sorted(unknown)[0]!r}",
            where=f"stage.{ctx.name}.mixture",
            allowed=", ".join(sorted(sizes)),
        )
    shown = {domain: stage.mixture.get(domain, 1.0) * size for domain, size in sizes.items()}
    own = sum(size for domain, size in shown.items() if not domain.startswith(REPLAY))
    again = sum(shown.values()) - own
    weights = dict(stage.mixture)
    if again:
        assert isinstance(stage, Replaying)
        factor = stage.replay_share / (1 - stage.replay_share) * own / again
        weights |= {domain: stage.mixture.get(domain, 1.0) * factor for domain in sizes if domain.startswith(REPLAY)}
    return weights


def fine_tune(
    stage: FineTuning,
    ctx: StageContext,
    tokenizer: Any,
    source: Any,
    *,
    train: list[Any],
    held_out: list[Any],
    objective: Any,
    model: Any = None,
) -> None:
    """Trains on `train` (samples, or units of samples that stay in one row) in the mixture's order, validates on `held_out`, and
    leaves a model directory with the tokenizer of the folder `source`. `model` is the spec of a fresh model, if it is one."""
    from k2lab.data.feed import PackedFeed
    from k2lab.data.mixture import epoch_order
    from k2lab.data.samples import valid_batches
    from k2lab.text.template import chat_template

    weights, domains = weights_of(stage, ctx, train), domains_of(train)

    def order(epoch: int) -> Any:
        return epoch_order(ctx.seed, ctx.name, epoch, domains, weights)

    def feed(rank: int, world: int) -> PackedFeed:
        return PackedFeed(
            train,
            order,
            seq_len=stage.seq_len,
            global_batch=stage.global_batch,
            per_device_batch=stage.per_device_batch,
            fill="whole",
            rank=rank,
            world=world,
        )

    def valid(rank: int, world: int) -> list[Any]:
        size = stage.per_device_batch * stage.seq_len
        return valid_batches(held_out, stage.seq_len, size, stage.valid_tokens, ctx.seed, ctx.name, rank, world)

    execute(
        stage,
        ctx,
        make_feed=feed,
        valid=valid,
        tokens_in_data=int(sum(weights.get(d, 1.0) * tokens_of(sample) for d, sample in zip(domains, train, strict=True))),
        tokenizer_source=source,
        vocab_size=tokenizer.vocab_size,
        objective=objective,
        model_spec=model,
    )
    if ctx.rank == 0 and "<|im_middle|>" in tokenizer.special:
        # Other servers must render chats as this stage did: the template says whether a system message is put in.
        tokenizer.save(ctx.work, chat_template=chat_template(default_system=stage.default_system))
