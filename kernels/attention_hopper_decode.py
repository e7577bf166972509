"""Packed attention of large tiles on Hopper: warp-specialised, in Gluon.

The same items and the same results as ``packed.packed_attention_kernel`` for run A. One warpgroup gathers keys and
values into a ring of blocks in shared memory, the other multiplies (FlashAttention-3, https://arxiv.org/abs/2407.08608).
Both together take so few registers that programs of the other tile class run beside them on the same multiprocessor and
read their KV meanwhile.
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

from packinfer_sgl.kernels.attention_triton import A_LEN, A_OFF, N_COLS, PIECE, Q_CNT, Q_OFF

ROWS = gl.constexpr(64)  # query rows of a tile: those of one warpgroup's product


@gluon.jit
def _gather(
    k_ptr, v_ptr, slots_ptr, items_ptr, first, work, kv_heads, stride_page, stride_slot, stride_kv_head,
    k_ring, v_ring, k_ready, v_ready, free,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the items' blocks, one after the other."""
    threads: gl.constexpr = HEAD_DIM // 8  # of a row: 16 bytes each
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    at = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    n = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        a_len = gl.load(item_ptr + A_LEN)
        a_slots = slots_ptr + gl.load(item_ptr + A_OFF)
        head = (w % kv_heads).to(gl.int64) * stride_kv_head
        # slots are loaded a block ahead; the slot list ends in room for it
        slot = gl.load(a_slots + at)
        for j in range(0, a_len, BLOCK_N):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * stride_page + (slot % PAGE).to(gl.int64) * stride_slot
            inside = gl.expand_dims(j + at < a_len, 1)
            slot = gl.load(a_slots + j + BLOCK_N + at)
            offset = gl.expand_dims(head + kv_row, 1) + gl.expand_dims(d, 0)
            stage = n % STAGES
            mbarrier.wait(free.index(stage), (n // STAGES) & 1 ^ 1)
            async_copy.async_copy_global_to_shared(k_ring.index(stage), k_ptr + offset, mask=inside)
            async_copy.mbarrier_arrive(k_ready.index(stage), increment_count=False)
            async_copy.async_copy_global_to_shared(v_ring.index(stage), v_ptr + offset, mask=inside)
            async_copy.mbarrier_arrive(v_ready.index(stage), increment_count=False)
            n += 1


@gluon.jit
def load_q(
    q_ptr, query_rows_ptr, q_tile, first_row, q_off, q_cnt, kv_head, stride_q_token, stride_q_head,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """ROWS rows of a tile into shared memory, from ``first_row`` on."""
    threads: gl.constexpr = HEAD_DIM // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    live = row // GROUP < q_cnt
    query = gl.load(query_rows_ptr + q_off + row // GROUP, mask=live, other=0).to(gl.int64)
    q_row = query * stride_q_token + (kv_head * GROUP + row % GROUP).to(gl.int64) * stride_q_head
    q_offset = gl.expand_dims(q_row, 1) + gl.expand_dims(d, 0)
    q_tile.store(gl.load(q_ptr + q_offset, mask=gl.expand_dims(live, 1), other=0.0))
    fence_async_shared()


@gluon.jit
def store_results(
    acc, top, total, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, query_rows_ptr, partial_rows_ptr, first_row,
    q_off, q_cnt, piece, kv_head, n_heads, stride_out_token, stride_out_head,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """The same rows' results: to the output, or to the item's partial results."""
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
    live = row // GROUP < q_cnt
    head = kv_head * GROUP + row % GROUP
    query = gl.load(query_rows_ptr + q_off + row // GROUP, mask=live, other=0).to(gl.int64)
    part = gl.load(partial_rows_ptr + q_off + row // GROUP, mask=live, other=0)
    direct = live & (part < 0)
    partial = live & (part >= 0)
    result = acc / gl.expand_dims(gl.where(total == 0.0, 1.0, total), 1)
    lse2 = top + gl.log2(total)
    out_row = query * stride_out_token + head.to(gl.int64) * stride_out_head
    out_offset = gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0)
    gl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(direct, 1))
    gl.store(lse2_ptr + query * n_heads + head, lse2, mask=direct)
    part_row = (part + piece).to(gl.int64) * n_heads + head
    part_offset = gl.expand_dims(part_row * HEAD_DIM, 1) + gl.expand_dims(d, 0)
    gl.store(part_out_ptr + part_offset, result, mask=gl.expand_dims(partial, 1))
    gl.store(part_lse2_ptr + part_row, lse2, mask=partial)


@gluon.jit
def _multiply(
    q_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, items_ptr, query_rows_ptr,
    partial_rows_ptr, first, work, kv_heads, n_heads, stride_q_token, stride_q_head, stride_out_token, stride_out_head,
    scale2, cap2, q_tile, k_ring, v_ring, k_ready, v_ready, free,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """Online softmax over the blocks in the ring, and the results."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    n = 0
    for w in range(gl.program_id(0), work, gl.num_programs(0)):
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        kv_head = w % kv_heads
        q_off = gl.load(item_ptr + Q_OFF)
        q_cnt = gl.load(item_ptr + Q_CNT)
        a_len = gl.load(item_ptr + A_LEN)
        piece = gl.load(item_ptr + PIECE)
        load_q(
            q_ptr, query_rows_ptr, q_tile, 0, q_off, q_cnt, kv_head, stride_q_token, stride_q_head, GROUP, HEAD_DIM
        )  # fmt: skip

        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
        top = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
        total = gl.zeros([ROWS], gl.float32, row_layout)
        for j in range(0, a_len, BLOCK_N):
            stage = n % STAGES
            phase = (n // STAGES) & 1
            zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
            mbarrier.wait(k_ready.index(stage), phase)
            fence_async_shared()  # keys came by cp.async, the product reads them through the async proxy
            s = warpgroup_mma(q_tile, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if SOFT_CAP:
                s = cap2 * (1.0 - 2.0 / (1.0 + gl.exp2(s * scale2 * (2.0 * 1.4426950408889634) / cap2)))
            if j + BLOCK_N > a_len:
                pos = j + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
                s = gl.where(gl.expand_dims(pos < a_len, 0), s, -float("inf"))
            s_top = gl.convert_layout(gl.max(s, 1), row_layout)
            new_top = gl.maximum(top, s_top if SOFT_CAP else s_top * scale2)
            shift = gl.expand_dims(gl.convert_layout(new_top, gl.SliceLayout(1, s_layout)), 1)
            p = gl.exp2(s - shift if SOFT_CAP else s * scale2 - shift)
            keep = gl.exp2(top - new_top)
            total = total * keep + gl.convert_layout(gl.sum(p, 1), row_layout)
            acc = acc * gl.expand_dims(keep, 1)
            top = new_top
            p_operand = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(v_ready.index(stage), phase)
            fence_async_shared()
            acc = warpgroup_mma(p_operand, v_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage), count=1)
            n += 1

        store_results(
            acc, top, total, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, query_rows_ptr, partial_rows_ptr, 0,
            q_off, q_cnt, piece, kv_head, n_heads, stride_out_token, stride_out_head, GROUP, HEAD_DIM, o_layout,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_hopper_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_page,
    stride_slot, stride_kv_head, scale2, cap2, first_count, last_count, kv_heads, n_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, SOFT_CAP: gl.constexpr,
    STAGES: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As ``packed_attention_kernel`` with BLOCK_M 64, for items without run B that do not grow.

    8 warps, of which 4 gather. A gathering thread gets GATHER_REGISTERS, a multiplying one what ``maxnreg`` leaves.
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
        q_tile = gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], layout)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            # each gathering thread arrives when its copies have
            mbarrier.init(k_ready.index(i), count=128)
            mbarrier.init(v_ready.index(i), count=128)
            mbarrier.init(free.index(i), count=1)
        gl.warp_specialize(
            [(_multiply, (q_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, items_ptr, query_rows_ptr,
                 partial_rows_ptr, first, work, kv_heads, n_heads, stride_q_token, stride_q_head, stride_out_token,
                 stride_out_head, scale2, cap2, q_tile, k_ring, v_ring, k_ready, v_ready, free,
                 GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP)),
             (_gather, (k_ptr, v_ptr, slots_ptr, items_ptr, first, work, kv_heads, stride_page, stride_slot,
                 stride_kv_head, k_ring, v_ring, k_ready, v_ready, free, HEAD_DIM, BLOCK_N, PAGE, STAGES))],
            [4],
            [GATHER_REGISTERS],
        )  # fmt: skip
