"""A KV slot list in which no token stands twice, for batches whose list would not fit else.

Compiled by numba, which invalidates its cache per file, so compiled functions here must not call compiled functions of
other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.slot_list import N_SPAN_COLS, SEGMENT, SPAN


@njit(cache=True)
def list_once(row_order, nodes, tail_start, kv_lens, windows, room_tokens, whole):  # type: ignore[no-untyped-def]
    """A slot list in which each KV token of the tree stands once, whichever nodes are kept.

    Each row lists the tokens of its heavy path (Sleator and Tarjan 1983: from a node on to the child with the most
    rows) in one stretch; the tokens before it stand in other rows' stretches. On the way up, a row's path enters
    another stretch only where it leaves a child with at most half of its parent's rows. So ``n`` rows with nothing kept
    read at most ``n * log2(n) / 2`` segments besides their ``n`` tails.

    Args:
        room_tokens: if not 0, each row's newest token must be its own.
        whole: the tree before pruning: its parent, row_lo, row_hi, start, end, tail_start.

    Returns:
        As ``slot_list.list_by_reader``.
    """
    row_lo, row_hi, start, end = nodes
    parent, whole_lo, whole_hi, whole_start, whole_end, whole_tail = whole
    n_nodes, n_whole, n_rows = len(start), len(parent), len(row_order)

    lowest = np.full(n_rows, -1, np.int64)  # node of each place
    for i in range(n_whole):  # deeper nodes come later and overwrite
        lowest[whole_lo[i] : whole_hi[i]] = i
    lister = np.full(n_whole, -1, np.int64)  # of each node, the place in whose stretch it lies
    most = np.zeros(n_whole, np.int64)
    for place in range(n_rows):
        if lowest[place] >= 0 and most[lowest[place]] == 0:
            lister[lowest[place]], most[lowest[place]] = place, 1
    list_from = whole_tail.astype(np.int64)
    for i in range(n_whole - 1, -1, -1):  # children before their parents
        above, rows = parent[i], whole_hi[i] - whole_lo[i]
        if above >= 0 and rows > most[above]:
            lister[above], most[above] = lister[i], rows
        list_from[lister[i]] = whole_start[i]

    columns = np.empty((n_rows, N_SPAN_COLS), np.int32)
    spans = columns.reshape(-1).view(SPAN)
    append_base = np.zeros(n_rows, np.int32)
    to_slots = np.empty(n_rows, np.int64)
    capacity = 0
    for place in range(n_rows):
        row, first, span = row_order[place], list_from[place], spans[place]
        to_slots[place] = capacity - first
        span.row, span.start, span.tokens, span.offset = row, first, kv_lens[row] - first, capacity
        span.copy_slot = -1
        append_base[row] = to_slots[place]
        capacity += kv_lens[row] - first + room_tokens

    # in how many stretches each kept node and each tail lies
    bottom = np.empty(n_nodes, np.int64)
    n_fragments = np.zeros(n_nodes + n_rows, np.int64)
    for i in range(n_nodes):
        bottom[i] = lowest[row_lo[i]]
        while whole_end[bottom[i]] != end[i]:
            bottom[i] = parent[bottom[i]]
        n_fragments[i] = _count_fragments(bottom[i], start[i], -1, parent, whole_end, lister)
    for place in range(n_rows):
        n_fragments[n_nodes + place] = _count_fragments(
            lowest[place], tail_start[place], place, parent, whole_end, lister
        )
    segments = np.empty(n_fragments.sum() + n_rows, SEGMENT)
    n = 0
    for i in range(n_nodes + n_rows):
        fragments = segments[n : n + n_fragments[i]]
        n += len(fragments)
        if i < n_nodes:
            lo, hi, node, begin, own = row_lo[i], row_hi[i], bottom[i], start[i], -1
        else:
            lo = i - n_nodes
            hi, node, begin, own = lo + 1, lowest[lo], tail_start[lo], lo
        for s in fragments:
            s.lo, s.hi = lo, hi
        _fill_fragments(fragments, node, begin, own, parent, whole_start, whole_end, lister, to_slots)
    n_shared = n
    for place in range(n_rows):
        s = segments[n]
        s.lo, s.hi, s.end, s.to_slots = place, place + 1, kv_lens[row_order[place]], to_slots[place]
        s.start = max(tail_start[place], list_from[place])
        if windows or s.end > s.start or s.start == 0:
            n += 1
    return segments[:n], n_shared, columns, append_base, capacity


@njit
def _count_fragments(node, begin, own, parent, whole_end, lister):  # type: ignore[no-untyped-def]
    """In how many stretches the path from position ``begin`` down to ``node`` lies, not counting that of place
    ``own``."""
    n, last = 0, own
    while node >= 0 and whole_end[node] > begin:
        n += lister[node] != last
        last = lister[node]
        node = parent[node]
    return n


@njit
def _fill_fragments(  # type: ignore[no-untyped-def]
    segments, node, begin, own, parent, whole_start, whole_end, lister, to_slots
):
    """Set positions and slots of the segments in those stretches."""
    n, last = len(segments), own
    while node >= 0 and whole_end[node] > begin:
        if lister[node] != last:
            n -= 1
            segments[n].end, segments[n].to_slots = whole_end[node], to_slots[lister[node]]
        if lister[node] != own:
            segments[n].start = whole_start[node]  # spans of the pruned tree begin where its nodes do
        last = lister[node]
        node = parent[node]
