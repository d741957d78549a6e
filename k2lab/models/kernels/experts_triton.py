"""Triton kernels around the experts' products: sorting, moving rows, SwiGLU, and the router's choice.

Rows are (token, choice) pairs in expert order. Each expert's rows begin at a multiple of `ALIGN` and are filled up, so that a
tile of `ALIGN` rows never holds two experts. Imported on CUDA devices only, since it needs triton.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` choices, `R` aligned rows, `N` = T x K slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------- sorting


@triton.jit
def count_kernel(ids_N, hist_EB, num, blocks, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr):
    """Slots per expert in every block of `BLOCK` slots; hist [E, blocks]."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_N + slot, mask=slot < num, other=E).to(tl.int32)
    e = tl.arange(0, BE)
    counts = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(hist_EB + e * blocks + block, counts, mask=e < E)


@triton.jit
def place_kernel(
    ids_N, hist_EB, upto_EB, slot_R, token_R, row_N, ends_E, num, blocks,
    E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Row of every slot (-1: the expert is none of ours) and slot of every row; order within an expert is that of the slots."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_N + slot, mask=slot < num, other=E).to(tl.int32)
    e = tl.arange(0, BE)
    total = tl.load(upto_EB + e * blocks + blocks - 1, mask=e < E, other=0)
    aligned = (total + ALIGN - 1) // ALIGN * ALIGN
    ends = tl.cumsum(aligned, 0)
    if block == 0:
        tl.store(ends_E + e, ends, mask=e < E)
    here = tl.load(hist_EB + e * blocks + block, mask=e < E, other=0)
    upto = tl.load(upto_EB + e * blocks + block, mask=e < E, other=0)
    first = ends - aligned + upto - here
    one = (expert[:, None] == e[None, :]).to(tl.int32)
    rank = tl.cumsum(one, 0) - one
    row = tl.sum(one * (rank + first[None, :]), axis=1)
    ours = (slot < num) & (expert >= 0) & (expert < E)
    tl.store(row_N + slot, tl.where(ours, row, -1), mask=slot < num)
    tl.store(slot_R + row, slot, mask=ours)
    tl.store(token_R + row, slot // K, mask=ours)


@triton.jit
def tile_kernel(ends_E, expert_M, tiles, E: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Expert of every tile of ALIGN rows (E: none)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BE)
    ends = tl.load(ends_E + e, mask=e < E, other=0x7FFFFFFF)
    expert = tl.sum(((ends[None, :] <= (i * ALIGN)[:, None]) & (e < E)[None, :]).to(tl.int32), axis=1)
    tl.store(expert_M + i, expert, mask=i < tiles)


# ---------------------------------------------------------------- moving rows


@triton.jit
def spread_kernel(
    x_TD, row_N, upto_EB, ends_E, out_RD, T, blocks,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, ALIGN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Copies every token to its K rows: x is read once. The last E programs zero the rows that fill up an expert."""
    pid = tl.program_id(0)
    d = tl.arange(0, BD)
    if pid < T:
        for start in tl.static_range(0, D, BD):
            x = tl.load(x_TD + pid.to(tl.int64) * D + start + d, mask=start + d < D)
            for k in tl.static_range(K):
                row = tl.load(row_N + pid * K + k)
                tl.store(out_RD + row.to(tl.int64) * D + start + d, x, mask=(start + d < D) & (row >= 0))
    else:
        e = pid - T
        end = tl.load(ends_E + e)
        total = tl.load(upto_EB + e * blocks + blocks - 1)
        fill = (ALIGN - total % ALIGN) % ALIGN
        for i in range(fill):
            for start in tl.static_range(0, D, BD):
                at = out_RD + (end - 1 - i).to(tl.int64) * D + start + d
                tl.store(at, tl.zeros([BD], out_RD.dtype.element_ty), mask=start + d < D)


@triton.jit
def combine_kernel(rows_RD, row_N, out_TD, D: tl.constexpr, K: tl.constexpr, BD: tl.constexpr):
    """Sum of a token's K rows, in order of its choices: no atomics."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BD], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_N + t * K + k)
        acc += tl.load(rows_RD + row.to(tl.int64) * D + d, mask=(d < D) & (row >= 0), other=0.0).to(tl.float32)
    tl.store(out_TD + t.to(tl.int64) * D + d, acc.to(out_TD.dtype.element_ty), mask=d < D)


# ---------------------------------------------------------------- SwiGLU


@triton.jit
def swiglu_kernel(
    pre_RF2, slot_R, weight_N, ends_E, act_RF, F: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):
    """act = weight x silu(gate) x up of sorted rows; pre [R, 2F] holds gate, then up."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < tl.load(ends_E + E - 1):
        slot = tl.load(slot_R + r)
        weight = tl.load(weight_N + slot, mask=slot >= 0, other=0.0).to(tl.float32)
        f = tl.program_id(1) * BF + tl.arange(0, BF)
        mask = (f < F)[None, :] & (r >= 0)[:, None]
        at = pre_RF2 + r.to(tl.int64)[:, None] * (2 * F) + f[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        act = gate * tl.sigmoid(gate) * up * weight[:, None]
        tl.store(act_RF + r.to(tl.int64)[:, None] * F + f[None, :], act.to(act_RF.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_grad_kernel(
    grad_RF, pre_RF2, slot_R, weight_N, ends_E, grad_pre_RF2, act_RF, grad_weight_N,
    F: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """From the gradient at the weighted act: gradients of gate, up and weight, and the weighted act once more."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    if tl.program_id(0) * BR < tl.load(ends_E + E - 1):
        slot = tl.load(slot_R + r)
        weight = tl.load(weight_N + slot, mask=slot >= 0, other=0.0).to(tl.float32)[:, None]
        grad_weight = tl.zeros([BR], tl.float32)
        for start in tl.static_range(0, F, BF):
            f = start + tl.arange(0, BF)
            mask = (f < F)[None, :] & (r >= 0)[:, None]
            narrow, wide = r.to(tl.int64)[:, None] * F + f[None, :], r.to(tl.int64)[:, None] * (2 * F) + f[None, :]
            gate = tl.load(pre_RF2 + wide, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(pre_RF2 + wide + F, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grad_RF + narrow, mask=mask, other=0.0).to(tl.float32)
            sig = tl.sigmoid(gate)
            silu = gate * sig
            grad_weight += tl.sum(grad * silu * up, axis=1)
            kind = act_RF.dtype.element_ty
            tl.store(act_RF + narrow, (silu * up * weight).to(kind), mask=mask)
            grad = grad * weight
            tl.store(grad_pre_RF2 + wide, (grad * up * (sig + silu * (1 - sig))).to(kind), mask=mask)
            tl.store(grad_pre_RF2 + wide + F, (grad * silu).to(kind), mask=mask)
        tl.store(grad_weight_N + slot, grad_weight, mask=slot >= 0)


# ---------------------------------------------------------------- dense SwiGLU


@triton.jit
def dense_kernel(pre_TF2, act_TF, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """act = silu(gate) x up; pre [T, 2F] holds gate, then up."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (t < T)[:, None] & (f < F)[None, :]
    at = pre_TF2 + t.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    act = g * tl.sigmoid(g) * u
    tl.store(act_TF + t.to(tl.int64)[:, None] * F + f[None, :], act.to(act_TF.dtype.element_ty), mask=mask)


@triton.jit
def dense_grad_kernel(grad_TF, pre_TF2, grad_pre_TF2, T, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Gradients of gate and up; the activation takes the place of its gradient."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (t < T)[:, None] & (f < F)[None, :]
    narrow, wide = t.to(tl.int64)[:, None] * F + f[None, :], t.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    g = tl.load(pre_TF2 + wide, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(pre_TF2 + wide + F, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_TF + narrow, mask=mask, other=0.0).to(tl.float32)
    sig = tl.sigmoid(g)
    silu = g * sig
    kind = grad_TF.dtype.element_ty
    tl.store(grad_pre_TF2 + wide, (grad * u * (sig + silu * (1 - sig))).to(kind), mask=mask)
    tl.store(grad_pre_TF2 + wide + F, (grad * silu).to(kind), mask=mask)
    tl.store(grad_TF + narrow, (silu * u).to(kind), mask=mask)


# ---------------------------------------------------------------- router


@triton.jit
def choose_kernel(
    logits_TE, bias_E, chosen_TK, weights_TK, counts_E, T, scale,
    E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, COUNT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Top K of sigmoid(logits) + bias, the weights of the chosen, and (COUNT) tokens per expert added to counts i64[E]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    scores = tl.sigmoid(tl.load(logits_TE + t.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=0.0))
    bias = tl.load(bias_E + e, mask=e < E, other=0.0).to(tl.float32)
    left = tl.where((e < E)[None, :], scores + bias[None, :], float("-inf"))
    total, taken = tl.zeros([BT], tl.float32), tl.zeros([BT, BE], tl.int32)
    for k in range(K):  # a loop on the device: unrolled, it takes seconds to compile
        best = tl.argmax(left, axis=1)
        hit = e[None, :] == best[:, None]
        score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        total += score
        taken += hit.to(tl.int32)
        left = tl.where(hit, float("-inf"), left)
        tl.store(chosen_TK + t * K + k, best.to(tl.int64), mask=t < T)
        tl.store(weights_TK + t * K + k, score if NORM else score * scale, mask=t < T)
    if NORM:
        tl.debug_barrier()
        for k in range(K):  # a loop on the device: unrolled, it takes seconds to compile
            weight = tl.load(weights_TK + t * K + k, mask=t < T, other=0.0)
            tl.store(weights_TK + t * K + k, weight / (total + 1e-20) * scale, mask=t < T)
    if COUNT:
        counts = tl.sum(tl.where(inside, taken, 0), axis=0)
        tl.atomic_add(counts_E + e, counts.to(tl.int64), mask=(e < E) & (counts > 0), sem="relaxed")


@triton.jit
def choose_grad_kernel(
    grad_weights_TK, logits_TE, chosen_TK, grad_logits_TE, out_T2E, T, scale,
    E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, LOGITS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradient at the logits (plus the one that reached them directly) as a sum of two bf16 numbers, [T, 2E]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    scores = tl.sigmoid(tl.load(logits_TE + at, mask=inside, other=0.0))
    total, along = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    grad, taken = tl.zeros([BT, BE], tl.float32), tl.zeros([BT, BE], tl.int32)
    for k in range(K):  # a loop on the device: unrolled, it takes seconds to compile
        hit = e[None, :] == tl.load(chosen_TK + t * K + k, mask=t < T, other=0).to(tl.int32)[:, None]
        given = tl.load(grad_weights_TK + t * K + k, mask=t < T, other=0.0)
        score = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        total += score
        along += given * score
        grad += tl.where(hit, given[:, None], 0.0)
        taken += hit.to(tl.int32)
    if NORM:
        total += 1e-20
        grad = tl.where(taken > 0, grad / total[:, None] - (along / (total * total))[:, None], 0.0)
    grad = grad * scale * scores * (1 - scores)
    if LOGITS:
        grad += tl.load(grad_logits_TE + at, mask=inside, other=0.0)
    high = grad.to(tl.bfloat16)
    wide = t.to(tl.int64)[:, None] * (2 * E) + e[None, :]
    tl.store(out_T2E + wide, high, mask=inside)
    tl.store(out_T2E + wide + E, (grad - high.to(tl.float32)).to(tl.bfloat16), mask=inside)
