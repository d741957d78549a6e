"""The optimizer that a recipe's slot builds: one object with clipping, update, QK-Clip, masters, table and state.

The training loop calls, per step and in this order: `clip`, `step`, `zero_grad`. State goes through `state_tensors` and
`load_state_tensors`, a flat dictionary with deterministic names that safetensors can hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from k2lab.core.errors import CheckpointError, NumericsError, RecipeError
from k2lab.core.types import RowLayout
from k2lab.optim import _qk_clip, _table
from k2lab.optim._adamw import AdamWPart
from k2lab.optim._muon import MuonPart, MuonSettings
from k2lab.optim._offload import Ferry, host_copy
from k2lab.optim._table import TableRow

STATE_FORMAT = 1
SCALARS = "optim.scalars"
STEP_COUNTS = "adamw.steps"
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepInfo:
    """What one update did: the scheduled learning rate (before any row's `lr_scale`) and {layer: heads that QK-Clip scaled}."""

    lr: float
    clipped: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class MuonClipSettings:
    """What MuonClip adds to AdamW. `tau` None = no QK-Clip; `per_head` cuts query and key-value projections into heads."""

    muon: MuonSettings
    per_head: bool = False
    tau: float | None = 100.0
    alpha: float = 0.5


class Optimizer:
    """AdamW, or MuonClip if `muonclip` is given. Built by the slots `adamw` and `muonclip`.

    Args: `named_parameters` in a fixed order, frozen ones included (they appear in the table and are never touched);
    `row_layouts` of the attention layers that QK-Clip may scale; `schedule` with `factor(step, total_steps)`; `adamw_lr` None =
    lr; `master` "auto" keeps a float32 master of every bfloat16 or float16 parameter, "off" updates it in its own type,
    "stochastic" updates it in float32 and rounds it up or down by chance. Masters are taken from the parameters here, so load
    weights first. `offload` "cpu" keeps masters and moments in the host's memory.

    Raises ValueError for row layouts that do not fit, tensors that are not contiguous or names given twice, RecipeError if
    nothing can be trained.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        row_layouts: Sequence[RowLayout],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        schedule: Any,
        master: str = "auto",
        offload: str = "off",
        adamw_lr: float | None = None,
        muonclip: MuonClipSettings | None = None,
    ) -> None:
        pairs = list(named_parameters)
        self.lr, self.schedule, self.muonclip = lr, schedule, muonclip
        tau = muonclip.tau if muonclip is not None else None
        self.tau = tau if tau is not None and math.isfinite(tau) else None  # None = no QK-Clip
        self.params: dict[str, nn.Parameter] = dict(pairs)
        if muonclip is not None:
            _qk_clip.check_layouts({name: tuple(param.shape) for name, param in pairs}, row_layouts)
        # A frozen projection cannot outgrow its limit, and scaling one of the two alone would change a model that must not
        # change.
        self.layouts = [x for x in row_layouts if muonclip and all(self.params[name].requires_grad for name in (x.q, x.kv))]
        self._rows = _table.make(
            ((name, tuple(param.shape), param.requires_grad) for name, param in pairs),
            muon=muonclip is not None,
            weight_decay=weight_decay,
            adamw_scale=1.0 if adamw_lr is None else adamw_lr / lr,
            heads=_table.head_splits(row_layouts) if muonclip and muonclip.per_head else None,
        )
        trained = [row for row in self._rows if row.optimizer != "frozen"]
        if not trained:
            raise RecipeError("no parameter can be trained: all are frozen or there are none")
        for row in trained:
            if not self.params[row.name].is_contiguous():
                raise ValueError(f"parameter {row.name!r} is not contiguous")
        self.ferry = Ferry(self.params[trained[0].name].device) if offload == "cpu" else None
        self.masters = self._make_masters(trained) if master == "auto" else {}
        if master == "stochastic":
            _no_float16(trained, self.params)
        by_chance = master == "stochastic"
        settings = muonclip.muon if muonclip else MuonSettings(ns_dtype="fp32")
        self.muon = MuonPart(self._part(trained, "muon"), settings, by_chance, self.ferry)
        self.adamw = AdamWPart(self._part(trained, "adamw"), betas, eps, by_chance, self.ferry)
        self.updates = 0

    def _make_masters(self, rows: list[TableRow]) -> dict[str, Tensor]:
        low = {row.name: self.params[row.name] for row in rows if self.params[row.name].dtype in LOW_PRECISION}
        if self.ferry is not None:
            return {name: host_copy(param, torch.float32) for name, param in low.items()}
        return {name: param.detach().to(torch.float32) for name, param in low.items()}

    def _part(self, rows: list[TableRow], optimizer: str) -> list[tuple[TableRow, nn.Parameter, Tensor]]:
        own = [row for row in rows if row.optimizer == optimizer]
        return [(row, self.params[row.name], self.masters.get(row.name, self.params[row.name])) for row in own]

    # ------------------------------------------------------------ one step

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> float:
        """Global gradient norm over all trainable parameters (float32 sums); scales gradients in place if it exceeds `max_norm`.

        A norm that is not finite is returned and nothing is scaled: the caller decides. Raises NumericsError if no parameter
        has a gradient at all.
        """
        grads = self._gradients()
        norms = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads, 2, dtype=torch.float32)]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        if max_norm is not None and math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
        return norm

    def _gradients(self) -> list[Tensor]:
        grads = [self.params[row.name].grad for row in self._rows if row.optimizer != "frozen"]
        found = [grad for grad in grads if grad is not None]
        if not found:
            raise NumericsError(
                "no parameter has a gradient",
                got=f"{len(grads)} trainable parameters",
                next="Run a backward pass before clip and step",
            )
        return found

    @torch.no_grad()
    def step(self, step: int, total_steps: int, max_logits: Mapping[int, Tensor | None] | None = None) -> StepInfo:
        """One update: AdamW and Muon, then QK-Clip. `step` = updates already done in this run (the first has 0).

        `max_logits` {layer: S_H} are this step's largest scaled logits per head, already reduced over micro-batches and ranks;
        they are read, not changed or remembered: the model resets them. Layers without one are skipped. Parameters without a
        gradient are left alone. Raises NumericsError (maxima not finite, no gradient) before anything moves.
        """
        self._gradients()
        maxima = _qk_clip.read(self.layouts, max_logits) if self.tau is not None else {}
        lr = self.lr * self._factor(step, total_steps)
        copied = self.muon.update(lr, self.updates) | self.adamw.update(lr, self.updates)
        names = [name for name in self.masters if name not in copied]
        if names and self.ferry is None:  # a ferry brings no state of parameters that were left alone
            torch._foreach_copy_([self.params[name] for name in names], [self.masters[name] for name in names])
        clipped: dict[int, list[int]] = {}
        if self.muonclip is not None and self.tau is not None and _qk_clip.any_over(maxima, self.tau):
            self._settle()  # masters on the host must have arrived before they are scaled there
            clipped = _qk_clip.scale(self.params, self.masters, self.layouts, maxima, self.tau, self.muonclip.alpha)
        self.updates += 1
        # Fused kernels, PyTorch's AdamW among them, do not: what was computed from the old weights must be known to be old.
        torch.autograd.graph.increment_version([self.params[row.name] for row in self._rows if row.optimizer != "frozen"])
        return StepInfo(lr=lr, clipped=clipped)

    def _settle(self) -> None:
        if self.ferry is not None:
            self.ferry.settle()

    def _factor(self, step: int, total_steps: int) -> float:
        factor = self.schedule.factor(step, total_steps)
        if not (math.isfinite(factor) and factor >= 0):
            raise RecipeError(
                "the schedule gave no share of the learning rate",
                where=f"schedule, step {step} of {total_steps}",
                got=factor,
                allowed="a finite number from 0 on",
            )
        return factor

    def zero_grad(self) -> None:
        """Drops all gradients (sets them to None)."""
        for param in self.params.values():
            param.grad = None

    # ------------------------------------------------------------ table

    def table(self) -> list[TableRow]:
        """One row per parameter, frozen ones included, in the order given."""
        return list(self._rows)

    def table_text(self) -> str:
        """The table for people: equal layers folded, totals; for MuonClip also what QK-Clip acts on, and the number type of
        Newton-Schulz with its reason."""
        text = _table.table_text(self._rows)
        if self.ferry is not None:
            text += "\nMasters and moments in the host's memory"
        if self.muonclip is None:
            return text
        on = f"tau {self.tau:g}, alpha {self.muonclip.alpha:g}, {len(self.layouts)} attention layers" if self.tau else "off"
        return f"{text}\nQK-Clip: {on}\nNewton-Schulz in {self.muon.note}"

    def table_hash(self) -> str:
        """sha256 hex of the table: who updates what, at which scale and decay, cut how."""
        return _table.table_hash(self._rows)

    # ------------------------------------------------------------ state

    def scalars(self) -> dict[str, Any]:
        """Plain JSON: format, table hash, updates done, and the number type of Newton-Schulz (None without Muon)."""
        return {
            "format": STATE_FORMAT,
            "table_hash": self.table_hash(),
            "updates": self.updates,
            "ns_dtype": self.muon.dtype_name if self.muonclip else None,
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on bit for bit: moments, masters, counts and `scalars` (as bytes), all contiguous.

        The large ones are the live tensors, not copies: write them out before the next step.
        """
        self._settle()
        found = {**self._live_state(), STEP_COUNTS: self.adamw.step_counts()}
        text = json.dumps(self.scalars(), sort_keys=True).encode()
        return {**found, SCALARS: torch.tensor(list(text), dtype=torch.uint8)}

    def _live_state(self) -> dict[str, Tensor]:
        masters = {f"master/{name}": tensor for name, tensor in self.masters.items()}
        return {**self.muon.state(), **self.adamw.state(), **masters}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave. Parameters themselves are the model's to load, masters are ours.

        Raises CheckpointError, before anything is changed, if the table differs or a tensor is missing, unknown or of another
        shape or type.
        """
        scalars = _read_scalars(tensors)
        if scalars["table_hash"] != self.table_hash():
            raise CheckpointError(
                "the state belongs to another parameter -> optimizer table",
                got=scalars["table_hash"],
                allowed=self.table_hash(),
                next="Keep model and optimizer settings as they were, or start the stage afresh",
            )
        live = {**self._live_state(), STEP_COUNTS: self.adamw.step_counts()}
        given = set(tensors) - {SCALARS}
        if given != set(live):
            missing, unknown = sorted(set(live) - given), sorted(given - set(live))
            raise CheckpointError(
                "the optimizer state does not fit",
                got=f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}",
            )
        for name, tensor in live.items():
            if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
                raise CheckpointError(
                    f"{name} does not fit",
                    got=f"{tuple(tensors[name].shape)} {tensors[name].dtype}",
                    allowed=f"{tuple(tensor.shape)} {tensor.dtype}",
                )
        self._settle()
        for name, tensor in live.items():
            tensor.copy_(tensors[name])
        self.adamw.load_step_counts(tensors[STEP_COUNTS])
        self.updates = scalars["updates"]
        if self.muonclip is not None:
            self.muon.adopt_dtype(scalars["ns_dtype"])


def _no_float16(rows: Iterable[TableRow], params: Mapping[str, Tensor]) -> None:
    for row in rows:
        if params[row.name].dtype == torch.float16:
            raise RecipeError(
                'master = "stochastic" rounds to bfloat16 only',
                where=row.name,
                got="float16",
                next='Train in bfloat16, or take master = "auto"',
            )


def _read_scalars(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if SCALARS not in tensors:
        raise CheckpointError(
            f"this is no optimizer state: it has no {SCALARS!r}", got=", ".join(sorted(tensors)[:3]) or "nothing"
        )
    try:
        scalars = json.loads(bytes(tensors[SCALARS].tolist()).decode())
    except ValueError as error:
        raise CheckpointError(f"{SCALARS!r} of the optimizer state is not JSON: {error}") from None
    if scalars.get("format") != STATE_FORMAT:
        raise CheckpointError("the optimizer state has another format", got=scalars.get("format"), allowed=str(STATE_FORMAT))
    return scalars
