"""Packed attention on CUDA: Triton kernels over the work items of a plan.

One program of ``packed_attention_kernel`` is one work item and one KV head. Its rows are (query token, query head of
the KV head) pairs, token after token, so any GQA ratio fills a tile without padding between tokens. Each tile class is
a launch of its own, because tiles of few and of many rows want different numbers of warps; they run at the same time.
Queries with several partial results are merged in ``merge.py``.

With PDL (programmatic dependent launch, Hopper and later) each launch begins when the one before it has begun, not when
it is done: classes do not need each other's results. A launch is done only when the one before it is, because its
first program waits for that; so the merge, which waits for the last class, waits for all.

Offsets that a caller's stride enters are 64-bit: caches may have any layout and size.

``lse2`` is the log-sum-exp in base 2. The empty state is an output of 0 with an lse2 of -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from packinfer_sgl.planning.plan import Col

Q_OFF = tl.constexpr(int(Col.Q_OFF))
Q_CNT = tl.constexpr(int(Col.Q_CNT))
A_OFF = tl.constexpr(int(Col.A_OFF))
A_LEN = tl.constexpr(int(Col.A_LEN))
A_POS = tl.constexpr(int(Col.A_POS))
B_OFF = tl.constexpr(int(Col.B_OFF))
B_LEN = tl.constexpr(int(Col.B_LEN))
PIECE = tl.constexpr(int(Col.SPLIT))
TILE_CLASS = tl.constexpr(int(Col.TILE_CLASS))
OPEN_ROW = tl.constexpr(int(Col.OPEN_ROW))
NEXT = tl.constexpr(int(Col.NEXT_ITEM))
N_COLS = tl.constexpr(len(Col))
# entries of ``counts``: first those of ``Plan.class_indptr``
N_TAKEN = tl.constexpr(4)  # by programs of the extend kernel; 0 between launches
N_MERGED = tl.constexpr(5)
N_QUERIES = tl.constexpr(6)
N_SPANS = tl.constexpr(7)


@triton.jit
def _entry(pos, a_len, to_b):
    """Where in the slot list, from run A's first slot on, the slot of a token of either run is."""
    return pos + tl.where(pos < a_len, 0, to_b)


@triton.jit
def _attend(
    q,
    acc,
    top,
    total,
    k_ptr,
    v_ptr,
    slots_ptr,
    next_slot,
    begin,
    end,
    length,
    a_len,
    to_b,
    win_lo,
    win_hi,
    live,
    mask_rows,
    scale2,
    cap2,
    stride_page,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    CUSTOM_MASK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over tokens ``begin`` to ``end`` of ``length`` tokens, whose slots lie at ``slots_ptr``.

    ``next_slot`` are the slots of the first block, and are returned as those of the block after the last.

    MASK 0: every block is full; 1: tokens from ``length`` on are hidden; 2: the first ``a_len`` tokens are run A, the
    others run B, whose slots lie ``to_b`` entries further on; of these a query row sees those in [win_lo, win_hi). With
    CUSTOM_MASK a ``live`` row sees of all that only tokens with a flag at ``mask_rows``.
    """
    at = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    # Slots travel one block ahead in registers. Loaded in the block that uses them they are an indirect load, on
    # which Triton's pipeliner spends half of its stages. Those beyond the run are not used; the list ends in room.
    for j in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slot = next_slot
        pos = j + at
        if MASK == 2:
            next_slot = tl.load(slots_ptr + _entry(pos + BLOCK_N, a_len, to_b))
        else:
            next_slot = tl.load(slots_ptr + pos + BLOCK_N)
        if PAGE == 1:
            kv_row = slot.to(tl.int64) * stride_slot
        else:
            kv_row = (slot // PAGE).to(tl.int64) * stride_page + (slot % PAGE).to(tl.int64) * stride_slot
        offset = kv_row[:, None] + d[None, :]
        if MASK == 0:
            k = tl.load(k_ptr + offset)
            v = tl.load(v_ptr + offset)
        else:
            inside = (pos < length)[:, None]
            k = tl.load(k_ptr + offset, mask=inside, other=0.0)
            v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k))
        if SOFT_CAP:
            # tanh by exp2, exact at both ends
            s = cap2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale2 * (2.0 * 1.4426950408889634) / cap2)))
        if MASK == 1:
            s = tl.where((pos < length)[None, :], s, -float("inf"))
        if MASK == 2:
            seen = ((pos < a_len)[None, :] | (pos[None, :] >= win_lo[:, None])) & (pos[None, :] < win_hi[:, None])
            s = tl.where(seen, s, -float("inf"))
        if CUSTOM_MASK:
            wanted = live[:, None] & (pos < length)[None, :]
            s = tl.where(tl.load(mask_rows[:, None] + pos[None, :], mask=wanted, other=0) != 0, s, -float("inf"))
        # scaling after the maximum makes one fused multiply-add of scale and shift for each element
        new_top = tl.maximum(top, tl.max(s, 1) if SOFT_CAP else tl.max(s, 1) * scale2)
        blind: tl.constexpr = CUSTOM_MASK or MASK == 2  # a row may not have seen anything yet
        shift = tl.where(new_top == -float("inf"), 0.0, new_top) if blind else new_top
        p = tl.exp2(s - shift[:, None] if SOFT_CAP else s * scale2 - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        top = new_top
    return acc, top, total, next_slot


@triton.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse2_ptr,
    part_out_ptr,
    part_lse2_ptr,
    slots_ptr,
    items_ptr,
    counts_ptr,
    query_rows_ptr,
    partial_rows_ptr,
    win_lo_ptr,
    win_hi_ptr,
    kv_lens_ptr,
    mask_ptr,
    mask_rows_ptr,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_page,
    stride_slot,
    stride_kv_head,
    scale2,
    cap2,
    first_count,
    last_count,
    kv_heads,
    n_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CUSTOM_MASK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PEEL: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Items ``counts[first_count]`` to ``counts[last_count] - 1``, each with those that follow it; all KV heads of an
    item next to each other.

    PEEL runs full blocks without masks and the rest apart. WINDOW adds run B. With CUSTOM_MASK a query sees of its KV
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
            live = nth < q_cnt
            query = tl.load(query_rows_ptr + q_off + nth, mask=live, other=0).to(tl.int64)
            slot = tl.load(a_slots + tl.arange(0, BLOCK_N))
            kv_len = tl.load(kv_lens_ptr + tl.maximum(open_row, 0)).to(tl.int32)
            a_len = tl.where(open_row >= 0, kv_len - a_pos, a_len)
            q = tl.load(
                q_ptr + query[:, None] * stride_q_token + head.to(tl.int64)[:, None] * stride_q_head + d[None, :],
                mask=live[:, None],
                other=0.0,
            )
            acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            k_head = k_ptr + kv_head.to(tl.int64) * stride_kv_head
            v_head = v_ptr + kv_head.to(tl.int64) * stride_kv_head
            mask_rows = mask_ptr + query
            if CUSTOM_MASK:
                mask_rows = mask_ptr + tl.load(mask_rows_ptr + query, mask=live, other=0) + a_pos
            if PEEL:
                full = a_len // BLOCK_N * BLOCK_N
                acc, top, total, slot = _attend(
                    q, acc, top, total, k_head, v_head, a_slots, slot, 0, full, a_len, a_len, 0, nth, nth, live,
                    mask_rows, scale2, cap2, stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 0, CUSTOM_MASK,
                    SOFT_CAP, STAGES,
                )  # fmt: skip
            if WINDOW:
                begin = full if PEEL else 0
                b_len = tl.load(item_ptr + B_LEN)
                to_b = tl.load(item_ptr + B_OFF) - tl.load(item_ptr + A_OFF) - a_len
                lo = a_len + tl.load(win_lo_ptr + q_off + nth, mask=live, other=0)
                # the windows are those of the tile's last piece
                hi = a_len + tl.minimum(tl.load(win_hi_ptr + q_off + nth, mask=live, other=0), b_len)
                slot = tl.load(a_slots + _entry(begin + tl.arange(0, BLOCK_N), a_len, to_b))
                acc, top, total, slot = _attend(
                    q, acc, top, total, k_head, v_head, a_slots, slot, begin, a_len + b_len, a_len + b_len, a_len, to_b,
                    lo, hi, live, mask_rows, scale2, cap2, stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 2,
                    CUSTOM_MASK, SOFT_CAP, STAGES,
                )  # fmt: skip
            elif PEEL:
                acc, top, total, slot = _attend(
                    q, acc, top, total, k_head, v_head, a_slots, slot, full, a_len, a_len, a_len, 0, nth, nth, live,
                    mask_rows, scale2, cap2, stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 1, CUSTOM_MASK,
                    SOFT_CAP, 1,
                )  # fmt: skip
            else:
                acc, top, total, slot = _attend(
                    q, acc, top, total, k_head, v_head, a_slots, slot, 0, a_len, a_len, a_len, 0, nth, nth, live,
                    mask_rows, scale2, cap2, stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 1, CUSTOM_MASK,
                    SOFT_CAP, STAGES,
                )  # fmt: skip
            result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            lse2 = top + tl.log2(total)
            # read now or again rather than kept in registers across the loops
            item = tl.load(item_ptr + NEXT)
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
            part_row = (part + tl.load(item_ptr + PIECE)).to(tl.int64) * n_heads + head
            tl.store(part_out_ptr + part_row[:, None] * HEAD_DIM + d[None, :], result, mask=partial[:, None])
            tl.store(part_lse2_ptr + part_row, lse2, mask=partial)
    if PDL:
        # not all programs: those that wait would keep others of this launch from starting
        if tl.program_id(0) == 0:
            gdc_wait()


@triton.jit
def snapshot_kernel(
    req_to_token_ptr,
    pool_rows_ptr,
    spans_ptr,
    counts_ptr,
    kv_slots_ptr,
    stride_row,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write each span's slots (``Plan.spans``) to the plan's slot list: those in SGLang's table, or its copy's.

    With a PAGE above 1 the table holds a page's number for each PAGE positions.
    """
    for span in tl.range(tl.program_id(0), tl.load(counts_ptr + N_SPANS), tl.num_programs(0)):
        row = tl.load(spans_ptr + span * 5)
        start = tl.load(spans_ptr + span * 5 + 1)
        length = tl.load(spans_ptr + span * 5 + 2)
        offset = tl.load(spans_ptr + span * 5 + 3)
        copied = tl.load(spans_ptr + span * 5 + 4)
        table = req_to_token_ptr + tl.load(pool_rows_ptr + row).to(tl.int64) * stride_row
        for i in tl.range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
            at = i + tl.arange(0, BLOCK)
            position = start + at
            own = tl.load(table + position // PAGE, mask=(at < length) & (copied < 0)) * PAGE + position % PAGE
            slots = tl.where(copied < 0, own, copied + at)
            tl.store(kv_slots_ptr + offset + at, slots.to(tl.int32), mask=at < length)


@triton.jit
def append_kernel(kv_slots_ptr, append_base_ptr, kv_lens_ptr, out_slots_ptr, counts_ptr, BLOCK: tl.constexpr):
    """Enter the slot of each row's new token, its last one, in the plan's slot list."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < tl.load(counts_ptr + N_QUERIES)
    base = tl.load(append_base_ptr + row, mask=live, other=0)
    length = tl.load(kv_lens_ptr + row, mask=live, other=0).to(tl.int32)
    slot = tl.load(out_slots_ptr + row, mask=live, other=0).to(tl.int32)
    tl.store(kv_slots_ptr + base + length - 1, slot, mask=live)
