"""Reinforcement learning on tasks with verifiable answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.core.stage import CheckpointRef, Dataset, Slot, StageContext
from k2lab.core.types import PlanInput
from k2lab.plan import state
from k2lab.rl.advantages import Advantages
from k2lab.rl.shaping import Budget, Temperature
from k2lab.stages import _lora
from k2lab.stages._fine_tuning import FineTuning
from k2lab.stages._training import execute


@dataclass(frozen=True, kw_only=True)
class Rl(FineTuning):
    """Sample groups of responses to tasks, judge them by verifiers, reinforce what beats its group (Kimi's RL, or GRPO).

    Each step draws `tasks_per_step` tasks x `group_size` responses with the present weights (an embedded sampler on the very same
    tensors), computes advantages within groups and makes one update. Only tasks of moderate difficulty are used: the starting
    model's pass rate is measured first. Fine-tuning data can be mixed in (`ptx`) against forgetting; `mixture` and `over_length`
    are about it. Rollouts with an error (a reward that raises, say) are left out, counted and reported.
    """

    version: ClassVar[int] = 2
    uses_model: ClassVar[bool] = False
    # A step's rows follow from its rollouts, its length from `steps`; there is no held-out loss to watch.
    global_batch: ClassVar[int] = 0
    token_target: ClassVar[int | None] = None
    epochs: ClassVar[float | None] = None
    valid_every: ClassVar[int] = 0
    valid_tokens: ClassVar[int] = 0
    early_stop: ClassVar[None] = None
    # The sampler's passes and the trainer's are to agree to the last digits.
    compile: ClassVar[Any] = "none"

    start: CheckpointRef = "reasoning_sft"  # type: ignore[assignment]
    # Records with "answer" (and "rewards"); the train part is used.
    tasks: Dataset = "reasoning"
    # Only tasks of these families (none named = all), and within these difficulties.
    domains: list[str] = field(default_factory=tuple)  # type: ignore[assignment]
    min_difficulty: float | None = None
    max_difficulty: float | None = None
    # Use tasks that the starting model solves in this share of samples: where all or none are right there is nothing to learn.
    pass_rate: list[float] = field(default_factory=lambda: (0.2, 0.8))  # type: ignore[arg-type,return-value]
    # How pass rates are measured: samples per task (0 = no measurement, all tasks are used) on so many tasks at most (0 = all).
    pass_samples: int = 8
    pass_tasks: int = 512
    # Read them from this data set instead (a preference_data stage's: the same tasks, asked by the same model).
    pass_rates: Dataset | None = None

    # What is optimised, and how rewards become advantages.
    algorithm: Annotated[Any, Slot("objective")] = field(default_factory=lambda: load("objective", "kimi")())
    advantages: Advantages = field(default_factory=Advantages)
    # Responses per task; tasks per step over all ranks.
    group_size: int = 8
    tasks_per_step: int = 16
    # Leave groups whose rewards are all equal out of the update. They pull nowhere, but they count among the sequences that the
    # loss is divided by, and cost time; without them steps are larger where few groups say anything.
    drop_zero_signal: bool = False
    # Leave them out and draw further tasks in their place, for so many rounds at most.
    refill_rounds: int = 0
    steps: int = 100
    # Most tokens of a response; budgets by task family, and what it costs to exceed them.
    max_tokens: int = 64
    budget: Budget = field(default_factory=Budget)
    temperature: Temperature = field(default_factory=Temperature)
    top_p: float = 1.0
    # Tools offered in every task, and turns that a response may take with them.
    tools: list[Annotated[Any, Slot("tool")]] = field(default_factory=tuple)  # type: ignore[assignment]
    max_turns: int = 1
    # 0: rollouts are drawn by the weights that they train. 1: by those of the step before.
    max_policy_lag: int = 0

    # Data sets trained beside the rollouts (weight: the objective's ptx_weight), and trained tokens of them per step.
    ptx: list[Dataset] = field(default_factory=tuple)  # type: ignore[assignment]
    ptx_tokens: int = 1024
    over_length: Literal["error", "drop", "truncate"] = "drop"
    # Rows per forward and backward on one rank: sequences are packed up to per_device_batch x seq_len tokens.
    per_device_batch: int = 8
    # Responses that are sampled together. Rounding depends on what is in a batch, so it belongs to the stage's identity.
    sample_batch: int = 256

    def check(self, where: str) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise RecipeError(f"must be at least {least}", where=f"{where}.{name}", got=getattr(self, name))
        if len(self.pass_rate) != 2 or not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise RecipeError(
                "must be two shares, the lower first", where=f"{where}.pass_rate", got=list(self.pass_rate), allowed="[0.2, 0.8]"
            )
        if self.max_policy_lag not in (0, 1):
            raise RecipeError(
                "the sampler lives in the trainer's process: a batch is drawn by the present weights or by those one step before",
                where=f"{where}.max_policy_lag",
                got=self.max_policy_lag,
                allowed="0 or 1",
            )
        if not 0 < self.top_p <= 1:
            raise RecipeError("a share of probability above 0", where=f"{where}.top_p", got=self.top_p)
        if self.max_tokens >= self.seq_len:
            raise RecipeError(
                "prompt and response must fit into seq_len",
                where=f"{where}.max_tokens",
                got=self.max_tokens,
                allowed=f"less than seq_len = {self.seq_len}",
            )
        _lora.check(self, where)
        self.temperature.check(f"{where}.temperature")
        self.budget.check(f"{where}.budget")
        if self.budget.toggle is not None and (self.pass_rates is not None or not self.pass_samples):
            raise RecipeError(
                "the toggle's budget comes from the measurement of pass rates: leave pass_rates out and set pass_samples",
                where=f"{where}.budget.toggle",
            )
        if not {"advantages", "logprobs"} <= set(self.algorithm.needs):
            raise RecipeError(
                "this objective does not learn from rollouts", where=f"{where}.algorithm",
                got=type(self.algorithm).slot_name, allowed="kimi, grpo, or one that needs logprobs and advantages",
            )  # fmt: skip

    def check_ranks(self, where: str, world: int) -> None:
        """RecipeError unless the step's tasks can be dealt to `world` ranks."""
        if self.tasks_per_step % world:
            lower = self.tasks_per_step // world * world
            raise RecipeError(
                f"{self.tasks_per_step} tasks x {self.group_size} rollouts = {self.tasks_per_step * self.group_size} samples "
                f"cannot be dealt to {world} ranks by whole groups",
                where=f"{where}.tasks_per_step",
                allowed=f"a multiple of {world} tasks",
                next=f"Set {where}.tasks_per_step={lower + world}" + (f" or {lower}" if lower else ""),
            )

    def total_steps(self, tokens_in_data: int) -> int:
        return self.steps

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        self.check_ranks(f"stage.{name}", gpus)
        rows = self.tasks_per_step * self.group_size
        plan = PlanInput(
            stage=name,
            type=self.slot_name,
            kind="train",
            model=model,
            seq_len=self.seq_len,
            per_device_batch=self.per_device_batch,
            grad_acc=math.ceil(rows / (gpus * self.per_device_batch)),
            gpus=gpus,
            steps=self.steps,
            optimizer=type(self.optim).slot_name,
            precision=self.precision,
            recompute=self.recompute,
            notes=(
                f"{self.tasks_per_step} tasks x {self.group_size} responses of at most {self.max_tokens} tokens per step; every "
                f"sequence is counted as seq_len = {self.seq_len} tokens, an upper bound",
                "sampling is not in the time: it depends on how long responses get",
            ),
        )
        return _lora.planned(self, plan) if self.lora is not None else state.planned(self.optim, plan)

    def run(self, ctx: StageContext) -> None:
        from k2lab.rl.feed import GIVES, RolloutFeed
        from k2lab.stages import _rl
        from k2lab.stages._training import check_streams
        from k2lab.text import tokenizer as text_tokenizer
        from k2lab.text.template import chat_template

        source = ctx.parent("start").path
        tokenizer = text_tokenizer.load(source)
        check_streams(self.algorithm, GIVES, f"stage.{ctx.name}")
        tasks = _rl.tasks_of(self, ctx, tokenizer)
        ptx = _rl.ptx_stream(self, ctx, tokenizer)

        def feed(rank: int, world: int) -> RolloutFeed:
            chosen, measured = _rl.moderate(self, ctx, tokenizer, tasks, rank)
            return RolloutFeed(
                chosen,
                tokenizer,
                _rl.settings(self, ctx, measured),
                ptx=ptx,
                rank=rank,
                world=world,
                note=lambda text: ctx.events.emit("note", text=text),
                begun=lambda: measured.tell(ctx),
            )

        execute(
            self,
            ctx,
            make_feed=feed,
            valid=lambda rank, world: [],
            tokens_in_data=0,
            tokenizer_source=source,
            vocab_size=tokenizer.vocab_size,
            objective=self.algorithm,
        )
        if ctx.rank == 0 and "<|im_middle|>" in tokenizer.special:
            tokenizer.save(ctx.work, chat_template=chat_template(default_system=self.default_system))

    @staticmethod
    def examples() -> list[Rl]:
        optimizer = load("optimizer", "muonclip")
        return [
            Rl(optim=optimizer(lr=1e-3), steps=2, seq_len=128, max_tokens=8, tasks_per_step=2, group_size=4),
            Rl(
                optim=optimizer(lr=1e-3),
                algorithm=load("objective", "grpo")(),
                advantages=Advantages(divide_by_std=True),
                budget=Budget(tokens={"chain_sum": 32}, shape="linear"),
                temperature=Temperature(start=1.2, end=0.8, decay="cosine"),
                refill_rounds=2,
                max_policy_lag=1,
                ptx=("reasoning",),  # type: ignore[arg-type]
            ),
        ]


_LEAST = {
    "seq_len": 2, "checkpoint_every": 1, "keep_checkpoints": 1, "per_device_batch": 1, "sample_batch": 1, "group_size": 2,
    "tasks_per_step": 1, "steps": 1, "max_tokens": 1, "max_turns": 1, "pass_samples": 0, "pass_tasks": 0, "refill_rounds": 0,
    "ptx_tokens": 1,
}  # fmt: skip
