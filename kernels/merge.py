"""Merge of the partial results of each query, as one softmax over all KV tokens that its items saw, and the sink."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from packinfer_sgl.kernels.attention_triton import LOG2_E, with_sink
from packinfer_sgl.kernels.columns import N_MERGED, N_QUERIES


@triton.jit
def _merge(
    part_out_ptr, part_lse2_ptr, sinks_ptr, begin, end, head, n_heads,
    HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The softmax over the union of what partial results ``begin`` to ``end`` of a head saw, BLOCK_P at a time.

    Returns the result [HEAD_DIM] and its lse2.
    """
    d = tl.arange(0, HEAD_DIM)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    top = -float("inf")
    total = 0.0
    for i in range(begin, end, BLOCK_P):
        row = i + tl.arange(0, BLOCK_P)
        part = row.to(tl.int64) * n_heads + head
        lse2 = tl.load(part_lse2_ptr + part, mask=row < end, other=-float("inf"))  # [BLOCK_P]
        o = tl.load(part_out_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=(row < end)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(lse2, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(lse2 - shift)
        keep = tl.exp2(top - shift)
        acc = acc * keep + tl.sum(weight[:, None] * o, 0)
        total = total * keep + tl.sum(weight, 0)
        top = new_top
    if SINKS:
        top, total, keep = with_sink(top, total, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E)
        acc = acc * keep
    return acc / tl.where(total == 0.0, 1.0, total), top + tl.log2(total)


@triton.jit
def _out_rows(out_ptr, stride_out_token, stride_out_head, query, head, HEAD_DIM: tl.constexpr):
    """Pointers [HEADS, HEAD_DIM] to the output of some heads of a query."""
    d = tl.arange(0, HEAD_DIM)
    return out_ptr + query.to(tl.int64) * stride_out_token + head[:, None].to(tl.int64) * stride_out_head + d[None, :]


@triton.jit
def _merge_query(
    part_out_ptr, part_lse2_ptr, sinks_ptr, out_ptr, lse2_ptr, stride_out_token, stride_out_head, n_heads, query, begin,
    end, first_head, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Partial results ``begin`` to ``end`` of HEADS heads of a query, to the output."""
    head = first_head + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_DIM)
    out = _out_rows(out_ptr, stride_out_token, stride_out_head, query, head, HEAD_DIM)
    lse2_out = lse2_ptr + query.to(tl.int64) * n_heads + head
    if end - begin <= 4:
        # all loads of all heads at once
        row = begin + tl.arange(0, 4)[None, :]
        part = row.to(tl.int64) * n_heads + head[:, None]  # [HEADS, 4]
        lse2 = tl.load(part_lse2_ptr + part, mask=row < end, other=-float("inf"))
        part_out = part_out_ptr + part[:, :, None] * HEAD_DIM + d[None, None, :]
        o = tl.load(part_out, mask=(row < end)[:, :, None], other=0.0)  # [HEADS, 4, HEAD_DIM]
        top = tl.max(lse2, 1)
        weight = tl.exp2(lse2 - tl.where(top == -float("inf"), 0.0, top)[:, None])
        total = tl.sum(weight, 1)
        acc = tl.sum(weight[:, :, None] * o, 1)
        if SINKS:
            top, total, keep = with_sink(top, total, tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E)
            acc = acc * keep[:, None]
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out, result.to(out_ptr.dtype.element_ty))
        tl.store(lse2_out, top + tl.log2(total))
    else:
        for i in tl.static_range(HEADS):
            h = first_head + i
            one, one_lse2 = _merge(
                part_out_ptr, part_lse2_ptr, sinks_ptr, begin, end, h, n_heads, HEAD_DIM, SINKS, BLOCK_P
            )  # fmt: skip
            out_row = out_ptr + query.to(tl.int64) * stride_out_token + h.to(tl.int64) * stride_out_head
            tl.store(out_row + d, one.to(out_ptr.dtype.element_ty))
            tl.store(lse2_ptr + query.to(tl.int64) * n_heads + h, one_lse2)


@triton.jit(do_not_specialize=["n_heads", "most_queries"])
def merge_kernel(
    part_out_ptr, part_lse2_ptr, merge_indptr_ptr, counts_ptr, sinks_ptr, out_ptr, lse2_ptr, stride_out_token,
    stride_out_head, n_heads, most_queries,
    HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query, i) merges the partial results of a query for the ``i``th HEADS of its heads.

    Queries past those of the plan are padding: they come out as 0, with an lse2 of -inf. ``merge_indptr`` has room for
    ``most_queries``.
    """
    query = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    # padding may lie past the list; all three loads go out at once
    begin = tl.load(merge_indptr_ptr + tl.minimum(query, most_queries))
    end = tl.load(merge_indptr_ptr + tl.minimum(query + 1, most_queries))
    is_padding = query >= tl.load(counts_ptr + N_QUERIES)
    head = first_head + tl.arange(0, HEADS)
    out = _out_rows(out_ptr, stride_out_token, stride_out_head, query, head, HEAD_DIM)
    lse2_out = lse2_ptr + query.to(tl.int64) * n_heads + head
    if PDL:
        # CTAs without work exit early, except the first, which keeps this launch from being done before those before it
        if is_padding | (end > begin) | (query + first_head == 0):
            gdc_wait()
    if is_padding:
        tl.store(out, tl.zeros([HEADS, HEAD_DIM], out_ptr.dtype.element_ty))
        tl.store(lse2_out, tl.full([HEADS], -float("inf"), tl.float32))
    elif end > begin:
        _merge_query(
            part_out_ptr, part_lse2_ptr, sinks_ptr, out_ptr, lse2_ptr, stride_out_token, stride_out_head, n_heads,
            query=query, begin=begin, end=end, first_head=first_head, HEAD_DIM=HEAD_DIM, SINKS=SINKS, HEADS=HEADS,
            BLOCK_P=BLOCK_P,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_heads", "n_rows"])
def merge_listed_kernel(
    part_out_ptr, part_lse2_ptr, merge_indptr_ptr, merged_ptr, counts_ptr, sinks_ptr, out_ptr, lse2_ptr,
    stride_out_token, stride_out_head, n_heads, n_rows,
    HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``merge_kernel`` where queries are many and few of them have partial results: those in a list.

    Of ``n_rows`` those past the plan's queries are padding.
    """
    first_head = tl.program_id(1) * HEADS
    if PDL:
        gdc_wait()
    for i in tl.range(tl.program_id(0), tl.load(counts_ptr + N_MERGED), tl.num_programs(0)):
        query = tl.load(merged_ptr + i)
        begin = tl.load(merge_indptr_ptr + query)
        end = tl.load(merge_indptr_ptr + query + 1)
        _merge_query(
            part_out_ptr, part_lse2_ptr, sinks_ptr, out_ptr, lse2_ptr, stride_out_token, stride_out_head, n_heads,
            query=query, begin=begin, end=end, first_head=first_head, HEAD_DIM=HEAD_DIM, SINKS=SINKS, HEADS=HEADS,
            BLOCK_P=BLOCK_P,
        )  # fmt: skip
    head = first_head + tl.arange(0, HEADS)
    n_queries = tl.load(counts_ptr + N_QUERIES)
    for i in tl.range(tl.program_id(0), n_rows - n_queries, tl.num_programs(0)):
        query = n_queries + i
        out = _out_rows(out_ptr, stride_out_token, stride_out_head, query, head, HEAD_DIM)
        tl.store(out, tl.zeros([HEADS, HEAD_DIM], out_ptr.dtype.element_ty))
        tl.store(lse2_ptr + query.to(tl.int64) * n_heads + head, tl.full([HEADS], -float("inf"), tl.float32))
