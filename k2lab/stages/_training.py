"""What pretraining and fine-tuning stages share: recipe fields, wiring of model, optimizer, feed and loop."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from k2lab.core.batches import check_batch
from k2lab.core.errors import RecipeError
from k2lab.core.stage import CheckpointRef, RunFlag, Slot, Stage, StageContext
from k2lab.core.types import PlanInput
from k2lab.plan import state
from k2lab.stages import _lora
from k2lab.stages._lora import Lora

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tiktoken.model")


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop when validation has not improved by `min_delta` nats for `patience` validations; the best weights are restored."""

    patience: int = 3
    min_delta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """Fields that every training stage has.

    Tokens per optimizer step = global_batch x seq_len = ranks x per_device_batch x grad_acc x seq_len; grad_acc follows.
    """

    kind: ClassVar[str] = "checkpoint"
    uses_model: ClassVar[bool] = True
    distributed: ClassVar[bool] = True

    # The checkpoint to begin from: an earlier stage, a model directory; "none" = a fresh model from the recipe's spec.
    start: CheckpointRef | None = None
    # Rows per optimizer step over all ranks; each row holds at most seq_len tokens of packed documents.
    global_batch: int = 16
    # Rows per forward and backward on one rank.
    per_device_batch: int = 16
    seq_len: int = 256
    # How long: exactly one of these three.
    steps: int | None = None
    token_target: int | None = None
    epochs: float | None = None
    optim: Annotated[Any, Slot("optimizer")]
    # Rate of the aux-loss-free router bias (0 = off): each step, bias += rate x sign(mean load - load), then centred.
    router_bias_rate: float = 1e-3
    # "quantile" = instead, the bias with which the step's tokens would have loaded all experts equally; no rate, but 0 = off.
    router_bias_rule: Literal["sign", "quantile"] = "sign"
    # Validate every so many steps (0 = never) on at most this many held-out tokens.
    valid_every: int = 50
    valid_tokens: int = 16384
    early_stop: EarlyStopping | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    # "int4" = quantisation-aware training: routed experts multiply by the INT4 values that an export of them will hold. Also on
    # if the checkpoint to begin from was trained so and is not exported yet.
    qat: Literal["none", "int4"] = "none"
    # Activations that the backward pass computes again instead of keeping them; results stay the same. "layers": every layer, so
    # that one hidden state per layer is kept, for one forward pass more (a third of the step's flops). "selective": of each layer
    # the block, attention or feed-forward, with fewer flops per byte freed; less of either. `k2 plan` says how much.
    recompute: Annotated[Literal["none", "layers", "selective"], RunFlag()] = "none"
    # "layers" = torch.compile on the layers of dense students (Llama, Qwen2): norms, rotation, SwiGLU and sums in few kernels.
    # The first step waits for the compiler, of which later runs find the results in the user's cache folder.
    compile: Literal["none", "layers"] = "none"
    # Train low-rank adapters on a frozen model instead of its weights; router biases belong to the frozen model and stay.
    lora: Lora | None = None
    # Save a step checkpoint every so many steps, keep the newest few while the stage is unfinished.
    checkpoint_every: Annotated[int, RunFlag()] = 100
    keep_checkpoints: Annotated[int, RunFlag()] = 2

    def check(self, where: str) -> None:
        given = [name for name in ("steps", "token_target", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                "say how long to train by exactly one of steps, token_target and epochs",
                where=where,
                got=", ".join(given) or "none",
            )
        if getattr(self, given[0]) <= 0:
            raise RecipeError("must be positive", where=f"{where}.{given[0]}", got=getattr(self, given[0]))
        for name in ("seq_len", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < (2 if name == "seq_len" else 1):
                raise RecipeError("too small", where=f"{where}.{name}", got=getattr(self, name))
        if self.early_stop is not None and not self.valid_every:
            raise RecipeError("early_stop needs validation: set valid_every", where=f"{where}.early_stop")
        if self.compile == "layers" and self.recompute == "selective":
            raise RecipeError(
                "a compiled layer chooses itself what it keeps",
                where=f"{where}.compile",
                got='compile = "layers" with recompute = "selective"',
                allowed='recompute = "none" or "layers"',
            )
        check_batch(self.global_batch, self.per_device_batch, 1, where)
        _lora.check(self, where)

    def check_ranks(self, where: str, world: int) -> None:
        check_batch(self.global_batch, self.per_device_batch, world, where)

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        check_batch(self.global_batch, self.per_device_batch, gpus, f"stage.{name}")
        if self.qat == "int4" and model is not None:
            model.require_int4(f"stage.{name}.qat")
        if self.compile == "layers" and model is not None:
            model.require_compilable(f"stage.{name}.compile")
        plan = PlanInput(
            stage=name,
            type=self.slot_name,
            kind="train",
            model=model,
            seq_len=self.seq_len,
            per_device_batch=self.per_device_batch,
            grad_acc=self.global_batch // (gpus * self.per_device_batch),
            gpus=gpus,
            steps=self.steps,
            token_target=self.token_target,
            optimizer=type(self.optim).slot_name,
            precision=self.precision,
            recompute=self.recompute,
            notes=(f"length set by epochs = {self.epochs}",) if self.epochs is not None else (),
        )
        return _lora.planned(self, plan) if self.lora is not None else state.planned(self.optim, plan)

    def total_steps(self, tokens_in_data: int) -> int:
        """Optimizer steps, from whichever of steps, token_target and epochs was given (rows counted as full)."""
        per_step = self.global_batch * self.seq_len
        if self.steps is not None:
            return self.steps
        target = self.token_target if self.token_target is not None else (self.epochs or 0.0) * tokens_in_data
        return max(1, math.ceil(target / per_step))


def tokenizer_folder(ctx: StageContext, start: bool, tokens_role: str | None = None) -> Path:
    """Where this training stage's tokenizer lies: with the checkpoint it begins from, else with its tokens."""
    if start:
        return ctx.parent("start").path
    assert tokens_role is not None
    return ctx.parent(tokens_role).path / "tokenizer"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Puts the tokenizer's files beside the weights, so that the directory is a whole model for any reader."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def execute(
    stage: Training,
    ctx: StageContext,
    *,
    make_feed: Callable[[int, int], Any],
    valid: Callable[[int, int], list[Any]],
    tokens_in_data: int,
    tokenizer_source: Path,
    vocab_size: int,
    objective: Any,
    model_spec: Any = None,
) -> None:
    """Builds model and optimizer, trains with the one loop, saves a model directory into `ctx.work`.

    `make_feed(rank, world)` gives the feed, `valid(rank, world)` this rank's validation batches. The feed is made before any
    model is loaded: its `gives` (names of streams, and "pairs") must cover what the objective needs, else RecipeError. A feed
    that draws from the model in training has a method `attach(model)`, called once the model is there; what its `facts()` says
    about a step goes into the step's event. A stage without `start` trains a fresh `model_spec`, by default the recipe's.
    """
    import torch

    from k2lab.dist import mesh
    from k2lab.engine.loop import train
    from k2lab.engine.run import EarlyStop, TrainRun
    from k2lab.models.router import track_quantiles

    rank, world, device = mesh.init(ctx.device)
    stage.check_ranks(f"stage.{ctx.name}", world)
    feed = make_feed(rank, world)
    check_streams(objective, feed.gives, f"stage.{ctx.name}")
    model, adapted = _model(stage, ctx, device, vocab_size, model_spec)
    tau = getattr(stage.optim, "tau", None)
    model.capture_max_logits(tau)
    optim = stage.optim.build(model.named_parameters(), model.row_layouts())
    if hasattr(feed, "attach"):
        feed.attach(model)
    bias_rate = stage.router_bias_rate if model.routers() and stage.lora is None else 0.0
    if bias_rate and stage.router_bias_rule == "quantile":
        track_quantiles(model)
    total = stage.total_steps(tokens_in_data)
    peak = peak_flops(device)
    run = TrainRun(
        work=ctx.work,
        events=ctx.events,
        total_steps=total,
        microbatches=feed.microbatches,
        max_grad_norm=stage.optim.max_grad_norm,
        rank=rank,
        checkpoint_every=stage.checkpoint_every,
        keep=stage.keep_checkpoints,
        valid=valid(rank, world) if stage.valid_every else (),
        valid_every=stage.valid_every,
        early_stop=EarlyStop(patience=stage.early_stop.patience, min_delta=stage.early_stop.min_delta)
        if stage.early_stop
        else None,
        bias_rate=bias_rate,
        bias_rule=stage.router_bias_rule,
        flops_per_token=model.flops_per_token(stage.seq_len),
        peak_flops=peak,
        objective=objective,
        facts=getattr(feed, "facts", None),
    )
    done = run.resume(model, optim, feed)
    ctx.options["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    ctx.events.emit(
        "stage_start", step=done, type=ctx.options["type"], identity=ctx.identity, total=total, unit="steps", resumed=done > 0
    )
    if rank == 0:
        (ctx.work / "parameters.txt").write_text(optim.table_text() + "\n", encoding="utf-8")
    train(model, optim, feed, objective, run)
    facts = run.finish(model)
    if rank == 0:
        _leave(stage, ctx, model, tokenizer_source, adapted)
        ctx.facts.update(training=facts, table_hash=optim.table_hash())


def _model(stage: Training, ctx: StageContext, device: Any, vocab_size: int, model_spec: Any) -> tuple[Any, dict[str, int]]:
    """(the model to train, as the stage's fields want it; matrices with adapters by target)."""
    import torch

    from k2lab import specs
    from k2lab.models import build
    from k2lab.stages._models import load_model

    dtype = torch.float32 if stage.precision == "fp32" else torch.bfloat16
    adapted: dict[str, int] = {}
    if stage.lora is not None:
        model, adapted = _lora.begin(stage, ctx, dtype, device)
    elif stage.start is not None:
        model = load_model(ctx.parent("start").path, dtype, device, merge=True)
    else:
        spec = model_spec if model_spec is not None else specs.from_recipe(ctx.model)
        model = build.from_spec(spec, seed=ctx.seed, dtype=dtype, device=device)
    if model.vocab_size < vocab_size:
        raise RecipeError(
            f"the tokenizer has {vocab_size} tokens and the model only {model.vocab_size}",
            where=f"stage.{ctx.name}",
            next="Make vocab_size of the model and of the tokenizer stage equal",
        )
    if stage.qat == "int4":
        model.qat("int4_group", where=f"stage.{ctx.name}.qat")
    model.recompute(stage.recompute, stage.seq_len)
    if stage.compile == "layers":
        model.compile(where=f"stage.{ctx.name}.compile")
    return model, adapted


def _leave(stage: Training, ctx: StageContext, model: Any, tokenizer_source: Path, adapted: dict[str, int]) -> None:
    """Writes the artifact, a whole model or an adapter, and says what was trained of it."""
    from k2lab.ckpt import origin
    from k2lab.models import build

    parameters = [parameter for _, parameter in model.named_parameters()]
    if stage.lora is None:
        build.save(model, ctx.work)
        ctx.facts["parameters"] = sum(p.numel() for p in parameters)
    else:
        _lora.finish(stage, ctx, model)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        ctx.facts["lora"] = {"parameters": trained, "matrices": adapted, "merged": stage.lora.merge}
        ctx.facts["parameters"] = model.spec.total()
    copy_tokenizer(tokenizer_source, ctx.work)
    if stage.start is not None and (stage.lora is None or stage.lora.merge):
        # what training leaves as it was is exported from the bytes that it came from
        origin.carry(_lora.base_of_start(ctx)[0], ctx.work)


def check_streams(objective: Any, gives: Collection[str], where: str) -> None:
    """RecipeError unless a feed that `gives` these streams has all that the objective needs."""
    missing = [name for name in objective.needs if name not in gives]
    if missing:
        raise RecipeError(
            f"the objective {type(objective).__name__} needs {' and '.join(missing)}, which this stage's data does not carry",
            where=where,
            got=", ".join(sorted(gives)) or "tokens and weights only",
            allowed="data with " + ", ".join(objective.needs),
            next="Choose another objective or another kind of stage for this data",
        )


def peak_flops(device: Any) -> float:
    """Peak dense bf16 FLOP/s of a known GPU, 0 if unknown: the denominator of MFU, never guessed."""
    import torch

    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    for part, peak in (("H100", 989e12), ("H200", 989e12), ("A100", 312e12), ("B200", 2250e12)):
        if part in name:
            return peak
    return 0.0
