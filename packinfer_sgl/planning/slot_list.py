"""The KV slot list of a plan: where each KV position stands in it, and which rows read it.

Compiled by numba, which invalidates its cache per file, so compiled functions here must not call compiled functions of
other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.plan import SpanCol

# KV positions [start, end) for the rows at places [lo, hi). Position ``p`` is entry ``to_slots + p`` of the slot list.
# First come segments that several rows read or that a row finds in another row's part of the list, then tails.
SEGMENT = np.dtype([(name, np.int64) for name in ("lo", "hi", "start", "end", "to_slots")])
N_SPAN_COLS = len(SpanCol)
SPAN = np.dtype([(column.name.lower(), np.int32) for column in SpanCol])


@njit(cache=True)
def list_by_reader(row_order, nodes, tail_start, kv_lens, windows, room_tokens):  # type: ignore[no-untyped-def]
    """A slot list in which each kept node and each tail stands by itself: a span that no node keeps stands in it once
    for each row that reads it.

    Returns:
        The segments, how many of them are no tails, ``Plan.spans``, ``Plan.append_base`` and
        ``Plan.kv_capacity``.
    """
    row_lo, row_hi, start, end = nodes
    n_nodes, n_rows = len(start), len(row_order)
    segments = np.empty(n_nodes + n_rows, SEGMENT)
    for i in range(n_nodes):
        s = segments[i]
        s.lo, s.hi, s.start, s.end = row_lo[i], row_hi[i], start[i], end[i]
    n = n_nodes
    for place in range(n_rows):
        s = segments[n]
        s.lo, s.hi, s.start, s.end = place, place + 1, tail_start[place], kv_lens[row_order[place]]
        # every query is in some item: an empty tail stays where a query may see none of the row's nodes
        if windows or s.end > s.start or s.start == 0:
            n += 1
    segments = segments[:n]
    columns = np.empty((n, N_SPAN_COLS), np.int32)
    spans = columns.reshape(-1).view(SPAN)
    append_base = np.zeros(n_rows, np.int32)
    capacity = 0
    for i in range(n):
        s, span = segments[i], spans[i]
        row = row_order[s.lo]
        s.to_slots = capacity - s.start
        span.row, span.start, span.tokens, span.offset = row, s.start, s.end - s.start, capacity
        span.copy_slot = -1
        capacity += s.end - s.start
        if i >= n_nodes:
            append_base[row] = s.to_slots
            capacity += room_tokens
    return segments, n_nodes, columns, append_base, capacity
