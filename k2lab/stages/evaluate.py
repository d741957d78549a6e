"""Measure models on held-out text, held-out answers and tasks, and say what each training stage bought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import CheckpointRef, Dataset, RunFlag, Slot, Stage, StageContext, Tokens
from k2lab.stages._task_groups import TaskGroup

if TYPE_CHECKING:
    from k2lab.eval.measured import Metrics

BITS = "bits_per_byte"
TASK_FIELDS = ("instructions", "task_data")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Bits per byte, response loss, verified tasks (avg@k, 95 % intervals) and samples; plain prompts, greedy by default.

    Writes `results.json`: every model beside what it was trained from, and students beside their teachers. Times go into a
    `timings.json` of the same form: they are the one thing here that differs from run to run.
    """

    kind: ClassVar[str] = "report"
    version: ClassVar[int] = 3
    uses_model: ClassVar[bool] = True

    # What to measure, in the order of training; each is compared with what it was trained from.
    models: list[CheckpointRef]
    # Measure the untrained model too, as the "before" of a model that began from nothing.
    untrained: bool = True
    # Held-out text, and the count tables (unigram, bigram, trigram) that stand beside the models.
    tokens: Tokens | None = None
    # Measured are so many of its documents, drawn once for all models and count tables (0 = all).
    text_documents: int = 0
    # Held-out instructions for response loss and tasks.
    instructions: Dataset | None = None
    # Further data sets whose held-out records tasks are made from (records with an answer are tasks).
    task_data: list[Dataset] = field(default_factory=tuple)  # type: ignore[assignment]
    # Tasks asked with the settings below (k, temperature, max_tokens), and groups of tasks with settings of their own, such as
    # { tasks = [{ type = "answered", limit = 500 }], k = 4, temperature = 1.0, max_tokens = 96, pass_at = [1, 4] }.
    tasks: list[Annotated[Any, Slot("task")]] = field(default_factory=tuple)  # type: ignore[assignment]
    task_groups: list[TaskGroup] = field(default_factory=tuple)  # type: ignore[assignment]
    # Longest piece of a document that is scored at once.
    seq_len: int = 256
    # Samples per task, temperature and token limit; k > 1 needs a temperature.
    k: int = 1
    temperature: float = 0.0
    max_tokens: int = 64
    # Name the best of k samples, too; never shown unless asked for here.
    best_of_n: bool = False
    default_system: bool = False
    # Measure the time that decoding takes per token: so many tokens, greedily, for each of `decode_batch` held-out prompts at
    # once, the same for all models (0 = not measured). The median of 6 repeats; other work on the machine makes it larger.
    decode_tokens: int = 0
    decode_batch: int = 32
    # Prompts whose answers are shown, not scored; more from a file of {"prompt": ...} lines.
    prompts: list[str] = field(default_factory=tuple)  # type: ignore[assignment]
    prompts_jsonl: str | None = None
    batch_tokens: Annotated[int, RunFlag()] = 8192

    def check(self, where: str) -> None:
        if not self.models:
            raise RecipeError("name at least one model to evaluate", where=f"{where}.models")
        if len(set(self.models)) != len(self.models):
            raise RecipeError("a model is named twice", where=f"{where}.models", got=", ".join(self.models))
        if self.text_documents < 0:
            raise RecipeError("must not be negative", where=f"{where}.text_documents", got=self.text_documents)
        if self.decode_tokens < 0 or self.decode_tokens == 1 or self.decode_batch < 1:
            name = "decode_batch" if self.decode_batch < 1 else "decode_tokens"
            allowed = "1 or more" if self.decode_batch < 1 else "2 or more, or 0 for no measurement"
            raise RecipeError("there is nothing to time", where=f"{where}.{name}", got=getattr(self, name), allowed=allowed)
        if self.decode_tokens and self.instructions is None and not self.task_data:
            what = "times are taken on prompts of `instructions` and `task_data`: name a data set"
            raise RecipeError(what, where=f"{where}.decode_tokens")
        self._own_group().check(where)
        for n, group in enumerate(self.task_groups):
            group.check(f"{where}.task_groups[{n}]")
        if (self.tasks or self.task_groups) and self.instructions is None and not self.task_data:
            raise RecipeError(
                "tasks are made from `instructions` and `task_data`: name a data set",
                where=f"{where}.{'tasks' if self.tasks else 'task_groups'}",
            )

    def _own_group(self) -> TaskGroup:
        """The tasks that are asked with the stage's own settings."""
        return TaskGroup(
            tasks=self.tasks, k=self.k, temperature=self.temperature, max_tokens=self.max_tokens, best_of_n=self.best_of_n
        )

    def fingerprint(self) -> str:
        """Identity of the prompts file."""
        from k2lab.core.artifacts import file_sha256

        if self.prompts_jsonl is None:
            return ""
        if not Path(self.prompts_jsonl).is_file():
            raise DataError("there is no such file", where="prompts_jsonl", got=self.prompts_jsonl)
        return file_sha256(Path(self.prompts_jsonl))

    def run(self, ctx: StageContext) -> None:
        from k2lab.eval import measured as measuring
        from k2lab.eval.results import Results
        from k2lab.stages import _students

        self._note_overlap(ctx)
        subjects = list(self._subjects(ctx))
        for other in sorted({ref for group in self.task_groups for ref in group.models} - set(self.models)):
            ctx.events.emit("note", text=f"a group of tasks is for the model {other!r}, which is not measured here")
        results, timings = Results(), Results()
        measured: dict[str, dict[str, Any]] = {}
        for number, (name, artifact, before) in enumerate(subjects):
            ctx.events.emit("progress", done=number, total=len(subjects), unit=f"models ({name})")
            model, tokenizer = self._load(ctx, artifact)
            results.add_model(
                name, stage=name if artifact is not None else None, label=name if artifact is not None else "untrained"
            )
            found = self._measure(ctx, model, tokenizer, name if artifact is not None else None)
            measured[name] = found
            measuring.add(results, name, found["metrics"])
            results.add_samples(name, found["samples"])
            if self.decode_tokens and artifact is not None:
                timings.add_model(name, stage=name, label=name)
                measuring.add(timings, name, self._times(ctx, model, tokenizer))
            if before is not None:
                measuring.add_step(results, (before, measured[before]["metrics"]), (name, found["metrics"]))
        ctx.events.emit("progress", done=len(subjects), total=len(subjects), unit="models")
        self._baselines(ctx, results)
        _students.compare(results, ctx.parents["models"], {name: found["metrics"] for name, found in measured.items()})
        if timings.models:
            timings.write(ctx.work / "timings.json")
        results.write(ctx.work / "results.json")

    def _subjects(self, ctx: StageContext) -> Iterator[tuple[str, Any, str | None]]:
        """(name, artifact or None for the untrained model, name of what it was trained from) in order."""
        names = {artifact.identity: artifact.name for artifact in ctx.parents["models"]}
        fresh = [
            a
            for a in ctx.parents["models"]
            if "start" not in a.manifest.get("parents", {}) and a.manifest.get("type") == "pretrain"
        ]
        if self.untrained and fresh:
            yield "untrained", None, None
        for artifact in ctx.parents["models"]:
            before = _measured_start(artifact, names)
            if before is None and artifact in fresh and self.untrained:
                before = "untrained"
            yield artifact.name, artifact, before

    def _load(self, ctx: StageContext, artifact: Any) -> tuple[Any, Any]:
        from k2lab import specs
        from k2lab.dist import mesh
        from k2lab.models import build
        from k2lab.stages._models import load_model
        from k2lab.text import tokenizer as text_tokenizer

        device = mesh.pick_device(ctx.device)
        if artifact is None:
            first = ctx.parents["models"][0]
            model = build.from_spec(specs.from_recipe(ctx.model), seed=ctx.seed, device=device)
            return model, text_tokenizer.load(first.path)
        return load_model(artifact.path, device=device), text_tokenizer.load(artifact.path)

    def _measure(self, ctx: StageContext, model: Any, tokenizer: Any, name: str | None) -> dict[str, Any]:
        """Metrics and samples of one model; `name` None for the untrained one."""
        metrics: Metrics = {}
        self._text(ctx, model, tokenizer, metrics)
        self._answers(ctx, model, tokenizer, metrics)
        samples = []
        if name is not None:  # an untrained model's answers are noise: the first trained one is where tasks begin
            samples = self._tasks(ctx, model, tokenizer, name, metrics)
        samples = [*self._canned(ctx, model, tokenizer), *samples]
        return {"metrics": metrics, "samples": samples}

    def _text(self, ctx: StageContext, model: Any, tokenizer: Any, metrics: Metrics) -> None:
        from k2lab.data.shards import TokenReader
        from k2lab.eval.bits import document_bits, documents
        from k2lab.eval.measured import Measured

        if self.tokens is None:
            return
        parent = ctx.parent("tokens")
        docs = self._held_out(parent, tokenizer) if parent.manifest.get("fingerprint") != tokenizer.fingerprint() else None
        docs = docs if docs is not None else documents(TokenReader(parent.path, "valid"))
        docs = [docs[place] for place in self._drawn(ctx, len(docs))]
        found = document_bits(model, docs, self.seq_len, tokens_per_batch=self.batch_tokens)
        settings = f"pieces of {self.seq_len} tokens"
        for domain in sorted(set(found.domain)):
            part = found.of(domain)
            metrics[f"{BITS}/{domain}"] = Measured(part.bits_per_byte(), "bits/byte", "lower", settings, part.bits, part.bytes)
        metrics[BITS] = Measured(found.bits_per_byte(), "bits/byte", "lower", settings, found.bits, found.bytes)

    def _drawn(self, ctx: StageContext, count: int) -> list[int]:
        """Which of the held-out documents are measured, the same for every model and count table, in their order."""
        from k2lab.core.rng import rng

        if not 0 < self.text_documents < count:
            return list(range(count))
        return sorted(int(place) for place in rng(ctx.seed, ctx.name, "text_documents").permutation(count)[: self.text_documents])

    @staticmethod
    def _held_out(parent: Any, tokenizer: Any) -> list[Any]:
        """The held-out documents in the tokens of a model that has another tokenizer than the data."""
        from k2lab.data.shards import TokenReader
        from k2lab.eval.bits import Document, documents
        from k2lab.stages._chats import document_start
        from k2lab.text import tokenizer as text_tokenizer

        own = text_tokenizer.load(parent.path / "tokenizer")
        special = set(own.special.values())
        made = []
        for doc in documents(TokenReader(parent.path, "valid")):
            ids = tokenizer.encode(own.decode([int(t) for t in doc.tokens if int(t) not in special]))
            made.append(Document([document_start(tokenizer), *ids, tokenizer.eos_id], doc.num_bytes, doc.key, doc.domain))
        return made

    def _records(self, ctx: StageContext) -> list[dict[str, Any]]:
        from k2lab.data import shards

        return list(shards.read_records(ctx.parent("instructions").path, "valid")) if self.instructions is not None else []

    def _answers(self, ctx: StageContext, model: Any, tokenizer: Any, metrics: Metrics) -> None:
        from k2lab.eval.measured import Measured
        from k2lab.eval.response import Chat, joined, response_loss
        from k2lab.stages._chats import messages_of
        from k2lab.text.chat import render

        if self.instructions is None:
            return
        by_domain: dict[str, list[Any]] = {}
        for record in self._records(ctx):
            rendered = render(messages_of(record), tokenizer, tools=record.get("tools"), default_system=self.default_system)
            if len(rendered.tokens) <= self.seq_len:
                chat = Chat(rendered.tokens, rendered.trained, record["key"])
                by_domain.setdefault(record.get("domain") or record["source"], []).append(chat)
        settings = f"teacher-forced, text tokens of answers in chats of at most {self.seq_len} tokens"
        special = tokenizer.special.values()
        found = {
            f"response_loss/{domain}": response_loss(model, chats, special, self.seq_len, tokens_per_batch=self.batch_tokens)
            for domain, chats in sorted(by_domain.items())
        }
        if len(found) > 1:
            found["response_loss"] = joined(list(found.values()))
        for name, loss in found.items():
            metrics[name] = Measured(loss.per_token(), "nats/token", "lower", settings, loss.nats, loss.tokens)

    def _tasks(self, ctx: StageContext, model: Any, tokenizer: Any, name: str, metrics: Metrics) -> list[dict[str, str]]:
        from k2lab.eval import measured as measuring
        from k2lab.sampling.local import LocalSampler
        from k2lab.stages import _task_groups

        groups = [self._own_group(), *(group for group in self.task_groups if group.asks(name))]
        if not any(group.tasks for group in groups):
            return []
        sampler = LocalSampler(model.hf, tokenizer.pad_id, eos_id=tokenizer.im_end_id)
        records = _task_groups.held_out_records(ctx, TASK_FIELDS)
        found, samples = _task_groups.measure(groups, records, sampler, tokenizer, ctx, default_system=self.default_system)
        measuring.merge(metrics, found)
        return samples

    def _times(self, ctx: StageContext, model: Any, tokenizer: Any) -> Metrics:
        """Seconds per generated token, on the first held-out prompts."""
        from k2lab.eval import speed
        from k2lab.eval.measured import Measured
        from k2lab.gym.tasks.answered import prompt_of
        from k2lab.sampling.local import LocalSampler
        from k2lab.stages._task_groups import held_out_records
        from k2lab.text.chat import render

        asked = [messages for record in held_out_records(ctx, TASK_FIELDS) if (messages := prompt_of(record))]
        chats = [list(messages) for messages in asked[: self.decode_batch]]
        if not chats:
            raise DataError("no held-out record asks anything: there is no prompt to time", where=f"stage.{ctx.name}")
        prompts = [
            render(chat, tokenizer, add_generation_prompt=True, default_system=self.default_system).tokens for chat in chats
        ]
        sampler = LocalSampler(model.hf, tokenizer.pad_id, len(prompts))
        (times,) = speed.decode_times([sampler], [prompts], self.decode_tokens)
        settings = f"greedy, {len(prompts)} answers of {self.decode_tokens} tokens at once"
        return {"decode_time": Measured(speed.middle([1e3 * each for each in times]), "ms/token", "lower", settings, times)}

    def _note_overlap(self, ctx: StageContext) -> None:
        """Says how many held-out tasks of `task_data` share a canonical key with training data."""
        from k2lab.stages._task_groups import disjoint_from_training, held_out_records

        if self.task_data:
            counts = disjoint_from_training(ctx, TASK_FIELDS, held_out_records(ctx, ("task_data",)))
            ctx.facts["disjoint"] = counts
            shared = f"{counts['shared']} of which share a canonical key with training data"
            ctx.events.emit("note", text=f"{counts['held_out']:,} held-out tasks, {shared}")

    def _canned(self, ctx: StageContext, model: Any, tokenizer: Any) -> list[dict[str, str]]:
        from k2lab.core.types import Message, SampleParams
        from k2lab.data.files import read_jsonl
        from k2lab.sampling.local import LocalSampler
        from k2lab.text.chat import render

        prompts = list(self.prompts)
        if self.prompts_jsonl is not None:
            for where, row in read_jsonl(Path(self.prompts_jsonl)):
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                    raise DataError('each line needs {"prompt": "..."}', where=str(where), got=json.dumps(row)[:80])
                prompts.append(row["prompt"])
        if not prompts:
            return []
        sampler = LocalSampler(model.hf, tokenizer.pad_id, eos_id=tokenizer.im_end_id)
        rendered = [
            render([Message.text("user", text)], tokenizer, add_generation_prompt=True, default_system=self.default_system).tokens
            for text in prompts
        ]
        params = SampleParams(max_tokens=self.max_tokens, temperature=self.temperature, seed=ctx.seed)
        done = sampler.sample(rendered, params, [f"prompt {n}" for n in range(len(prompts))])
        return [
            {"prompt": text, "completion": tokenizer.decode(completion.tokens), "stop": completion.stop.value}
            for text, completion in zip(prompts, done, strict=True)
        ]

    def _baselines(self, ctx: StageContext, results: Any) -> None:
        from k2lab.data.ngram import NgramModel
        from k2lab.data.shards import TokenReader

        if self.tokens is None:
            return
        folder = ctx.parent("tokens").path
        train, valid = TokenReader(folder, "train"), TokenReader(folder, "valid")
        # The count tables put their own marks around documents: [BOS] and [EOS] of the stored tokens are left off.
        inner = [valid[i][1:-1] for i in range(len(valid))]
        domains, drawn = [valid.domain(i) for i in range(len(valid))], self._drawn(ctx, len(valid))
        for order, name in ((1, "unigram"), (2, "bigram"), (3, "trigram")):
            table = NgramModel([train[i][1:-1] for i in range(len(train))], train.vocab_size, order)
            for domain in [None, *sorted({domains[i] for i in drawn})]:
                chosen = [i for i in drawn if domain in (None, domains[i])]
                bits = table.bits([inner[i] for i in chosen]) / int(valid.text_bytes[chosen].sum())
                results.add_baseline(f"{name} (Witten-Bell)", BITS if domain is None else f"{BITS}/{domain}", bits)

    @staticmethod
    def examples() -> list[Evaluate]:
        return [Evaluate(models=("pretrain",), tokens="tokenize")]  # type: ignore[arg-type]


def _measured_start(artifact: Any, names: dict[str, str]) -> str | None:
    """The name, in `names` {identity: name}, of the nearest model that this one was trained from, stage by stage; None if none is
    measured. Stages between that are not measured are looked up beside the artifact, where runs keep them."""
    from k2lab.core import artifacts

    here = artifact
    while here is not None and (start := here.manifest.get("parents", {}).get("start")) is not None:
        if start["identity"] in names:
            return names[start["identity"]]
        here = artifacts.beside(here, "start")
    return None
