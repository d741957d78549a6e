"""The losses of a linear head on CUDA: matrix products of a library and one kernel per piece of logits, without a host
synchronisation. `losses.py` and `_distribution.py` send tensors here that `takes` accepts; formulas and meanings are theirs.

Logits of a piece are written once, read once or twice and overwritten by their gradient in the inputs' type, which two products
turn into the gradients of hidden states and weights; the latter is summed over pieces in fp32 inside the product. Values that are
results (log-probabilities, divergences) come from fp32 logits. The cross-entropy of bf16 inputs that is trained on comes from
bf16 logits, as in transformers, and has its error: where logits spread by 4, 0.02 nats per token (3e-4 in the mean) and 0.8 % of
the gradients' norm. fp32 logits would leave 1e-5 nats and 0.2 %, and take 6 % more time.

Positions of weight 0 cost a matrix row each unless `rows` is given, a bound on the number of the others that the host knows: then
the others are gathered on the device.

Legend: `T` positions, `D` width, `W` vocabulary, `K` teacher's tokens, `c` positions of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from k2lab.models import slower

SLOWER = "losses on this GPU take a slower path, in which the host waits for the device"
BUFFER = 512 << 20  # bytes of a piece's logits
ROWS = 4096  # with fewer positions in a piece, summing the weight's gradient over pieces costs more than a tenth of the products
GATHER = 0.9  # rows are gathered if at most this share of them counts
DTYPES = (torch.bfloat16, torch.float32)
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)  # the student's remainder stays above it, as on the CPU


@slower.or_none("triton", SLOWER)
def _kernels() -> ModuleType:
    from k2lab.models.kernels import losses_triton

    return losses_triton


def takes(hidden_TD: torch.Tensor, weight_WD: torch.Tensor) -> bool:
    """True if the functions below can run: CUDA, bf16 or fp32 throughout, Triton installed. On CUDA it is said once why not."""
    if hidden_TD.device.type != "cuda":
        return False
    if hidden_TD.dtype != weight_WD.dtype or hidden_TD.dtype not in DTYPES:
        slower.say(f"hidden states are {hidden_TD.dtype} and the head {weight_WD.dtype}, not bfloat16 or float32 both", SLOWER)
        return False
    return _kernels() is not None


def piece_rows(W: int, itemsize: int) -> int:
    """Positions of a piece, unless the caller asks for more: as many as fill `BUFFER` with logits, at least `ROWS`."""
    return max(ROWS, BUFFER // (W * itemsize) // 256 * 256)


# ---------------------------------------------------------------- products


def _product(x_cD: torch.Tensor, weight_WD: torch.Tensor, out_cW: torch.Tensor) -> None:
    """x W^T into `out_cW`, whose rows may be strided and whose type may be fp32 where the factors are bf16."""
    if out_cW.dtype == x_cD.dtype:
        torch.mm(x_cD, weight_WD.t(), out=out_cW)
    else:
        torch.ops.aten.mm.dtype_out(x_cD, weight_WD.t(), out_cW.dtype, out=out_cW)


class _Gradients:
    """Collects both gradients over pieces: `hidden` [T, D] in the hidden states' type, `weight` [W, D] in fp32."""

    def __init__(self, hidden_TD: torch.Tensor, weight_WD: torch.Tensor, need: tuple[bool, bool]) -> None:
        self.hidden_TD, self.weight_WD = hidden_TD, weight_WD
        self.hidden = torch.empty_like(hidden_TD) if need[0] else None
        self.weight = torch.empty_like(weight_WD, dtype=torch.float32) if need[1] else None
        self.begun = False

    def add(self, part: slice, grad_cW: torch.Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad_cW, self.weight_WD, out=self.hidden[part])
        if self.weight is not None:
            left, right = grad_cW.t(), self.hidden_TD[part]
            if left.dtype == torch.float32:
                torch.addmm(self.weight, left, right, beta=int(self.begun), out=self.weight)
            elif self.begun:
                torch.ops.aten.addmm.dtype_out(self.weight, left, right, torch.float32, out=self.weight)
            else:
                torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=self.weight)
            self.begun = True


class _Logits:
    """A buffer for the logits of one piece at a time, fp32 if `wide`, else of the hidden states' type. Their gradients, always of
    the hidden states' type, take the same memory, each row where that of the logits begins. Rows have spare columns behind the W,
    the first of which takes what is written for entries that do not exist."""

    def __init__(self, hidden_TD: torch.Tensor, weight_WD: torch.Tensor, chunk: int | None, wide: bool = True) -> None:
        T, W = len(hidden_TD), len(weight_WD)
        self.hidden_TD, self.weight_WD = hidden_TD, weight_WD
        dtype = torch.float32 if wide else hidden_TD.dtype
        self.chunk = min(max(chunk or 0, piece_rows(W, dtype.itemsize)), max(T, 1))
        self.logits = torch.empty((self.chunk, (W // 64 + 1) * 64), dtype=dtype, device=hidden_TD.device)
        self.grads = self.logits.view(hidden_TD.dtype)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(positions, logits [c, W], room for gradients [c, W] in the same memory)."""
        W = len(self.weight_WD)
        for first in range(0, len(self.hidden_TD), self.chunk):
            part = slice(first, min(first + self.chunk, len(self.hidden_TD)))
            count = part.stop - first
            logits = self.logits[:count, :W]
            _product(self.hidden_TD[part], self.weight_WD, logits)
            yield part, logits, self.grads[:count, :W]


class _Selection:
    """Positions that count, moved to the front on the device if the host knows that they are few."""

    def __init__(self, counts_T: torch.Tensor, rows: int | None) -> None:
        T = len(counts_T)
        self.T, self.places = T, None
        bound = None if rows is None else min(T, (rows + 255) // 256 * 256)
        if bound is not None and bound <= GATHER * T:
            torch._assert_async(counts_T.sum() <= rows, "more positions count than `rows` says")
            self.places = torch.sort(counts_T.byte(), descending=True, stable=True).indices[:bound]

    def take(self, values_T: torch.Tensor) -> torch.Tensor:
        return values_T.contiguous() if self.places is None else values_T.index_select(0, self.places)

    def put(self, values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or self.places is None:
            return values
        return values.new_zeros(self.T, *values.shape[1:]).index_copy_(0, self.places, values)


# ---------------------------------------------------------------- cross-entropy and log-probabilities


class CrossEntropy(torch.autograd.Function):
    """See `losses.linear_cross_entropy`. Gradients are made in the forward pass for a factor of 1."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, targets_T, weight_T, chunk, rows):
        kernels = _kernels()
        chosen = _Selection(weight_T != 0, rows)
        hidden, targets, weights = (chosen.take(x) for x in (hidden_TD, targets_T, weight_T))
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        need = ctx.needs_input_grad[:2]
        sums = _Gradients(hidden, weight_WD, need)
        for part, logits, grads in _Logits(hidden, weight_WD, chunk, wide=not any(need)).pieces():
            kernels.cross_entropy(logits, grads if any(need) else None, targets[part], weights[part], nll[part])
            if any(need):
                sums.add(part, grads)
        ctx.save_for_backward(chosen.put(sums.hidden), sums.weight)
        ctx.dtype = weight_WD.dtype
        nll_T = chosen.put(nll)
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * weight_T).sum(), nll_T

    @staticmethod
    def backward(ctx, grad, _):
        return *_scaled(ctx, grad), None, None, None, None


def _scaled(ctx, grad):
    """Saved gradients times the upstream scalar; that of the weights in fp32, then rounded once, in one pass."""
    grad_hidden, total = ctx.saved_tensors
    grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
    return grad_hidden, None if total is None else torch.mul(total, grad, out=torch.empty_like(total, dtype=ctx.dtype))


def log_probs(
    hidden_TD: torch.Tensor, weight_WD: torch.Tensor, targets_T: torch.Tensor, weight_T: torch.Tensor, chunk: int | None
) -> torch.Tensor:
    """log p(target) [T] from fp32 logits, 0 where the weight is 0; no gradient."""
    kernels = _kernels()
    nll = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
    for part, logits, _ in _Logits(hidden_TD, weight_WD, chunk).pieces():
        kernels.cross_entropy(logits, None, targets_T[part], weight_T[part], nll[part])
    return nll.neg_()


# ---------------------------------------------------------------- divergence from a teacher


@dataclass
class _Buckets:
    """What a piece's divergence needs. `named_cK` the student's logits of the teacher's tokens, -inf where an entry is not there;
    `places_cK` their columns, W (spare) where not there; `total_c1`, `rest_c1` log-sum-exp of all logits and of the unnamed
    ones; `p_cK`, `r_c1` the teacher; `kl_c`."""

    named_cK: torch.Tensor
    places_cK: torch.Tensor
    total_c1: torch.Tensor
    rest_c1: torch.Tensor
    p_cK: torch.Tensor
    r_c1: torch.Tensor
    kl_c: torch.Tensor

    def gradient(
        self,
        logits_cW: torch.Tensor,
        grads_cW: torch.Tensor,
        kl_c1: torch.Tensor,
        chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """d/d logits of sum of (kl_c1 x KL + logp_c1 x log p of the target) -> `grads_cW`; `chosen` is (target [c, 1], its logit
        [c, 1], logp_c1). `logits_cW` has -inf at the named tokens.

        d KL / d logit_j = mass q_j - p_j for a named token, mass q_j - r q_j / s for any other; d log p / d logit_j = [j is the
        target] - q_j.
        """
        W = logits_cW.shape[1]
        every_c1 = kl_c1 * (self.p_cK.sum(-1, keepdim=True) + self.r_c1)
        other_c1 = kl_c1 * self.r_c1
        if chosen is not None:
            every_c1 = every_c1 - chosen[2]
        first, second = (self.total_c1[:, 0], every_c1[:, 0]), (self.rest_c1[:, 0], other_c1[:, 0])
        _kernels().two_softmaxes(logits_cW, grads_cW, first, second)
        spare_cX = grads_cW.as_strided((len(grads_cW), W + 1), grads_cW.stride())
        named_cK = (self.named_cK - self.total_c1).exp() * every_c1 - kl_c1 * self.p_cK
        if chosen is not None:
            target_c1, logit_c1, logp_c1 = chosen
            is_named_cK = self.places_cK == target_c1
            named_cK = named_cK + logp_c1 * is_named_cK
            rest_c1 = (logit_c1 - self.rest_c1).exp() * other_c1
            alone_c1 = (logit_c1 - self.total_c1).exp() * every_c1 - rest_c1 + logp_c1
            place_c1 = target_c1.masked_fill(is_named_cK.any(-1, keepdim=True), W)
            spare_cX.scatter_(1, place_c1, alone_c1.to(grads_cW.dtype))
        spare_cX.scatter_(1, self.places_cK, named_cK.to(grads_cW.dtype))


def _buckets(logits_cW: torch.Tensor, ids_cK: torch.Tensor, teacher_cK: torch.Tensor) -> _Buckets:
    """The buckets of a piece; puts -inf into `logits_cW` at the named tokens. A teacher of -inf throughout names nothing."""
    c, W = logits_cW.shape
    there_cK = teacher_cK > -torch.inf
    places_cK = torch.where(there_cK, ids_cK, W)
    spare_cX = logits_cW.as_strided((c, W + 1), logits_cW.stride())
    named_cK = spare_cX.gather(1, places_cK).float().masked_fill_(~there_cK, -torch.inf)
    spare_cX.scatter_(1, places_cK, -torch.inf)
    rest_c = torch.empty(c, dtype=torch.float32, device=logits_cW.device)
    _kernels().log_sum_exp(logits_cW, rest_c)
    rest_c1 = rest_c.unsqueeze(1)
    total_c1 = torch.logaddexp(rest_c1, named_cK.logsumexp(-1, keepdim=True))
    rest_c1 = torch.maximum(rest_c1, total_c1 + LOG_TINY)
    p_cK = teacher_cK.exp()
    r_c1 = (1 - p_cK.sum(-1, keepdim=True)).clamp(min=0)
    if ids_cK.shape[1] >= W:
        r_c1 = torch.where(there_cK.all(-1, keepdim=True), 0.0, r_c1)  # all tokens are named: what is left is rounding
    kl_cK = torch.where(there_cK, p_cK * (teacher_cK - named_cK + total_c1), 0.0)
    kl_c1 = kl_cK.sum(-1, keepdim=True) + torch.special.xlogy(r_c1, r_c1) - r_c1 * (rest_c1 - total_c1)
    return _Buckets(named_cK, places_cK, total_c1, rest_c1, p_cK, r_c1, kl_c1[:, 0])


def _taught(teacher_cK: torch.Tensor, known_c: torch.Tensor) -> torch.Tensor:
    """The teacher in fp32, naming nothing where it is not known."""
    return teacher_cK.float().masked_fill(~known_c.unsqueeze(1), -torch.inf)


class TopkKL(torch.autograd.Function):
    """See `losses.linear_topk_kl`. Gradients are made in the forward pass for a factor of 1."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, ids_TK, teacher_TK, weight_T, chunk, rows):
        chosen = _Selection(weight_T != 0, rows)
        hidden, ids, teacher, weights = (chosen.take(x) for x in (hidden_TD, ids_TK, teacher_TK, weight_T))
        kl = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        need = ctx.needs_input_grad[:2]
        sums = _Gradients(hidden, weight_WD, need)
        for part, logits, grads in _Logits(hidden, weight_WD, chunk).pieces():
            counts = weights[part] != 0
            buckets = _buckets(logits, ids[part], _taught(teacher[part], counts))
            kl[part] = torch.where(counts, buckets.kl_c, 0.0)
            if any(need):
                buckets.gradient(logits, grads, weights[part].float().unsqueeze(1))
                sums.add(part, grads)
        ctx.save_for_backward(chosen.put(sums.hidden), sums.weight)
        ctx.dtype = weight_WD.dtype
        kl_T = chosen.put(kl)
        ctx.mark_non_differentiable(kl_T)
        return (kl_T * weight_T).sum(), kl_T

    @staticmethod
    def backward(ctx, grad, _):
        return *_scaled(ctx, grad), None, None, None, None, None


class LogProbs(torch.autograd.Function):
    """See `losses.linear_logprobs` and `linear_logprobs_topk_kl`. The backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_WD, targets_T, weight_T, ids_TK, teacher_TK, teacher_T, chunk, rows):
        counts_T = weight_T != 0
        chosen = _Selection(counts_T, rows)
        hidden, targets = chosen.take(hidden_TD), chosen.take(targets_T)
        counts = chosen.take(counts_T)
        kl, ids, teacher = None, None, None
        if teacher_T is None:
            logp = log_probs(hidden, weight_WD, targets, counts, chunk)
        else:
            known = chosen.take(counts_T & (teacher_T != 0))
            ids, teacher = chosen.take(ids_TK), _taught(chosen.take(teacher_TK), known)
            logp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
            kl = torch.empty_like(logp)
            targets = targets.masked_fill(~counts, 0)  # those of other positions may be anything
            for part, logits, _ in _Logits(hidden, weight_WD, chunk).pieces():
                logit_c1 = logits.gather(1, targets[part].unsqueeze(1))
                buckets = _buckets(logits, ids[part], teacher[part])
                logp[part] = torch.where(counts[part], (logit_c1 - buckets.total_c1)[:, 0], 0.0)
                kl[part] = torch.where(known[part], buckets.kl_c, 0.0)
        ctx.save_for_backward(hidden, weight_WD, targets, counts, ids, teacher)
        ctx.chosen, ctx.chunk = chosen, chunk
        return chosen.put(logp), chosen.put(kl)

    @staticmethod
    def backward(ctx, logp_grad_T, kl_grad_T):
        hidden, weight_WD, targets, counts, ids, teacher = ctx.saved_tensors
        chosen = ctx.chosen
        upstream = chosen.take(logp_grad_T).float() * counts
        need = ctx.needs_input_grad[:2]
        sums = _Gradients(hidden, weight_WD, need)
        if kl_grad_T is None:
            kl_upstream = None
        else:
            kl_upstream = (chosen.take(kl_grad_T).float() * counts).unsqueeze(1)
        for part, logits, grads in _Logits(hidden, weight_WD, ctx.chunk).pieces():
            if teacher is None:
                unused = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
                _kernels().cross_entropy(logits, grads, targets[part], -upstream[part], unused)
            else:
                target_c1 = targets[part].unsqueeze(1)
                logit_c1 = logits.gather(1, target_c1).float()
                buckets = _buckets(logits, ids[part], teacher[part])
                known_c1 = (teacher[part] > -torch.inf).any(-1, keepdim=True)
                scale_c1 = torch.where(known_c1, kl_upstream[part], 0.0)
                buckets.gradient(logits, grads, scale_c1, (target_c1, logit_c1, upstream[part].unsqueeze(1)))
            sums.add(part, grads)
        total = None if sums.weight is None else sums.weight.to(weight_WD.dtype)
        return chosen.put(sums.hidden), total, None, None, None, None, None, None, None
