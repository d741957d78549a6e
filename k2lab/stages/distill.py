"""Distillation: a student learns a teacher's answers and, with the same vocabulary, its distribution at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, StageContext, TokenizerRef
from k2lab.core.types import PlanInput
from k2lab.stages._fine_tuning import Replaying, conversation, fine_tune, note_dropped, records_of, replayed, samples_of


@dataclass(frozen=True, kw_only=True)
class Distill(Replaying):
    """Train a student on a teacher's answers: cross-entropy, plus KL on the teacher's stored top-k where vocabularies are equal.

    The student is a checkpoint (`start`), or a fresh model of any class (`student`), e.g. a dense one for a mixture of experts.
    """

    version: ClassVar[int] = 1

    # The student: a checkpoint to go on from, or the spec of a fresh model (a name, or { spec = ..., num_layers = ... }).
    start: CheckpointRef | None = None
    student: str | dict[str, Any] | None = None
    # What a teacher_data stage wrote; with kl_weight = 0 any data set of conversations.
    data: Dataset = "teacher_data"
    # The tokenizer of a fresh student; by default the teacher's, which lies beside its answers.
    tokenizer: TokenizerRef | None = None
    # Weights of the two losses; each is a mean over its own tokens. KL needs top-k in `data` and the teacher's vocabulary.
    lm_weight: float = 1.0
    kl_weight: float = 1.0

    def check(self, where: str) -> None:
        super().check(where)
        if (self.start is None) == (self.student is None):
            raise RecipeError("say who learns: either `start` (a checkpoint) or `student` (a fresh model's spec)", where=where)
        if self.start is not None and self.tokenizer is not None:
            raise RecipeError("a checkpoint has its own tokenizer: leave `tokenizer` out", where=f"{where}.tokenizer")
        if self.lm_weight < 0 or self.kl_weight < 0 or not (self.lm_weight or self.kl_weight):
            raise RecipeError(
                "one weight must be positive, none negative",
                where=where,
                got=f"lm_weight={self.lm_weight}, kl_weight={self.kl_weight}",
            )
        if self.over_length == "truncate" and self.kl_weight:
            raise RecipeError("answers with a teacher's rows are not cut off: use drop", where=f"{where}.over_length")
        if self.student is not None:
            self.spec()

    def spec(self) -> Any:
        """The fresh student's ModelSpec, None if the student is a checkpoint."""
        from k2lab import specs

        if self.student is None:
            return None
        try:
            return specs.from_recipe(self.student)
        except RecipeError as error:
            error.where = (error.where or "model").replace("model", "student", 1)
            raise

    def fingerprint(self) -> str:
        """Identity of the student's shape: a changed spec makes a new artifact."""
        import hashlib
        import json

        spec = self.spec()
        if spec is None:
            return ""
        table = {**spec.config(), "local_heads": list(spec.local_heads)}
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        return super().plan_inputs(name, self.spec() or model, gpus)

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        source = self._tokenizer_folder(ctx)
        tokenizer = text_tokenizer.load(source)
        top_k = self._top_k(ctx, tokenizer) if self.kl_weight else 0
        make = self._with_teacher(ctx, tokenizer, top_k) if top_k else self._answers_only(ctx, tokenizer)
        train, held_out = make("train"), make("valid")
        again = replayed(self, ctx, tokenizer)
        if top_k:
            from k2lab.data.samples import no_teacher_sample

            again = [no_teacher_sample(sample, top_k) for sample in again]
        fine_tune(
            self,
            ctx,
            tokenizer,
            source,
            train=train + again,
            held_out=held_out,
            objective=load("objective", "distill")(lm_weight=self.lm_weight, kl_weight=self.kl_weight),
            model=self.spec(),
        )

    # ------------------------------------------------------------ which tokens

    def _tokenizer_folder(self, ctx: StageContext) -> Path:
        if self.start is not None:
            return ctx.parent("start").path
        if self.tokenizer is not None:
            return ctx.parent("tokenizer").path
        folder = ctx.parent("data").path / "tokenizer"
        if not folder.is_dir():
            raise RecipeError(
                "a fresh student needs a tokenizer, and the teacher's does not lie beside its answers",
                where=f"stage.{ctx.name}.tokenizer",
                next="Name a tokenizer stage or a checkpoint's folder in `tokenizer`",
            )
        return folder

    def _top_k(self, ctx: StageContext, tokenizer: Any) -> int:
        """How many of the teacher's tokens are stored. RecipeError where KL cannot be had: none are, or they are other tokens."""
        manifest = ctx.parent("data").manifest
        top_k, theirs = manifest.get("top_k", 0), manifest.get("tokenizer")
        where = f"stage.{ctx.name}.kl_weight"
        hint = "Set kl_weight = 0 to learn from the answers' text alone"
        if not top_k:
            raise RecipeError(
                "KL needs the teacher's log-probabilities, and the data holds none",
                where=where,
                next=f"Give the teacher_data stage a top_k (for example 16). {hint}, which needs none",
            )
        if theirs != tokenizer.fingerprint():
            raise RecipeError(
                "KL compares probabilities token by token, and teacher and student have different vocabularies",
                where=where,
                got=f"tokenizer {tokenizer.fingerprint()[:12]}",
                allowed=f"the teacher's, {str(theirs)[:12]}",
                next=f"{hint}, which works across vocabularies",
            )
        if bool(manifest.get("default_system")) != self.default_system:
            raise RecipeError(
                "the teacher saw other prompts than the student would: default_system differs",
                where=f"stage.{ctx.name}.default_system",
                got=self.default_system,
                allowed=str(bool(manifest.get("default_system"))).lower(),
            )
        return int(top_k)

    # ------------------------------------------------------------ samples

    def _answers_only(self, ctx: StageContext, tokenizer: Any) -> Callable[[str], list[Any]]:
        from k2lab.stages.reasoning_sft import check_trace

        render = conversation(self, tokenizer)

        def coded(record: dict[str, Any]) -> Iterator[Any]:
            check_trace(record)
            return render(record)

        return lambda split: samples_of(self, ctx, records_of(ctx, "data", split), split, coded)

    def _with_teacher(self, ctx: StageContext, tokenizer: Any, top_k: int) -> Callable[[str], list[Any]]:
        """Samples with the streams of the teacher's top-k; answers without rows are learnt as text."""
        import numpy as np

        from k2lab.data.samples import chat_sample, no_teacher_sample, teacher_sample
        from k2lab.stages._asking import rendered_answer
        from k2lab.stages._teacher import Teacher

        teacher = Teacher(ctx.parent("data").path)

        def make(split: str) -> list[Any]:
            samples, dropped = [], 0
            for record in records_of(ctx, "data", split):
                own = record.get("response_tokens")
                coded = rendered_answer(record, record["response"], own, tokenizer, self.default_system)
                length = len(coded.tokens)
                if length > self.seq_len:
                    if self.over_length == "error":
                        raise DataError(
                            f"a sample of {length} tokens is longer than seq_len = {self.seq_len}",
                            where=f"stage.{ctx.name}: {record['key']}",
                            next="Raise seq_len, or set over_length to drop",
                        )
                    dropped += 1
                    continue
                source = record.get("domain", record.get("source", ""))
                sample = chat_sample(coded.tokens, coded.trained, record["key"], source)
                if own is None or "top" not in record:
                    samples.append(no_teacher_sample(sample, top_k))
                    continue
                ids_TK, logprobs_TK = np.zeros((length, top_k), np.int64), np.zeros((length, top_k), np.float32)
                ids_TK[-len(own) :], logprobs_TK[-len(own) :] = teacher.rows(record)
                samples.append(teacher_sample(sample, ids_TK, logprobs_TK))
            note_dropped(self, ctx, dropped, split)
            if not samples:
                raise DataError(f"no {split} sample is left", where=f"stage.{ctx.name}", next="Raise seq_len or look at the data")
            return samples

        return make

    @staticmethod
    def examples() -> list[Distill]:
        return [
            Distill(
                student="tiny-qwen2",
                optim=load("optimizer", "adamw")(lr=1e-3),
                steps=2,
                global_batch=2,
                per_device_batch=1,
                seq_len=128,
                valid_every=2,
                valid_tokens=256,
            )
        ]
