"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on torch's fused kernels, with state under our own names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k2lab.optim._table import TableRow

FUSED_DEVICES = frozenset({"cpu", "cuda"})


class AdamWPart:
    """Moments and update of all parameters that the table gives to AdamW."""

    def __init__(self, params: list[tuple[TableRow, nn.Parameter, Tensor]], betas: tuple[float, float], eps: float) -> None:
        self.params, self.betas, self.eps = params, betas, eps
        self.exp_avg = {row.name: _zeros(weight) for row, _, weight in params}
        self.exp_avg_sq = {row.name: _zeros(weight) for row, _, weight in params}
        # Updates done per parameter: one that had no gradient in some steps has its own bias correction.
        # Fused kernels want the counts beside the weights, the others want them on the CPU.
        places = [weight.device if weight.device.type in FUSED_DEVICES else torch.device("cpu") for _, _, weight in params]
        self.steps = [torch.zeros((), dtype=torch.float32, device=place) for place in places]

    def update(self, lr: float) -> None:
        """One step with learning rate `lr` x the row's `lr_scale`. Parameters without a gradient are left alone."""
        groups: dict[tuple, list[int]] = {}
        for index, (row, param, weight) in enumerate(self.params):
            if param.grad is not None:
                groups.setdefault((weight.device, weight.dtype, row.lr_scale, row.weight_decay), []).append(index)
        for (device, _, scale, decay), indices in groups.items():
            rows, params, weights = zip(*(self.params[index] for index in indices))
            adamw(
                list(weights),
                [param.grad.to(weight.dtype).contiguous() for param, weight in zip(params, weights)],
                [self.exp_avg[row.name] for row in rows],
                [self.exp_avg_sq[row.name] for row in rows],
                [],
                [self.steps[index] for index in indices],
                fused=device.type in FUSED_DEVICES,
                foreach=device.type not in FUSED_DEVICES,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr * scale,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """{"adamw.exp_avg/<name>": ..., "adamw.exp_avg_sq/<name>": ...}, the live tensors."""
        found = {f"adamw.exp_avg/{name}": tensor for name, tensor in self.exp_avg.items()}
        found |= {f"adamw.exp_avg_sq/{name}": tensor for name, tensor in self.exp_avg_sq.items()}
        return found

    def step_counts(self) -> Tensor:
        """Updates done per parameter in table order, float32 on the CPU."""
        return torch.stack([step.cpu() for step in self.steps]) if self.steps else torch.zeros(0)

    def load_step_counts(self, counts: Tensor) -> None:
        for step, count in zip(self.steps, counts):
            step.copy_(count)


def _zeros(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
