"""Packed attention of extend batches on Hopper: warp-specialised, in Gluon.

The same items and the same results as ``packed.packed_attention_kernel`` with run B, for tiles of 128 rows. Products
bound it, so the tensor cores must never wait: one warpgroup gathers keys and values into two rings of blocks in shared
memory, two multiply, each 64 of the rows; one's softmax runs beside the other's products, and with PIPELINED also
beside its own (FlashAttention-3, https://arxiv.org/abs/2407.08608).
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

from packinfer_sgl.kernels.packed import A_LEN, A_OFF, B_LEN, B_OFF, N_COLS, PIECE, Q_CNT, Q_OFF
from packinfer_sgl.kernels.packed_hopper import ROWS, load_q, store_results

CHUNK = gl.constexpr(32)  # rows that are copied together


@gluon.jit
def _n_blocks(length, BLOCK_N: gl.constexpr):
    """Blocks of an item; at least one, also where there is nothing to see."""
    return gl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _copy_block(block, ready, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """Begin to copy the rows at ``offsets`` (in shared memory); those after the first ``n_inside`` become 0."""
    threads: gl.constexpr = HEAD_DIM // 8  # of a row: 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    d = gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout)), 0)
    for i in gl.static_range(BLOCK_N // CHUNK):
        kv_row = gl.multiple_of(offsets.index(i).load(gl.SliceLayout(1, layout)), 8)
        offset = gl.expand_dims(kv_row, 1) + d
        inside = gl.expand_dims(i * CHUNK + row < n_inside, 1)
        async_copy.async_copy_global_to_shared(block.slice(i * CHUNK, CHUNK), pointer + offset, mask=inside)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _gather(
    k_ptr, v_ptr, slots_ptr, items_ptr, first, work, kv_heads, stride_page, stride_slot, stride_kv_head,
    offsets, k_ring, v_ring, k_ready, v_ready, k_free, v_free,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the rings with the items' blocks, one after the other.

    Each slot is looked up once and goes to those who copy from it through shared memory, because registers are few.
    """
    at = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
    all_offsets = offsets._reinterpret(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    n = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        a_len = gl.load(item_ptr + A_LEN)
        length = a_len + gl.load(item_ptr + B_LEN)
        a_off = gl.load(item_ptr + A_OFF)
        b_off = gl.load(item_ptr + B_OFF) - a_len
        head = (w % kv_heads) * stride_kv_head
        # slots are loaded a block ahead; the slot list ends in room for it
        slot = gl.load(slots_ptr + (gl.where(at < a_len, a_off, b_off) + at))
        for b in range(_n_blocks(length, BLOCK_N)):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * stride_page + (slot % PAGE) * stride_slot
            all_offsets.store(kv_row)
            pos = (b + 1) * BLOCK_N + at
            slot = gl.load(slots_ptr + (gl.where(pos < a_len, a_off, b_off) + pos))
            stage = n % STAGES
            phase = (n // STAGES) & 1 ^ 1
            rest = length - b * BLOCK_N
            mbarrier.wait(k_free.index(stage), phase)
            _copy_block(k_ring.index(stage), k_ready.index(stage), k_ptr + head, offsets, rest, HEAD_DIM, BLOCK_N)
            mbarrier.wait(v_free.index(stage), phase)
            _copy_block(v_ring.index(stage), v_ready.index(stage), v_ptr + head, offsets, rest, HEAD_DIM, BLOCK_N)
            n += 1


@gluon.jit
def _weigh(
    s, top, total, begin, a_len, lo, hi, scale2, cap2, MASK: gl.constexpr, SOFT_CAP: gl.constexpr,
    s_layout: gl.constexpr,
):  # fmt: skip
    """Online softmax: the weights of a block that begins at ``begin``, and the factor of all that came before it.

    With MASK a row sees tokens before ``a_len``, and of the others those in [lo, hi).
    """
    if SOFT_CAP:
        s = cap2 * (1.0 - 2.0 / (1.0 + gl.exp2(s * scale2 * (2.0 * 1.4426950408889634) / cap2)))
    if MASK:
        pos = gl.expand_dims(begin + gl.arange(0, s.shape[1], gl.SliceLayout(0, s_layout)), 0)
        seen = ((pos < a_len) | (pos >= gl.expand_dims(lo, 1))) & (pos < gl.expand_dims(hi, 1))
        s = gl.where(seen, s, -float("inf"))
    s_top = gl.max(s, 1)
    new_top = gl.maximum(top, s_top if SOFT_CAP else s_top * scale2)
    shift = gl.where(new_top == -float("inf"), 0.0, new_top)  # a row may not have seen anything yet
    p = gl.exp2(s - gl.expand_dims(shift, 1) if SOFT_CAP else s * scale2 - gl.expand_dims(shift, 1))
    keep = gl.exp2(top - shift)
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _step(
    p, acc, top, total, b, n, a_len, lo, hi, scale2, cap2, q_tile,
    k_ring, v_ring, k_ready, v_ready, k_free, v_free,
    MASK: gl.constexpr, SOFT_CAP: gl.constexpr, STAGES: gl.constexpr, PIPELINED: gl.constexpr, FIRST: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Block ``b`` of an item, the ``n``th of the program.

    With PIPELINED the product of its weights ``p`` with the values is left to the next step, which computes its own
    weights meanwhile. The FIRST has none to do.
    """
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    stage = n % STAGES
    phase = (n // STAGES) & 1
    last = (n - 1) % STAGES
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    mbarrier.wait(k_ready.index(stage), phase)
    if PIPELINED and not FIRST:
        mbarrier.wait(v_ready.index(last), ((n - 1) // STAGES) & 1)
    fence_async_shared()  # keys came by cp.async, the product reads them through the async proxy
    s = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if PIPELINED and not FIRST:
        acc = warpgroup_mma(p, v_ring.index(last), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
    else:
        s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, top, total, keep = _weigh(
        s, top, total, b * BLOCK_N, a_len, lo, hi, scale2, cap2, MASK, SOFT_CAP, s_layout
    )  # fmt: skip
    if PIPELINED and not FIRST:
        # long since through, but a branch: without one, ptxas waits for the product before it computes the weights
        mbarrier.wait(v_ready.index(last), ((n - 1) // STAGES) & 1)
        acc, total = warpgroup_mma_wait(0, deps=[acc, total])
        mbarrier.arrive(v_free.index(last), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, o_layout)), 1)
    p = gl.convert_layout(weights.to(p.dtype), p_layout)
    if not PIPELINED:
        acc = _add_values(p, acc, n, v_ring, v_ready, v_free, STAGES)
    return p, acc, top, total


@gluon.jit
def _add_values(p, acc, n, v_ring, v_ready, v_free, STAGES: gl.constexpr):
    """The product of the weights of the ``n``th block with its values, at once."""
    stage = n % STAGES
    mbarrier.wait(v_ready.index(stage), (n // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(stage), count=1)
    return acc


@gluon.jit
def _multiply(
    q_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, items_ptr, query_rows_ptr, partial_rows_ptr, win_lo_ptr,
    win_hi_ptr, first, work, kv_heads, n_heads, stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    scale2, cap2, q_tiles, k_ring, v_ring, k_ready, v_ready, k_free, v_free,
    WHICH: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SOFT_CAP: gl.constexpr, PIPELINED: gl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks in the rings for the first or the second 64 rows (WHICH), and their results."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    FIRST_ROW: gl.constexpr = WHICH * ROWS
    q_tile = q_tiles.index(WHICH)
    n = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        kv_head = w % kv_heads
        q_off = gl.load(item_ptr + Q_OFF)
        q_cnt = gl.load(item_ptr + Q_CNT)
        a_len = gl.load(item_ptr + A_LEN)
        b_len = gl.load(item_ptr + B_LEN)
        piece = gl.load(item_ptr + PIECE)
        blocks = _n_blocks(a_len + b_len, BLOCK_N)
        if q_cnt * GROUP > FIRST_ROW:
            load_q(
                q_ptr, query_rows_ptr, q_tile, FIRST_ROW, q_off, q_cnt, kv_head, stride_q_token, stride_q_head, GROUP,
                HEAD_DIM,
            )  # fmt: skip
            token = (FIRST_ROW + gl.arange(0, ROWS, row_layout)) // GROUP
            lo = a_len + gl.load(win_lo_ptr + q_off + token, mask=token < q_cnt, other=0)
            # the windows are those of the tile's last piece
            hi = a_len + gl.minimum(gl.load(win_hi_ptr + q_off + token, mask=token < q_cnt, other=0), b_len)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
            top = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
            total = gl.zeros([ROWS], gl.float32, row_layout)
            p = gl.zeros([ROWS, BLOCK_N], q_ptr.dtype.element_ty, p_layout)
            full = a_len // BLOCK_N
            if PIPELINED:
                p, acc, top, total = _step(
                    p, acc, top, total, 0, n, a_len, lo, hi, scale2, cap2, q_tile, k_ring, v_ring, k_ready, v_ready,
                    k_free, v_free, True, SOFT_CAP, STAGES, True, True, s_layout, o_layout,
                )  # fmt: skip
            started: gl.constexpr = 1 if PIPELINED else 0
            for b in range(started, full):
                p, acc, top, total = _step(
                    p, acc, top, total, b, n + b, a_len, lo, hi, scale2, cap2, q_tile, k_ring, v_ring, k_ready,
                    v_ready, k_free, v_free, False, SOFT_CAP, STAGES, PIPELINED, False, s_layout, o_layout,
                )  # fmt: skip
            for b in range(gl.maximum(full, started), blocks):
                p, acc, top, total = _step(
                    p, acc, top, total, b, n + b, a_len, lo, hi, scale2, cap2, q_tile, k_ring, v_ring, k_ready,
                    v_ready, k_free, v_free, True, SOFT_CAP, STAGES, PIPELINED, False, s_layout, o_layout,
                )  # fmt: skip
            if PIPELINED:
                acc = _add_values(p, acc, n + blocks - 1, v_ring, v_ready, v_free, STAGES)
            o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
            store_results(
                acc, gl.convert_layout(top, o_rows), gl.convert_layout(total, o_rows), out_ptr, lse2_ptr, part_out_ptr,
                part_lse2_ptr, query_rows_ptr, partial_rows_ptr, FIRST_ROW, q_off, q_cnt, piece, kv_head, n_heads,
                stride_out_token, stride_out_head, GROUP, HEAD_DIM, o_layout,
            )  # fmt: skip
        else:
            # no row of mine is live: give the blocks back in step with the other warpgroup
            for b in range(blocks):
                stage = (n + b) % STAGES
                phase = ((n + b) // STAGES) & 1
                mbarrier.wait(k_ready.index(stage), phase)
                mbarrier.arrive(k_free.index(stage), count=1)
                mbarrier.wait(v_ready.index(stage), phase)
                mbarrier.arrive(v_free.index(stage), count=1)
        n += blocks


@gluon.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_extend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr, stride_q_token, stride_q_head, stride_out_token,
    stride_out_head, stride_page, stride_slot, stride_kv_head, scale2, cap2, first_count, last_count, kv_heads, n_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, SOFT_CAP: gl.constexpr,
    STAGES: gl.constexpr, PIPELINED: gl.constexpr, MULTIPLY_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As ``packed_attention_kernel`` with BLOCK_M 128 and WINDOW, for items that do not grow and that none follows.

    12 warps, of which 4 gather. A gathering thread gets GATHER_REGISTERS, one of the second multiplying warpgroup
    MULTIPLY_REGISTERS, and one of the first what ``maxnreg`` leaves.
    """
    first = gl.load(counts_ptr + first_count)
    work = (gl.load(counts_ptr + last_count) - first) * kv_heads
    # a program without work is gone before those of the next launch begin: they would spread unevenly around it
    if gl.program_id(0) < work:
        gdc_launch_dependents()
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], layout)
        offsets = gl.allocate_shared_memory(
            gl.int64, [BLOCK_N // CHUNK, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )  # fmt: skip
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            # each gathering thread arrives when its copies have, and each multiplying warpgroup when it has read
            mbarrier.init(k_ready.index(i), count=128)
            mbarrier.init(v_ready.index(i), count=128)
            mbarrier.init(k_free.index(i), count=2)
            mbarrier.init(v_free.index(i), count=2)
        gl.warp_specialize(
            [(_multiply, (q_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, items_ptr, query_rows_ptr,
                 partial_rows_ptr, win_lo_ptr, win_hi_ptr, first, work, kv_heads, n_heads, stride_q_token,
                 stride_q_head, stride_out_token, stride_out_head, scale2, cap2, q_tiles, k_ring, v_ring, k_ready,
                 v_ready, k_free, v_free, gl.constexpr(0), GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP, PIPELINED)),
             (_multiply, (q_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, items_ptr, query_rows_ptr,
                 partial_rows_ptr, win_lo_ptr, win_hi_ptr, first, work, kv_heads, n_heads, stride_q_token,
                 stride_q_head, stride_out_token, stride_out_head, scale2, cap2, q_tiles, k_ring, v_ring, k_ready,
                 v_ready, k_free, v_free, gl.constexpr(1), GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP, PIPELINED)),
             (_gather, (k_ptr, v_ptr, slots_ptr, items_ptr, first, work, kv_heads, stride_page, stride_slot,
                 stride_kv_head, offsets, k_ring, v_ring, k_ready, v_ready, k_free, v_free, HEAD_DIM, BLOCK_N, PAGE,
                 STAGES))],
            [4, 4],
            [MULTIPLY_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip
