"""The producer warpgroup of ``attention_hopper_extend``: takes items, copies their queries and KV to shared memory."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from packinfer_sgl.kernels.columns import A_LEN, A_OFF, B_LEN, B_OFF, N_COLS, NEXT_TICKET, Q_CNT, Q_OFF
from packinfer_sgl.kernels.hopper_common import ROWS, empty_phase, grown, row_layout
from packinfer_sgl.kernels.hopper_extend_fp8 import fill_last, fill_stages
from packinfer_sgl.kernels.hopper_extend_pipeline import CONSUMERS, n_blocks, write_work_tile

COPY_ROWS = gl.constexpr(32)  # that are copied together


class ProducerArgs(NamedTuple):
    q_ptr: gl.tensor
    k_ptr: gl.tensor
    v_ptr: gl.tensor
    slots_ptr: gl.tensor
    items_ptr: gl.tensor
    counts_ptr: gl.tensor
    query_rows_ptr: gl.tensor
    kv_lens_ptr: gl.tensor
    first: gl.tensor  # item of the class
    work: gl.tensor  # (item, KV head) pairs
    kv_heads: gl.tensor
    stride_q_token: gl.tensor
    stride_q_head: gl.tensor
    stride_page: gl.tensor
    stride_slot: gl.tensor
    stride_kv_head: gl.tensor
    q_offsets: gl.shared_memory_descriptor  # [CONSUMERS * ROWS / COPY_ROWS, COPY_ROWS] int64
    kv_offsets: gl.shared_memory_descriptor  # [BLOCK_N / COPY_ROWS, COPY_ROWS] int64


@gluon.jit
def _copy_rows(rows, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr, FIRST: gl.constexpr = 0):
    """Begin to copy rows to shared memory, from the ``offsets`` after the FIRST; past ``n_inside`` they become 0."""
    layout: gl.constexpr = row_layout(HEAD_DIM)
    row = gl.arange(0, COPY_ROWS, gl.SliceLayout(1, layout))
    d = gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout)), 0)
    for i in gl.static_range(rows.shape[0] // COPY_ROWS):
        from_row = gl.multiple_of(offsets.index(FIRST // COPY_ROWS + i).load(gl.SliceLayout(1, layout)), 8)
        offset = gl.expand_dims(from_row, 1) + d  # [COPY_ROWS, HEAD_DIM]
        inside = gl.expand_dims(FIRST + i * COPY_ROWS + row < n_inside, 1)
        async_copy.async_copy_global_to_shared(rows.slice(i * COPY_ROWS, COPY_ROWS), pointer + offset, mask=inside)


@gluon.jit
def produce(
    args, pipe, raw, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, FP8_KV: gl.constexpr, RUN_B: gl.constexpr,
):  # fmt: skip
    """Fill the stages with the items' queries and KV blocks, one after the other; FP8_KV through ``raw``.

    Each row offset is computed by one thread and passed through shared memory: the producer has few registers.
    """
    row = gl.arange(0, CONSUMERS * ROWS, gl.BlockedLayout([1], [32], [4], [0]))
    at = gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
    all_q_offsets = args.q_offsets._reinterpret(gl.int64, [CONSUMERS * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    all_kv_offsets = args.kv_offsets._reinterpret(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    nth_block = 0  # of all items of this CTA
    nth_item = 0
    w = gl.program_id(0)
    while w < args.work:
        item_ptr = args.items_ptr + (args.first + w // args.kv_heads) * N_COLS
        kv_head = w % args.kv_heads
        q_off = gl.load(item_ptr + Q_OFF)
        q_cnt = gl.load(item_ptr + Q_CNT)
        a_len = gl.load(item_ptr + A_LEN)
        if not RUN_B:
            a_len = grown(item_ptr, a_len, args.kv_lens_ptr)
        length = a_len + gl.load(item_ptr + B_LEN)
        a_off = gl.load(item_ptr + A_OFF)
        b_off = gl.load(item_ptr + B_OFF) - a_len
        # [CONSUMERS * ROWS]
        query = gl.load(args.query_rows_ptr + q_off + row // GROUP, mask=row // GROUP < q_cnt, other=0)
        # slots are loaded a block ahead; the slot list ends in room for it
        slot = gl.load(args.slots_ptr + (gl.where(at < a_len, a_off, b_off) + at))  # [BLOCK_N]
        q_head = (kv_head * GROUP + row % GROUP).to(gl.int64)
        all_q_offsets.store(query.to(gl.int64) * args.stride_q_token + q_head * args.stride_q_head)
        q_stage = nth_item % Q_STAGES
        mbarrier.wait(pipe.q_empty.index(q_stage), empty_phase(nth_item, Q_STAGES))
        write_work_tile(pipe.work_tiles.index(q_stage), item_ptr, w, a_len)
        mbarrier.arrive(pipe.work_full.index(q_stage), count=1)
        for i in gl.static_range(CONSUMERS):
            rows = pipe.q_stages.index(CONSUMERS * q_stage + i)  # [ROWS, HEAD_DIM]
            _copy_rows(rows, args.q_ptr, args.q_offsets, q_cnt * GROUP, HEAD_DIM, i * ROWS)
        async_copy.mbarrier_arrive(pipe.q_full.index(q_stage), increment_count=False)
        head = kv_head.to(gl.int64) * args.stride_kv_head
        for b in range(n_blocks(length, BLOCK_N)):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * args.stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * args.stride_page + (slot % PAGE).to(gl.int64) * args.stride_slot
            all_kv_offsets.store(kv_row)
            pos = (b + 1) * BLOCK_N + at
            slot = gl.load(args.slots_ptr + (gl.where(pos < a_len, a_off, b_off) + pos))
            stage = nth_block % STAGES
            phase = empty_phase(nth_block, STAGES)
            rest = length - b * BLOCK_N
            if FP8_KV:
                fill_stages(
                    pipe, raw, args.k_ptr + head, args.v_ptr + head, args.kv_offsets, rest, nth_block, b == 0, HEAD_DIM,
                    STAGES,
                )  # fmt: skip
            else:
                mbarrier.wait(pipe.k_empty.index(stage), phase)
                _copy_rows(pipe.k_stages.index(stage), args.k_ptr + head, args.kv_offsets, rest, HEAD_DIM)
                async_copy.mbarrier_arrive(pipe.k_full.index(stage), increment_count=False)
                mbarrier.wait(pipe.v_empty.index(stage), phase)
                _copy_rows(pipe.v_stages.index(stage), args.v_ptr + head, args.kv_offsets, rest, HEAD_DIM)
                async_copy.mbarrier_arrive(pipe.v_full.index(stage), increment_count=False)
            nth_block += 1
        if FP8_KV:  # now, not with the next item: the consumers have no other block to go on with
            fill_last(pipe, raw, nth_block - 1, HEAD_DIM, STAGES)
        # The tile scheduler: the first items are those of the CTAs' ids, the others go by tickets to whoever is free.
        # Items that take longest stand first.
        ticket = gl.atomic_add(args.counts_ptr + NEXT_TICKET, 1, sem="relaxed")
        if ticket == args.work - 1:  # one ticket for each item: the last of all; the next launch counts from 0
            gl.store(args.counts_ptr + NEXT_TICKET, 0)
        w = gl.minimum(gl.num_programs(0), args.work) + ticket
        nth_item += 1
    # a work tile with w >= work ends the consumers' loops
    q_stage = nth_item % Q_STAGES
    mbarrier.wait(pipe.q_empty.index(q_stage), empty_phase(nth_item, Q_STAGES))
    write_work_tile(pipe.work_tiles.index(q_stage), args.items_ptr, w, 0)
    mbarrier.arrive(pipe.work_full.index(q_stage), count=1)
