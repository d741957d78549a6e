"""Kimi Delta Attention (Kimi Linear report, arXiv:2510.26692) and its short convolution, chunked, for packed documents.

Per head, with state S [D, V], per-channel decay a_t = exp(g_t), key k_t (unit length), rate b_t:

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T,        o_t = S_t^T q_t / sqrt(D)

Each document is cut into chunks of its own, and chunk number i of all documents is one batched step, so the sequential loop is
as long as the longest document, and neither state nor convolution can cross a boundary. Everything else (decayed products within
chunks, the triangular systems, outputs) is computed for all chunks at once.

Decays are products of exponentials of *differences* of cumulated gates. Where a chunk decays by less than exp(2 SAFE) in every
channel these factor about the chunk's middle into two matrices and one product; where it decays more, a recursion over
halves uses only exponents <= 0. No gate, however strong, overflows or loses the exact result.

Legend: `B` batch, `T` tokens, `H` heads, `D` key width, `V` value width, `M` chunks of all documents, `C` chunk length, `J`
kernel length, `X` channels, `S` documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from k2lab.models import kda_gpu
from k2lab.models.pack import Pack

CHUNK = 32
SAFE = 60.0  # exp(+-60) and products of two such factors with unit vectors stay far from fp32's limits


def decay_gate(
    z_THD: torch.Tensor, log_rate_H1: torch.Tensor, bias_HD: torch.Tensor, lower_bound: float | None = None
) -> torch.Tensor:
    """Log-decay g <= 0 of shape [..., H, D]. Unbounded (Kimi Linear): -exp(A) softplus(z + bias). With `lower_bound` (< 0, Kimi
    K3's form): lower_bound sigmoid(exp(A) (z + bias)). Computed in fp32 or wider."""
    wide = torch.promote_types(z_THD.dtype, torch.float32)
    z, rate = z_THD.to(wide) + bias_HD.to(wide), log_rate_H1.to(wide).exp()
    return -rate * F.softplus(z) if lower_bound is None else lower_bound * torch.sigmoid(rate * z)


def unit(x: torch.Tensor, size: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
    """size x / sqrt(|x|^2 + eps) over the last axis, as in the flash-linear-attention library."""
    return Unit.apply(x, size, eps)


# ---------------------------------------------------------------- layout


@dataclass(frozen=True)
class Chunks:
    """Chunks of all documents, ordered by their number within the document; within a number, longest document first, so that the
    documents that are still running are always a prefix of the state."""

    pack: Pack
    size: int

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Documents, longest first (stable)."""
        return tuple(sorted(range(len(self.pack.lengths)), key=lambda n: -self.pack.lengths[n]))

    @cached_property
    def active(self) -> tuple[int, ...]:
        """Documents that have a chunk number i, for each i."""
        counts = [-(-length // self.size) for length in self.pack.lengths]
        return tuple(sum(count > i for count in counts) for i in range(max(counts)))

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([self.pack.lengths[n] for n in self.order])
        starts = torch.tensor([self.pack.starts[n] for n in self.order])
        first = torch.cat([starts[:count] + i * self.size for i, count in enumerate(self.active)])
        end = torch.cat([(starts + lengths)[:count] for count in self.active])
        rows = (first[:, None] + torch.arange(self.size)[None]).flatten()
        limit = end.repeat_interleave(self.size)
        return torch.minimum(rows, limit - 1).to(self.pack.device), (rows >= limit).to(self.pack.device)

    @cached_property
    def _heads(self) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return {}

    def rows(self, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows (token, head) of [T H, *] and places (chunk, head, position) of [M H C, *]: the row of each place i64[M H C]
        (padding repeats the document's last token), the place of each row i64[T H], and the places that are padding i64[n]."""
        if heads not in self._heads:
            rows, padded = self._places
            head = torch.arange(heads, device=self.pack.device)[None, :, None]
            of_place = (rows.view(-1, 1, self.size) * heads + head).flatten()
            blank = padded.view(-1, 1, self.size).expand(-1, heads, -1).flatten()
            real = (~blank).nonzero()[:, 0]
            of_row = torch.empty(self.pack.num_tokens * heads, dtype=torch.int64, device=self.pack.device)
            of_row.index_copy_(0, of_place[real], real)
            self._heads[heads] = (of_place, of_row, blank.nonzero()[:, 0])
        return self._heads[heads]


class Place(torch.autograd.Function):
    """Rows (token, head) [T H, *] put into chunks [M H C, *]. Padding must not influence any result, so it has no gradient."""

    @staticmethod
    def forward(ctx, x, of_place, of_row):
        ctx.of_row = of_row
        return x.index_select(0, of_place)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.of_row), None, None


class Unplace(torch.autograd.Function):
    """The inverse: results [M H C, *] of the chunks as rows [T H, *]; those of padding are dropped."""

    @staticmethod
    def forward(ctx, x, of_place, of_row, padding):
        ctx.of_place, ctx.padding = of_place, padding
        return x.index_select(0, of_row)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.of_place).index_fill_(0, ctx.padding, 0.0), None, None, None


class Unit(torch.autograd.Function):
    """size x / sqrt(|x|^2 + eps) over the last axis; see `unit`."""

    @staticmethod
    def forward(ctx, x, size, eps):
        scale = torch.linalg.vecdot(x, x).unsqueeze(-1).add_(eps).rsqrt_().mul_(size)
        y = x * scale
        ctx.save_for_backward(y, scale)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-(ctx.size**2))
        return torch.addcmul(grad, y, along).mul_(scale), None, None


# ---------------------------------------------------------------- decayed products


def _halved(x: torch.Tensor, k: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """sum_d x_id k_jd exp(G_id - G_jd) for j <= i, 0 elsewhere; [..., C, C]; for decays of any strength. Pairs across the
    middle of a block are measured from its middle, both exponents <= 0; pairs within a half are the halves' own problem."""
    C = x.shape[-2]
    blocks = (x * k).sum(-1)[..., None, None]  # [..., C, 1, 1]: the diagonal
    size = 1
    while size < C:
        x2, k2, g2 = (t.unflatten(-2, (C // (2 * size), 2 * size)) for t in (x, k, decay))
        middle = g2[..., size - 1 : size, :]
        later = x2[..., size:, :] * (g2[..., size:, :] - middle).exp().to(x.dtype)
        earlier = k2[..., :size, :] * (middle - g2[..., :size, :]).exp().to(x.dtype)
        across = later @ earlier.transpose(-1, -2)
        top = torch.cat([blocks[..., 0::2, :, :], torch.zeros_like(across)], dim=-1)
        blocks = torch.cat([top, torch.cat([across, blocks[..., 1::2, :, :]], dim=-1)], dim=-2)
        size *= 2
    return blocks[..., 0, :, :]


class Solve(torch.autograd.Function):
    """(I + lower)^-1 sides for strictly lower triangular [..., C, C] and sides [..., C, n].

    Through the explicit inverse, which the backward pass reuses: three products are faster than two more triangular solves. It is
    tame, because the inverse is a product of contractions (I - b k k^T with |k| = 1 and 0 <= b <= 1).
    """

    @staticmethod
    def forward(ctx, lower, sides):
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower).contiguous()
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        solved = torch.matmul(inverse, sides)
        ctx.save_for_backward(inverse, solved)
        return solved

    @staticmethod
    def backward(ctx, grad):
        inverse, solved = ctx.saved_tensors
        grad_sides = torch.matmul(inverse.transpose(-1, -2), grad)
        return torch.matmul(grad_sides, solved.transpose(-1, -2)).neg_(), grad_sides


# ---------------------------------------------------------------- the scan over chunks


class Scan(torch.autograd.Function):
    """The only sequential part. For chunks of one document in order:

        v = u - w S;    S <- diag(decay) S + k^T v

    u [M, H, C, V], w and k [M, H, C, D], decay [M, H, D], initial [S, H, D, V] -> v [M, H, C, V], states before each chunk
    [M, H, D, V], final states [S, H, D, V]; documents and chunks in `Chunks` order.
    """

    @staticmethod
    def forward(ctx, u, w, k, decay, initial, active):
        M, H, C, V = u.shape
        D = w.shape[-1]
        v, states, final = torch.empty_like(u), u.new_empty(M, H, D, V), torch.empty_like(initial)
        flat_v, flat_u, flat_w = v.view(M * H, C, V), u.reshape(M * H, C, V), w.reshape(M * H, C, D)
        flat_k = k.reshape(M * H, C, D).transpose(1, 2)
        states[: active[0]] = initial
        first = 0
        for step, count in enumerate(active):
            now = slice(first * H, (first + count) * H)
            state = states[first : first + count]
            torch.baddbmm(flat_u[now], flat_w[now], state.view(-1, D, V), alpha=-1, out=flat_v[now])
            new = state * decay[first : first + count, :, :, None]
            new.view(-1, D, V).baddbmm_(flat_k[now], flat_v[now])
            first += count
            running = active[step + 1] if step + 1 < len(active) else 0
            states[first : first + running] = new[:running]
            final[running:count] = new[running:]
        ctx.save_for_backward(w, k, decay, v, states)
        ctx.active = active
        return v, states, final

    @staticmethod
    def backward(ctx, grad_v, grad_states, grad_final):
        w, k, decay, v, states = ctx.saved_tensors
        M, H, C, V = v.shape
        D = w.shape[-1]
        total_v, after = torch.empty_like(v), torch.empty_like(states)
        flat_total, flat_grad = total_v.view(M * H, C, V), grad_v.reshape(M * H, C, V)
        flat_w, flat_k = w.reshape(M * H, C, D).transpose(1, 2), k.reshape(M * H, C, D)
        first, grad_state = M, grad_final[:0]
        for count in reversed(ctx.active):
            first -= count
            now, chunks = slice(first * H, (first + count) * H), slice(first, first + count)
            # documents that end here join with the gradient of their final state
            grad = torch.cat([grad_state, grad_final[len(grad_state) : count]], out=after[chunks])
            torch.baddbmm(flat_grad[now], flat_k[now], grad.view(-1, D, V), out=flat_total[now])
            grad_state = torch.addcmul(grad_states[chunks], grad, decay[chunks, :, :, None])
            grad_state.view(-1, D, V).baddbmm_(flat_w[now], flat_total[now], alpha=-1)
        grad_w = torch.matmul(total_v, states.transpose(-1, -2)).neg_()
        grad_k = torch.matmul(v, after.transpose(-1, -2))
        return total_v, grad_w, grad_k, torch.linalg.vecdot(after, states), grad_state, None


# ---------------------------------------------------------------- KDA


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = CHUNK,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    pack: Pack | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KDA over packed documents. query, key, g [B, T, H, D], value [B, T, H, V], beta [B, T, H] -> (out [B, T, H, V], final
    states [S, H, D, V] or None).

    As transformers' `chunk_kimi_delta_attention`, plus `pack`: with it B = 1 and documents are those of the pack; without, each
    row of the batch is a document. States are per document. `chunk_size` must be a power of two. Computed in fp32 or wider; half
    precision on CUDA by flash-linear-attention's kernels where they are installed (`kda_gpu`), which have a chunk of their own.
    """
    B, T, H, D = key.shape
    V = value.shape[-1]
    if kda_gpu.takes(query, value):
        states = {"initial_state": initial_state, "output_final_state": output_final_state}
        return kda_gpu.chunk_kda(query, key, value, g, beta, **states, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, pack=pack)
    pack = pack if pack is not None else Pack.rows(B, T, key.device)
    assert pack.num_tokens == B * T, "a pack describes exactly the tokens that are there"
    layout = _layout(pack, chunk_size)
    of_place, of_row, padding = layout.rows(H)
    wide = torch.promote_types(query.dtype, torch.float32)

    def chunked(x: torch.Tensor, width: int) -> torch.Tensor:
        rows = Place.apply(x.reshape(-1, width).to(wide), of_place, of_row)
        return rows.view(-1, H, chunk_size, width)

    # A padded place has beta = 0 and g = 0: it neither writes to the state nor lets it decay.
    real = torch.ones(len(of_place), 1, dtype=wide, device=key.device).index_fill_(0, padding, 0.0)
    real = real.view(-1, H, chunk_size, 1)
    q, k, v = chunked(query, D), chunked(key, D), chunked(value, V)
    q, k = (unit(q, D**-0.5), unit(k)) if use_qk_l2norm_in_kernel else (q * D**-0.5, k)
    b, decay = chunked(beta, 1) * real, chunked(g, D) * real
    parts = _decayed(q, k, decay)
    # (I + tril(b k k^T, -1)) [u | w] = b [v | k exp(G)]
    sides = torch.cat([v, parts.grown_keys], dim=-1) * b
    # Cut off the upper triangle before anything multiplies it: it may hold infinities, and the gradient of b would be 0 x inf.
    u, w = Solve.apply(parts.among_keys.tril(-1) * b, sides).split([V, D], dim=-1)
    states = _initial_states(initial_state, layout, pack, (H, D, V), q)
    new_v, before, final = Scan.apply(u, w, parts.left_keys, parts.kept, states, layout.active)
    out = torch.baddbmm(
        torch.matmul(parts.grown_queries, before).flatten(0, 1), parts.with_query.flatten(0, 1), new_v.flatten(0, 1)
    )
    out = Unplace.apply(out.view(-1, V), of_place, of_row, padding)
    if output_final_state:
        back = torch.empty(len(layout.order), dtype=torch.int64)
        back[list(layout.order)] = torch.arange(len(layout.order))
        final = final.index_select(0, back.to(final.device))
    return out.view(B, T, H, V).to(query.dtype), final if output_final_state else None


@dataclass
class Decayed:
    """What a chunk needs of its keys, queries and cumulated gates G (last position: L). among_keys, with_query [M, H, C, C]:
    k_i k_j exp(G_i - G_j) and q_i k_j exp(G_i - G_j) for j <= i; grown_keys, grown_queries: times exp(G); left_keys: k exp(L - G)
    (as the chunk's end sees them); kept [M, H, D]: exp(L)."""

    among_keys: torch.Tensor
    with_query: torch.Tensor
    grown_keys: torch.Tensor
    grown_queries: torch.Tensor
    left_keys: torch.Tensor
    kept: torch.Tensor


def _decayed(q: torch.Tensor, k: torch.Tensor, gates: torch.Tensor) -> Decayed:
    """The chunk's parts. Mild decays factor about the chunk's middle; strong ones are summed in fp64,
    because a sum of thousands has no digits left for the small gates after them, and combined by halves."""
    decay = gates.cumsum(-2)
    if _mild(decay.detach()):
        middle = decay[..., decay.shape[-2] // 2, None, :].detach()
        shifted = decay - middle
        # Two exponentials and no division: the derivative of 1 / growth squares it, and exp(2 SAFE) is beyond fp32.
        growth, shrink = shifted.exp(), shifted.neg().exp()
        up_k, up_q, down_k = k * growth, q * growth, k * shrink
        down_kT, before = down_k.transpose(-1, -2), middle.exp()
        return Decayed(
            among_keys=torch.matmul(up_k, down_kT),
            with_query=torch.matmul(up_q, down_kT).tril(),
            grown_keys=up_k * before,
            grown_queries=up_q * before,
            left_keys=down_k * shifted[..., -1:, :].exp(),
            kept=decay[..., -1, :].exp(),
        )
    wide, decay = k.dtype, gates.double().cumsum(-2)
    growth, last = decay.exp().to(wide), decay[..., -1:, :]
    return Decayed(
        among_keys=_halved(k, k, decay),
        with_query=_halved(q, k, decay),
        grown_keys=k * growth,
        grown_queries=q * growth,
        left_keys=k * (last - decay).exp().to(wide),
        kept=growth[..., -1, :],
    )


def _mild(decay: torch.Tensor) -> bool:
    """True if no channel of any chunk decays by more than exp(SAFE) on either side of the chunk's middle."""
    middle = decay[..., decay.shape[-2] // 2, None, :]
    return bool(torch.maximum(middle - decay[..., -1:, :], decay[..., :1, :] - middle).amax() < SAFE)


def _layout(pack: Pack, size: int) -> Chunks:
    """The pack's chunks; kept on the pack, because every layer needs the same."""
    assert size & (size - 1) == 0, "chunk_size is a power of two"
    known = pack.__dict__.setdefault("_chunks", {})
    if size not in known:
        known[size] = Chunks(pack, size)
    return known[size]


def _initial_states(
    given: torch.Tensor | None, layout: Chunks, pack: Pack, shape: tuple[int, int, int], like: torch.Tensor
) -> torch.Tensor:
    if given is None:
        return like.new_zeros(len(pack.lengths), *shape)
    return given.to(like.dtype).index_select(0, torch.tensor(layout.order, device=given.device))


def recurrent_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    pack: Pack | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The definition, token by token: for decoding and as the yardstick of `chunk_kda`. Same arguments and results."""
    B, T, H, D = key.shape
    pack = pack if pack is not None else Pack.rows(B, T, key.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, g, beta = (x.flatten(0, 1).to(wide) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)
    states = v.new_zeros(len(pack.lengths), H, D, v.shape[-1]) if initial_state is None else initial_state.to(wide)
    out, final = [v.new_empty(0, H, v.shape[-1])] * T * B, []
    for n, (start, end) in enumerate(zip(pack.starts, pack.starts[1:])):
        state = states[n]
        for t in range(start, end):
            state = state * g[t].exp().unsqueeze(-1)
            held = torch.einsum("hd,hdv->hv", k[t], state)
            state = state + k[t].unsqueeze(-1) * (beta[t].unsqueeze(-1) * (v[t] - held)).unsqueeze(-2)
            out[t] = torch.einsum("hd,hdv->hv", q[t] * D**-0.5, state)
        final.append(state)
    result = torch.stack(out).view(B, T, H, -1).to(query.dtype)
    return result, torch.stack(final) if output_final_state else None
