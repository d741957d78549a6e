"""Products with frozen experts on Hopper: weights in bf16 or INT4 codes, and a low-rank term in the same sum (Gluon).

Built as `experts_gluon`: a persistent program walks over tiles of 128 x 256, eight warps multiply, the others fill a ring of
shared memory. The low-rank term is P more summed-over columns: rows of `low` [R, P] times `factors`, so it costs P / C of the
product. INT4 codes are read as they lie, decoded in registers to bf16(code x scale) by four warps while the others multiply, and
written where TMA would have put bf16 weights: no decoded matrix is ever in device memory. A row's 32 weights of one scale are
decoded by one thread, four instructions per two weights: a nibble put below 128.0 in bf16 is 128 + code + 8, minus 136 is the
code (exact), times the scale is rounded once. Needs triton 3.6.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `R` aligned rows, `W` columns of a result, `C` summed-over
columns, `P` columns of the low-rank term.
"""

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

from k2lab.models.kernels.experts_gluon import _halves, _send, _swiglu

# What is multiplied. Weights are of the row's expert; PAIR gives columns of gate and of up side by side in one tile.
NT = gl.constexpr(0)  # out[r] = weights [E, W, C] a[r] + factors [E, W, P] low[r]
NN = gl.constexpr(1)  # out[r] = weights [E, C, W]^T a[r] + factors [E, P, W]^T low[r]
PAIR = gl.constexpr(3)  # as NT with weights [E, 2W, C], factors [E, 2W, P]; out [R, 2W] = gate and up, act = weight silu(gate) up
# Rows and summed-over columns of a step, columns of a store, and buffers of [BM / 2, H] that each group stores from.
BM, BK, H, OUTS = gl.constexpr(128), gl.constexpr(64), gl.constexpr(64), gl.constexpr(4)


@gluon.jit
def _place(tile, at, rows, W, GROUP, MODE: gl.constexpr, BN: gl.constexpr):
    """Expert, first row and first column of a tile; GROUP row tiles share a sweep over the columns."""
    expert_M, ends_E, token_R, first_expert, last_expert = at
    begin, rows = rows
    wide: gl.constexpr = BN // 2 if MODE == PAIR else BN
    columns = W // wide
    per = GROUP * columns
    first = tile // per * GROUP
    size = gl.minimum(rows - first, GROUP)
    m = begin + first + tile % per % size
    return gl.load(expert_M + m), m * BM, tile % per // size * wide


@gluon.jit
def _extent(at, W, MODE: gl.constexpr, BN: gl.constexpr):
    """((first row tile, row tiles), tiles in all) of the experts that are multiplied."""
    expert_M, ends_E, token_R, first_expert, last_expert = at
    begin = gl.load(ends_E + first_expert - 1, mask=first_expert > 0, other=0) // BM
    rows = gl.load(ends_E + last_expert - 1) // BM - begin
    return (begin, rows), rows * (W // (BN // 2 if MODE == PAIR else BN))


@gluon.jit
def _load_b(b, bar, buf, e, n, k, W, depth, MODE: gl.constexpr, BN: gl.constexpr):
    """Rows or columns k and on of an expert's matrix [., depth] (NN: [depth, .])."""
    if MODE == NN:
        tma.async_copy_global_to_shared(b, [e * depth + k, n], bar, buf)
    elif MODE == NT:
        tma.async_copy_global_to_shared(b, [e * W + n, k], bar, buf)
    else:
        tma.async_copy_global_to_shared(b, [e * 2 * W + n, k], bar, buf.slice(0, BN // 2, 0))
        tma.async_copy_global_to_shared(b, [e * 2 * W + W + n, k], bar, buf.slice(BN // 2, BN // 2, 0))


@gluon.jit
def _decoded(word, scale2):
    """Four int32, each two bf16 values, of a word of 8 codes; scale2 holds a bf16 scale twice."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t, u;
        mov.b32 u, $4;          shl.b32 t, $4, 12;
        and.b32 u, u, 0x0000000F;  and.b32 t, t, 0x000F0000;  or.b32 u, u, 0x43004300;  or.b32 $0, t, u;
        shr.u32 u, $4, 8;       shl.b32 t, $4, 4;
        and.b32 u, u, 0x0000000F;  and.b32 t, t, 0x000F0000;  or.b32 u, u, 0x43004300;  or.b32 $1, t, u;
        shr.u32 u, $4, 16;      shr.u32 t, $4, 4;
        and.b32 u, u, 0x0000000F;  and.b32 t, t, 0x000F0000;  or.b32 u, u, 0x43004300;  or.b32 $2, t, u;
        shr.u32 u, $4, 24;      shr.u32 t, $4, 12;
        and.b32 u, u, 0x0000000F;  and.b32 t, t, 0x000F0000;  or.b32 u, u, 0x43004300;  or.b32 $3, t, u;
        mov.b32 t, 0x43084308;
        sub.rn.bf16x2 $0, $0, t;  sub.rn.bf16x2 $1, $1, t;  sub.rn.bf16x2 $2, $2, t;  sub.rn.bf16x2 $3, $3, t;
        mul.rn.bf16x2 $0, $0, $5;  mul.rn.bf16x2 $1, $1, $5;  mul.rn.bf16x2 $2, $2, $5;  mul.rn.bf16x2 $3, $3, $5;
        }""",
        "=&r,=&r,=&r,=&r,r,r",
        [word, scale2],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _decode(words, scales, buf, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Words int32 [ROWS, COLUMNS / 32, 4] and scales int16 [ROWS, COLUMNS / 32] to bf16 [ROWS, COLUMNS] in shared memory."""
    twice = (scales.to(gl.int32) & 0xFFFF) * 0x10001
    p0, p1, p2, p3 = _decoded(words, gl.expand_dims(twice, 2).broadcast_to(words.shape))
    pairs = gl.join(gl.join(p0, p2), gl.join(p1, p3)).reshape([ROWS, COLUMNS // 2])
    buf._reinterpret(gl.int32, [ROWS, COLUMNS // 2], gl.NVMMASharedLayout(128, 32, 2)).store(pairs)


@gluon.jit
def _load(
    a, b, low, factors, ring, at, W, C, P, GROUP, SMS, MODE: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: everything arrives through TMA."""
    a_bufs, b_bufs, ready, free = ring
    expert_M, ends_E, token_R, first_expert, last_expert = at
    rows, total = _extent(at, W, MODE, BN)
    it = 0
    for tile in range(gl.program_id(0), total, SMS):
        e, m, n = _place(tile, at, rows, W, GROUP, MODE, BN)
        for s in range((C + P) // BK):
            stage = it % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (BM + BN) * BK * 2)
            if s * BK < C:
                tma.async_copy_global_to_shared(a, [m, s * BK], bar, a_bufs.index(stage))
                _load_b(b, bar, b_bufs.index(stage), e - first_expert, n, s * BK, W, C, MODE, BN)
            else:
                tma.async_copy_global_to_shared(low, [m, s * BK - C], bar, a_bufs.index(stage))
                _load_b(factors, bar, b_bufs.index(stage), e, n, s * BK - C, W, P, MODE, BN)
            it += 1


@gluon.jit
def _feed(
    a, b, scales, low, factors, ring, at, W, C, P, GROUP, SMS,
    MODE: gl.constexpr, GATHER: gl.constexpr, PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps that fetch rows of tokens where they lie (GATHER; rows that fill up an expert fetch token 0, and their results
    are never used), and decode weights (PACKED)."""
    a_bufs, b_bufs, ready, free = ring
    expert_M, ends_E, token_R, first_expert, last_expert = at
    rows, total = _extent(at, W, MODE, BN)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    r = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    # of codes: rows, groups of 32, words; a thread decodes a group at a time, and its stores meet no bank twice
    ROWS: gl.constexpr = BK if MODE == NN else BN
    COLUMNS: gl.constexpr = BN if MODE == NN else BK
    code: gl.constexpr = gl.BlockedLayout([1, 1, 4], [16, 2, 1], [1, 4, 1] if MODE == NN else [4, 1, 1], [2, 1, 0])
    wr = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, code)))
    wg = gl.arange(0, COLUMNS // 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, code)))
    ww = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, code)))
    it = 0
    for tile in range(gl.program_id(0), total, SMS):
        e, m, n = _place(tile, at, rows, W, GROUP, MODE, BN)
        steps = C // BK
        from_ = a
        if GATHER:
            from_ = a + gl.load(token_R + m + r).to(gl.int64)[:, None] * C + c[None, :]
        words = b
        scale = scales
        stride = 0
        if PACKED:
            if MODE == NN:
                first = (e * C).to(gl.int64) * (W // 32) + n // 32
                spot = wr[:, None] * (W // 32) + wg[None, :]
                stride = BK * (W // 32)
            elif MODE == NT:
                first = (e * W + n).to(gl.int64) * (C // 32)
                spot = wr[:, None] * (C // 32) + wg[None, :]
                stride = BK // 32
            else:
                first = (e * 2 * W + n).to(gl.int64) * (C // 32)
                spot = (wr + gl.where(wr < BN // 2, 0, W - BN // 2))[:, None] * (C // 32) + wg[None, :]
                stride = BK // 32
            words_at = b + first * 4 + (gl.expand_dims(spot * 4, 2) + ww[None, None, :])
            scales_at = scales + first + spot
            words = gl.load(words_at)
            scale = gl.load(scales_at)
        for s in range(steps):
            stage = it % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            if not (GATHER and PACKED):
                mbarrier.expect(bar, (0 if GATHER else BM * BK * 2) + (0 if PACKED else BN * BK * 2))
            if GATHER:
                async_copy.async_copy_global_to_shared(a_bufs.index(stage), from_ + s * BK)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a, [m, s * BK], bar, a_bufs.index(stage))
            if PACKED:
                ahead = gl.minimum(s + 1, steps - 1) * stride
                words_next = gl.load(words_at + ahead * 4)
                scale_next = gl.load(scales_at + ahead)
                _decode(words, scale, b_bufs.index(stage), ROWS, COLUMNS)
                # a fence here would wait for the loads of the next step: those who multiply have it
                gl.thread_barrier()
                mbarrier.arrive(bar)
                words = words_next
                scale = scale_next
            else:
                _load_b(b, bar, b_bufs.index(stage), e - first_expert, n, s * BK, W, C, MODE, BN)
            it += 1
        for s in range(P // BK):
            stage = it % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), ((it // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (BM + BN) * BK * 2)
            tma.async_copy_global_to_shared(low, [m, s * BK], bar, a_bufs.index(stage))
            _load_b(factors, bar, b_bufs.index(stage), e, n, s * BK, W, P, MODE, BN)
            if GATHER:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            elif PACKED:
                mbarrier.arrive(bar)
            it += 1


@gluon.jit
def _multiply(
    ring, out_bufs, at, outs, rest, W, C, P, GROUP, SMS,
    MODE: gl.constexpr, GATHER: gl.constexpr, PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply the rows PART x 64 and on of every tile and write the result."""
    a_bufs, b_bufs, ready, free = ring
    out, act_out = outs
    slot_R, weight_N = rest
    M: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, H, 16])
    r = gl.arange(0, M, layout=gl.SliceLayout(1, narrow))
    rows, total = _extent(at, W, MODE, BN)
    base: gl.constexpr = PART * OUTS
    it = 0
    for tile in range(gl.program_id(0), total, SMS):
        e, m, n = _place(tile, at, rows, W, GROUP, MODE, BN)
        row = m + PART * M
        if MODE == PAIR:
            slot = gl.load(slot_R + row + r)
            weight = gl.load(weight_N + slot, mask=slot >= 0, other=0.0).to(gl.float32)[:, None]
        acc = gl.zeros([M, BN], gl.float32, layout)
        for s in range((C + P) // BK):
            stage = it % STAGES
            mbarrier.wait(ready.index(stage), (it // STAGES) & 1)
            if GATHER or PACKED:  # what threads wrote, for the tensor cores
                fence_async_shared()
            b = b_bufs.index(stage)
            if MODE != NN:
                b = b.permute((1, 0))
            token = warpgroup_mma(a_bufs.index(stage).slice(PART * M, M, 0), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(token,))
            mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), pred=s > 0)
            it += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(free.index((it + STAGES - 1) % STAGES))
        parts = _halves(acc)
        if BN == 256:
            parts = _halves(parts[0]) + _halves(parts[1])
        tma.store_wait(0)
        if MODE == PAIR:
            _swiglu(parts, weight, out, act_out, row, n, W, out_bufs, base, narrow)
        else:
            for i in gl.static_range(BN // H):
                _send(out, row, n + i * H, gl.convert_layout(parts[i], narrow, assert_trivial=True), out_bufs.index(base + i))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["P", "FIRST", "LAST", "GROUP", "SMS"])
def product_kernel(
    a, b, scales, low, factors, out, act_out, expert_M, ends_E, token_R, slot_R, weight_N, W, C, P, FIRST, LAST, GROUP, SMS,
    MODE: gl.constexpr, GATHER: gl.constexpr, PACKED: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One of the products above. a, low, factors, out, act_out are TMA descriptors, but with GATHER a is a pointer to the tokens'
    rows [T, C]; b is a descriptor, with PACKED a pointer to int32 codes with scales (bf16 as int16). P may be 0.
    Only rows of experts FIRST to LAST - 1 are multiplied, and without PACKED b begins with expert FIRST."""
    ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BK if MODE == NN else BN, BN if MODE == NN else BK], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    out_bufs = gl.allocate_shared_memory(gl.bfloat16, [2 * OUTS, BM // 2, H], LAYOUT)
    for i in gl.static_range(STAGES):
        # an arrival with the bytes that TMA brings, one per thread that gathers, one after decoding
        mbarrier.init(ring[2].index(i), count=129 if GATHER else (2 if PACKED else 1))
        mbarrier.init(ring[3].index(i), count=2)
    fence_async_shared()
    at = (expert_M, ends_E, token_R, FIRST, LAST)
    outs = (out, act_out)
    rest = (slot_R, weight_N)
    if GATHER or PACKED:
        gl.warp_specialize(
            [
                (_multiply, (ring, out_bufs, at, outs, rest, W, C, P, GROUP, SMS, MODE, GATHER, PACKED, BN, STAGES, 0)),
                (_multiply, (ring, out_bufs, at, outs, rest, W, C, P, GROUP, SMS, MODE, GATHER, PACKED, BN, STAGES, 1)),
                (
                    _feed,
                    (a, b, scales, low, factors, ring, at, W, C, P, GROUP, SMS, MODE, GATHER, PACKED, BN, STAGES),
                ),
            ],
            [4, 4],
            [200, 112] if PACKED else [216, 80],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (ring, out_bufs, at, outs, rest, W, C, P, GROUP, SMS, MODE, GATHER, PACKED, BN, STAGES, 0)),
                (_multiply, (ring, out_bufs, at, outs, rest, W, C, P, GROUP, SMS, MODE, GATHER, PACKED, BN, STAGES, 1)),
                (_load, (a, b, low, factors, ring, at, W, C, P, GROUP, SMS, MODE, BN, STAGES)),
            ],
            [4, 1],
            [232, 40],
        )
