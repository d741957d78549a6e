"""A layer over long packs piece by piece, with exact carry of its state and recomputation: memory of a segment, not of the pack.

Forward keeps the layer's input and the recurrent state at segment boundaries that lie inside a document (f32[H, D, V] each).
Backward takes the segments in reverse, computes each again and hands the state's gradient to the one before it. The convolution
needs the last J - 1 tokens before a segment: these are projected again with it. Weights' gradients are added in fp32 over
segments and rounded to the weights' dtype once.

Legend: `T` tokens, `D` head width, `V` value width, `H` heads, `J` kernel length, `S` documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from k2lab.models.pack import Pack

STEP = 64  # a cut inside a document falls on a multiple of this, the kernels' chunk


@dataclass(frozen=True)
class Segment:
    """Tokens start .. end. `reach` tokens before start belong to its first document and are seen by the convolution only;
    `begun`: the first document began in an earlier segment; `goes_on`: the last one ends in a later segment.
    `pack`: its documents; `window`: the same with the `reach` tokens in front."""

    start: int
    end: int
    reach: int
    begun: bool
    goes_on: bool
    pack: Pack
    window: Pack


@dataclass(frozen=True)
class Cost:
    """Bytes of work in the backward pass: per token, per chunk of a document, per document."""

    token: float
    chunk: float
    document: float


# run(x of a segment's window, the segment, the state of its first document or None, for_backward) -> (y, state of its last
# document or None)
Run = Callable[[torch.Tensor, Segment, torch.Tensor | None, bool], tuple[torch.Tensor, torch.Tensor | None]]


def plan(pack: Pack, cost: Cost, budget: float, reach: int) -> tuple[Segment, ...]:
    """Cuts a pack into segments whose work fits `budget` bytes, each at least `STEP` tokens; whole documents where they fit.
    `reach` is the convolution's J - 1. Kept on the pack, because every layer needs the same."""
    known = pack.__dict__.setdefault("_segments", {})
    key = (cost, budget, reach)
    if key not in known:
        cuts = _cuts(pack, cost, budget)
        known[key] = tuple(_segment(pack, start, end, reach) for start, end in zip(cuts, cuts[1:]))
    return known[key]


def _work(tokens: int, cost: Cost) -> float:
    return tokens * cost.token + -(-tokens // STEP) * cost.chunk + cost.document


def _cuts(pack: Pack, cost: Cost, budget: float) -> list[int]:
    """Greedy: documents join a segment while they fit; of one that does not, as many whole steps as still fit."""
    cuts, used = [0], 0.0
    for start, end in zip(pack.starts, pack.starts[1:]):
        while start < end:
            if used + _work(end - start, cost) <= budget:
                used += _work(end - start, cost)
                break
            steps = int(max(0.0, budget - used - cost.document) // (STEP * cost.token + cost.chunk))
            whole = int(max(0.0, budget - cost.document) // (STEP * cost.token + cost.chunk))
            if used and 8 * steps < whole:  # the rest of the segment is not worth a cut inside a document
                steps = 0
            if not used:
                steps = max(1, steps)
            start = min(start + STEP * steps, end)
            used = 0.0
            if start < pack.num_tokens:
                cuts.append(start)
    return [*cuts, pack.num_tokens]


def _segment(pack: Pack, start: int, end: int, reach: int) -> Segment:
    inner = [place for place in pack.starts if start < place < end]
    first = max(place for place in pack.starts if place <= start)
    reach = min(reach, start - first)
    bounds = [start, *inner, end]
    return Segment(
        start=start,
        end=end,
        reach=reach,
        begun=first < start,
        goes_on=end not in pack.starts,
        pack=Pack(tuple(place - start for place in bounds), pack.device),
        window=Pack(tuple(max(0, place - start + reach) if n else 0 for n, place in enumerate(bounds)), pack.device),
    )


def initial_states(state: torch.Tensor | None, segment: Segment, like: tuple[int, int, int]) -> torch.Tensor | None:
    """f32[S, H, D, V] of a segment's documents, 0 but for the one that began before; None where no document is cut."""
    if not (segment.begun or segment.goes_on):
        return None
    S, device = len(segment.pack.lengths), segment.pack.device
    if state is None:
        return torch.zeros(S, *like, dtype=torch.float32, device=device)
    rest = torch.zeros(S - 1, *like, dtype=torch.float32, device=device)
    return torch.cat([state[None], rest]) if S > 1 else state[None]


class InSegments(torch.autograd.Function):
    """x [T, width], weights -> y [T, width] of the same layer, by segments."""

    @staticmethod
    def forward(ctx: Any, run: Run, segments: Sequence[Segment], x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        y, state, states = None, None, []
        for segment in segments:
            states.append(state)
            part, state = run(x[segment.start - segment.reach : segment.end], segment, state, False)
            if y is None:
                y = part.new_empty(len(x), part.shape[-1])
            y[segment.start : segment.end] = part
        ctx.save_for_backward(x, *(state for state in states if state is not None))
        ctx.has_state = [state is not None for state in states]
        ctx.run, ctx.segments, ctx.weights = run, segments, weights
        kind = x.device.type
        ctx.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        assert y is not None, "a pack has tokens"
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        states = [kept.pop(0) if has else None for has in ctx.has_state]
        wanted = [weight for weight in ctx.weights if weight.requires_grad]
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        grad_state, before = None, None
        for segment, state in zip(reversed(ctx.segments), reversed(states)):
            window = x[segment.start - segment.reach : segment.end].detach()
            inputs = [window.requires_grad_()] if grad_x is not None else []
            if segment.begun:
                state = state.detach().requires_grad_()
                inputs.append(state)
            with torch.enable_grad(), torch.autocast(x.device.type, ctx.autocast, enabled=ctx.autocast is not None):
                part, final = ctx.run(window, segment, state, True)
            outputs, grads = [part], [grad_y[segment.start : segment.end]]
            if segment.goes_on and final.requires_grad:  # not where all that the state depends on is frozen
                outputs, grads = [part, final], [*grads, grad_state]
            found = list(torch.autograd.grad(outputs, [*inputs, *wanted], grads, allow_unused=True))
            del part, final, outputs
            if grad_x is not None:
                grad = found.pop(0)
                grad_x[segment.start : segment.end] = grad[segment.reach :]
                if before is not None:  # the next segment's convolution saw this one's last tokens
                    grad_x[segment.end - len(before) : segment.end] += before
                before = grad[: segment.reach].clone() if segment.reach else None
            grad_state = found.pop(0) if segment.begun else None
            for n, grad in enumerate(found):
                if grad is not None:
                    wide = torch.promote_types(grad.dtype, torch.float32)
                    sums[n] = grad.to(wide) if sums[n] is None else sums[n].add_(grad)
        totals = iter(None if total is None else total.to(weight.dtype) for total, weight in zip(sums, wanted))
        return None, None, grad_x, *(next(totals) if weight.requires_grad else None for weight in ctx.weights)
