"""Muon as Moonshot trains with it, batched over all matrices of equal shape (arXiv 2502.16982; Jordan et al. 2024).

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N after transposition: `x_BMN`; a parameter's own matrices have R
rows and C columns: `weight_BRC`.

    M <- mu M + G;  U = G + mu M (Nesterov) or M;  O = NewtonSchulz(U);  W <- W - lr (0.2 sqrt(max(rows, cols)) O + wd W)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2lab.optim import _ns_fused, _ns_torch
from k2lab.optim._newton_schulz import EPS, choose_bf16, newton_schulz
from k2lab.optim._offload import Ferry, Job, host_zeros
from k2lab.optim._rounding import is_stochastic, round_into, seed
from k2lab.optim._table import TableRow, matrix_shape

# Elements of one stack. On CPU a stack should stay near the caches; on a GPU it bounds the passing memory.
STACK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 28}
STACK_ELEMENTS_DEFAULT = 1 << 26


@dataclass(frozen=True)
class MuonSettings:
    """Muon's own knobs; lr and weight decay come with every call and from the table.

    `ns_dtype`: auto, fp32, bf16, fp16; `ns_kernel`: auto, torch; `momentum_dtype`: fp32, bf16.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    ns_dtype: str = "auto"
    ns_kernel: str = "auto"
    momentum_dtype: str = "fp32"


@dataclass
class _Entry:
    """One parameter: `weight` is what is updated (the master, if there is one), `split` row blocks per matrix."""

    row: TableRow
    param: nn.Parameter
    weight: Tensor
    momentum: Tensor
    stochastic: bool

    @property
    def rows_cols(self) -> tuple[int, int]:
        return matrix_shape(self.row.shape, self.row.split)

    @property
    def has_master(self) -> bool:
        return self.weight is not self.param

    def count(self) -> int:
        """Number of matrices: experts x row blocks."""
        rows, cols = self.rows_cols
        return self.weight.numel() // (rows * cols)

    def part(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The matrices `start:stop` of a tensor of this parameter's shape, [stop - start, R, C]."""
        return tensor.detach().view(-1, *self.rows_cols)[start:stop]


@dataclass
class _Piece:
    """Some matrices of one parameter, as they go into a stack: state on the parameter's device, brought there if need be."""

    entry: _Entry
    start: int
    grad_BRC: Tensor
    param_BRC: Tensor
    momentum_BRC: Tensor
    weight_BRC: Tensor

    @property
    def tall(self) -> bool:
        rows, cols = self.entry.rows_cols
        return rows > cols


class MuonPart:
    """Momentum and update of all parameters that the table gives to Muon.

    `stochastic`: bfloat16 weights without a master are rounded up or down by chance. `ferry`: momentum is kept on the host, as
    masters are then, and comes to the GPU stack by stack.
    """

    def __init__(
        self,
        params: list[tuple[TableRow, nn.Parameter, Tensor]],
        settings: MuonSettings,
        stochastic: bool = False,
        ferry: Ferry | None = None,
    ) -> None:
        self.settings, self.ferry = settings, ferry
        self.entries = []
        for row, param, weight in params:
            # Momentum is at least float32 unless asked otherwise: in bfloat16 small gradients may vanish beside it.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if settings.momentum_dtype == "bf16" and dtype == torch.float32:
                dtype = torch.bfloat16
            momentum = host_zeros(param, dtype) if ferry else torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            by_chance = stochastic and weight is param and is_stochastic(weight)
            self.entries.append(_Entry(row, param, weight, momentum, by_chance))
        self.dtype_name, self.note = self._choose_dtype()

    def _choose_dtype(self) -> tuple[str, str]:
        wanted = self.settings.ns_dtype
        if not self.entries:
            return ("fp32" if wanted == "auto" else wanted), "fp32: no matrices" if wanted == "auto" else f"{wanted}: no matrices"
        device = self.entries[0].param.device
        kernels, why = _ns_fused.kernels(device, self.settings.ns_kernel)
        if wanted != "auto":
            return wanted, f"{wanted}: as the recipe says; {why}"
        if kernels is not None:
            return "mixed", f"mixed: fp16 on Gram matrices, bf16 where the plain form is cheaper; {why}"
        bf16, reason = choose_bf16(device)
        return ("bf16" if bf16 else "fp32"), f"{reason}; {why}" if device.type == "cuda" else reason

    def adopt_dtype(self, name: str) -> None:
        """Keeps the number type with which a resumed run began, where the recipe leaves it open."""
        if self.settings.ns_dtype == "auto" and name != self.dtype_name:
            self.dtype_name, self.note = name, f"{name}: kept from the checkpoint"

    def _half(self, rows: int, cols: int) -> torch.dtype | None:
        """16-bit type for stacks of such matrices, None = full precision. bfloat16 cannot resolve Gram matrices."""
        if self.dtype_name == "mixed":
            by_gram = _ns_fused.symmetric_gram_is_cheaper(rows, cols, self.settings.ns_steps)
            return torch.float16 if by_gram else torch.bfloat16
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype_name]

    def update(self, lr: float, updates: int = 0) -> set[str]:
        """One step with the raw learning rate `lr`, after `updates` finished ones.

        Parameters without a gradient are left alone, momentum included. Returns the names of the parameters that already hold
        the rounding of their new master.
        """
        groups: dict[tuple, list[_Entry]] = {}
        for entry in self.entries:
            if entry.param.grad is not None:
                key = (entry.param.device, entry.momentum.dtype, *sorted(entry.rows_cols))
                groups.setdefault(key, []).append(entry)
        jobs: list[Job] = []
        copied: set[str] = set()
        # The largest groups first: while a GPU works on them, the many small launches of the others queue up behind.
        for (device, dtype, rows, cols), entries in sorted(groups.items(), key=_size, reverse=True):
            fused = self._fused(device, dtype, rows, cols)
            work = self._update_fused if fused else self._update_by_torch
            limit = STACK_ELEMENTS.get(device.type, STACK_ELEMENTS_DEFAULT)
            jobs += [self._job(pieces, work, lr, updates) for pieces in _stacks(entries, max(1, limit // (rows * cols)))]
            copied.update(entry.row.name for entry in entries if fused or self.ferry)
        if self.ferry is not None:
            self.ferry.run(jobs)
        else:
            for held, run in jobs:
                run(held)
        return copied

    def _job(
        self,
        pieces: list[tuple[_Entry, int, int]],
        work: Callable[[list[_Piece], float, int], None],
        lr: float,
        updates: int,
    ) -> Job:
        """What a stack needs of the state, and its update. Without a ferry the state is where it is needed."""
        held = [entry.part(entry.momentum, start, stop) for entry, start, stop in pieces]
        held += [entry.part(entry.weight, start, stop) for entry, start, stop in pieces if entry.has_master]

        def run(state: list[Tensor]) -> None:
            momenta, masters = state[: len(pieces)], iter(state[len(pieces) :])
            stack = []
            for (entry, start, stop), momentum in zip(pieces, momenta):
                assert entry.param.grad is not None
                grad = entry.param.grad.reshape(-1, *entry.rows_cols)[start:stop]
                param = entry.part(entry.param, start, stop)
                stack.append(_Piece(entry, start, grad, param, momentum, next(masters) if entry.has_master else param))
            work(stack, lr, updates)

        return held, run

    # ------------------------------------------------------------ by torch

    def _update_by_torch(self, stack: list[_Piece], lr: float, updates: int) -> None:
        self._advance_momentum(stack)
        x_BMN = self._inputs(stack)
        half = self._half(*x_BMN.shape[1:])
        if half == torch.float16:
            scale_B = 1.0 / (torch.linalg.vector_norm(x_BMN, dim=(1, 2)).float() + EPS)
            half_BMN = x_BMN.to(torch.bfloat16)
            update_BMN, factor = _ns_fused.orthogonalise(half_BMN, scale_B, self.settings.ns_steps, half, _ns_torch)
        else:
            update_BMN, factor = newton_schulz(x_BMN, self.settings.ns_steps, half is not None), 1.0
        at = 0
        for piece in stack:
            row, weight = piece.entry.row, piece.weight_BRC
            update = update_BMN[at : at + len(weight)]
            update = update.mT if piece.tall else update
            value = weight.float() if piece.entry.stochastic else weight
            if row.weight_decay:
                value.mul_(1.0 - lr * row.weight_decay)
            value.add_(update, alpha=-lr * row.lr_scale * factor)
            if piece.entry.stochastic:
                round_into(weight, value, seed(f"{row.name} {piece.start}", updates))
            elif self.ferry is not None and piece.entry.has_master:
                piece.param_BRC.copy_(weight)
            at += len(weight)

    def _advance_momentum(self, stack: list[_Piece]) -> None:
        mu = self.settings.momentum
        exact = [piece for piece in stack if piece.momentum_BRC.dtype != torch.bfloat16]
        if exact:
            momenta = [piece.momentum_BRC for piece in exact]
            torch._foreach_mul_(momenta, mu)
            torch._foreach_add_(momenta, [piece.grad_BRC for piece in exact])
        for piece in stack:
            if piece.momentum_BRC.dtype == torch.bfloat16:
                piece.momentum_BRC.copy_(piece.momentum_BRC.float().mul_(mu).add_(piece.grad_BRC))

    def _inputs(self, stack: list[_Piece]) -> Tensor:
        """G + mu M (Nesterov) or M of a stack's matrices, transposed so that M <= N, in float32 or float64."""
        first = stack[0]
        dtype = torch.promote_types(first.momentum_BRC.dtype, torch.float32)
        shape = (sum(len(piece.weight_BRC) for piece in stack), *sorted(first.entry.rows_cols))
        x_BMN = torch.empty(shape, dtype=dtype, device=first.param_BRC.device)
        at = 0
        for piece in stack:
            momentum = piece.momentum_BRC
            if self.settings.nesterov:
                # Adding first and transposing by one copy is faster than adding transposed.
                momentum = torch.add(piece.grad_BRC, momentum, alpha=self.settings.momentum)
            x_BMN[at : at + len(momentum)].copy_(momentum.mT if piece.tall else momentum)
            at += len(momentum)
        return x_BMN

    # ------------------------------------------------------------ by fused kernels

    def _fused(self, device: torch.device, dtype: torch.dtype, rows: int, cols: int) -> bool:
        """Whether the GPU's own kernels take such matrices."""
        if self._half(rows, cols) is None or dtype == torch.float64:
            return False
        kernels, _ = _ns_fused.kernels(device, self.settings.ns_kernel)
        return kernels is not None and kernels.fits(rows, cols)

    def _update_fused(self, stack: list[_Piece], lr: float, updates: int) -> None:
        """Two passes over memory around Newton-Schulz: momentum on the way into the stack, decay and update on the way out."""
        from k2lab.optim import _muon_triton

        device = stack[0].param_BRC.device
        kernels, _ = _ns_fused.kernels(device, self.settings.ns_kernel)
        assert kernels is not None
        count, rows, cols = sum(len(piece.weight_BRC) for piece in stack), *sorted(stack[0].entry.rows_cols)
        x_BMN = torch.empty(count, rows, cols, dtype=torch.bfloat16, device=device)
        sums_BX = torch.empty(count, _muon_triton.blocks(rows, cols), dtype=torch.float32, device=device)
        at = 0
        for piece in stack:
            here = slice(at, at + len(piece.weight_BRC))
            _muon_triton.gather(
                piece.grad_BRC,
                piece.momentum_BRC,
                x_BMN[here],
                sums_BX[here],
                self.settings.momentum,
                nesterov=self.settings.nesterov,
            )
            at = here.stop
        scale_B = 1.0 / (sums_BX.sum(1).sqrt_() + EPS)
        half = self._half(rows, cols)
        assert half is not None
        update_BMN, factor = _ns_fused.orthogonalise(x_BMN, scale_B, self.settings.ns_steps, half, kernels)
        at = 0
        for piece in stack:
            row = piece.entry.row
            _muon_triton.scatter(
                update_BMN[at : at + len(piece.weight_BRC)],
                piece.weight_BRC,
                piece.param_BRC if piece.entry.has_master else None,
                keep=1.0 - lr * row.weight_decay,
                scale=-lr * row.lr_scale * factor,
                seed=seed(row.name, updates) if piece.entry.stochastic else None,
                first=piece.start,
            )
            at += len(piece.weight_BRC)

    # ------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """{"muon.momentum/<name>": tensor}, the live tensors."""
        return {f"muon.momentum/{entry.row.name}": entry.momentum for entry in self.entries}


def _size(group: tuple[tuple, list[_Entry]]) -> int:
    return sum(entry.weight.numel() for entry in group[1])


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
