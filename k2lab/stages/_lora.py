"""LoRA in training stages: recipe fields, putting adapters on the model that a stage begins from, and what the stage leaves."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.stage import StageContext
from k2lab.core.types import PlanInput

TARGETS = ("attention", "shared_experts", "dense_mlp", "routed_experts")
ADAPTER = "adapter"  # subfolder of a merged artifact


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank adapters (LoRA, arXiv:2106.09685) on a frozen model: each target matrix W acts as W + (alpha / rank) B A."""

    # Width of the adapters, and their scale times it.
    rank: int = 16
    alpha: float = 32.0
    # Which matrices: all projections of attention (KDA's gates too), gate, up and down of shared experts, of dense layers, and of
    # every routed expert. What a model lacks is left out.
    targets: tuple[str, ...] = TARGETS
    # Scale by alpha / sqrt(rank) instead (arXiv:2312.03732).
    rslora: bool = False
    # Only 0: adapters are trained without dropout.
    dropout: float = 0.0
    # The frozen routed experts in memory: "dense" in the stage's precision, "packed" as the INT4 codes of an INT4 checkpoint.
    experts: Literal["dense", "packed"] = "dense"
    # true: the artifact is a whole model with the adapters added, in the stage's precision, and the adapter itself in adapter/.
    # false: the artifact is the adapter alone, which later stages load on its base.
    merge: bool = True

    def check(self, where: str) -> None:
        """Raises RecipeError for values that cannot be trained with."""
        if self.rank < 1:
            raise RecipeError("must be at least 1", where=f"{where}.rank", got=self.rank)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise RecipeError("must be positive", where=f"{where}.alpha", got=self.alpha)
        if self.dropout:
            raise RecipeError("adapters are trained without dropout", where=f"{where}.dropout", got=self.dropout, allowed="0")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise RecipeError("names each target once, and at least one", where=f"{where}.targets", got=list(self.targets))
        for target in self.targets:
            if target not in TARGETS:
                raise RecipeError(
                    f"there is no LoRA target {target!r}", where=f"{where}.targets", allowed=", ".join(TARGETS),
                    next=did_you_mean(target, TARGETS),
                )  # fmt: skip


def planned(stage: Any, plan: PlanInput) -> PlanInput:
    """What the planner is told of a stage, with its adapters if it has some."""
    if stage.lora is None:
        return plan
    from k2lab.plan.adapters import AdapterInput

    known = {item.name: getattr(plan, item.name) for item in fields(plan)}
    packed = stage.lora.experts == "packed"
    return AdapterInput(**known, rank=stage.lora.rank, targets=tuple(stage.lora.targets), packed=packed)


def check(stage: Any, where: str) -> None:
    """RecipeError for a training stage whose other fields contradict its `lora`."""
    if stage.lora is None:
        return
    stage.lora.check(f"{where}.lora")
    if stage.start is None:
        raise RecipeError("LoRA adapts a trained model, and this stage begins with a fresh one", where=f"{where}.start")
    if getattr(stage.optim, "tau", None) is not None:
        raise RecipeError(
            "QK-Clip scales query and key weights, which LoRA keeps frozen",
            where=f"{where}.optim.tau", got=stage.optim.tau,
            next='Set tau = "none", or take adamw, which is what trains adapters in either case',
        )  # fmt: skip
    if stage.qat != "none":
        raise RecipeError(
            "quantisation-aware training moves the experts' own weights, which LoRA keeps frozen",
            where=f"{where}.qat", got=stage.qat, allowed="none", next="Leave out qat or lora",
        )  # fmt: skip


def begin(stage: Any, ctx: StageContext, dtype: Any, device: Any) -> tuple[Any, dict[str, int]]:
    """(the model that the stage begins from, frozen, with adapters on; matrices by target).

    A start that is an adapter itself goes on being trained, with the base that it has, if it is of the same rank and scale."""
    from k2lab.ckpt.folder import open_folder
    from k2lab.ckpt.peft import Adapter, is_adapter
    from k2lab.models import build, lora
    from k2lab.stages._models import settings_of

    wanted, where = stage.lora, f"stage.{ctx.name}.lora"
    settings = lora.Settings(rank=wanted.rank, alpha=wanted.alpha, rslora=wanted.rslora)
    start = ctx.parent("start").path
    before = Adapter.open(start) if is_adapter(start) else None
    if before is not None and settings_of(before) != settings:
        raise RecipeError(
            "the adapter to begin from is of another kind", where=where,
            got=f"rank {wanted.rank}, alpha {wanted.alpha:g}, rslora {wanted.rslora}",
            allowed=f"rank {before.rank}, alpha {before.alpha:g}, rslora {before.rslora}",
        )  # fmt: skip
    base, _ = base_of_start(ctx)
    source = open_folder(base)
    if wanted.experts == "packed" and source.format != "int4_group":
        raise RecipeError(
            "only the experts of an INT4 checkpoint can stay packed", where=f"{where}.experts", got=f"{base} is {source.format}",
            next='Give a checkpoint made by `k2 convert --to int4`, or set experts = "dense"',
        )  # fmt: skip
    model = build.load(source, dtype=dtype, device=device, experts=wanted.experts)
    counts = lora.attach(model, settings, wanted.targets, ctx.seed)
    if before is not None:
        lora.load(model, before.of(lora.names(model)), settings)
    return model, counts


def base_of_start(ctx: StageContext) -> tuple[Path, str]:
    """(folder, identity) of the model under the adapters: the start, or the base of a start that is an adapter."""
    from k2lab.ckpt.peft import Adapter, is_adapter
    from k2lab.ckpt.strict import read_object
    from k2lab.core.artifacts import exists, open_artifact
    from k2lab.stages._models import BASE, base_of

    start = ctx.parent("start")
    if not is_adapter(start.path):
        return start.path, start.identity
    base, _ = base_of(start.path, Adapter.open(start.path).base)
    if (start.path / BASE).is_file():
        return base, read_object(start.path / BASE)["identity"]
    return base, open_artifact(base).identity if exists(base) else ""


def finish(stage: Any, ctx: StageContext, model: Any) -> None:
    """Leaves the stage's files in `ctx.work`: the adapter, and with `merge` the whole model."""
    from k2lab.ckpt import peft
    from k2lab.models import build, lora
    from k2lab.stages._models import write_base

    base, identity = base_of_start(ctx)
    folder = ctx.work / ADAPTER if stage.lora.merge else ctx.work
    settings = model.adapters
    peft.save(
        folder, lora.pairs(model), rank=settings.rank, alpha=settings.alpha, rslora=settings.rslora, base=str(base.resolve())
    )
    write_base(folder, base, identity, stage.lora.experts)
    if stage.lora.merge:
        build.save(model, ctx.work)
    else:  # readers of shapes find them where a whole model has them
        shutil.copyfile(base / "config.json", ctx.work / "config.json")
