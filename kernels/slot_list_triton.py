"""The slot list of a plan on the GPU: taken from SGLang's table when the plan is loaded, appended to while it lives."""

from __future__ import annotations

import triton
import triton.language as tl

from packinfer_sgl.kernels.columns import (
    MAX_ARRAYS,
    N_QUERIES,
    N_SPAN_COLS,
    N_SPANS,
    SPAN_COPY_SLOT,
    SPAN_OFFSET,
    SPAN_ROW,
    SPAN_START,
    SPAN_TOKENS,
    SPANS_START,
    STARTS,
)


@triton.jit
def _place(block_ptr, placed_ptr, places_ptr, first, step, BLOCK: tl.constexpr):
    """Copy entries ``first``, ``first + step``, ... (BLOCK at a time) of ``Plan.block`` to where the kernels look for
    them: each array to ``placed_ptr`` plus its entry of ``places_ptr`` ([MAX_ARRAYS], where it is in ``ARRAYS``)."""
    array = tl.arange(0, MAX_ARRAYS)
    start = tl.load(block_ptr + STARTS + array)
    end = tl.load(block_ptr + STARTS + 1 + array)
    shift = tl.load(places_ptr + array) - start
    entries = tl.load(block_ptr + STARTS + MAX_ARRAYS)
    for i in tl.range(first, entries, step):
        at = i + tl.arange(0, BLOCK)
        is_in = (at[:, None] >= start[None, :]) & (at[:, None] < end[None, :])  # one array, if any
        to = at + tl.sum(tl.where(is_in, shift[None, :], 0), 1)
        tl.store(placed_ptr + to, tl.load(block_ptr + at, mask=at < entries, other=0), mask=at < entries)


@triton.jit
def snapshot_kernel(
    req_to_token_ptr, pool_rows_ptr, block_ptr, placed_ptr, places_ptr, kv_slots_ptr, stride_row,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Put the plan that was copied to ``block_ptr`` in its place, and write each of its spans' slots (``Plan.spans``)
    to its slot list: those in SGLang's table, or its copy's.

    With a PAGE above 1 the table holds a page's number for each PAGE positions.
    """
    program, programs = (
        tl.program_id(0) * tl.num_programs(1) + tl.program_id(1),
        tl.num_programs(0) * tl.num_programs(1),
    )
    _place(block_ptr, placed_ptr, places_ptr, program * PLACED, programs * PLACED, BLOCK=PLACED)
    spans_ptr = block_ptr + tl.load(block_ptr + SPANS_START)
    for span in tl.range(tl.program_id(0), tl.load(block_ptr + N_SPANS), tl.num_programs(0)):
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
