"""The slot list of a plan on the GPU: taken from SGLang's table when the plan is loaded, appended to while it lives."""

from __future__ import annotations

import triton
import triton.language as tl

from packinfer_sgl.kernels.columns import (
    N_QUERIES,
    N_SPAN_COLS,
    N_SPANS,
    SPAN_COPY_SLOT,
    SPAN_OFFSET,
    SPAN_ROW,
    SPAN_START,
    SPAN_TOKENS,
)


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
        span_ptr = spans_ptr + span * N_SPAN_COLS
        row = tl.load(span_ptr + SPAN_ROW)
        start = tl.load(span_ptr + SPAN_START)
        length = tl.load(span_ptr + SPAN_TOKENS)
        offset = tl.load(span_ptr + SPAN_OFFSET)
        copied = tl.load(span_ptr + SPAN_COPY_SLOT)
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
