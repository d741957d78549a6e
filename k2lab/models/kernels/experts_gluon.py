"""Products over groups of rows on Hopper: one warp (or, gathering, four) loads tiles, eight warps multiply them (Gluon).

A persistent program walks over tiles of 128 x 256; operands arrive in a ring of shared memory through TMA, and each of two groups
of four warps multiplies half of the rows, so that one group writes its results while the other still multiplies. What a result is
combined with (the gradient so far, or gate and up) arrives during the product, in the buffers that the results leave from. Rows
of tokens may be fetched where they lie (16 bytes a thread, `cp.async`) instead of from a sorted copy. Needs triton 3.6.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `R` aligned rows, `M` tiles of rows, `W` columns of a result,
`C` summed-over columns.
"""

# ruff: noqa: SIM102, SIM109  (kernels know no `in`; what is known at compile time is asked for apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# What is multiplied. Weights are of the row's expert; PAIR gives columns of gate and of up side by side in one tile.
NT = gl.constexpr(0)  # out[r] = weights [E, W, C] a[r]
NN = gl.constexpr(1)  # out[r] = weights [E, C, W]^T a[r]
TN = gl.constexpr(2)  # out[e] = sum over the expert's rows of a[r]^T b[r]
PAIR = gl.constexpr(3)  # as NT with weights [E, 2W, C]
# What is done with the result.
STORE, ADD, SWIGLU = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
# Rows and summed-over columns of a step, columns of a store, and buffers of [BM / 2, H] that each group stores from.
BM, BK, H, OUTS = gl.constexpr(128), gl.constexpr(64), gl.constexpr(64), gl.constexpr(4)


@gluon.jit
def _extent(ends_E, W, E, MODE: gl.constexpr, BN: gl.constexpr):
    """(row tiles that share the columns, tiles in all)."""
    wide: gl.constexpr = BN // 2 if MODE == PAIR else BN
    if MODE == TN:
        return W[0] // BM, E * (W[0] // BM) * (W[1] // BN)
    else:
        rows = gl.load(ends_E + E - 1) // BM
        return rows, rows * (W[0] // wide)


@gluon.jit
def _place(tile, expert_M, ends_E, rows, W, GROUP, MODE: gl.constexpr, BN: gl.constexpr):
    """First coordinates in a, b and out, and number of steps, of a tile; GROUP row tiles share a sweep over the columns."""
    wide: gl.constexpr = BN // 2 if MODE == PAIR else BN
    columns = (W[1] if MODE == TN else W[0]) // wide
    e = 0
    if MODE == TN:
        e = tile // (rows * columns)
        tile = tile % (rows * columns)
    per = GROUP * columns
    first = tile // per * GROUP
    size = gl.minimum(rows - first, GROUP)
    m = first + tile % per % size
    n = tile % per // size
    if MODE == TN:
        start = gl.load(ends_E + e - 1, mask=e > 0, other=0)
        end = gl.load(ends_E + e)
        return start, m * BM, start, n * BN, e * W[0] + m * BM, n * BN, (end - start) // BK
    else:
        e = gl.load(expert_M + m)
        if MODE == NN:
            return m * BM, 0, e * W[1], n * BN, m * BM, n * BN, W[1] // BK
        elif MODE == NT:
            return m * BM, 0, e * W[0] + n * BN, 0, m * BM, n * BN, W[1] // BK
        else:
            return m * BM, 0, e * 2 * W[0] + n * wide, 0, m * BM, n * wide, W[1] // BK


@gluon.jit
def _load_a(a, bar, buf, a0, a1, k, MODE: gl.constexpr):
    if MODE == TN:
        tma.async_copy_global_to_shared(a, [a0 + k, a1], bar, buf)
    else:
        tma.async_copy_global_to_shared(a, [a0, k], bar, buf)


@gluon.jit
def _load_b(b, bar, buf, b0, b1, k, width, MODE: gl.constexpr, BN: gl.constexpr):
    if MODE == NT:
        tma.async_copy_global_to_shared(b, [b0, k], bar, buf)
    elif MODE == PAIR:
        tma.async_copy_global_to_shared(b, [b0, k], bar, buf.slice(0, BN // 2, 0))
        tma.async_copy_global_to_shared(b, [b0 + width, k], bar, buf.slice(BN // 2, BN // 2, 0))
    else:
        tma.async_copy_global_to_shared(b, [b0 + k, b1], bar, buf)


@gluon.jit
def _load_old(out, out_bufs, old_ready, o0, o1):
    """What the tile's result is added to."""
    for part in gl.static_range(2):
        bar = old_ready.index(part)
        mbarrier.expect(bar, OUTS * (BM // 2) * H * 2)
        for i in gl.static_range(OUTS):
            tma.async_copy_global_to_shared(out, [o0 + part * (BM // 2), o1 + i * H], bar, out_bufs.index(part * OUTS + i))


@gluon.jit
def _load(
    a, b, out, ring, out_bufs, at, W, E, GROUP, SMS,
    MODE: gl.constexpr, KIND: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp."""
    a_bufs, b_bufs, ready, free, old_ready, old_free = ring
    expert_M, ends_E, token_R = at
    rows, total = _extent(ends_E, W, E, MODE, BN)
    it = 0
    done = 0
    for tile in range(gl.program_id(0), total, SMS):
        a0, a1, b0, b1, o0, o1, steps = _place(tile, expert_M, ends_E, rows, W, GROUP, MODE, BN)
        for s in range(steps):
            stage = it % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (BM + BN) * BK * 2)
            _load_a(a, bar, a_bufs.index(stage), a0, a1, s * BK, MODE)
            _load_b(b, bar, b_bufs.index(stage), b0, b1, s * BK, W[0], MODE, BN)
            it += 1
        if KIND == ADD:
            if steps > 0:
                mbarrier.wait(old_free.index(0), (done & 1) ^ 1)
                mbarrier.wait(old_free.index(1), (done & 1) ^ 1)
                _load_old(out, out_bufs, old_ready, o0, o1)
                done += 1


@gluon.jit
def _gather(a, b, ring, at, W, E, GROUP, SMS, MODE: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr):
    """As `_load` with four warps that fetch the rows of a [T, C] from the tokens. Rows that fill up an expert fetch token 0;
    their results are never used."""
    a_bufs, b_bufs, ready, free, old_ready, old_free = ring
    expert_M, ends_E, token_R = at
    rows, total = _extent(ends_E, W, E, MODE, BN)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    r = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    it = 0
    for tile in range(gl.program_id(0), total, SMS):
        a0, a1, b0, b1, o0, o1, steps = _place(tile, expert_M, ends_E, rows, W, GROUP, MODE, BN)
        from_ = a + gl.load(token_R + a0 + r).to(gl.int64)[:, None] * W[1] + c[None, :]
        for s in range(steps):
            stage = it % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BN * BK * 2)
            _load_b(b, bar, b_bufs.index(stage), b0, b1, s * BK, W[0], MODE, BN)
            async_copy.async_copy_global_to_shared(a_bufs.index(stage), from_ + s * BK)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            it += 1


@gluon.jit
def _halves(x):
    """Left and right half of the columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _send(descriptor, row, column, value, buf):
    """Writes a tile of H columns through a buffer, without waiting for it to arrive."""
    buf.store(value.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(descriptor, [row, column], buf)


@gluon.jit
def _swiglu(parts, weight, out, act_out, row, column, width, bufs, base: gl.constexpr, LAYOUT: gl.constexpr):
    """Stores gate, up and weight x silu(gate) x up."""
    for i in gl.static_range(2):
        g = gl.convert_layout(parts[i], LAYOUT, assert_trivial=True)
        u = gl.convert_layout(parts[2 + i], LAYOUT, assert_trivial=True)
        _send(out, row, column + i * H, g, bufs.index(base + 3 * i % OUTS))
        if i == 1:
            tma.store_wait(OUTS - 1)
        _send(out, row, width + column + i * H, u, bufs.index(base + (3 * i + 1) % OUTS))
        if i == 1:
            tma.store_wait(OUTS - 1)
        act = g / (1.0 + gl.exp(-g)) * u * weight
        _send(act_out, row, column + i * H, act, bufs.index(base + (3 * i + 2) % OUTS))


@gluon.jit
def _multiply(
    ring, out_bufs, at, outs, rest, W, E, GROUP, SMS, MODE: gl.constexpr, SIDE: gl.constexpr, KIND: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply the rows PART x 64 and on of every tile and write the result."""
    a_bufs, b_bufs, ready, free, old_ready, old_free = ring
    expert_M, ends_E, token_R = at
    out, act_out = outs
    slot_R, weight_N = rest
    M: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, H, 16])
    r = gl.arange(0, M, layout=gl.SliceLayout(1, narrow))
    rows, total = _extent(ends_E, W, E, MODE, BN)
    base: gl.constexpr = PART * OUTS
    it = 0
    done = 0
    for tile in range(gl.program_id(0), total, SMS):
        a0, a1, b0, b1, o0, o1, steps = _place(tile, expert_M, ends_E, rows, W, GROUP, MODE, BN)
        row = o0 + PART * M
        if KIND == SWIGLU:
            slot = gl.load(slot_R + row + r)
            weight = gl.load(weight_N + slot, mask=slot >= 0, other=0.0).to(gl.float32)[:, None]
        acc = gl.zeros([M, BN], gl.float32, layout)
        for s in range(steps):
            stage = it % STAGES
            mbarrier.wait(ready.index(stage), (it // STAGES) & 1)
            if SIDE > 0:  # what `cp.async` wrote, for the tensor cores
                fence_async_shared()
            a = a_bufs.index(stage).slice(PART * M, M, 1 if MODE == TN else 0)
            b = b_bufs.index(stage)
            if MODE == TN:
                a = a.permute((1, 0))
            if MODE == NT or MODE == PAIR:
                b = b.permute((1, 0))
            token = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(token,))
            mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), pred=s > 0)
            if KIND == ADD:  # the last tile's results have left the buffers: they may be filled again
                if s == 0:
                    tma.store_wait(0)
                    mbarrier.arrive(old_free.index(PART), pred=done > 0)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), pred=steps > 0)
        parts = _halves(acc)
        if BN == 256:
            parts = _halves(parts[0]) + _halves(parts[1])
        if KIND != ADD:
            tma.store_wait(0)
        if KIND == SWIGLU:
            _swiglu(parts, weight, out, act_out, row, o1, W[0], out_bufs, base, narrow)
        elif KIND == ADD:
            if steps > 0:
                mbarrier.wait(old_ready.index(PART), done & 1)
                for i in gl.static_range(BN // H):
                    buf = out_bufs.index(base + i)
                    value = gl.convert_layout(parts[i], narrow, assert_trivial=True) + buf.load(narrow).to(gl.float32)
                    _send(out, row, o1 + i * H, value, buf)
                done += 1
        else:
            for i in gl.static_range(BN // H):
                _send(out, row, o1 + i * H, gl.convert_layout(parts[i], narrow, assert_trivial=True), out_bufs.index(base + i))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["E", "GROUP", "SMS"])
def product_kernel(
    a, b, out, act_out, expert_M, ends_E, token_R, slot_R, weight_N, W0, W1, E, GROUP, SMS,
    MODE: gl.constexpr, SIDE: gl.constexpr, KIND: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One of the products above with one of the ends: STORE; ADD (to what is in out; mode TN, BN 256); SWIGLU (mode PAIR, BN 256:
    out = gate and up [R, 2F], act_out = weight x silu(gate) x up).

    a, b, out, act_out are TMA descriptors, but with SIDE 1 a is a pointer to the tokens' rows [T, C].
    (W0, W1) = columns of the result and of the sum; in mode TN rows and columns of the result."""
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK if MODE == TN else BM, BM if MODE == TN else BK], LAYOUT),
        gl.allocate_shared_memory(
            gl.bfloat16, [STAGES, BK if MODE == NN or MODE == TN else BN, BN if MODE == NN or MODE == TN else BK], LAYOUT
        ),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    out_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * OUTS, BM // 2, H], LAYOUT)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring[2].index(i), count=129 if SIDE > 0 else 1)
        mbarrier.init(ring[3].index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ring[4].index(i), count=1)
        mbarrier.init(ring[5].index(i), count=1)
    fence_async_shared()
    at = (expert_M, ends_E, token_R)
    outs = (out, act_out)
    rest = (slot_R, weight_N)
    W = (W0, W1)
    if SIDE > 0:
        gl.warp_specialize(
            [
                (_multiply, (ring, out_bufs, at, outs, rest, W, E, GROUP, SMS, MODE, SIDE, KIND, BN, STAGES, 0)),
                (_multiply, (ring, out_bufs, at, outs, rest, W, E, GROUP, SMS, MODE, SIDE, KIND, BN, STAGES, 1)),
                (_gather, (a, b, ring, at, W, E, GROUP, SMS, MODE, BN, STAGES)),
            ],
            [4, 4],
            [216, 80],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, out_bufs, at, outs, rest, W, E, GROUP, SMS, MODE, SIDE, KIND, BN, STAGES, 0)),
                (_multiply, (ring, out_bufs, at, outs, rest, W, E, GROUP, SMS, MODE, SIDE, KIND, BN, STAGES, 1)),
                (_load, (a, b, out, ring, out_bufs, at, W, E, GROUP, SMS, MODE, KIND, BN, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
