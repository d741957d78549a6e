"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on torch's fused kernels, with state under our own names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from k2lab.optim._offload import Ferry, Job, host_zeros
from k2lab.optim._rounding import is_stochastic, round_into, seed
from k2lab.optim._table import TableRow

FUSED_DEVICES = frozenset({"cpu", "cuda"})


class AdamWPart:
    """Moments and update of all parameters that the table gives to AdamW.

    `stochastic`: bfloat16 weights without a master are updated in float32 and rounded up or down by chance. `ferry`: moments are
    kept on the host, as masters are then, and come to the GPU parameter by parameter.
    """

    def __init__(
        self,
        params: list[tuple[TableRow, nn.Parameter, Tensor]],
        betas: tuple[float, float],
        eps: float,
        stochastic: bool = False,
        ferry: Ferry | None = None,
    ) -> None:
        self.params, self.betas, self.eps, self.stochastic, self.ferry = params, betas, eps, stochastic, ferry
        self.exp_avg = {row.name: self._zeros(param, weight) for row, param, weight in params}
        self.exp_avg_sq = {row.name: self._zeros(param, weight) for row, param, weight in params}
        # Updates done per parameter: one that had no gradient in some steps has its own bias correction.
        # Fused kernels want the counts beside the weights, the others want them on the CPU.
        places = [param.device if param.device.type in FUSED_DEVICES else torch.device("cpu") for _, param, _ in params]
        self.steps = [torch.zeros((), dtype=torch.float32, device=place) for place in places]

    def _by_chance(self, param: Tensor, weight: Tensor) -> bool:
        return self.stochastic and weight is param and is_stochastic(weight)

    def _zeros(self, param: Tensor, weight: Tensor) -> Tensor:
        # A weight that is rounded stochastically is updated in float32, and so are its moments.
        dtype = torch.float32 if self._by_chance(param, weight) else weight.dtype
        return host_zeros(param, dtype) if self.ferry else torch.zeros(weight.shape, dtype=dtype, device=weight.device)

    def update(self, lr: float, updates: int = 0) -> set[str]:
        """One step with learning rate `lr` x the row's `lr_scale`, after `updates` finished ones.

        Parameters without a gradient are left alone. Returns the names of the parameters that already hold the rounding of their
        new master.
        """
        groups: dict[tuple, list[int]] = {}
        for index, (row, param, weight) in enumerate(self.params):
            if param.grad is not None:
                alone = index if self.ferry else None
                groups.setdefault((param.device, weight.dtype, row.lr_scale, row.weight_decay, alone), []).append(index)
        jobs = [self._job(indices, lr, updates) for indices in groups.values()]
        if self.ferry is None:
            for held, run in jobs:
                run(held)
            return set()
        self.ferry.run(jobs)
        return {self.params[index][0].name for indices in groups.values() for index in indices}

    def _job(self, indices: list[int], lr: float, updates: int) -> Job:
        """What parameters of one learning rate, decay and type need of the state, and their update."""
        rows, params, weights = zip(*(self.params[index] for index in indices))
        count = len(indices)
        held = [self.exp_avg[row.name] for row in rows] + [self.exp_avg_sq[row.name] for row in rows]
        held += [weight for param, weight in zip(params, weights) if weight is not param]

        def run(state: list[Tensor]) -> None:
            masters = iter(state[2 * count :])
            own = [param if weight is param else next(masters) for param, weight in zip(params, weights)]
            by_chance = self._by_chance(params[0], weights[0])
            values = [weight.float() for weight in own] if by_chance else own
            device = values[0].device
            adamw(
                values,
                [param.grad.to(value.dtype).contiguous() for param, value in zip(params, values)],
                state[:count],
                state[count : 2 * count],
                [],
                [self.steps[index] for index in indices],
                fused=device.type in FUSED_DEVICES,
                foreach=device.type not in FUSED_DEVICES,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr * rows[0].lr_scale,
                weight_decay=rows[0].weight_decay,
                eps=self.eps,
                maximize=False,
            )
            for row, param, weight, value in zip(rows, params, own, values):
                if by_chance:
                    round_into(weight, value, seed(row.name, updates))
                elif self.ferry is not None and weight is not param:
                    param.copy_(weight)

        return held, run

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
