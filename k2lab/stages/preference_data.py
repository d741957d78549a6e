"""Preference pairs from a model's own answers, judged by the tasks' rewards; also how often each task is solved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import CheckpointRef, Dataset, StageContext
from k2lab.stages import _asking
from k2lab.stages._asking import Asking

PASS_RATES = "pass_rates.jsonl"


@dataclass(frozen=True, kw_only=True)
class PreferenceData(Asking):
    """Sample k answers per task, judge them with the task's rewards, and pair right ones with wrong ones of similar length.

    Writes {"prompt","chosen","rejected"} records with the model's own tokens, held out by prompt; `pass_rates.jsonl`
    ({"key","pass_rate","samples"} per task); and `answers.jsonl`, every answer with its reward.
    """

    version: ClassVar[int] = 1

    # The model that answers.
    model: CheckpointRef
    # Records with "answer" (and "rewards").
    tasks: Dataset
    # Pairs of one task at most; each pairs answers that were used least so far.
    pairs_per_task: int = 2
    # Least difference of the two sides' rewards.
    margin: float = 0.5
    # Of the possible pairs, take those whose lengths differ least, so that length does not tell right from wrong.
    match_length: bool = True
    # Leave out pairs whose longer side has more than so many times the tokens of the shorter; 1.0 = equal lengths only.
    length_ratio: float | None = None
    # Take pairs whose wrong answer the model found most likely against the right one, its confident mistakes, before those of
    # similar length; bound lengths by length_ratio then.
    hard: bool = False
    # Only tasks solved this often give pairs: a task hardly ever solved is solved by luck.
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0
    valid_share: float = 0.2

    def check(self, where: str) -> None:
        super().check(where)
        if self.k < 2:
            raise RecipeError("a pair needs at least two answers", where=f"{where}.k", got=self.k)
        if self.pairs_per_task < 1:
            raise RecipeError("must be at least 1", where=f"{where}.pairs_per_task", got=self.pairs_per_task)
        if not 0 < self.margin <= 1:
            raise RecipeError("a margin lies between 0 and 1", where=f"{where}.margin", got=self.margin)
        if self.length_ratio is not None and self.length_ratio < 1:
            raise RecipeError("must be at least 1", where=f"{where}.length_ratio", got=self.length_ratio)
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            got = f"min_pass_rate={self.min_pass_rate}, max_pass_rate={self.max_pass_rate}"
            raise RecipeError("pass rates lie between 0 and 1, the least first", where=where, got=got)

    def run(self, ctx: StageContext) -> None:
        from k2lab.text import tokenizer as text_tokenizer

        tokenizer = text_tokenizer.load(ctx.parent("model").path)
        records = _asking.asked_records(self, ctx, "tasks")
        answers = self._answers(ctx, tokenizer, records)
        write_pass_rates(ctx, records, answers)
        pairs = self._pairs(ctx, tokenizer, records, answers)
        ctx.facts["counts"] = _asking.write_parts(self, ctx, pairs)
        ctx.facts["pairs"] = _lengths(pairs)
        _asking.keep_tokenizer(ctx, tokenizer)

    def _answers(self, ctx: StageContext, tokenizer: Any, records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """k judged answers per record, out of the journal where it has them."""
        from k2lab.core.types import SampleParams
        from k2lab.dist import mesh
        from k2lab.gym.rollouts import roll_out
        from k2lab.sampling.local import LocalSampler
        from k2lab.stages._journal import Journal
        from k2lab.stages._models import load_model

        tasks = _asking.tasks_of(records, self.max_tokens, judged=True, rewards_instead=self.rewards)
        pieces = list(_asking.chunks(self, tasks))
        found: list[list[dict[str, Any]]] = []
        sampler = None
        with Journal(ctx.work / _asking.JOURNAL) as journal:
            for number, piece in enumerate(pieces):
                if number >= len(journal.entries):
                    if sampler is None:
                        model = load_model(ctx.parent("model").path, device=mesh.pick_device(ctx.device))
                        sampler = LocalSampler(model.hf, tokenizer.pad_id, self.batch, eos_id=tokenizer.im_end_id)
                    groups = roll_out(
                        piece,
                        sampler,
                        tokenizer,
                        k=self.k,
                        params=SampleParams(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p),
                        seed=ctx.seed,
                        default_system=self.default_system,
                        keys_prefix=f"{ctx.name}/",
                    )
                    journal.add(
                        [
                            {"key": group.task, "answers": [_asking.from_rollout(one, tokenizer) for one in group.rollouts]}
                            for group in groups
                        ]
                    )
                found += [entry["answers"] for entry in journal.entries[number]]
                ctx.events.emit("progress", done=len(found), total=len(tasks), unit="tasks")
        return found

    def _pairs(self, ctx: StageContext, tokenizer: Any, records: list[dict[str, Any]], answers: Any) -> list[dict[str, Any]]:
        from k2lab.data.filtering import FunnelRow
        from k2lab.stages._pairs import choose_pairs, distinct

        usable = FunnelRow("answers that ended and could be judged")
        fitting = FunnelRow(f"tasks with a pass rate from {self.min_pass_rate:g} to {self.max_pass_rate:g}")
        paired = FunnelRow("tasks with right and wrong answers")
        made: list[dict[str, Any]] = []
        for record, own in zip(records, answers, strict=True):
            whole = _asking.counted(
                usable, own, _asking.is_whole, lambda answer: answer["error"] or f"stopped by {answer['stop']}"
            )
            rate = pass_rate(own)
            fits = rate is not None and self.min_pass_rate <= rate <= self.max_pass_rate
            fitting.seen, fitting.kept = fitting.seen + 1, fitting.kept + fits
            if not fits:
                continue
            pairs = choose_pairs(
                distinct(whole),
                per_task=self.pairs_per_task,
                margin=self.margin,
                match_length=self.match_length,
                length_ratio=self.length_ratio,
                hard=self.hard,
                seed=ctx.seed,
                key=record["key"],
            )
            paired.seen, paired.kept = paired.seen + 1, paired.kept + bool(pairs)
            for n, (chosen, rejected) in enumerate(pairs):
                made.append(
                    _asking.made_record(
                        record,
                        f"{record['key']}#{n}",
                        self.rewards,
                        chosen=chosen["text"],
                        rejected=rejected["text"],
                        chosen_tokens=chosen["tokens"],
                        rejected_tokens=rejected["tokens"],
                        tokenizer=tokenizer.fingerprint(),
                        pass_rate=round(rate, 6),
                    )
                )
        for row in (usable, fitting, paired):
            row.dropped = row.seen - row.kept
            ctx.events.emit("funnel", **row.as_event())
        if not made:
            raise DataError(
                f"no pair can be made: of {usable.seen} answers {usable.kept} are whole, and no task has right and wrong ones",
                where=f"stage.{ctx.name}",
                next="Give tasks that the model solves sometimes, a higher k or temperature, or more max_tokens",
            )
        return made

    @staticmethod
    def examples() -> list[PreferenceData]:
        return [PreferenceData(model="reasoning_sft", tasks="reasoning", k=4, limit=8)]


def pass_rate(answers: list[dict[str, Any]]) -> float | None:
    """Mean reward of the answers that could be judged, None if there are none."""
    judged = [answer["reward"] for answer in answers if not answer["error"]]
    return sum(judged) / len(judged) if judged else None


def write_pass_rates(ctx: StageContext, records: list[dict[str, Any]], answers: list[list[dict[str, Any]]]) -> None:
    """`pass_rates.jsonl`, a line per task: mean reward over the samples that could be judged."""
    from k2lab.core.artifacts import disk_errors

    path = ctx.work / PASS_RATES
    rates = []
    with disk_errors(path), path.open("w", encoding="utf-8") as file:
        for record, own in zip(records, answers, strict=True):
            rate = pass_rate(own)
            if rate is not None:
                rates.append(rate)
                samples = sum(not answer["error"] for answer in own)
                line = {"key": record["key"], "pass_rate": round(rate, 6), "samples": samples}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    ctx.facts["pass_rate"] = round(sum(rates) / len(rates), 6) if rates else None
    ctx.facts["errors"] = sum(bool(answer["error"]) for own in answers for answer in own)


def _lengths(pairs: list[dict[str, Any]]) -> dict[str, float]:
    """Whether length tells the sides apart: mean tokens of each, share of pairs whose chosen side is longer (ties 1/2)."""
    sides = [(len(pair["chosen_tokens"]), len(pair["rejected_tokens"])) for pair in pairs]
    longer = sum((a > b) + 0.5 * (a == b) for a, b in sides)
    return {
        "chosen_tokens": round(sum(a for a, _ in sides) / len(sides), 3),
        "rejected_tokens": round(sum(b for _, b in sides) / len(sides), 3),
        "chosen_longer": round(longer / len(sides), 4),
    }
