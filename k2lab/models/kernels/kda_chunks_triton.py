"""KDA's backward pass around and within chunks as two Triton kernels, with unit vectors and the decay gate; imported lazily, on
CUDA only.

Within a chunk, with cumulated gates G (base 2, falling), last gate L, state before it h, and pairs j <= i,

    Aqk_ij = sum_d q_id k_jd 2^(G_id - G_jd),    Akk_ij = b_i sum_d k_id k_jd 2^(G_id - G_jd),    A = (I + tril(Akk, -1))^-1
    w = A b (k 2^G),  u = A b v,  v_new = u - w h,  out = scale (q 2^G h + Aqk v_new),  h' = 2^L h + (k 2^(L - G))^T v_new

`parts_backward` gives what reaches q, k, v, b, G through w, u, h and h', and the gradient of Akk; `chunk_backward` adds what goes
through Aqk and Akk. While no channel decays by more than 2^LIMIT over a chunk the exponent is split at the chunk's middle and
everything is four matrix products. Any other chunk is four blocks of 16 tokens: between blocks the exponent is split at the later
block's first token, so that both parts are <= 0; within a block as in a chunk, or, if it decays more, pair by pair. So a gate of
any strength is exact, and the usual ones are fast.

A token's pair with itself, and the last key's way into h', meet no decay. They are left out of the gradients of G: there they
would cancel, and what rounding leaves of that would be more than all the rest where gates are strong.

Legend: `T` tokens, `H` heads, `D` head width, `V` value width, `M` chunks of all documents, `C` tokens of a chunk,
`BC` of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 16
LIMIT = 160.0  # 2^80 on either side of the middle stays far from fp32's limits, also in products with gradients
# Of products within a chunk. A pair's parts of dG at its two tokens come from two products and cancel before the earlier one:
# what tf32 rounds differently there would show in the gates' gradients, most of all in that of log_rate, a sum over all tokens.
PRECISION = "bf16x3"
# What was fastest on an H100: slice of the head width, warps, registers of a thread.
PARTS: tuple[int, int, int | None] = (32, 4, None)
WHOLE: tuple[int, int, int | None] = (32, 4, None)
BLOCKS = 4  # warps


@triton.jit
def _decay(z, log_rate, bias, out, lower_bound, BOUNDED: tl.constexpr):
    """Gradients of z and of log_rate (per element) from that of the gate, `out`."""
    rate, x = tl.exp(log_rate), z + bias
    if BOUNDED:
        share = tl.sigmoid(rate * x)
        of_z = out * (lower_bound * rate) * share * (1.0 - share)
        of_rate = of_z * x
    else:
        grown = tl.exp(tl.minimum(x, 20.0))
        soft = tl.where(x > 20.0, x, tl.where(x < -8.0, grown - 0.5 * grown * grown, tl.log(1.0 + grown)))
        of_z = -rate * out * tl.sigmoid(x)
        of_rate = -rate * out * soft
    return of_z, of_rate


@triton.jit
def _where(starts, chunks, H: tl.constexpr, C: tl.constexpr):
    """Of this program: chunk, head, first row (token, head) of the chunk, number of its tokens. Addresses within a chunk are
    counted from there in 32 bits: tiles of 64-bit addresses would fill the registers."""
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    document, number = tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)
    first = tl.load(starts + document).to(tl.int64) + number * C
    count = tl.minimum(tl.load(starts + document + 1).to(tl.int64) - first, C).to(tl.int32)
    return chunk, head, first * H + head, count


@triton.jit
def _parts_backward(
    q, k, v, v_new, g, beta, A, h, grad_out, grad_h, grad_v, starts, chunks, scale,
    out_q, out_k, out_g, out_b, out_v, out_A,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    chunk, head, row, count = _where(starts, chunks, H, C)
    i, c = tl.arange(0, C), tl.arange(0, BV)
    ok, in_v = i < count, c < V
    values, value_place = ok[:, None] & in_v[None, :], i[:, None] * (H * V) + c[None, :]
    pairs = i[:, None] * (H * C) + i[None, :]
    k += row * D
    q += row * D
    g += row * D
    out_q += row * D
    out_k += row * D
    out_g += row * D
    h += (chunk * H + head) * D * V
    grad_h += (chunk * H + head) * D * V
    dv = tl.load(grad_v + row * V + value_place, mask=values, other=0.0)
    bi = tl.load(beta + row + i * H, mask=ok, other=0.0).to(tl.float32)
    across = tl.load(A + row * C + (i[None, :] * (H * C) + i[:, None]), mask=ok[None, :], other=0.0)  # A^T
    dA = tl.zeros((C, C), dtype=tl.float32)
    db = tl.zeros((C,), dtype=tl.float32)
    for part in tl.range(tl.minimum(count, 1) * ((D + BD - 1) // BD), disable_licm=True):
        d = part * BD + tl.arange(0, BD)
        in_d = d < D
        keys, whole = ok[:, None] & in_d[None, :], in_d[:, None] & in_v[None, :]
        place, state = i[:, None] * (H * D) + d[None, :], d[:, None] * V + c[None, :]
        # through the state before the chunk
        hs = tl.load(h + state, mask=whole, other=0.0)
        dw = (-tl.dot(dv, tl.trans(hs))).to(dv.dtype)
        dq = tl.dot(tl.load(grad_out + row * V + value_place, mask=values, other=0.0), tl.trans(hs))
        gi = tl.load(g + place, mask=keys, other=0.0)
        grown = tl.where(keys, tl.exp2(gi), 0.0)
        dq *= grown * scale
        tl.store(out_q + place, dq, mask=keys)
        dg = dq * tl.load(q + place, mask=keys, other=0.0).to(tl.float32)
        # through the state after it
        dhs = tl.load(grad_h + state, mask=whole, other=0.0)
        last = tl.load(g + (count - 1) * (H * D) + d, mask=in_d, other=0.0)
        of_last = tl.sum(hs.to(tl.float32) * dhs.to(tl.float32), 1) * tl.exp2(last)
        dk = tl.dot(tl.load(v_new + row * V + value_place, mask=values, other=0.0), tl.trans(dhs))
        dk *= tl.where(keys, tl.exp2(last[None, :] - gi), 0.0)
        ki = tl.load(k + place, mask=keys, other=0.0).to(tl.float32)
        moved = tl.where((i == count - 1)[:, None], 0.0, ki * dk)  # the last key meets no decay
        dg -= moved
        of_last += tl.sum(moved, 0)
        dg += tl.where((i == count - 1)[:, None], of_last[None, :], 0.0)
        # through w
        kg = ki * grown
        of_kg = tl.dot(across, dw.to(across.dtype))
        db += tl.sum(of_kg * kg, 1)
        of_kg *= bi[:, None]
        tl.store(out_k + place, dk + of_kg * grown, mask=keys)
        tl.store(out_g + place, dg + of_kg * kg, mask=keys)
        dA = tl.dot(dw, tl.trans(kg.to(dw.dtype)), dA)
    # through u
    vi = tl.load(v + row * V + value_place, mask=values, other=0.0)
    dA = tl.dot(dv, tl.trans(vi), dA)
    of_v = tl.dot(across, dv.to(across.dtype))
    db += tl.sum(of_v * vi.to(tl.float32), 1)
    tl.store(out_v + row * V + value_place, (of_v * bi[:, None]).to(out_v.dtype.element_ty), mask=values)
    tl.store(out_b + row + i * H, db, mask=ok)
    # of Akk: -A^T (dA) A^T below the diagonal
    below = (i[:, None] > i[None, :]) & ok[:, None] & ok[None, :]
    dA = tl.where(below, dA * bi[None, :], 0.0)
    dA = tl.dot(dA.to(across.dtype), across)
    dA = tl.dot(across, dA.to(across.dtype))
    tl.store(out_A + row * C + pairs, tl.where(below, -dA, 0.0), mask=ok[:, None])


@triton.jit
def _finish(
    row_q, row_k, column, own, qi, ki, bi, rows, ok, inside, here, row, head, after,
    grad_q, grad_k, grad_g, grad_b, q_scale, k_scale, z, log_rate, bias, lower_bound, out_q, out_k, out_g, out_b, d, in_d,
    H: tl.constexpr, D: tl.constexpr, UNITS: tl.constexpr, RAW: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds what came from outside the chunk, and from each token's pair with itself (`own`), and stores the gradients of some
    rows. Returns the sums over these of the gradients of G, of the bias and of log_rate. `after`: the first of these over later
    rows."""
    line = row + rows * H
    of_b = tl.load(grad_b + line, mask=ok, other=0.0) + tl.sum(row_k * ki, 1)
    tl.store(out_b + line, of_b, mask=ok)
    row_k *= bi[:, None]
    of_g = tl.load(grad_g + row * D + here, mask=inside, other=0.0) + qi * row_q + (row_k - column) * ki
    of_g = tl.where(inside, of_g, 0.0)
    row_q += own[:, None] * ki + tl.load(grad_q + row * D + here, mask=inside, other=0.0)
    column += own[:, None] * qi
    if UNITS:
        sq = tl.load(q_scale + line, mask=ok, other=0.0)
        row_q = (row_q - qi * tl.sum(row_q * qi, 1)[:, None]) * sq[:, None]
    tl.store(out_q + row * D + here, row_q.to(out_q.dtype.element_ty), mask=inside)
    row_k += column + tl.load(grad_k + row * D + here, mask=inside, other=0.0)
    if UNITS:
        sk = tl.load(k_scale + line, mask=ok, other=0.0)
        row_k = (row_k - ki * tl.sum(row_k * ki, 1)[:, None]) * sk[:, None]
    tl.store(out_k + row * D + here, row_k.to(out_k.dtype.element_ty), mask=inside)
    total = tl.cumsum(of_g, 0, reverse=True) + after[None, :]
    of_g = tl.sum(of_g, 0)
    of_bias, of_rate = of_g, of_g
    if RAW:
        zi = tl.load(z + row * D + here, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + head * D + d, mask=in_d, other=0.0).to(tl.float32)
        total, each = _decay(zi, tl.load(log_rate + head).to(tl.float32), shift[None, :], total, lower_bound, BOUNDED)
        of_bias = tl.sum(tl.where(inside, total, 0.0), 0)
        of_rate = tl.sum(tl.where(inside, each, 0.0), 0)
    tl.store(out_g + row * D + here, total.to(out_g.dtype.element_ty), mask=inside)
    return of_g, of_bias, of_rate


@triton.jit
def _across_unit(x, grad, scale, out, along, row, i, ok, count, H: tl.constexpr, D: tl.constexpr, BS: tl.constexpr):
    """From the gradients of unit vectors x to those of what was scaled; `along`: their products with x."""
    factor = tl.load(scale + row + i * H, mask=ok, other=0.0)
    for part in tl.range(tl.minimum(count, 1) * ((D + BS - 1) // BS), disable_licm=True):
        d = part * BS + tl.arange(0, BS)
        inside, here = ok[:, None] & (d < D)[None, :], row * D + i[:, None] * (H * D) + d[None, :]
        unit = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
        result = (tl.load(grad + here, mask=inside, other=0.0) - unit * along[:, None]) * factor[:, None]
        tl.store(out + here, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _whole_backward(
    q, k, g, beta, grad_Aqk, grad_Akk, grad_q, grad_k, grad_g, grad_b, q_scale, k_scale, z, log_rate, bias, starts, chunks,
    lower_bound, out_q, out_k, out_g, out_b, rate_parts, bias_parts,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, UNITS: tl.constexpr, RAW: tl.constexpr, BOUNDED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Chunks that decay by less than 2^LIMIT in every channel, a slice of the head at a time. Gradients of unit vectors wait in
    grad_q and grad_k until the sums over the head are known."""
    chunk, head, row, count = _where(starts, chunks, H, C)
    i, e = tl.arange(0, C), tl.arange(0, BD)
    bottom = (count - 1) * (H * D)
    span = tl.load(g + row * D + e, mask=e < D, other=0.0) - tl.load(g + row * D + bottom + e, mask=e < D, other=0.0)
    if tl.max(span) < LIMIT:
        ok = i < count
        bi = tl.load(beta + row + i * H, mask=ok, other=0.0).to(tl.float32)
        pairs = i[:, None] * (H * C) + i[None, :]
        of_b = tl.load(grad_b + row + i * H, mask=ok, other=0.0)
        own = tl.load(grad_Aqk + row * C + i * (H * C + 1), mask=ok, other=0.0)
        along_q = tl.zeros((C,), dtype=tl.float32)
        along_k = tl.zeros((C,), dtype=tl.float32)
        of_rate = tl.zeros((BS,), dtype=tl.float32)
        for part in tl.range(tl.minimum(count, 1) * ((D + BS - 1) // BS), disable_licm=True):
            d = part * BS + tl.arange(0, BS)
            in_d = d < D
            inside, here = ok[:, None] & in_d[None, :], i[:, None] * (H * D) + d[None, :]
            centre = tl.load(g + row * D + d, mask=in_d, other=0.0) + tl.load(g + row * D + bottom + d, mask=in_d, other=0.0)
            gi = tl.load(g + row * D + here, mask=inside, other=0.0) - 0.5 * centre[None, :]
            a = tl.load(grad_Aqk + row * C + pairs, mask=ok[:, None] & (i[:, None] > i[None, :]), other=0.0)
            b = tl.load(grad_Akk + row * C + pairs, mask=ok[:, None] & (i[:, None] > i[None, :]), other=0.0)
            up, down = tl.where(inside, tl.exp2(gi), 0.0), tl.where(inside, tl.exp2(-gi), 0.0)
            ki = tl.load(k + row * D + here, mask=inside, other=0.0).to(tl.float32)
            row_q = tl.dot(a, ki * down, input_precision=PRECISION) * up
            row_k = tl.dot(b, ki * down, input_precision=PRECISION) * up
            of_b += tl.sum(row_k * ki, 1)
            row_k *= bi[:, None]
            qi = tl.load(q + row * D + here, mask=inside, other=0.0).to(tl.float32)
            column = tl.dot(tl.trans(a), qi * up, input_precision=PRECISION)
            column = tl.dot(tl.trans(b), ki * up * bi[:, None], column, input_precision=PRECISION)
            column *= down
            of_g = tl.load(grad_g + row * D + here, mask=inside, other=0.0) + qi * row_q + (row_k - column) * ki
            total = tl.cumsum(tl.where(inside, of_g, 0.0), 0, reverse=True)
            row_q += own[:, None] * ki + tl.load(grad_q + row * D + here, mask=inside, other=0.0)
            row_k += column + own[:, None] * qi + tl.load(grad_k + row * D + here, mask=inside, other=0.0)
            if UNITS:
                along_q += tl.sum(row_q * qi, 1)
                along_k += tl.sum(row_k * ki, 1)
                tl.store(grad_q + row * D + here, row_q, mask=inside)
                tl.store(grad_k + row * D + here, row_k, mask=inside)
            else:
                tl.store(out_q + row * D + here, row_q.to(out_q.dtype.element_ty), mask=inside)
                tl.store(out_k + row * D + here, row_k.to(out_k.dtype.element_ty), mask=inside)
            if RAW:
                zi = tl.load(z + row * D + here, mask=inside, other=0.0).to(tl.float32)
                shift = tl.load(bias + head * D + d, mask=in_d, other=0.0).to(tl.float32)
                total, each = _decay(zi, tl.load(log_rate + head).to(tl.float32), shift[None, :], total, lower_bound, BOUNDED)
                tl.store(bias_parts + (chunk * H + head) * D + d, tl.sum(tl.where(inside, total, 0.0), 0), mask=in_d)
                of_rate += tl.sum(tl.where(inside, each, 0.0), 0)
            tl.store(out_g + row * D + here, total.to(out_g.dtype.element_ty), mask=inside)
        tl.store(out_b + row + i * H, of_b, mask=ok)
        if RAW:
            tl.store(rate_parts + chunk * H + head, tl.sum(of_rate, 0))
        if UNITS:
            tl.debug_barrier()  # each thread may read what another one stored
            _across_unit(q, grad_q, q_scale, out_q, along_q, row, i, ok, count, H, D, BS)
            _across_unit(k, grad_k, k_scale, out_k, along_k, row, i, ok, count, H, D, BS)


@triton.jit
def _earlier(
    k, g, grad_Aqk, grad_Akk, line, ok, anchor, i, d, in_d, block,
    H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of rows of a block, what pairs with earlier blocks give the queries' and keys' gradients, but for the rows' own decay since
    their block's first token."""
    row_q = tl.zeros((BC, BD), dtype=tl.float32)
    row_k = tl.zeros((BC, BD), dtype=tl.float32)
    for J in range(block):
        there = (J * BC + i)[:, None] * (H * D) + d[None, :]
        kj = tl.load(k + there, mask=in_d[None, :], other=0.0).to(tl.float32)
        kj *= tl.exp2(anchor[None, :] - tl.load(g + there, mask=in_d[None, :], other=0.0))
        a = tl.load(grad_Aqk + line[:, None] + (J * BC + i)[None, :], mask=ok[:, None], other=0.0)
        b = tl.load(grad_Akk + line[:, None] + (J * BC + i)[None, :], mask=ok[:, None], other=0.0)
        row_q = tl.dot(a, kj, row_q, input_precision=PRECISION)
        row_k = tl.dot(b, kj, row_k, input_precision=PRECISION)
    return row_q, row_k


@triton.jit
def _later(
    q, k, g, beta, grad_Aqk, grad_Akk, gi, i, d, in_d, block, blocks, count,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of keys of a block, what pairs with later blocks give their gradients."""
    column = tl.zeros((BC, BD), dtype=tl.float32)
    for J in range(block + 1, blocks):
        later = J * BC + i
        there_ok = (later < count)[:, None] & in_d[None, :]
        there = later[:, None] * (H * D) + d[None, :]
        middle = tl.load(g + J * BC * (H * D) + d, mask=in_d, other=0.0)
        lift = tl.load(g + there, mask=there_ok, other=0.0) - middle[None, :]
        lift = tl.where(there_ok, tl.exp2(lift), 0.0)
        qj = tl.load(q + there, mask=there_ok, other=0.0).to(tl.float32) * lift
        bj = tl.load(beta + later * H, mask=later < count, other=0.0).to(tl.float32)
        kj = tl.load(k + there, mask=there_ok, other=0.0).to(tl.float32) * lift * bj[:, None]
        across = (later * (H * C))[None, :] + (block * BC + i)[:, None]
        a = tl.load(grad_Aqk + across, mask=(later < count)[None, :], other=0.0)
        b = tl.load(grad_Akk + across, mask=(later < count)[None, :], other=0.0)
        part = tl.dot(a, qj, input_precision=PRECISION)
        part = tl.dot(b, kj, part, input_precision=PRECISION)
        column += part * tl.exp2(middle[None, :] - gi)
    return column


@triton.jit
def _by_pairs(
    row_q, row_k, column, k, g, grad_Aqk, grad_Akk, qi, ki, gi, bi, line, ok, inside, i, d, in_d, block, count,
    H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Adds the pairs within a block one column at a time: no exponent is above 0."""
    for j in range(tl.minimum(count - block * BC, BC)):
        token = block * BC + j
        kj = tl.load(k + token * (H * D) + d, mask=in_d, other=0.0).to(tl.float32)
        gj = tl.load(g + token * (H * D) + d, mask=in_d, other=0.0)
        a = tl.load(grad_Aqk + line + token, mask=ok & (i > j), other=0.0)
        b = tl.load(grad_Akk + line + token, mask=ok & (i > j), other=0.0)
        pair = tl.where(inside & (i > j)[:, None], tl.exp2(tl.minimum(gi - gj[None, :], 0.0)), 0.0)
        row_q += a[:, None] * kj[None, :] * pair
        row_k += b[:, None] * kj[None, :] * pair
        both = tl.sum((a[:, None] * qi + (b * bi)[:, None] * ki) * pair, 0)
        column += tl.where((i == j)[:, None], both[None, :], 0.0)
    return row_q, row_k, column


@triton.jit
def _blocks_backward(
    q, k, g, beta, grad_Aqk, grad_Akk, grad_q, grad_k, grad_g, grad_b, q_scale, k_scale, z, log_rate, bias, starts, chunks,
    lower_bound, out_q, out_k, out_g, out_b, rate_parts, bias_parts,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr, UNITS: tl.constexpr, RAW: tl.constexpr, BOUNDED: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The other chunks, by blocks."""
    chunk, head, row, count = _where(starts, chunks, H, C)
    i, d = tl.arange(0, BC), tl.arange(0, BD)
    in_d = d < D
    q += row * D
    k += row * D
    g += row * D
    beta += row
    grad_Aqk += row * C
    grad_Akk += row * C
    blocks = (count + BC - 1) // BC
    after = tl.zeros((BD,), dtype=tl.float32)  # sum of the gradients of G after this block
    of_bias = tl.zeros((BD,), dtype=tl.float32)
    of_rate = tl.zeros((BD,), dtype=tl.float32)
    top = tl.load(g + d, mask=in_d, other=0.0)
    bottom = tl.load(g + (count - 1) * (H * D) + d, mask=in_d, other=0.0)
    if tl.max(top - bottom) < LIMIT:
        return
    for step in range(blocks):
        block = blocks - 1 - step
        rows = block * BC + i
        ok = rows < count
        inside, here = ok[:, None] & in_d[None, :], rows[:, None] * (H * D) + d[None, :]
        line = rows * (H * C)
        gi = tl.load(g + here, mask=inside, other=0.0)
        qi = tl.load(q + here, mask=inside, other=0.0).to(tl.float32)
        ki = tl.load(k + here, mask=inside, other=0.0).to(tl.float32)
        bi = tl.load(beta + rows * H, mask=ok, other=0.0).to(tl.float32)
        anchor = tl.load(g + block * BC * (H * D) + d, mask=in_d, other=0.0)
        row_q, row_k = _earlier(k, g, grad_Aqk, grad_Akk, line, ok, anchor, i, d, in_d, block, H, D, BC, BD, PRECISION)
        grown = tl.where(inside, tl.exp2(gi - anchor[None, :]), 0.0)
        row_q *= grown
        row_k *= grown
        column = _later(
            q, k, g, beta, grad_Aqk, grad_Akk, gi, i, d, in_d, block, blocks, count, H, D, C, BC, BD, PRECISION
        )  # fmt: skip
        last = tl.load(g + (tl.minimum((block + 1) * BC, count) - 1) * (H * D) + d, mask=in_d, other=0.0)
        if tl.max(anchor - last) < LIMIT:
            within = line[:, None] + (block * BC + i)[None, :]
            a = tl.load(grad_Aqk + within, mask=ok[:, None] & (i[:, None] > i[None, :]), other=0.0)
            b = tl.load(grad_Akk + within, mask=ok[:, None] & (i[:, None] > i[None, :]), other=0.0)
            centre = 0.5 * (anchor + last)
            up = tl.where(inside, tl.exp2(gi - centre[None, :]), 0.0)
            down = tl.where(inside, tl.exp2(centre[None, :] - gi), 0.0)
            kd = ki * down
            row_q += tl.dot(a, kd, input_precision=PRECISION) * up
            row_k += tl.dot(b, kd, input_precision=PRECISION) * up
            part = tl.dot(tl.trans(a), qi * up, input_precision=PRECISION)
            part += tl.dot(tl.trans(b), ki * up * bi[:, None], input_precision=PRECISION)
            column += part * down
        else:
            row_q, row_k, column = _by_pairs(
                row_q, row_k, column, k, g, grad_Aqk, grad_Akk, qi, ki, gi, bi, line, ok, inside, i, d, in_d, block, count,
                H, D, BC,
            )  # fmt: skip
        own = tl.load(grad_Aqk + line + rows, mask=ok, other=0.0)
        of_g, bias_part, rate_part = _finish(
            row_q, row_k, column, own, qi, ki, bi, rows, ok, inside, here, row, head, after,
            grad_q, grad_k, grad_g, grad_b, q_scale, k_scale, z, log_rate, bias, lower_bound, out_q, out_k, out_g, out_b, d, in_d,
            H, D, UNITS, RAW, BOUNDED,
        )  # fmt: skip
        after += of_g
        of_bias += bias_part
        of_rate += rate_part
    if RAW:
        tl.store(bias_parts + (chunk * H + head) * D + d, of_bias, mask=in_d)
        tl.store(rate_parts + chunk * H + head, tl.sum(of_rate, 0))


def parts_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_new: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A: torch.Tensor,
    h: torch.Tensor,
    grad_out: torch.Tensor,
    grad_h: torch.Tensor,
    grad_v: torch.Tensor,
    starts: torch.Tensor,
    chunks: torch.Tensor,
    size: int,
    tuned: tuple[int, int, int | None] = PARTS,
) -> tuple[torch.Tensor, ...]:
    """f32 gradients of q, k, g and beta so far, the gradients of v and, f32[1, T, H, C], of Akk. h, grad_h [1, M, H, D, V]: state
    before each chunk and gradient of that after it; grad_v that of v_new."""
    (H, D), V, M = k.shape[2:], v.shape[-1], len(chunks)
    wide = {"dtype": torch.float32, "device": k.device}
    out_q, out_k, out_g = (torch.empty(k.shape, **wide) for _ in range(3))
    out_b, out_A, out_v = torch.empty(beta.shape, **wide), torch.empty(A.shape, **wide), torch.empty_like(v)
    _parts_backward[(M * H,)](
        q, k, v, v_new, g, beta, A, h, grad_out, grad_h, grad_v, starts, chunks, D**-0.5,
        out_q, out_k, out_g, out_b, out_v, out_A,
        H, D, V, size, min(tuned[0], triton.next_power_of_2(D)), triton.next_power_of_2(V),
        num_warps=tuned[1], num_stages=1, maxnreg=tuned[2],
    )  # fmt: skip
    return out_q, out_k, out_g, out_b, out_v, out_A


def chunk_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    grad_Aqk: torch.Tensor,
    grad_Akk: torch.Tensor,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor] | None,
    gate: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    lower_bound: float | None,
    starts: torch.Tensor,
    chunks: torch.Tensor,
    size: int,
    tuned: tuple[int, int, int | None] = WHOLE,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k, g, beta and, with a gate, of its log_rate and bias.

    q, k [1, T, H, D], g f32[1, T, H, D] cumulated within chunks in base 2, beta [1, T, H]; grad_Aqk, grad_Akk f32[1, T, H, C];
    grads: f32 gradients of q, k, g and beta from outside the chunks. With `scales` f32[1, T, H] q and k are unit vectors and the
    gradients are those of what was scaled; with `gate` (z, log_rate [H], bias [H D]) that of g is given as that of z, else as
    that of the log-decays. starts i32[S + 1], chunks i32[M, 2]. `grads` are overwritten.
    """
    H, D, M = *k.shape[2:], len(chunks)
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    out_b = torch.empty(beta.shape, dtype=torch.float32, device=beta.device)
    out_g = torch.empty_like(g if gate is None else gate[0])
    parts = (
        torch.empty((M, H), dtype=torch.float32, device=k.device),
        torch.empty((M, H * D), dtype=torch.float32, device=k.device),
    )
    nothing = starts
    z, log_rate, bias = gate or (nothing, nothing, nothing)
    bound = 0.0 if lower_bound is None else float(lower_bound)
    arguments = (
        q, k, g, beta, grad_Aqk, grad_Akk, *grads, *(scales or (nothing, nothing)), z, log_rate, bias, starts, chunks,
        bound, out_q, out_k, out_g, out_b, *(parts if gate else (nothing, nothing)),
        H, D, size, BLOCK, triton.next_power_of_2(D), LIMIT, PRECISION, scales is not None, gate is not None,
        lower_bound is not None, tuned[0],
    )  # fmt: skip
    # Which of the two a chunk needs is only known on the device; a program that has nothing to do costs nothing.
    _whole_backward[(M * H,)](*arguments, num_warps=tuned[1], num_stages=1, maxnreg=tuned[2])
    _blocks_backward[(M * H,)](*arguments, num_warps=BLOCKS, num_stages=1)
    if gate is None:
        return out_q, out_k, out_g, out_b, None, None
    return out_q, out_k, out_g, out_b, parts[0].sum(0).to(log_rate.dtype), parts[1].sum(0).to(bias.dtype)
