"""A teacher's answers as training data: from a model of the run, or from an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.core.stage import CheckpointRef, Dataset, StageContext, TokenizerRef
from k2lab.core.types import PlanInput
from k2lab.stages import _asking
from k2lab.stages._asking import Asking
from k2lab.stages._endpoint import Endpoint


@dataclass(frozen=True, kw_only=True)
class TeacherData(Asking):
    """Sample a teacher's answers (with its top-k log-probabilities) to prompts, keep the whole ones, or only verified ones.

    Writes {"prompt","response"} records, thoughts kept as `<think>...</think>`, with the teacher's own tokens where they are
    known; `teacher/` with top-k ids and log-probabilities aligned with these; `answers.jsonl`, every answer with its reward.
    """

    version: ClassVar[int] = 1

    # Who answers: a checkpoint of the run, or an endpoint { type = "openai", url = ..., model = ..., key_env = ... }.
    teacher: CheckpointRef | None = None
    endpoint: Endpoint | None = None
    # The tokenizer of an endpoint's model, if its token ids are to be used.
    tokenizer: TokenizerRef | None = None
    # Data sets whose prompts are asked; records of any kind but text.
    prompts: list[Dataset]
    k: int = 1
    temperature: float = 0.7
    # Keep the teacher's log-probabilities of so many most probable tokens per position (0 = none).
    top_k: int = 0
    top_precision: Literal["fp16", "fp32"] = "fp16"
    # Keep only answers that the tasks' rewards judge to be worth at least min_reward.
    verify: bool = False
    min_reward: float = 1.0
    # Different answers kept per prompt at most (0 = all).
    keep: int = 0

    def check(self, where: str) -> None:
        super().check(where)
        if (self.teacher is None) == (self.endpoint is None):
            raise RecipeError("say who answers: either `teacher` or `endpoint`", where=where)
        if not self.prompts:
            raise RecipeError("name at least one data set of prompts", where=f"{where}.prompts")
        if self.rewards and not self.verify:
            raise RecipeError("rewards judge nothing without verify = true", where=f"{where}.rewards")
        if self.top_k < 0 or self.keep < 0:
            raise RecipeError("must not be negative", where=f"{where}.{'top_k' if self.top_k < 0 else 'keep'}")
        if self.endpoint is not None and self.top_k and not (self.endpoint.token_ids and self.tokenizer):
            raise RecipeError(
                "an endpoint's top-k needs token ids, and the tokenizer that they belong to",
                where=f"{where}.top_k",
                allowed="endpoint.token_ids = true and `tokenizer`, with a server that gives ids; or top_k = 0",
            )

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        if self.endpoint is None:
            return super().plan_inputs(name, model, gpus)
        notes = (f"answers come from {self.endpoint.model} over HTTP; time and price are the server's",)
        return PlanInput(stage=name, type=self.slot_name, kind="cpu", notes=notes)

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        records = _asking.asked_records(self, ctx, "prompts")
        tasks = _asking.tasks_of(records, self.max_tokens, judged=self.verify, rewards_instead=self.rewards)
        if self.endpoint is None:
            tokenizer = text_tokenizer.load(ctx.parent("teacher").path)
            answers = self._from_model(ctx, tokenizer, tasks)
        else:
            tokenizer = text_tokenizer.load(ctx.parent("tokenizer").path) if self.tokenizer else None
            answers = self._from_endpoint(ctx, tokenizer, tasks)
            ctx.facts["licences"] = [self.endpoint.license] if self.endpoint.license else []
        made = self._made(ctx, tokenizer, records, answers)
        ctx.facts["counts"] = _asking.write_parts(self, ctx, made)
        ctx.facts["top_k"] = self.top_k
        ctx.facts["default_system"] = self.default_system
        if tokenizer is not None:
            _asking.keep_tokenizer(ctx, tokenizer)

    # ------------------------------------------------------------ who answers

    def _from_model(self, ctx: StageContext, tokenizer: Any, tasks: list[Any]) -> list[list[dict[str, Any]]]:
        """k answers per task; a piece that is in the journal also has its shard of top-k."""
        from k2lab.core.types import SampleParams
        from k2lab.dist import mesh
        from k2lab.gym.rollouts import roll_out
        from k2lab.sampling.local import LocalSampler
        from k2lab.stages._journal import Journal
        from k2lab.stages._models import load_model
        from k2lab.stages._teacher import Remembering, write_shard

        params = SampleParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, top_k_logprobs=self.top_k
        )
        prefix = f"{ctx.name}/"
        found: list[list[dict[str, Any]]] = []
        local = None
        with Journal(ctx.work / _asking.JOURNAL) as journal:
            for number, piece in enumerate(_asking.chunks(self, tasks)):
                if number >= len(journal.entries):
                    if local is None:
                        model = load_model(ctx.parent("teacher").path, device=mesh.pick_device(ctx.device))
                        local = LocalSampler(model.hf, tokenizer.pad_id, self.batch, eos_id=tokenizer.im_end_id)
                    sampler = Remembering(local)
                    groups = roll_out(
                        piece,
                        sampler,
                        tokenizer,
                        k=self.k,
                        params=params,
                        seed=ctx.seed,
                        default_system=self.default_system,
                        keys_prefix=prefix,
                    )
                    entry = [
                        {"key": group.task, "answers": [_asking.from_rollout(one, tokenizer) for one in group.rollouts]}
                        for group in groups
                    ]
                    if self.top_k:
                        flat = [answer for item in entry for answer in item["answers"]]
                        tops = [sampler.top[f"{prefix}{group.task}/{n}"] for group in groups for n in range(self.k)]
                        assert all(len(top) == len(answer["tokens"]) for top, answer in zip(tops, flat, strict=True))
                        first = write_shard(ctx.work, number, tops, self.top_k, self.top_precision)
                        for answer, row in zip(flat, first, strict=True):
                            answer["top"] = [number, row]
                    journal.add(entry)
                found += [item["answers"] for item in journal.entries[number]]
                ctx.events.emit("progress", done=len(found), total=len(tasks), unit="prompts")
        return found

    def _from_endpoint(self, ctx: StageContext, tokenizer: Any, tasks: list[Any]) -> list[list[dict[str, Any]]]:
        """k answers per task; finished requests come out of the journal, failed ones are asked again."""
        from k2lab.core.types import SampleParams
        from k2lab.stages._journal import Journal
        from k2lab.text.chat import to_openai

        assert self.endpoint is not None
        endpoint = self.endpoint.connect(f"stage.{ctx.name}.endpoint")
        params = SampleParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=ctx.seed,
            top_k_logprobs=self.top_k,
        )
        by_key = {f"{task.key}/{n}": task for task in tasks for n in range(self.k)}
        failed: dict[str, str] = {}
        with Journal(ctx.work / _asking.JOURNAL) as journal:
            have = {entry["key"]: entry for entry in journal.entries}
            todo = [key for key in by_key if key not in have]
            requests = ((key, to_openai(list(by_key[key].messages))) for key in todo)
            for key, answer in endpoint.ask_all(requests, params):
                if answer.passing:
                    failed[key] = answer.error
                    continue
                have[key] = {"key": key, **self._judged(by_key[key], answer, tokenizer)}
                journal.add(have[key])
                ctx.events.emit("progress", done=len(have), total=len(by_key), unit="requests")
        if failed:
            raise MachineError(
                f"{len(failed)} of {len(by_key)} requests failed after {self.endpoint.retries + 1} tries each",
                where=f"stage.{ctx.name}",
                got=next(iter(failed.values())),
                next="Give the same command again: finished requests are kept, only these are asked again",
            )
        answers = [[have[f"{task.key}/{n}"] for n in range(self.k)] for task in tasks]
        self._shards_of(ctx, answers)
        return answers

    def _judged(self, task: Any, answer: Any, tokenizer: Any) -> dict[str, Any]:
        """An endpoint's answer as the journal keeps it."""
        text = f"<think>{answer.reasoning}</think>{answer.text}" if answer.reasoning else answer.text
        reward, _, error = _asking.judge(task, text) if task.rewards and not answer.error else (0.0, {}, "")
        kept = {"text": text, "stop": answer.stop.value, "reward": reward, "error": answer.error or error}
        if answer.tokens and tokenizer is not None:
            kept["tokens"] = list(answer.tokens)
            if self.top_k:
                # -inf is no JSON: servers mark what they leave out by very small numbers
                kept["top_rows"] = [[list(ids), [max(lp, -1e4) for lp in lps]] for ids, lps in answer.top]
        elif answer.logprobs:
            kept["logprobs"] = [round(value, 6) for value in answer.logprobs]
        return kept

    def _shards_of(self, ctx: StageContext, answers: list[list[dict[str, Any]]]) -> None:
        """Writes the top-k that came with an endpoint's answers, and notes where each answer's rows are."""
        from k2lab.stages._teacher import write_shard

        flat = [answer for own in answers for answer in own if len(answer.get("top_rows", ())) == len(answer.get("tokens", (0,)))]
        size = 1024
        for shard, begin in enumerate(range(0, len(flat), size)):
            part = flat[begin : begin + size]
            first = write_shard(ctx.work, shard, [answer["top_rows"] for answer in part], self.top_k, self.top_precision)
            for answer, row in zip(part, first, strict=True):
                answer["top"] = [shard, row]

    # ------------------------------------------------------------ what is kept

    def _made(self, ctx: StageContext, tokenizer: Any, records: list[dict[str, Any]], answers: Any) -> Iterator[dict[str, Any]]:
        """Response records of the answers that are kept; says in funnel events what was dropped."""
        from k2lab.data.filtering import FunnelRow
        from k2lab.stages._pairs import distinct

        whole = FunnelRow("answers that ended and could be judged")
        good = FunnelRow(f"answers worth at least {self.min_reward:g}")
        chosen = FunnelRow("different answers" + (f", at most {self.keep} per prompt" if self.keep else ""))
        made: list[dict[str, Any]] = []
        for record, own in zip(records, answers, strict=True):
            kept = _asking.counted(
                whole, own, _has_answer, lambda answer: answer["error"] or f"no answer, stopped by {answer['stop']}"
            )
            if self.verify:
                kept = _asking.counted(good, kept, lambda a: a["reward"] >= self.min_reward, lambda a: f"reward {a['reward']:g}")
            different = {id(answer) for answer in distinct(kept)[: self.keep or None]}
            kept = _asking.counted(
                chosen, kept, lambda answer, few=different: id(answer) in few, lambda _: "said before, or enough kept"
            )
            for n, answer in enumerate(kept):
                fields: dict[str, Any] = {"response": answer["text"]}
                if answer.get("tokens") and tokenizer is not None:
                    fields |= {"response_tokens": answer["tokens"], "tokenizer": tokenizer.fingerprint()}
                    if "top" in answer:
                        fields["top"] = answer["top"]
                if self.verify:
                    fields["reward"] = answer["reward"]
                made.append(_asking.made_record(record, f"{record['key']}#{n}", self.rewards, **fields))
        for row in (whole, good, chosen) if self.verify else (whole, chosen):
            ctx.events.emit("funnel", **row.as_event())
        ctx.facts["errors"] = sum(bool(answer["error"]) for own in answers for answer in own)
        if not made:
            raise DataError(
                f"no answer is left: of {whole.seen} answers {whole.kept} are whole",
                where=f"stage.{ctx.name}",
                got=whole.examples[0]["why"] if whole.examples else None,
                next="Raise max_tokens, or k and temperature, or look at answers.jsonl",
            )
        return iter(made)

    @staticmethod
    def examples() -> list[TeacherData]:
        return [
            TeacherData(teacher="sft", prompts=("instructions",), top_k=4, limit=8),  # type: ignore[arg-type]
            TeacherData(
                endpoint=Endpoint(url="http://127.0.0.1:8000/v1", model="kimi", key_env="KIMI_API_KEY"),
                prompts=("instructions",),  # type: ignore[arg-type]
                verify=True,
                k=4,
            ),
        ]


def _has_answer(answer: dict[str, Any]) -> bool:
    """Whether the answer is whole, and comes to something behind its thoughts."""
    from k2lab.gym.rewards._answer import final_answer

    return _asking.is_whole(answer) and bool(final_answer(answer["text"]))
