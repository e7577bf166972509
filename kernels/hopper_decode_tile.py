"""A tile of the Hopper decode kernel: its queries, the states that it goes on from, its results (``ConsumerArgs``)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from packinfer_sgl.kernels.hopper_common import LOG2_E, ROWS, row_layout, with_sink


@gluon.jit
def load_q(args, q_off, q_cnt, kv_head, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr):
    """A tile's ROWS rows into shared memory; rows past its queries become 0."""
    layout: gl.constexpr = row_layout(HEAD_DIM)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    live = row // GROUP < q_cnt
    query = gl.load(args.query_rows_ptr + q_off + row // GROUP, mask=live, other=0).to(gl.int64)  # [ROWS]
    q_row = query * args.stride_q_token + (kv_head * GROUP + row % GROUP).to(gl.int64) * args.stride_q_head
    q_offset = gl.expand_dims(q_row, 1) + gl.expand_dims(d, 0)  # [ROWS, HEAD_DIM]
    q = gl.load(args.q_ptr + q_offset, mask=gl.expand_dims(live, 1), other=0.0)
    args.q_tile.store(q.to(args.q_tile.dtype))
    fence_async_shared()


@gluon.jit
def _partial_rows(args, part, split, head, UNITS: gl.constexpr):
    """Row of the partial results of each query and head, by its entry of ``Plan.partial_rows``."""
    part_row = part + split
    if UNITS:
        part_row = gl.where(part < 0, -2 - part, part_row)  # of a state, where the item writes the output itself
    return part_row.to(gl.int64) * args.n_heads + head


@gluon.jit
def load_state(
    args, q_off, q_cnt, split, kv_head,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, FIRST_D: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """What another item left of the same rows' unit: output ([ROWS, WIDTH] columns from FIRST_D on), maximum and sum
    ([ROWS])."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    d = FIRST_D + gl.arange(0, WIDTH, gl.SliceLayout(0, o_layout))
    live = row // GROUP < q_cnt
    part = gl.load(args.partial_rows_ptr + q_off + row // GROUP, mask=live, other=0)
    part_row = _partial_rows(args, part, split, kv_head * GROUP + row % GROUP, True)
    offset = gl.expand_dims(part_row * HEAD_DIM, 1) + gl.expand_dims(d, 0)
    acc = gl.load(args.part_out_ptr + offset, mask=gl.expand_dims(live, 1), other=0.0)
    top = gl.load(args.part_lse2_ptr + part_row, mask=live, other=-float("inf"))
    return acc, top, gl.load(args.part_sum_ptr + part_row, mask=live, other=0.0)


@gluon.jit
def store_results(
    args, acc, top, total, q_off, q_cnt, split, kv_head, hands_on,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, SINKS: gl.constexpr, UNITS: gl.constexpr, FIRST_D: gl.constexpr,
    o_layout: gl.constexpr,
):  # fmt: skip
    """The same rows' results ([ROWS, columns from FIRST_D on], [ROWS], [ROWS]): to the output, or to the item's partial
    results; or, if it ``hands_on``, its state."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    d = FIRST_D + gl.arange(0, acc.shape[1], gl.SliceLayout(0, o_layout))
    live = row // GROUP < q_cnt
    head = kv_head * GROUP + row % GROUP
    query = gl.load(args.query_rows_ptr + q_off + row // GROUP, mask=live, other=0).to(gl.int64)
    part = gl.load(args.partial_rows_ptr + q_off + row // GROUP, mask=live, other=0)
    direct = live & (part < 0)
    partial = live & (part >= 0)
    if UNITS:
        direct = direct & (hands_on == 0)
        partial = partial | live & (hands_on > 0)
    if SINKS:
        sink = gl.load(args.sinks_ptr + head, mask=direct, other=-float("inf"))
        top, total, keep = with_sink(top, total, sink.to(gl.float32) * LOG2_E)
        acc = acc * gl.expand_dims(keep, 1)
    factor = args.v_scale / gl.where(total == 0.0, 1.0, total)
    lse2 = top + gl.log2(total)
    if UNITS:
        factor = gl.where(hands_on > 0, 1.0, factor)
        lse2 = gl.where(hands_on > 0, top, lse2)
    result = acc * gl.expand_dims(factor, 1)
    out_row = query * args.stride_out_token + head.to(gl.int64) * args.stride_out_head
    out_offset = gl.expand_dims(out_row, 1) + gl.expand_dims(d, 0)
    gl.store(args.out_ptr + out_offset, result.to(args.out_ptr.dtype.element_ty), mask=gl.expand_dims(direct, 1))
    if FIRST_D == 0:
        gl.store(args.lse2_ptr + query * args.n_heads + head, lse2, mask=direct)
    part_row = _partial_rows(args, part, split, head, UNITS)
    part_offset = gl.expand_dims(part_row * HEAD_DIM, 1) + gl.expand_dims(d, 0)
    gl.store(args.part_out_ptr + part_offset, result, mask=gl.expand_dims(partial, 1))
    if FIRST_D == 0:
        gl.store(args.part_lse2_ptr + part_row, lse2, mask=partial)
        if UNITS:
            gl.store(args.part_sum_ptr + part_row, total, mask=partial & (hands_on > 0))
