"""Muon as Moonshot trains with it, batched over all matrices of equal shape (arXiv 2502.16982; Jordan et al. 2024).

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N after transposition: `x_BMN`.

    M <- mu M + G;  U = G + mu M (Nesterov) or M;  O = NewtonSchulz(U);  W <- W - lr (0.2 sqrt(max(rows, cols)) O + wd W)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2lab.optim._newton_schulz import choose_bf16, newton_schulz
from k2lab.optim._table import TableRow, matrix_shape

# Elements of one stack. On CPU a stack should stay near the caches; on a GPU it bounds the passing memory.
STACK_ELEMENTS = {"cpu": 1 << 19}
STACK_ELEMENTS_DEFAULT = 1 << 26


@dataclass(frozen=True)
class MuonSettings:
    """Muon's own knobs; lr and weight decay come with every call and from the table. `ns_dtype`: auto, fp32, bf16."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "auto"


@dataclass
class _Entry:
    """One parameter: `weight` is what is updated (the master, if there is one), `split` row blocks per matrix."""

    row: TableRow
    param: nn.Parameter
    weight: Tensor
    momentum: Tensor

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad

    @property
    def rows_cols(self) -> tuple[int, int]:
        return matrix_shape(self.row.shape, self.row.split)

    def count(self) -> int:
        """Number of matrices: experts x row blocks."""
        rows, cols = self.rows_cols
        return self.weight.numel() // (rows * cols)


class MuonPart:
    """Momentum and update of all parameters that the table gives to Muon."""

    def __init__(self, params: list[tuple[TableRow, nn.Parameter, Tensor]], settings: MuonSettings) -> None:
        self.settings = settings
        self.entries = []
        for row, param, weight in params:
            # Momentum is at least float32: in bfloat16 small gradients would vanish beside it.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            momentum = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            self.entries.append(_Entry(row, param, weight, momentum))
        self.bf16, self.note = self._choose_dtype()

    def _choose_dtype(self) -> tuple[bool, str]:
        wanted = self.settings.ns_dtype
        if wanted != "auto":
            return wanted == "bf16", f"{wanted}: as the recipe says"
        if not self.entries:
            return False, "fp32: no matrices"
        return choose_bf16(self.entries[0].weight.device)

    def adopt_dtype(self, name: str) -> None:
        """Keeps the number type with which a resumed run began, where the recipe leaves it open."""
        if self.settings.ns_dtype == "auto" and name != self.dtype_name:
            self.bf16, self.note = name == "bf16", f"{name}: kept from the checkpoint"

    @property
    def dtype_name(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    def update(self, lr: float) -> None:
        """One step with the raw learning rate `lr`. Parameters without a gradient are left alone, momentum included."""
        live = [entry for entry in self.entries if entry.param.grad is not None]
        if not live:
            return
        momenta = [entry.momentum for entry in live]
        torch._foreach_mul_(momenta, self.settings.momentum)
        torch._foreach_add_(momenta, [entry.grad for entry in live])
        for decay in {entry.row.weight_decay for entry in live} - {0.0}:
            torch._foreach_mul_([e.weight for e in live if e.row.weight_decay == decay], 1.0 - lr * decay)
        groups: dict[tuple, list[_Entry]] = {}
        for entry in live:
            key = (entry.weight.device, entry.momentum.dtype, *sorted(entry.rows_cols))
            groups.setdefault(key, []).append(entry)
        for (device, dtype, rows, cols), entries in groups.items():
            limit = STACK_ELEMENTS.get(device.type, STACK_ELEMENTS_DEFAULT)
            for pieces in _stacks(entries, max(1, limit // (rows * cols))):
                size = sum(stop - start for _, start, stop in pieces)
                self._update_stack(pieces, torch.empty(size, rows, cols, dtype=dtype, device=device), lr)

    def _update_stack(self, pieces: list[tuple[_Entry, int, int]], x_BMN: Tensor, lr: float) -> None:
        at = 0
        for entry, start, stop in pieces:
            self._write_input(entry, start, stop, x_BMN[at : at + stop - start])
            at += stop - start
        update_BMN = newton_schulz(x_BMN, self.settings.ns_steps, self.bf16)
        at = 0
        for entry, start, stop in pieces:
            rows, cols = entry.rows_cols
            piece = update_BMN[at : at + stop - start]
            weight = entry.weight.view(-1, rows, cols)[start:stop]
            weight.add_(piece.mT if rows > cols else piece, alpha=-lr * entry.row.lr_scale)
            at += stop - start

    def _write_input(self, entry: _Entry, start: int, stop: int, out_BMN: Tensor) -> None:
        """Writes G + mu M (Nesterov) or M of the matrices `start:stop`, transposed so that rows <= cols."""
        rows, cols = entry.rows_cols
        momentum = entry.momentum.view(-1, rows, cols)[start:stop]
        if self.settings.nesterov:
            gradient = entry.grad.reshape(-1, rows, cols)[start:stop]
            # Adding first and transposing by one copy is faster than adding transposed.
            momentum = torch.add(gradient, momentum, alpha=self.settings.momentum)
        out_BMN.copy_(momentum.mT if rows > cols else momentum)

    def state(self) -> dict[str, Tensor]:
        """{"muon.momentum/<name>": tensor}, the live tensors."""
        return {f"muon.momentum/{entry.row.name}": entry.momentum for entry in self.entries}


def _stacks(entries: list[_Entry], most: int) -> list[list[tuple[_Entry, int, int]]]:
    """Cuts the matrices of `entries` into stacks of at most `most`, each a list of (entry, first matrix, last + 1)."""
    stacks: list[list[tuple[_Entry, int, int]]] = [[]]
    room = most
    for entry in entries:
        start, count = 0, entry.count()
        while start < count:
            if room == 0:
                stacks.append([])
                room = most
            stop = min(count, start + room)
            stacks[-1].append((entry, start, stop))
            room -= stop - start
            start = stop
    return stacks
