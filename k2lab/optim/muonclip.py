# slot
"""MuonClip: Muon for matrices, AdamW for the rest, QK-Clip after every update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from k2lab.core.errors import RecipeError
from k2lab.core.slots import Slot
from k2lab.core.types import RowLayout
from k2lab.optim._checks import check, default_schedule

if TYPE_CHECKING:
    from k2lab.optim._base import Optimizer


@dataclass(frozen=True, kw_only=True)
class MuonClip:
    """MuonClip as Moonshot trains Kimi models with: Muon with AdamW's update size, plus QK-Clip against logit explosion.

    Muon takes 2-D matrices (router gates too) and routed experts, each expert's gate, up and down its own matrix; AdamW takes
    embeddings, output head, norms, biases, convolutions and KDA's decay gates. Sources: arXiv 2502.16982 (Muon, update RMS 0.2,
    decay), arXiv 2507.20534 (QK-Clip).
    """

    lr: float  # peak learning rate, for Muon and AdamW alike: updates have the same RMS
    weight_decay: float = 0.1  # per step W is scaled by 1 - lr x weight_decay (raw lr, also for Muon)
    betas: tuple[float, ...] = (0.9, 0.95)  # AdamW's decay rates of the two moments
    eps: float = 1e-8  # AdamW's, added to the root of the second moment
    schedule: Annotated[Any, Slot("schedule")] = field(default_factory=default_schedule)  # of the learning rate
    max_grad_norm: float | None = 1.0  # global gradient norm to clip to; "none" = never
    momentum: float = 0.95  # Muon's mu
    nesterov: bool = True  # orthogonalise G + mu M instead of M
    ns_steps: int = 5  # Newton-Schulz steps; 10 gave no gain in arXiv 2502.16982
    # Number type of Newton-Schulz; auto = fp16 or bf16, whichever is faster for a shape, where a GPU has our kernels; bf16 where
    # it is native and (on CPU) measured faster; else fp32. The table says which.
    ns_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ns_kernel: Literal["auto", "torch"] = "auto"  # auto: symmetric products in Triton on Hopper GPUs; torch: its own everywhere
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"  # bf16 saves 2 bytes per parameter; AdamW's moments stay fp32
    per_head: bool = False  # orthogonalise each head of q_b_proj and kv_b_proj for itself
    tau: float | None = 100.0  # QK-Clip threshold on scaled logits; "none" = no QK-Clip
    alpha: float = 0.5  # share of QK-Clip's factor that the queries take (the keys take the rest)
    adamw_lr: float | None = None  # peak learning rate of AdamW's parameters; none = lr
    # auto: float32 masters of bfloat16 and float16 parameters; stochastic: none, bfloat16 rounds up or down by chance.
    master: Literal["auto", "off", "stochastic"] = "auto"
    offload: Literal["off", "cpu"] = "off"  # cpu: masters and moments in the host's memory, copied while the GPU works

    def __post_init__(self) -> None:
        check(self.lr, self.weight_decay, self.betas, self.eps, self.schedule, self.max_grad_norm, self.adamw_lr)
        if not 0.0 <= self.momentum < 1.0:
            raise RecipeError("momentum must be a decay rate", got=self.momentum, allowed="a number from 0 up to, but not, 1")
        if self.ns_steps < 1:
            raise RecipeError("ns_steps is too small", got=self.ns_steps, allowed="an integer >= 1; 5 is usual")
        if self.tau is not None and (math.isnan(self.tau) or self.tau <= 0):
            raise RecipeError("tau must be positive", got=self.tau, allowed='a number above 0 (Kimi K2: 100), or "none"')
        if not 0.0 <= self.alpha <= 1.0:
            raise RecipeError("alpha is a share", got=self.alpha, allowed="a number from 0 to 1")

    def build(self, named_parameters: Iterable[tuple[str, Any]], row_layouts: list[RowLayout]) -> Optimizer:
        """The optimizer of these parameters; QK-Clip acts on the layers of `row_layouts`."""
        from k2lab.optim._base import MuonClipSettings, Optimizer
        from k2lab.optim._muon import MuonSettings

        muon = MuonSettings(
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            ns_dtype=self.ns_dtype,
            ns_kernel=self.ns_kernel,
            momentum_dtype=self.momentum_dtype,
        )
        return Optimizer(
            named_parameters,
            row_layouts,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            schedule=self.schedule,
            master=self.master,
            offload=self.offload,
            adamw_lr=self.adamw_lr,
            muonclip=MuonClipSettings(muon=muon, per_head=self.per_head, tau=self.tau, alpha=self.alpha),
        )

    @staticmethod
    def examples() -> list[MuonClip]:
        from k2lab.optim.schedules.cosine import Cosine

        return [MuonClip(lr=2e-3), MuonClip(lr=2e-4, schedule=Cosine(warmup=2), per_head=True, ns_dtype="fp32", tau=None)]
