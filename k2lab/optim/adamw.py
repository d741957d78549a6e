# slot
"""AdamW for all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from k2lab.core.slots import Slot
from k2lab.core.types import RowLayout
from k2lab.optim._checks import check, default_schedule

if TYPE_CHECKING:
    from k2lab.optim._base import Optimizer


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay; right for models that were pretrained with it, such as Qwen students.

    Norms, biases and other vectors are not decayed.
    """

    lr: float  # peak learning rate
    weight_decay: float = 0.1  # per step W is scaled by 1 - lr x weight_decay
    betas: tuple[float, ...] = (0.9, 0.95)  # decay rates of the two moments
    eps: float = 1e-8  # added to the root of the second moment
    schedule: Annotated[Any, Slot("schedule")] = field(default_factory=default_schedule)  # of the learning rate
    max_grad_norm: float | None = 1.0  # global gradient norm to clip to; "none" = never
    # auto: float32 masters of bfloat16 and float16 parameters; stochastic: none, bfloat16 rounds up or down by chance.
    master: Literal["auto", "off", "stochastic"] = "auto"
    offload: Literal["off", "cpu"] = "off"  # cpu: masters and moments in the host's memory, copied while the GPU works

    def __post_init__(self) -> None:
        check(self.lr, self.weight_decay, self.betas, self.eps, self.schedule, self.max_grad_norm)

    def build(self, named_parameters: Iterable[tuple[str, Any]], row_layouts: list[RowLayout]) -> Optimizer:
        """The optimizer of these parameters; `row_layouts` are not used, since AdamW has no QK-Clip."""
        from k2lab.optim._base import Optimizer

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
        )

    @staticmethod
    def examples() -> list[AdamW]:
        from k2lab.optim.schedules.constant import Constant

        return [AdamW(lr=1e-3), AdamW(lr=2e-5, weight_decay=0.0, schedule=Constant(warmup=2), max_grad_norm=None)]
