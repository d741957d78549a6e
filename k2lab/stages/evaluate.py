"""Measure models on held-out text, held-out answers and tasks, and say what each training stage bought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import CheckpointRef, Dataset, RunFlag, Slot, Stage, StageContext, Tokens

BITS = "bits_per_byte"
SHAPES = {"ends with <|im_end|>": "eos_rate", "non-empty": "non_empty", "no other special token": "no_other_special"}


@dataclass(frozen=True)
class _Measured:
    """One metric of one model: its estimate, how to read it, and the per-item values that paired changes need
    (`bottom` None: a mean of `top`; else a ratio of sums)."""

    estimate: Any
    unit: str
    better: Literal["lower", "higher"]
    settings: str
    top: Any
    bottom: Any = None

    def change_from(self, old: _Measured | None) -> Any:
        """The paired change since `old`, or None where the two were not measured on the same items."""
        from k2lab.eval import stats

        if old is None or len(old.top) != len(self.top):
            return None
        if self.bottom is None:
            return stats.paired_change(old.top, self.top)
        if (old.bottom != self.bottom).any():  # another tokenizer: counts of tokens differ
            return None
        return stats.paired_ratio_change(old.top, self.top, self.bottom, 0, "change")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Bits per byte, response loss, verified tasks (avg@k, 95 % intervals) and samples; non-thinking, greedy by default."""

    kind: ClassVar[str] = "report"
    version: ClassVar[int] = 1
    uses_model: ClassVar[bool] = True

    # What to measure, in the order of training; each is compared with what it was trained from.
    models: list[CheckpointRef]
    # Measure the untrained model too, as the "before" of a model that began from nothing.
    untrained: bool = True
    # Held-out text, and the count tables (unigram, bigram, trigram) that stand beside the models.
    tokens: Tokens | None = None
    # Held-out instructions for response loss and tasks.
    instructions: Dataset | None = None
    tasks: list[Annotated[Any, Slot("task")]] = field(default_factory=tuple)  # type: ignore[assignment]
    # Longest piece of a document that is scored at once.
    seq_len: int = 256
    # Samples per task, temperature and token limit; k > 1 needs a temperature.
    k: int = 1
    temperature: float = 0.0
    max_tokens: int = 64
    # Name the best of k samples, too; never shown unless asked for here.
    best_of_n: bool = False
    default_system: bool = False
    # Prompts whose answers are shown, not scored; more from a file of {"prompt": ...} lines.
    prompts: list[str] = field(default_factory=tuple)  # type: ignore[assignment]
    prompts_jsonl: str | None = None
    batch_tokens: Annotated[int, RunFlag()] = 8192

    def check(self, where: str) -> None:
        if not self.models:
            raise RecipeError("name at least one model to evaluate", where=f"{where}.models")
        if len(set(self.models)) != len(self.models):
            raise RecipeError("a model is named twice", where=f"{where}.models", got=", ".join(self.models))
        if self.k < 1 or (self.k > 1 and self.temperature <= 0):
            raise RecipeError("k samples need a temperature above 0, else all are equal", where=f"{where}.k", got=self.k)
        if self.best_of_n and self.k == 1:
            raise RecipeError("best_of_n needs k > 1", where=f"{where}.best_of_n")
        if self.tasks and self.instructions is None:
            raise RecipeError("tasks are made from `instructions`: name that data set", where=f"{where}.tasks")

    def fingerprint(self) -> str:
        """Identity of the prompts file."""
        from k2lab.core.artifacts import file_sha256

        if self.prompts_jsonl is None:
            return ""
        if not Path(self.prompts_jsonl).is_file():
            raise DataError("there is no such file", where="prompts_jsonl", got=self.prompts_jsonl)
        return file_sha256(Path(self.prompts_jsonl))

    def run(self, ctx: StageContext) -> None:
        from k2lab.eval.results import Results

        subjects = list(self._subjects(ctx))
        results = Results()
        measured: dict[str, dict[str, Any]] = {}
        for number, (name, artifact, before) in enumerate(subjects):
            ctx.events.emit("progress", done=number, total=len(subjects), unit=f"models ({name})")
            model, tokenizer = self._load(ctx, artifact)
            results.add_model(
                name, stage=name if artifact is not None else None, label=name if artifact is not None else "untrained"
            )
            found = self._measure(ctx, model, tokenizer, untrained=artifact is None)
            measured[name] = found
            for metric, item in found["metrics"].items():
                results.add_metric(name, metric, item.estimate, unit=item.unit, better=item.better, settings=item.settings)
            results.add_samples(name, found["samples"])
            if before is not None:
                results.add_step(before, name)
                for metric, item in found["metrics"].items():
                    change = item.change_from(measured[before]["metrics"].get(metric))
                    if change is not None:
                        results.add_change(before, name, metric, change)
        ctx.events.emit("progress", done=len(subjects), total=len(subjects), unit="models")
        self._baselines(ctx, results)
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
            start = artifact.manifest.get("parents", {}).get("start")
            if start is not None:
                yield artifact.name, artifact, names.get(start["identity"])
            else:
                yield artifact.name, artifact, "untrained" if self.untrained and artifact in fresh else None

    def _load(self, ctx: StageContext, artifact: Any) -> tuple[Any, Any]:
        from k2lab import specs
        from k2lab.dist import mesh
        from k2lab.models import build
        from k2lab.text import tokenizer as text_tokenizer

        device = mesh.pick_device(ctx.device)
        if artifact is None:
            first = ctx.parents["models"][0]
            model = build.from_spec(specs.from_recipe(ctx.model), seed=ctx.seed, device=device)
            return model, text_tokenizer.load(first.path)
        return build.load(artifact.path, device=device), text_tokenizer.load(artifact.path)

    def _measure(self, ctx: StageContext, model: Any, tokenizer: Any, untrained: bool) -> dict[str, Any]:
        metrics: dict[str, _Measured] = {}
        self._text(ctx, model, tokenizer, metrics)
        self._answers(ctx, model, tokenizer, metrics)
        samples = []
        if not untrained:  # an untrained model's answers are noise: the first trained one is where tasks begin
            samples = self._tasks(ctx, model, tokenizer, metrics)
        samples = [*self._canned(ctx, model, tokenizer), *samples]
        return {"metrics": metrics, "samples": samples}

    def _text(self, ctx: StageContext, model: Any, tokenizer: Any, metrics: dict[str, _Measured]) -> None:
        from k2lab.data.shards import TokenReader
        from k2lab.eval.bits import document_bits, documents

        if self.tokens is None:
            return
        parent = ctx.parent("tokens")
        docs = self._held_out(parent, tokenizer) if parent.manifest.get("fingerprint") != tokenizer.fingerprint() else None
        docs = docs if docs is not None else documents(TokenReader(parent.path, "valid"))
        found = document_bits(model, docs, self.seq_len, tokens_per_batch=self.batch_tokens)
        settings = f"pieces of {self.seq_len} tokens"
        for domain in sorted(set(found.domain)):
            part = found.of(domain)
            metrics[f"{BITS}/{domain}"] = _Measured(part.bits_per_byte(), "bits/byte", "lower", settings, part.bits, part.bytes)
        metrics[BITS] = _Measured(found.bits_per_byte(), "bits/byte", "lower", settings, found.bits, found.bytes)

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

    def _answers(self, ctx: StageContext, model: Any, tokenizer: Any, metrics: dict[str, _Measured]) -> None:
        from k2lab.eval.response import Chat, response_loss
        from k2lab.stages._chats import messages_of
        from k2lab.text.chat import render

        if self.instructions is None:
            return
        by_domain: dict[str, list[Any]] = {}
        for record in self._records(ctx):
            rendered = render(messages_of(record), tokenizer, default_system=self.default_system)
            if len(rendered.tokens) <= self.seq_len:
                chat = Chat(rendered.tokens, rendered.trained, record["key"])
                by_domain.setdefault(record.get("domain") or record["source"], []).append(chat)
        settings = f"teacher-forced, text tokens of answers in chats of at most {self.seq_len} tokens"
        groups = sorted((f"response_loss/{domain}", chats) for domain, chats in by_domain.items())
        if len(groups) > 1:
            groups.append(("response_loss", [chat for _, chats in groups for chat in chats]))
        for name, chats in groups:
            found = response_loss(model, chats, tokenizer.special.values(), self.seq_len, tokens_per_batch=self.batch_tokens)
            loss = _Measured(found.per_token(), "nats/token", "lower", settings, found.nats, found.tokens)
            metrics[name] = loss

    def _tasks(self, ctx: StageContext, model: Any, tokenizer: Any, metrics: dict[str, _Measured]) -> list[dict[str, str]]:
        from k2lab.eval import stats
        from k2lab.eval.tasks import run_tasks
        from k2lab.sampling.local import LocalSampler

        samples: list[dict[str, str]] = []
        sampler = LocalSampler(model.hf, tokenizer.pad_id, eos_id=tokenizer.im_end_id)
        for item in self.tasks:
            name = type(item).slot_name
            run = run_tasks(
                item.tasks(self._records(ctx)),
                sampler,
                tokenizer,
                k=self.k,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=ctx.seed,
                default_system=self.default_system,
            )
            metrics[f"{name}/avg@{self.k}"] = _Measured(run.avg_at_k(), "fraction", "higher", run.settings, run.scores_PK.mean(1))
            if self.best_of_n:
                best = stats.best_of_n(run.scores_PK)
                metrics[f"{name}/best of {self.k}"] = _Measured(best, "fraction", "higher", run.settings, run.scores_PK.max(1))
            for shape, table in run.shape_PK.items():
                value = stats.avg_at_k(table)
                metrics[f"{name}/{SHAPES[shape]}"] = _Measured(value, "fraction", "higher", run.settings, table.mean(1))
            samples += run.samples(4)
        return samples

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
        domains = [valid.domain(i) for i in range(len(valid))]
        for order, name in ((1, "unigram"), (2, "bigram"), (3, "trigram")):
            table = NgramModel([train[i][1:-1] for i in range(len(train))], train.vocab_size, order)
            for domain in [None, *sorted(set(domains))]:
                chosen = [i for i, own in enumerate(domains) if domain in (None, own)]
                bits = table.bits([inner[i] for i in chosen]) / int(valid.text_bytes[chosen].sum())
                results.add_baseline(f"{name} (Witten-Bell)", BITS if domain is None else f"{BITS}/{domain}", bits)

    @staticmethod
    def examples() -> list[Evaluate]:
        return [Evaluate(models=("pretrain",), tokens="tokenize")]  # type: ignore[arg-type]
