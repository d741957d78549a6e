"""What stages that make data by asking a model share: prompts from records, answers in a journal, records that keep tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.rng import derive
from k2lab.core.stage import Stage, StageContext
from k2lab.core.types import Message, PlanInput, StopReason, Text

JOURNAL = "answers.jsonl"
# What a made record keeps of the record it was asked from.
KEPT_TAGS = ("source", "domain", "difficulty", "license", "answer", "rewards", "options")


@dataclass(frozen=True, kw_only=True)
class Asking(Stage):
    """Fields of stages that sample answers to the prompts of data sets."""

    kind: ClassVar[str] = "dataset"

    # Which part of the data sets is asked, and how many records at most (0 = all), chosen by key and seed.
    split: Literal["train", "valid"] = "train"
    limit: int = 0
    # Samples per prompt, and how they are drawn.
    k: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    # Most tokens of an answer.
    max_tokens: int = 64
    # Judge by these rewards instead of those that the records name, e.g. ["numeric"]; [] = as the records say.
    rewards: list[str] = field(default_factory=tuple)  # type: ignore[assignment]
    # Put Kimi's default system message before prompts that have none.
    default_system: bool = False
    # Share of prompts (whole groups of them) whose records go into the held-out part.
    valid_share: float = 0.1
    # Answers that are sampled together. Rounding depends on what is in a batch, so it belongs to the stage's identity.
    batch: int = 256

    def check(self, where: str) -> None:
        if self.k < 1 or (self.k > 1 and self.temperature <= 0):
            raise RecipeError("k samples need a temperature above 0, else all are equal", where=f"{where}.k", got=self.k)
        for name in ("max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise RecipeError("must be at least 1", where=f"{where}.{name}", got=getattr(self, name))
        if not 0 < self.valid_share < 1:
            raise RecipeError("must lie between 0 and 1", where=f"{where}.valid_share", got=self.valid_share)

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        notes = [f"{self.k} answers of at most {self.max_tokens} tokens per prompt; how long this takes is not known beforehand"]
        notes.append("the window is taken as 256 tokens of prompt and the answer")
        if not self.limit:
            notes.append("the number of prompts follows from the data (set limit to bound it)")
        return PlanInput(
            stage=name,
            type=self.slot_name,
            kind="sample" if model is not None else "cpu",
            model=model,
            seq_len=256 + self.max_tokens,
            per_device_batch=self.batch,
            gpus=gpus,
            token_target=self.limit * self.k * self.max_tokens or None,
            notes=tuple(notes),
        )


# ---------------------------------------------------------------- prompts


def prompt_of(record: dict[str, Any]) -> tuple[Message, ...]:
    """The conversation up to where the model is to answer. DataError for records that ask nothing."""
    from k2lab.gym.tasks import answered
    from k2lab.text.chat import from_openai

    if "prompt_messages" in record:
        return tuple(from_openai(record["prompt_messages"], where=f"{record.get('key')}: prompt_messages"))
    if isinstance(record.get("question"), str):
        return (Message.text("user", record["question"]),)
    messages = answered.prompt_of(record)
    if not messages:
        raise DataError("the record asks nothing", where=str(record.get("key")), got="keys " + ", ".join(record))
    return messages


def tasks_of(records: Sequence[dict[str, Any]], max_tokens: int, judged: bool, rewards_instead: Sequence[str] = ()) -> list[Any]:
    """A `gym.task.Task` per record, under the record's key; with `judged` each must carry an answer, else none is judged.
    `rewards_instead` take the place of the records' own rewards."""
    from k2lab.data.records import REWARDS, is_task
    from k2lab.gym.task import Task

    tasks = []
    for record in records:
        if judged and not is_task(record):
            raise DataError(
                "the record is no task: nothing says which answer is right",
                where=str(record.get("key")),
                got="keys " + ", ".join(record),
                allowed='records with "answer" (and "rewards", by default ["exact_match"])',
            )
        rewards = tuple(rewards_instead or record.get("rewards") or REWARDS) if judged else ()
        options = record.get("options") or {}
        tasks.append(
            Task(
                key=record["key"],
                messages=prompt_of(record),
                answer=record.get("answer", "") if judged else "",
                rewards=rewards,
                options={name: options[name] for name in rewards if name in options},
                max_tokens=max_tokens,
            )
        )
    return tasks


def asked_records(stage: Asking, ctx: StageContext, role: str) -> list[dict[str, Any]]:
    """The records of the data sets in `role` that are asked; keys differ. DataError if there are none."""
    from k2lab.gym.tasks._records import choose
    from k2lab.stages._fine_tuning import records_of

    found: dict[str, dict[str, Any]] = {}
    for record in records_of(ctx, role, stage.split):
        if record["key"] in found:
            raise DataError("two records have the same key", where=f"stage.{ctx.name}.{role}", got=record["key"])
        found[record["key"]] = record
    if not found:
        raise DataError("there is nothing to ask", where=f"stage.{ctx.name}.{role}")
    return choose(list(found.values()), stage.limit, ctx.seed, ctx.name)


# ---------------------------------------------------------------- answers


def chunks(stage: Asking, records: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The records in the pieces that are sampled together."""
    size = max(1, stage.batch // stage.k)
    for first in range(0, len(records), size):
        yield records[first : first + size]


def judge(task: Any, response: str) -> tuple[float, dict[str, float], str]:
    """(product of the rewards, each by name, what went wrong): a reward that raises or gives no number in [0, 1] counts 0."""
    from k2lab.core.errors import K2Error
    from k2lab.gym.task import judged

    found, error = {}, ""
    for name, reward in task.judges().items():
        try:
            found[name] = judged(task, name, reward, response)
        except Exception as problem:  # a reward may be anybody's code
            found[name] = 0.0
            own = isinstance(problem, K2Error)
            said = str(problem) if own else f"the reward {name} failed: {type(problem).__name__}: {problem}"
            error = error or said
    return (0.0 if error else math.prod(found.values())), found, error


def answer_of(tokens: Sequence[int], stop: str, reward: float, error: str, tokenizer: Any) -> dict[str, Any]:
    """An answer as the journal keeps it: the model's own `tokens`, and `text` without what ends the turn."""
    body = list(tokens[:-1]) if tokens and tokens[-1] == tokenizer.im_end_id else list(tokens)
    return {"text": tokenizer.decode(body), "tokens": list(tokens), "stop": stop, "reward": reward, "error": error}


def from_rollout(rollout: Any, tokenizer: Any) -> dict[str, Any]:
    """A single-turn rollout as an answer; `logprob` is its mean log-probability per token when it was drawn."""
    own = rollout.weight != 0
    made = [int(token) for token in rollout.tokens[own]]
    answer = answer_of(made, rollout.stop.value, rollout.reward, rollout.error, tokenizer)
    return {**answer, "logprob": round(float(rollout.logprobs[own].mean()), 5) if made else 0.0}


def is_whole(answer: dict[str, Any]) -> bool:
    """Whether the answer ended its turn, says something, and nothing went wrong when it was judged."""
    return answer["stop"] == StopReason.EOS.value and bool(answer["text"].strip()) and not answer["error"]


def counted(row: Any, answers: Sequence[dict[str, Any]], keeps: Any, why: Any) -> list[dict[str, Any]]:
    """The answers that `keeps` accepts, counted in a `FunnelRow`; `why(answer)` says why one goes."""
    kept = []
    for answer in answers:
        row.seen += 1
        if keeps(answer):
            row.kept += 1
            kept.append(answer)
            continue
        row.dropped += 1
        if len(row.examples) < 3:
            row.examples.append({"text": answer["text"][:160], "why": why(answer)})
    return kept


# ---------------------------------------------------------------- records


def made_record(record: dict[str, Any], key: str, rewards: Sequence[str] = (), **fields: Any) -> dict[str, Any]:
    """A record made from `record`'s prompt: what it keeps of it, its prompt, and `fields`; `rewards` instead of its own."""
    from k2lab.data.records import group_of, is_task
    from k2lab.text.chat import to_openai

    messages = prompt_of(record)
    made = {"key": key, **{tag: record[tag] for tag in KEPT_TAGS if record.get(tag) is not None}}
    made |= {"group": group_of(record), "prompt": messages[-1].content}
    plain = len(messages) == 1 and messages[0].role == "user" and all(isinstance(part, Text) for part in messages[0].parts)
    if not plain:
        made["prompt_messages"] = to_openai(list(messages))
    if made.get("answer") is not None and not is_task(record):
        del made["answer"]
    if rewards and "answer" in made:
        made["rewards"] = list(rewards)
        made["options"] = {name: value for name, value in made.get("options", {}).items() if name in rewards}
    return {**made, **fields}


def write_parts(stage: Asking, ctx: StageContext, made: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Writes the records into shards, held out by prompt group; the counts. DataError if a part would be empty."""
    from k2lab.data import shards

    parts: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for record in made:
        # Prompts come from one part of a split already: by the same draw, all of their groups would fall on the same side again.
        parts[shards.split_of(record, stage.valid_share, derive(ctx.seed, "answers"))].append(record)
    for split, records in parts.items():
        if not records:
            raise DataError(
                f"the {split} part is empty: {sum(map(len, parts.values()))} records were made in all",
                where=f"stage.{ctx.name}",
                next="Ask more prompts, draw more samples per prompt (k), or change valid_share",
            )
        shards.write_records(ctx.work, records, split)
    return {split: len(records) for split, records in parts.items()}


def keep_tokenizer(ctx: StageContext, tokenizer: Any) -> None:
    """Puts the tokenizer whose ids the records hold beside them, and its fingerprint into the facts."""
    tokenizer.save(ctx.work / "tokenizer")
    ctx.facts["tokenizer"] = tokenizer.fingerprint()


def own_tokens(record: dict[str, Any], names: Sequence[str], tokenizer: Any) -> bool:
    """Whether the record holds the ids that a model with this very tokenizer produced, in the fields `names`."""
    return record.get("tokenizer") == tokenizer.fingerprint() and all(isinstance(record.get(name), list) for name in names)


def rendered_answer(record: dict[str, Any], text: str, tokens: Sequence[int] | None, tokenizer: Any, default_system: bool) -> Any:
    """Prompt and one answer as `text.chat.Rendered`: the model's own tokens behind the rendered prompt if given, else rendered
    from `text`."""
    from k2lab.stages._chats import written
    from k2lab.text.chat import Rendered, render

    prompt = list(prompt_of(record))
    tools = record.get("tools")
    if tokens is None:
        return render([*prompt, written(text)], tokenizer, tools=tools, default_system=default_system)
    head = render(prompt, tokenizer, tools=tools, add_generation_prompt=True, default_system=default_system).tokens
    return Rendered([*head, *tokens], [False] * len(head) + [True] * len(tokens))
