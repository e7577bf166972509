"""The consumer warpgroups of ``attention_hopper_extend``: products, online softmax, results."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from packinfer_sgl.kernels.columns import A_LEN, B_LEN, Q_CNT, Q_OFF, SPLIT
from packinfer_sgl.kernels.hopper_common import LOG2_E, ROWS, full_phase, row_layout, soft_capped, with_sink
from packinfer_sgl.kernels.hopper_extend_pipeline import CONSUMERS, W, n_blocks, read_work_tile


class ConsumerArgs(NamedTuple):
    out_ptr: gl.tensor
    lse2_ptr: gl.tensor
    part_out_ptr: gl.tensor
    part_lse2_ptr: gl.tensor
    query_rows_ptr: gl.tensor
    partial_rows_ptr: gl.tensor
    sinks_ptr: gl.tensor
    win_lo_ptr: gl.tensor
    win_hi_ptr: gl.tensor
    work: gl.tensor  # (item, KV head) pairs
    kv_heads: gl.tensor
    n_heads: gl.tensor
    stride_out_token: gl.tensor
    stride_out_head: gl.tensor
    scale2: gl.tensor
    cap2: gl.tensor
    v_scale: gl.tensor


@gluon.jit
def _halves_max(s):
    """[M, N] to [M, N / 2]: maxima that do not wait for each other, as those of a reduction in one go would."""
    left, right = gl.split(gl.permute(gl.reshape(s, [s.shape[0], 2, s.shape[1] // 2]), [0, 2, 1]))
    return gl.maximum(left, right)


@gluon.jit
def _softmax_block(
    s, top, total, begin, a_len, lo, width, scale2, cap2, SOFT_CAP: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Online softmax: the weights [ROWS, BLOCK_N] of a block that begins at token ``begin`` of the item, the new
    ``top`` and ``total`` [ROWS], and the factor [ROWS] of all that came before it.

    A row sees tokens before ``a_len``, and of the others ``width`` from ``lo`` on.
    """
    BLOCK_N: gl.constexpr = s.shape[1]
    if SOFT_CAP:
        s = soft_capped(s, scale2, cap2)
    if begin + BLOCK_N > a_len:
        pos = gl.expand_dims(begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout)), 0)  # [1, BLOCK_N]
        # one comparison for both ends: unsigned, what is before ``lo`` is far beyond ``width``
        after_lo = (pos - gl.expand_dims(lo, 1)).to(gl.uint32, bitcast=True)
        seen = (pos < a_len) | (after_lo < gl.expand_dims(width.to(gl.uint32, bitcast=True), 1))  # [ROWS, BLOCK_N]
        s = gl.where(seen, s, -float("inf"))
    s_top = gl.convert_layout(gl.max(_halves_max(_halves_max(s)), 1), gl.SliceLayout(1, s_layout))
    new_top = gl.maximum(top, s_top if SOFT_CAP else s_top * scale2)
    shift = gl.where(new_top == -float("inf"), 0.0, new_top)  # a row may not have seen anything yet
    p = gl.exp2(s - gl.expand_dims(shift, 1) if SOFT_CAP else s * scale2 - gl.expand_dims(shift, 1))
    keep = gl.exp2(top - shift)
    return p, new_top, total * keep + gl.sum(p, 1), keep


@gluon.jit
def _store_results(
    args, acc, top, total, query, part, q_tile, q_empty, first_row, q_cnt, split, kv_head,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, SINKS: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """ROWS rows' results, to the output or to the item's partial results; then the Q stage is given back.

    Rows of an output of its dtype leave through the Q stage, which no product reads any more: 16 bytes a thread at
    once.
    """
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row = first_row + gl.arange(0, ROWS, rows)
    head = kv_head * GROUP + row % GROUP
    live = row // GROUP < q_cnt
    direct = live & (part < 0)
    partial = live & (part >= 0)
    if SINKS:
        sink = gl.load(args.sinks_ptr + head, mask=direct, other=-float("inf"))
        top, total, keep = with_sink(top, total, sink.to(gl.float32) * LOG2_E)
        acc = acc * gl.expand_dims(keep, 1)
    acc = acc * gl.expand_dims(args.v_scale / gl.where(total == 0.0, 1.0, total), 1)  # [ROWS, HEAD_DIM]
    lse2 = top + gl.log2(total)
    gl.store(args.lse2_ptr + query.to(gl.int64) * args.n_heads + head, lse2, mask=direct)
    if split >= 0:
        part_row = (part + split).to(gl.int64) * args.n_heads + head
        part_offset = gl.expand_dims(part_row * HEAD_DIM, 1) + gl.expand_dims(
            gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout)), 0
        )
        gl.store(args.part_out_ptr + part_offset, acc, mask=gl.expand_dims(partial, 1))
        gl.store(args.part_lse2_ptr + part_row, lse2, mask=partial)
    if args.out_ptr.dtype.element_ty == q_tile.dtype:
        layout: gl.constexpr = row_layout(HEAD_DIM)
        q_tile.store(acc.to(q_tile.dtype))
        result = q_tile.load(layout)
        mbarrier.arrive(q_empty, count=1)
        query = gl.convert_layout(gl.where(direct, query, -1), gl.SliceLayout(1, layout))
        row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
        out_head = (kv_head * GROUP + row % GROUP).to(gl.int64)
        out_row = query.to(gl.int64) * args.stride_out_token + out_head * args.stride_out_head
        gl.store(
            args.out_ptr + gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0),
            result,
            mask=gl.expand_dims(query >= 0, 1),
        )
    else:
        mbarrier.arrive(q_empty, count=1)
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
        out_row = query.to(gl.int64) * args.stride_out_token + head.to(gl.int64) * args.stride_out_head
        out_offset = gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0)
        gl.store(args.out_ptr + out_offset, acc.to(args.out_ptr.dtype.element_ty), mask=gl.expand_dims(direct, 1))


@gluon.jit
def _converted_in_place(q_tile, dtype: gl.constexpr, HEAD_DIM: gl.constexpr):
    """The queries in ``dtype``, of as many bits; each thread writes where it read."""
    converted = q_tile._reinterpret(dtype, [ROWS, HEAD_DIM], gl.NVMMASharedLayout(128, 16, 2))
    converted.store(q_tile.load(row_layout(HEAD_DIM)).to(dtype))
    fence_async_shared()
    return converted


@gluon.jit
def consume(
    WHICH: gl.constexpr, args, pipe, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, RUN_B: gl.constexpr,
):  # fmt: skip
    """Online softmax over the KV blocks for ROWS rows of each tile, the first for WHICH 0, and their results."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    FIRST_ROW: gl.constexpr = WHICH * ROWS
    nth_block = 0  # first of the item, of all items of this CTA
    nth_item = 0
    mbarrier.wait(pipe.work_full.index(0), 0)
    w = read_work_tile(pipe.work_tiles.index(0), W)
    while w < args.work:
        kv_head = w % args.kv_heads
        q_stage = nth_item % Q_STAGES
        work_tile = pipe.work_tiles.index(q_stage)
        q_off = read_work_tile(work_tile, Q_OFF)
        q_cnt = read_work_tile(work_tile, Q_CNT)
        a_len = read_work_tile(work_tile, A_LEN)
        b_len = read_work_tile(work_tile, B_LEN)
        split = read_work_tile(work_tile, SPLIT)
        blocks = n_blocks(a_len + b_len, BLOCK_N)
        q_tile = pipe.q_stages.index(CONSUMERS * q_stage + WHICH)  # [ROWS, HEAD_DIM]
        if q_cnt * GROUP > FIRST_ROW:
            token = (FIRST_ROW + gl.arange(0, ROWS, s_rows)) // GROUP  # [ROWS]
            lo, width = token, token * 0
            if RUN_B:
                lo = a_len + gl.load(args.win_lo_ptr + q_off + token, mask=token < q_cnt, other=0)
                # the windows are those of the tile's last split
                hi = a_len + gl.minimum(gl.load(args.win_hi_ptr + q_off + token, mask=token < q_cnt, other=0), b_len)
                width = gl.maximum(hi - lo, 0)
            token = (FIRST_ROW + gl.arange(0, ROWS, o_rows)) // GROUP
            query = gl.load(args.query_rows_ptr + q_off + token, mask=token < q_cnt, other=0)
            part = gl.load(args.partial_rows_ptr + q_off + token, mask=token < q_cnt, other=0)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
            top = gl.full([ROWS], -float("inf"), gl.float32, s_rows)
            total = gl.zeros([ROWS], gl.float32, s_rows)
            zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
            mbarrier.wait(pipe.q_full.index(q_stage), full_phase(nth_item, Q_STAGES))
            if WHICH == 1:
                # half a block behind consumer 0: else both multiply at the same time, then both do softmax
                mbarrier.wait(pipe.stagger.index(q_stage), full_phase(nth_item, Q_STAGES))
            queries = q_tile
            if q_tile.dtype != pipe.k_stages.dtype:  # FP8 KV was converted to float16
                queries = _converted_in_place(q_tile, pipe.k_stages.dtype, HEAD_DIM)
            # Not a loop over full blocks and one over masked ones: from two loops that multiply by the same queries, at
            # an address that changes, ptxas (CUDA 12.8) takes the address from the first even if that did not run.
            for b in range(blocks):
                stage = (nth_block + b) % STAGES
                phase = full_phase(nth_block + b, STAGES)
                mbarrier.wait(pipe.k_full.index(stage), phase)
                fence_async_shared()  # q, K and V came by cp.async, products read them through the async proxy
                k = pipe.k_stages.index(stage).permute((1, 0))  # [HEAD_DIM, BLOCK_N]
                s = warpgroup_mma(queries, k, zeros, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])  # [ROWS, BLOCK_N]
                if WHICH == 0:
                    if b == 0:
                        mbarrier.arrive(pipe.stagger.index(q_stage), count=1)
                mbarrier.arrive(pipe.k_empty.index(stage), count=1)
                p, top, total, keep = _softmax_block(
                    s, top, total, b * BLOCK_N, a_len, lo, width, args.scale2, args.cap2, SOFT_CAP, s_layout
                )  # fmt: skip
                acc = acc * gl.expand_dims(gl.convert_layout(keep, o_rows), 1)
                p_operand = gl.convert_layout(p.to(pipe.k_stages.dtype), p_layout)
                mbarrier.wait(pipe.v_full.index(stage), phase)
                fence_async_shared()
                acc = warpgroup_mma(p_operand, pipe.v_stages.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])  # [ROWS, HEAD_DIM]
                mbarrier.arrive(pipe.v_empty.index(stage), count=1)
            _store_results(
                args, acc, gl.convert_layout(top, o_rows), gl.convert_layout(total, o_rows), query, part, q_tile,
                pipe.q_empty.index(q_stage), FIRST_ROW, q_cnt, split, kv_head, GROUP, HEAD_DIM, SINKS, o_layout,
            )  # fmt: skip
        else:
            # no row of mine is live: give everything back in step with consumer 0
            mbarrier.wait(pipe.q_full.index(q_stage), full_phase(nth_item, Q_STAGES))
            mbarrier.wait(pipe.stagger.index(q_stage), full_phase(nth_item, Q_STAGES))
            mbarrier.arrive(pipe.q_empty.index(q_stage), count=1)
            for b in range(blocks):
                stage = (nth_block + b) % STAGES
                phase = full_phase(nth_block + b, STAGES)
                mbarrier.wait(pipe.k_full.index(stage), phase)
                mbarrier.arrive(pipe.k_empty.index(stage), count=1)
                mbarrier.wait(pipe.v_full.index(stage), phase)
                mbarrier.arrive(pipe.v_empty.index(stage), count=1)
        nth_block += blocks
        nth_item += 1
        next_stage = nth_item % Q_STAGES
        mbarrier.wait(pipe.work_full.index(next_stage), full_phase(nth_item, Q_STAGES))
        w = read_work_tile(pipe.work_tiles.index(next_stage), W)
