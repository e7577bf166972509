"""Packed attention on CUDA: Triton kernels over the work items of a plan.

One program of ``packed_attention_kernel`` is one work item and one KV head. Its rows are (query token, query head of
the KV head) pairs, token after token, so any GQA ratio fills a tile without padding between tokens. Each tile class is
a launch of its own, because tiles of few and of many rows want different numbers of warps; they run at the same time.
Queries with several partial results are merged in ``merge.py``.

With PDL (programmatic dependent launch, Hopper and later) each launch begins when the one before it has begun, not when
it is done: classes do not need each other's results. A launch is done only when the one before it is, because its
first program waits for that; so the merge, which waits for the last class, waits for all.

Offsets that a caller's stride enters are 64-bit: caches may have any layout and size.

KV in FP8 (e4m3) is converted to float16 behind its load, which is exact and one instruction for two elements; queries
and weights are then float16, too. Its scales cost nothing: that of the keys is part of ``scale2``, that of the values
of the last factor of each result, direct or partial.

``lse2`` is the log-sum-exp in base 2. The empty state is an output of 0 with an lse2 of -inf.

With SINKS each softmax also has a virtual token with its head's sink as logit and no value. It must come in once for
each query and head: here where an item writes the output itself, in ``merge.py`` for partial results.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from packinfer_sgl.kernels.columns import (
    A_LEN,
    A_OFF,
    A_POS,
    B_LEN,
    B_OFF,
    N_COLS,
    NEXT_ITEM,
    OPEN_ROW,
    Q_CNT,
    Q_OFF,
    SPLIT,
)

# How the tokens of a block are masked: every block is full; tokens from the end of the run on are hidden; run A and run
# B, of which each query row sees a window.
FULL, TAIL, WINDOW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_TANH_FACTOR = tl.constexpr(2.0 * 1.4426950408889634)
LOG2_E = tl.constexpr(1.4426950408889634)


class Kv(NamedTuple):
    """KV of one head, and an item's first entry of the slot list."""

    k_ptr: tl.tensor
    v_ptr: tl.tensor
    slots_ptr: tl.tensor
    stride_page: tl.tensor
    stride_slot: tl.tensor


@triton.jit
def _soft_capped(s, scale2, cap2):
    """``cap * tanh(scale * s / cap)`` in base 2, by exp2: exact at both ends."""
    return cap2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale2 * _TANH_FACTOR / cap2)))


@triton.jit
def with_sink(top, total, sink2):
    """A softmax state with one more token, of logit ``sink2`` (base 2) and without a value: its ``top`` and ``total``,
    and the factor of what was summed before. A sink of -inf changes nothing."""
    new_top = tl.maximum(top, sink2)
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    keep = tl.exp2(top - shift)
    return new_top, total * keep + tl.exp2(sink2 - shift), keep


@triton.jit
def _entry(pos, a_len, to_b):
    """Where in the slot list, from run A's first slot on, the slot of a token of either run is."""
    return pos + tl.where(pos < a_len, 0, to_b)


@triton.jit
def _attend(
    q, acc, top, total, kv, next_slot, begin, end, length, live, mask_rows, scale2, cap2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr, MASK: tl.constexpr, CUSTOM_MASK: tl.constexpr,
    SOFT_CAP: tl.constexpr, STAGES: tl.constexpr,
    a_len=None, to_b=None, win_lo=None, win_hi=None,
):  # fmt: skip
    """Online softmax over tokens ``begin`` to ``end`` of the ``length`` tokens of an item.

    ``next_slot`` [BLOCK_N] are the slots of the first block, and are returned as those of the block after the last.

    MASK: FULL, TAIL, or WINDOW: the first ``a_len`` tokens are run A, the others run B, whose slots lie ``to_b``
    entries further on; of these a query row sees those in [win_lo, win_hi), each [BLOCK_M]. With CUSTOM_MASK a ``live``
    row sees of all that only tokens with a flag at ``mask_rows``.
    """
    MAY_BE_EMPTY: tl.constexpr = CUSTOM_MASK or MASK == WINDOW  # a row may not have seen anything yet
    at = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    # Slots travel one block ahead in registers. Loaded in the block that uses them they are an indirect load, on
    # which Triton's pipeliner spends half of its stages. Those beyond the run are not used; the list ends in room.
    for j in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slot = next_slot
        pos = j + at  # [BLOCK_N]
        if MASK == WINDOW:
            next_slot = tl.load(kv.slots_ptr + _entry(pos + BLOCK_N, a_len, to_b))
        else:
            next_slot = tl.load(kv.slots_ptr + pos + BLOCK_N)
        if PAGE == 1:
            kv_row = slot.to(tl.int64) * kv.stride_slot
        else:
            kv_row = (slot // PAGE).to(tl.int64) * kv.stride_page + (slot % PAGE).to(tl.int64) * kv.stride_slot
        offset = kv_row[:, None] + d[None, :]
        if MASK == FULL:
            k = tl.load(kv.k_ptr + offset)  # [BLOCK_N, HEAD_DIM]
            v = tl.load(kv.v_ptr + offset)
        else:
            inside = (pos < length)[:, None]
            k = tl.load(kv.k_ptr + offset, mask=inside, other=0.0)
            v = tl.load(kv.v_ptr + offset, mask=inside, other=0.0)
        k = k.to(q.dtype)  # FP8 to float16
        v = v.to(q.dtype)
        s = tl.dot(q, tl.trans(k))  # [BLOCK_M, BLOCK_N]
        if SOFT_CAP:
            s = _soft_capped(s, scale2, cap2)
        if MASK == TAIL:
            s = tl.where((pos < length)[None, :], s, -float("inf"))
        if MASK == WINDOW:
            seen = ((pos < a_len)[None, :] | (pos[None, :] >= win_lo[:, None])) & (pos[None, :] < win_hi[:, None])
            s = tl.where(seen, s, -float("inf"))
        if CUSTOM_MASK:
            wanted = live[:, None] & (pos < length)[None, :]
            s = tl.where(tl.load(mask_rows[:, None] + pos[None, :], mask=wanted, other=0) != 0, s, -float("inf"))
        # scaling after the maximum makes one fused multiply-add of scale and shift for each element
        new_top = tl.maximum(top, tl.max(s, 1) if SOFT_CAP else tl.max(s, 1) * scale2)  # [BLOCK_M]
        shift = tl.where(new_top == -float("inf"), 0.0, new_top) if MAY_BE_EMPTY else new_top
        p = tl.exp2(s - shift[:, None] if SOFT_CAP else s * scale2 - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])  # [BLOCK_M, HEAD_DIM]
        top = new_top
    return acc, top, total, next_slot


@triton.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr, kv_lens_ptr, mask_ptr, mask_rows_ptr, sinks_ptr,
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_page, stride_slot, stride_kv_head, scale2,
    cap2, v_scale, first_count, last_count, kv_heads, n_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    RUN_B: tl.constexpr, CUSTOM_MASK: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, PEEL: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Items ``counts[first_count]`` to ``counts[last_count] - 1``, each with those that follow it; all KV heads of an
    item next to each other.

    PEEL runs full blocks without masks and the rest apart. RUN_B adds run B. With CUSTOM_MASK a query sees of its KV
    what the flags from ``mask_ptr[mask_rows_ptr[query]]`` on say, one byte for each KV position.
    """
    if PDL:
        gdc_launch_dependents()
    first = tl.load(counts_ptr + first_count)
    work = (tl.load(counts_ptr + last_count) - first) * kv_heads
    for w in tl.range(tl.program_id(0), work, tl.num_programs(0), num_stages=1):
        item = first + w // kv_heads
        kv_head = w % kv_heads
        while item >= 0:
            item_ptr = items_ptr + item * N_COLS
            q_off = tl.load(item_ptr + Q_OFF)
            q_cnt = tl.load(item_ptr + Q_CNT)
            a_len = tl.load(item_ptr + A_LEN)
            open_row = tl.load(item_ptr + OPEN_ROW)
            a_pos = tl.load(item_ptr + A_POS)
            a_slots = slots_ptr + tl.load(item_ptr + A_OFF)
            # what the item points at is loaded together, before anything waits for it: short items are all latency
            row = tl.arange(0, BLOCK_M)
            d = tl.arange(0, HEAD_DIM)
            nth = row // GROUP
            head = kv_head * GROUP + row % GROUP
            live = nth < q_cnt  # [BLOCK_M]
            query = tl.load(query_rows_ptr + q_off + nth, mask=live, other=0).to(tl.int64)
            slot = tl.load(a_slots + tl.arange(0, BLOCK_N))
            kv_len = tl.load(kv_lens_ptr + tl.maximum(open_row, 0)).to(tl.int32)
            a_len = tl.where(open_row >= 0, kv_len - a_pos, a_len)
            q = tl.load(
                q_ptr + query[:, None] * stride_q_token + head.to(tl.int64)[:, None] * stride_q_head + d[None, :],
                mask=live[:, None],
                other=0.0,
            )
            if k_ptr.dtype.element_ty.primitive_bitwidth == 8:
                q = q.to(tl.float16)
            acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            to_head = kv_head.to(tl.int64) * stride_kv_head
            kv = Kv(
                k_ptr=k_ptr + to_head, v_ptr=v_ptr + to_head, slots_ptr=a_slots, stride_page=stride_page,
                stride_slot=stride_slot,
            )  # fmt: skip
            mask_rows = mask_ptr + query
            if CUSTOM_MASK:
                mask_rows = mask_ptr + tl.load(mask_rows_ptr + query, mask=live, other=0) + a_pos
            begin = a_len // BLOCK_N * BLOCK_N if PEEL else 0
            if PEEL:
                acc, top, total, slot = _attend(
                    q, acc, top, total, kv, slot, begin=0, end=begin, length=a_len, live=live, mask_rows=mask_rows,
                    scale2=scale2, cap2=cap2, HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, PAGE=PAGE, MASK=FULL,
                    CUSTOM_MASK=CUSTOM_MASK, SOFT_CAP=SOFT_CAP, STAGES=STAGES,
                )  # fmt: skip
            if RUN_B:
                b_len = tl.load(item_ptr + B_LEN)
                to_b = tl.load(item_ptr + B_OFF) - tl.load(item_ptr + A_OFF) - a_len
                lo = a_len + tl.load(win_lo_ptr + q_off + nth, mask=live, other=0)
                # the windows are those of the tile's last split
                hi = a_len + tl.minimum(tl.load(win_hi_ptr + q_off + nth, mask=live, other=0), b_len)
                slot = tl.load(a_slots + _entry(begin + tl.arange(0, BLOCK_N), a_len, to_b))
                acc, top, total, slot = _attend(
                    q, acc, top, total, kv, slot, begin=begin, end=a_len + b_len, length=a_len + b_len, live=live,
                    mask_rows=mask_rows, scale2=scale2, cap2=cap2, HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, PAGE=PAGE,
                    MASK=WINDOW, CUSTOM_MASK=CUSTOM_MASK, SOFT_CAP=SOFT_CAP, STAGES=STAGES,
                    a_len=a_len, to_b=to_b, win_lo=lo, win_hi=hi,
                )  # fmt: skip
            else:
                acc, top, total, slot = _attend(
                    q, acc, top, total, kv, slot, begin=begin, end=a_len, length=a_len, live=live, mask_rows=mask_rows,
                    scale2=scale2, cap2=cap2, HEAD_DIM=HEAD_DIM, BLOCK_N=BLOCK_N, PAGE=PAGE, MASK=TAIL,
                    CUSTOM_MASK=CUSTOM_MASK, SOFT_CAP=SOFT_CAP, STAGES=1 if PEEL else STAGES,
                )  # fmt: skip
            if SINKS:
                is_direct = tl.load(partial_rows_ptr + q_off + nth, mask=live, other=0) < 0
                sink = tl.load(sinks_ptr + head, mask=is_direct, other=-float("inf"))
                top, total, keep = with_sink(top, total, sink.to(tl.float32) * LOG2_E)
                acc = acc * keep[:, None]
            result = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
            lse2 = top + tl.log2(total)
            # read now or again rather than kept in registers across the loops
            item = tl.load(item_ptr + NEXT_ITEM)
            query = tl.load(query_rows_ptr + q_off + nth, mask=live, other=0).to(tl.int64)
            part = tl.load(partial_rows_ptr + q_off + nth, mask=live, other=0)
            direct = live & (part < 0)
            partial = live & (part >= 0)
            tl.store(
                out_ptr + query[:, None] * stride_out_token + head.to(tl.int64)[:, None] * stride_out_head + d[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=direct[:, None],
            )
            tl.store(lse2_ptr + query * n_heads + head, lse2, mask=direct)
            part_row = (part + tl.load(item_ptr + SPLIT)).to(tl.int64) * n_heads + head
            tl.store(part_out_ptr + part_row[:, None] * HEAD_DIM + d[None, :], result, mask=partial[:, None])
            tl.store(part_lse2_ptr + part_row, lse2, mask=partial)
    if PDL:
        # not all programs: those that wait would keep others of this launch from starting
        if tl.program_id(0) == 0:
            gdc_wait()
