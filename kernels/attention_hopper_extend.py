"""Packed attention of extend batches on Hopper: warp-specialised, in Gluon.

The same items and the same results as ``packed.packed_attention_kernel`` with run B, for tiles of 128 rows. Products
bound it, so the tensor cores must not wait: one warpgroup gathers queries, keys and values into shared memory, blocks
and items ahead, and two multiply, each 64 of the rows, so that the softmax of one runs beside the products of the other
(FlashAttention-3, https://arxiv.org/abs/2407.08608). Programs take items from a counter, each when it has
gathered the one before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from packinfer_sgl.kernels.attention_hopper_decode import ROWS
from packinfer_sgl.kernels.attention_triton import (
    A_LEN,
    A_OFF,
    B_LEN,
    B_OFF,
    N_COLS,
    N_TAKEN,
    PIECE,
    Q_CNT,
    Q_OFF,
    TILE_CLASS,
)

CHUNK = gl.constexpr(32)  # rows that are copied together
WARPGROUPS = gl.constexpr(2)  # that multiply, each ROWS of a tile
Q_TILES = gl.constexpr(2)  # queries of the next item come while those of one are multiplied


@gluon.jit
def _n_blocks(length, BLOCK_N: gl.constexpr):
    """Blocks of an item; at least one, also where there is nothing to see."""
    return gl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _tell(told, item_ptr, w):
    """Pass an item on to the multiplying warpgroups: its columns, and in place of its tile class ``w``."""
    col = gl.arange(0, told.shape[0], gl.BlockedLayout([1], [32], [4], [0]))
    values = gl.load(item_ptr + col, mask=col < N_COLS, other=0)
    told.store(gl.where(col == TILE_CLASS, w, values))


@gluon.jit
def _told(told, COLUMN: gl.constexpr):
    return gl.max(told.slice(COLUMN, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _copy_rows(rows, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr, FIRST: gl.constexpr = 0):
    """Begin to copy rows to shared memory, from the ``offsets`` after the FIRST; past ``n_inside`` they become 0."""
    threads: gl.constexpr = HEAD_DIM // 8  # of a row: 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    d = gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout)), 0)
    for i in gl.static_range(rows.shape[0] // CHUNK):
        from_row = gl.multiple_of(offsets.index(FIRST // CHUNK + i).load(gl.SliceLayout(1, layout)), 8)
        offset = gl.expand_dims(from_row, 1) + d
        inside = gl.expand_dims(FIRST + i * CHUNK + row < n_inside, 1)
        async_copy.async_copy_global_to_shared(rows.slice(i * CHUNK, CHUNK), pointer + offset, mask=inside)


@gluon.jit
def _gather(
    args, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Fill the rings with the items' queries and blocks, one after the other.

    Each row is looked up once and goes to those who copy from it through shared memory, because registers are few.
    """
    (
        q_ptr, k_ptr, v_ptr, slots_ptr, items_ptr, counts_ptr, query_rows_ptr, first, work, kv_heads, stride_q_token,
        stride_q_head, stride_page, stride_slot, stride_kv_head, q_offsets, offsets, q_tiles, k_ring, v_ring, told,
        told_ready, q_ready, k_ready, v_ready, q_free, k_free, v_free,
    ) = args  # fmt: skip
    nth = gl.arange(0, WARPGROUPS * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    at = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
    all_q_offsets = q_offsets._reinterpret(gl.int64, [WARPGROUPS * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    all_offsets = offsets._reinterpret(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    n = 0
    nth_item = 0
    w = gl.program_id(0)
    while w < work:
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        kv_head = w % kv_heads
        q_off = gl.load(item_ptr + Q_OFF)
        q_cnt = gl.load(item_ptr + Q_CNT)
        a_len = gl.load(item_ptr + A_LEN)
        length = a_len + gl.load(item_ptr + B_LEN)
        a_off = gl.load(item_ptr + A_OFF)
        b_off = gl.load(item_ptr + B_OFF) - a_len
        query = gl.load(query_rows_ptr + q_off + nth // GROUP, mask=nth // GROUP < q_cnt, other=0)
        # slots are loaded a block ahead; the slot list ends in room for it
        slot = gl.load(slots_ptr + (gl.where(at < a_len, a_off, b_off) + at))
        q_head = (kv_head * GROUP + nth % GROUP).to(gl.int64)
        all_q_offsets.store(query.to(gl.int64) * stride_q_token + q_head * stride_q_head)
        tile = nth_item % Q_TILES
        mbarrier.wait(q_free.index(tile), (nth_item // Q_TILES) & 1 ^ 1)
        _tell(told.index(tile), item_ptr, w)
        mbarrier.arrive(told_ready.index(tile), count=1)
        for i in gl.static_range(WARPGROUPS):
            _copy_rows(q_tiles.index(WARPGROUPS * tile + i), q_ptr, q_offsets, q_cnt * GROUP, HEAD_DIM, i * ROWS)
        async_copy.mbarrier_arrive(q_ready.index(tile), increment_count=False)
        head = kv_head.to(gl.int64) * stride_kv_head
        for b in range(_n_blocks(length, BLOCK_N)):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * stride_page + (slot % PAGE).to(gl.int64) * stride_slot
            all_offsets.store(kv_row)
            pos = (b + 1) * BLOCK_N + at
            slot = gl.load(slots_ptr + (gl.where(pos < a_len, a_off, b_off) + pos))
            stage = n % STAGES
            phase = (n // STAGES) & 1 ^ 1
            rest = length - b * BLOCK_N
            mbarrier.wait(k_free.index(stage), phase)
            _copy_rows(k_ring.index(stage), k_ptr + head, offsets, rest, HEAD_DIM)
            async_copy.mbarrier_arrive(k_ready.index(stage), increment_count=False)
            mbarrier.wait(v_free.index(stage), phase)
            _copy_rows(v_ring.index(stage), v_ptr + head, offsets, rest, HEAD_DIM)
            async_copy.mbarrier_arrive(v_ready.index(stage), increment_count=False)
            n += 1
        # who is free first takes the next; those that take longest come first
        taken = gl.atomic_add(counts_ptr + N_TAKEN, 1, sem="relaxed")
        if taken == work - 1:  # the last of all: the next launch counts from 0
            gl.store(counts_ptr + N_TAKEN, 0)
        w = gl.minimum(gl.num_programs(0), work) + taken
        nth_item += 1
    tile = nth_item % Q_TILES
    mbarrier.wait(q_free.index(tile), (nth_item // Q_TILES) & 1 ^ 1)
    _tell(told.index(tile), items_ptr, w)
    mbarrier.arrive(told_ready.index(tile), count=1)


@gluon.jit
def _halves_max(s):
    """[M, N] to [M, N / 2]: maxima that do not wait for each other, as those of a reduction in one go would."""
    left, right = gl.split(gl.permute(gl.reshape(s, [s.shape[0], 2, s.shape[1] // 2]), [0, 2, 1]))
    return gl.maximum(left, right)


@gluon.jit
def _weigh(
    s, top, total, begin, a_len, lo, width, scale2, cap2, SOFT_CAP: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Online softmax: the weights of a block that begins at ``begin``, and the factor of all that came before it.

    A row sees tokens before ``a_len``, and of the others ``width`` from ``lo`` on.
    """
    BLOCK_N: gl.constexpr = s.shape[1]
    if SOFT_CAP:
        s = cap2 * (1.0 - 2.0 / (1.0 + gl.exp2(s * scale2 * (2.0 * 1.4426950408889634) / cap2)))
    if begin + BLOCK_N > a_len:
        pos = gl.expand_dims(begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout)), 0)
        # one comparison for both ends: unsigned, what is before ``lo`` is far beyond ``width``
        after_lo = (pos - gl.expand_dims(lo, 1)).to(gl.uint32, bitcast=True)
        seen = (pos < a_len) | (after_lo < gl.expand_dims(width.to(gl.uint32, bitcast=True), 1))
        s = gl.where(seen, s, -float("inf"))
    s_top = gl.convert_layout(gl.max(_halves_max(_halves_max(s)), 1), gl.SliceLayout(1, s_layout))
    new_top = gl.maximum(top, s_top if SOFT_CAP else s_top * scale2)
    shift = gl.where(new_top == -float("inf"), 0.0, new_top)  # a row may not have seen anything yet
    p = gl.exp2(s - gl.expand_dims(shift, 1) if SOFT_CAP else s * scale2 - gl.expand_dims(shift, 1))
    keep = gl.exp2(top - shift)
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _store_results(
    acc, top, total, query, part, tile, free, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, first_row, q_cnt, piece,
    kv_head, n_heads, stride_out_token, stride_out_head,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """ROWS rows' results, to the output or to the item's partial results; then the ``tile`` is free.

    Rows of an output of its dtype leave through the tile, which no product reads any more: 16 bytes a thread at once.
    """
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row = first_row + gl.arange(0, ROWS, rows)
    head = kv_head * GROUP + row % GROUP
    live = row // GROUP < q_cnt
    direct = live & (part < 0)
    partial = live & (part >= 0)
    acc = acc * gl.expand_dims(1.0 / gl.where(total == 0.0, 1.0, total), 1)
    lse2 = top + gl.log2(total)
    gl.store(lse2_ptr + query.to(gl.int64) * n_heads + head, lse2, mask=direct)
    if piece >= 0:
        part_row = (part + piece).to(gl.int64) * n_heads + head
        part_offset = gl.expand_dims(part_row * HEAD_DIM, 1) + gl.expand_dims(
            gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout)), 0
        )
        gl.store(part_out_ptr + part_offset, acc, mask=gl.expand_dims(partial, 1))
        gl.store(part_lse2_ptr + part_row, lse2, mask=partial)
    if out_ptr.dtype.element_ty == tile.dtype:
        threads: gl.constexpr = HEAD_DIM // 8
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
        tile.store(acc.to(tile.dtype))
        result = tile.load(layout)
        mbarrier.arrive(free, count=1)
        query = gl.convert_layout(gl.where(direct, query, -1), gl.SliceLayout(1, layout))
        row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
        out_head = (kv_head * GROUP + row % GROUP).to(gl.int64)
        out_row = query.to(gl.int64) * stride_out_token + out_head * stride_out_head
        gl.store(
            out_ptr + gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0), result, mask=gl.expand_dims(query >= 0, 1)
        )
    else:
        mbarrier.arrive(free, count=1)
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
        out_row = query.to(gl.int64) * stride_out_token + head.to(gl.int64) * stride_out_head
        out_offset = gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0)
        gl.store(out_ptr + out_offset, acc.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(direct, 1))


@gluon.jit
def _multiply(
    WHICH: gl.constexpr, args, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks in the rings for the first or second 64 rows of each tile, and their results."""
    (
        out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr, work,
        kv_heads, n_heads, stride_out_token, stride_out_head, scale2, cap2, q_tiles, k_ring, v_ring, told, told_ready,
        q_ready, k_ready, v_ready, q_free, k_free, v_free, led,
    ) = args  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    FIRST_ROW: gl.constexpr = WHICH * ROWS
    n = 0
    nth_item = 0
    mbarrier.wait(told_ready.index(0), 0)
    w = _told(told.index(0), TILE_CLASS)
    while w < work:
        kv_head = w % kv_heads
        tile = nth_item % Q_TILES
        item = told.index(tile)
        q_off = _told(item, Q_OFF)
        q_cnt = _told(item, Q_CNT)
        a_len = _told(item, A_LEN)
        b_len = _told(item, B_LEN)
        piece = _told(item, PIECE)
        blocks = _n_blocks(a_len + b_len, BLOCK_N)
        q_tile = q_tiles.index(WARPGROUPS * tile + WHICH)
        if q_cnt * GROUP > FIRST_ROW:
            token = (FIRST_ROW + gl.arange(0, ROWS, s_rows)) // GROUP
            lo = a_len + gl.load(win_lo_ptr + q_off + token, mask=token < q_cnt, other=0)
            # the windows are those of the tile's last piece
            hi = a_len + gl.minimum(gl.load(win_hi_ptr + q_off + token, mask=token < q_cnt, other=0), b_len)
            width = gl.maximum(hi - lo, 0)
            token = (FIRST_ROW + gl.arange(0, ROWS, o_rows)) // GROUP
            query = gl.load(query_rows_ptr + q_off + token, mask=token < q_cnt, other=0)
            part = gl.load(partial_rows_ptr + q_off + token, mask=token < q_cnt, other=0)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
            top = gl.full([ROWS], -float("inf"), gl.float32, s_rows)
            total = gl.zeros([ROWS], gl.float32, s_rows)
            zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
            mbarrier.wait(q_ready.index(tile), (nth_item // Q_TILES) & 1)
            if WHICH == 1:
                # half a block behind the other: else both multiply at the same time, and then weigh at the same time
                mbarrier.wait(led.index(tile), (nth_item // Q_TILES) & 1)
            # Not a loop over full blocks and one over masked ones: from two loops that multiply by the same queries, at
            # an address that changes, ptxas (CUDA 12.8) takes the address from the first even if that did not run.
            for b in range(blocks):
                stage = (n + b) % STAGES
                phase = ((n + b) // STAGES) & 1
                mbarrier.wait(k_ready.index(stage), phase)
                fence_async_shared()  # q, K and V came by cp.async, products read them through the async proxy
                s = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                if WHICH == 0:
                    if b == 0:
                        mbarrier.arrive(led.index(tile), count=1)
                mbarrier.arrive(k_free.index(stage), count=1)
                weights, top, total, keep = _weigh(
                    s, top, total, b * BLOCK_N, a_len, lo, width, scale2, cap2, SOFT_CAP, s_layout
                )  # fmt: skip
                acc = acc * gl.expand_dims(gl.convert_layout(keep, o_rows), 1)
                p = gl.convert_layout(weights.to(k_ring.dtype), p_layout)
                mbarrier.wait(v_ready.index(stage), phase)
                fence_async_shared()
                acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_free.index(stage), count=1)
            _store_results(
                acc, gl.convert_layout(top, o_rows), gl.convert_layout(total, o_rows), query, part, q_tile,
                q_free.index(tile), out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, FIRST_ROW, q_cnt, piece, kv_head,
                n_heads, stride_out_token, stride_out_head, GROUP, HEAD_DIM, o_layout,
            )  # fmt: skip
        else:
            # no row of mine is live: give everything back in step with the other warpgroup
            mbarrier.wait(q_ready.index(tile), (nth_item // Q_TILES) & 1)
            mbarrier.wait(led.index(tile), (nth_item // Q_TILES) & 1)
            mbarrier.arrive(q_free.index(tile), count=1)
            for b in range(blocks):
                stage = (n + b) % STAGES
                phase = ((n + b) // STAGES) & 1
                mbarrier.wait(k_ready.index(stage), phase)
                mbarrier.arrive(k_free.index(stage), count=1)
                mbarrier.wait(v_ready.index(stage), phase)
                mbarrier.arrive(v_free.index(stage), count=1)
        n += blocks
        nth_item += 1
        next_tile = nth_item % Q_TILES
        mbarrier.wait(told_ready.index(next_tile), (nth_item // Q_TILES) & 1)
        w = _told(told.index(next_tile), TILE_CLASS)


@gluon.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_extend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr, stride_q_token, stride_q_head, stride_out_token,
    stride_out_head, stride_page, stride_slot, stride_kv_head, scale2, cap2, first_count, last_count, kv_heads, n_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, SOFT_CAP: gl.constexpr,
    STAGES: gl.constexpr, MULTIPLY_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As ``packed_attention_kernel`` with BLOCK_M 128 and WINDOW, for items that do not grow and that none follows.

    Entry N_TAKEN of the counts is 0 before and after.

    12 warps, of which 4 gather. A gathering thread gets GATHER_REGISTERS, one of the second multiplying warpgroup
    MULTIPLY_REGISTERS, and one of the first what ``maxnreg`` leaves. Heads of q, K and V begin at multiples of 16
    bytes.
    """
    first = gl.load(counts_ptr + first_count)
    work = (gl.load(counts_ptr + last_count) - first) * kv_heads
    if gl.program_id(0) < work:
        gdc_launch_dependents()
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        rows_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        q_tiles = gl.allocate_shared_memory(dtype, [WARPGROUPS * Q_TILES, ROWS, HEAD_DIM], layout)
        q_offsets = gl.allocate_shared_memory(gl.int64, [WARPGROUPS * ROWS // CHUNK, CHUNK], rows_layout)
        offsets = gl.allocate_shared_memory(gl.int64, [BLOCK_N // CHUNK, CHUNK], rows_layout)
        told = gl.allocate_shared_memory(gl.int32, [Q_TILES, 16], rows_layout)
        told_ready = gl.allocate_shared_memory(gl.int64, [Q_TILES, 1], mbarrier.MBarrierLayout())
        q_ready = gl.allocate_shared_memory(gl.int64, [Q_TILES, 1], mbarrier.MBarrierLayout())
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        q_free = gl.allocate_shared_memory(gl.int64, [Q_TILES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        led = gl.allocate_shared_memory(gl.int64, [Q_TILES, 1], mbarrier.MBarrierLayout())
        # each gathering thread arrives when its copies have, and each multiplying warpgroup when it has read
        for i in gl.static_range(Q_TILES):
            mbarrier.init(q_ready.index(i), count=128)
            mbarrier.init(q_free.index(i), count=WARPGROUPS)
            mbarrier.init(led.index(i), count=1)
            mbarrier.init(told_ready.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(i), count=128)
            mbarrier.init(v_ready.index(i), count=128)
            mbarrier.init(k_free.index(i), count=WARPGROUPS)
            mbarrier.init(v_free.index(i), count=WARPGROUPS)
        multiply = (
            out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr,
            work, kv_heads, n_heads, stride_out_token, stride_out_head, scale2, cap2, q_tiles, k_ring, v_ring, told,
            told_ready, q_ready, k_ready, v_ready, q_free, k_free, v_free, led,
        )  # fmt: skip
        gather = (
            q_ptr, k_ptr, v_ptr, slots_ptr, items_ptr, counts_ptr, query_rows_ptr, first, work, kv_heads,
            stride_q_token, stride_q_head, stride_page, stride_slot, stride_kv_head, q_offsets, offsets, q_tiles,
            k_ring, v_ring, told, told_ready, q_ready, k_ready, v_ready, q_free, k_free, v_free,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_multiply, (0, multiply, GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP)),
                (_multiply, (1, multiply, GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP)),
                (_gather, (gather, GROUP, HEAD_DIM, BLOCK_N, PAGE, STAGES)),
            ],
            [4, 4],
            [MULTIPLY_REGISTERS, GATHER_REGISTERS],
        )
