"""Where each KV position of a batch stands in the slot list of its plan, and the query tiles that read it.

Compiled by numba: loops over segments and queries, which as array operations took five times as long; and in one call,
for where planning runs once in a while, each call costs more than its loops. numba invalidates its cache per file, so
compiled functions here must not call compiled functions of other files.
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


# ``queries`` queries, from the ``first`` in place order, over the segment's KV positions [a_from, a_to) as run A and
# ``b_len`` entries of the slot list from ``b_at`` on as run B: the segment's next positions, or, with ``inline``, tails
# of the queries' rows. Run A of a tail may grow by up to ``grows`` tokens while the plan lives.
TILE = np.dtype(
    [(name, np.int64) for name in ("segment", "tile_class", "first", "queries", "a_from", "a_to", "b_at", "b_len")]
    + [("inline", np.bool_), ("grows", np.int64)]
)


@njit
def query_tiles(  # type: ignore[no-untyped-def]
    row_order, row_lo, row_hi, start, end, tail_start, once, whole, whole_tail, kv_lens, qo_indptr, see_from, see_to,
    windows, policy, room_tokens,
):  # fmt: skip
    """The slot list, and the tiles of all its segments.

    Args:
        row_order, row_lo, row_hi, start, end, tail_start: of the tree of kept spans.
        once: whether each token is listed once.
        whole, whole_tail: if so, of the tree before pruning: parent, row_lo, row_hi, start, end ([5, n] int32), and
            tail_start.
        kv_lens, qo_indptr, room_tokens: see ``items.make_plan``.
        see_from, see_to: first KV position that each query sees, the one after its last ([n_queries] int32).
        windows: whether any query sees less than all of its row; if not, these arrays are not read.
        policy: ``TilePolicy.table``.

    Returns:
        The segments ([n] of ``SEGMENT``), how many of them are no tails, ``Plan.spans``, ``Plan.append_base``,
        ``Plan.kv_capacity``; the queries in place order, the place of each ([n_queries] int32), and [n_tiles] of
        ``TILE`` in the order of the segments.
    """
    nodes = row_lo, row_hi, start, end
    if once:
        segments, n_shared, spans, append_base, capacity = _list_once(
            row_order, nodes, tail_start, kv_lens, windows, room_tokens, whole, whole_tail
        )
    else:
        segments, n_shared, spans, append_base, capacity = _list_by_reader(
            row_order, nodes, tail_start, kv_lens, windows, room_tokens
        )
    queries, place_of, tiles = _tiles(
        row_order, segments, n_shared, qo_indptr, see_from, see_to, windows, policy, room_tokens
    )
    return segments, n_shared, spans, append_base, capacity, queries, place_of, tiles


@njit
def _list_by_reader(row_order, nodes, tail_start, kv_lens, windows, room_tokens):  # type: ignore[no-untyped-def]
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


@njit
def _list_once(  # type: ignore[no-untyped-def]
    row_order, nodes, tail_start, kv_lens, windows, room_tokens, whole, whole_tail
):
    """A slot list in which each KV token of the tree stands once, whichever nodes are kept.

    Each row lists the tokens of its heavy path (Sleator and Tarjan 1983: from a node on to the child with the most
    rows) in one stretch; the tokens before it stand in other rows' stretches. On the way up, a row's path enters
    another stretch only where it leaves a child with at most half of its parent's rows. So ``n`` rows with nothing kept
    read at most ``n * log2(n) / 2`` segments besides their ``n`` tails.

    Args:
        room_tokens: if not 0, each row's newest token must be its own.
        whole, whole_tail: see ``query_tiles``.

    Returns:
        As ``_list_by_reader``.
    """
    row_lo, row_hi, start, end = nodes
    parent, whole_lo, whole_hi, whole_start, whole_end = whole[0], whole[1], whole[2], whole[3], whole[4]
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


@njit
def _tiles(  # type: ignore[no-untyped-def]
    row_order, segments, n_shared, qo_indptr, see_from, see_to, windows, policy, room_tokens
):
    query_at = np.zeros(len(row_order) + 1, np.int64)  # of the first query of each place
    queries = np.empty(qo_indptr[-1], np.int32)
    place_of = np.empty(qo_indptr[-1], np.int32)
    for place, row in enumerate(row_order):
        begin, end = qo_indptr[row], qo_indptr[row + 1]
        query_at[place + 1] = query_at[place] + end - begin
        queries[query_at[place] : query_at[place + 1]] = np.arange(begin, end)
        place_of[query_at[place] : query_at[place + 1]] = place
    tiles = _whole_tiles(segments, query_at, policy)
    for tile in tiles:
        tile.grows = room_tokens if tile.segment >= n_shared else 0
    if windows:
        most = policy[0].max_inline_tail_tokens
        tiles = _inline_tails(tiles, segments, n_shared, queries, place_of, see_from, see_to, most)
        tiles = _set_runs(tiles, segments, n_shared, queries, see_from, see_to)
    return queries, place_of, tiles


@njit
def _whole_tiles(segments, query_at, policy):  # type: ignore[no-untyped-def]
    """Each segment's queries in equal parts of at most the class's size; run A is the whole segment."""
    tile_class, count = np.zeros(len(segments), np.int64), np.zeros(len(segments), np.int64)
    for i, s in enumerate(segments):
        queries = query_at[s.hi] - query_at[s.lo]
        if policy[0].unit_tokens == 0:
            for smaller in policy[1:]:
                tile_class[i] += queries <= smaller.tile_queries
        count[i] = -(-queries // policy[tile_class[i]].tile_queries)
    tiles = np.empty(count.sum(), TILE)
    n = 0
    for i, s in enumerate(segments):
        queries = query_at[s.hi] - query_at[s.lo]
        for nth in range(count[i]):
            step = -(-queries // count[i])
            tile = tiles[n]
            tile.segment, tile.tile_class = i, tile_class[i]
            tile.first, tile.queries = query_at[s.lo] + nth * step, min(step, queries - nth * step)
            tile.a_from, tile.a_to, tile.b_at, tile.b_len, tile.inline = s.start, s.end, s.to_slots + s.end, 0, False
            n += 1
    return tiles


@njit
def _inline_tails(tiles, segments, n_shared, queries, place_of, see_from, see_to, most):  # type: ignore[no-untyped-def]
    """Inline short tails: if no node lies below a node, the tails of its rows become run B of its tiles.

    These are the packed regions of PackInfer (https://arxiv.org/abs/2602.06072): suffixes of several requests side by
    side in one tile over their common prefix, without partial results. Tails are inlined only if every query sees the
    whole node and a tile's tails total at most ``most`` tokens.

    Returns:
        The tiles that are left; they are moved to the front of ``tiles``, which is no longer valid.
    """
    is_inlined = np.ones(n_shared, np.bool_)
    on_node = np.full(len(segments) - n_shared, -1, np.int64)  # of each place, the lowest node
    for i in range(n_shared):  # deeper nodes come later and overwrite
        s = segments[i]
        for above in on_node[s.lo : s.hi]:
            if above >= 0:
                is_inlined[above] = False
        on_node[s.lo : s.hi] = i
    for tile in tiles:
        if tile.segment < n_shared and is_inlined[tile.segment]:
            s = segments[tile.segment]
            begin, end = _tails(tile, segments[n_shared:], queries, place_of, see_to)
            _, last_from, first_to, _ = _windows(tile, queries, see_from, see_to)
            is_inlined[tile.segment] = end - begin <= most and last_from == 0 and first_to >= s.end
    n = 0
    for tile in tiles:
        node = tile.segment if tile.segment < n_shared else on_node[tile.segment - n_shared]
        if node < 0 or not is_inlined[node]:
            tiles[n] = tile
            n += 1
        elif tile.segment < n_shared:
            tiles[n] = tile
            begin, end = _tails(tile, segments[n_shared:], queries, place_of, see_to)
            tiles[n].b_at, tiles[n].b_len, tiles[n].inline = begin, end - begin, True
            n += 1
    return tiles[:n]


@njit
def _tails(tile, tails, queries, place_of, see_to):  # type: ignore[no-untyped-def]
    """Range in the slot list from the tail of the tile's first query to the last token that its last row's queries
    see."""
    last = tile.first + tile.queries - 1
    first_tail, last_tail = tails[place_of[tile.first]], tails[place_of[last]]
    end = last_tail.start
    for at in range(tile.first, last + 1):
        if place_of[at] == place_of[last]:
            end = max(end, see_to[queries[at]])
    return first_tail.start + first_tail.to_slots, end + last_tail.to_slots


@njit
def _windows(tile, queries, see_from, see_to):  # type: ignore[no-untyped-def]
    """The least and the greatest ``see_from`` of the tile's queries, and of their ``see_to``."""
    query = queries[tile.first]
    first_from, last_from, first_to, last_to = see_from[query], see_from[query], see_to[query], see_to[query]
    for at in range(tile.first + 1, tile.first + tile.queries):
        query = queries[at]
        first_from, last_from = min(first_from, see_from[query]), max(last_from, see_from[query])
        first_to, last_to = min(first_to, see_to[query]), max(last_to, see_to[query])
    return first_from, last_from, first_to, last_to


@njit
def _set_runs(tiles, segments, n_shared, queries, see_from, see_to):  # type: ignore[no-untyped-def]
    """Set run A and run B of each tile by what its queries see.

    Tokens that no query sees are cut off at both ends. Run A is what all queries see from the first token on; if some
    query's window begins later, everything is run B. A tile over a node of which no query sees a token is dropped.

    Returns:
        The tiles that are left; they are moved to the front of ``tiles``, which is no longer valid.
    """
    n = 0
    for tile in tiles:
        s = segments[tile.segment]
        if tile.inline:
            tiles[n] = tile
            n += 1
            continue
        first_from, last_from, first_to, last_to = _windows(tile, queries, see_from, see_to)
        b_to = min(max(last_to, s.start), s.end)
        a_from = min(max(first_from, s.start), b_to)
        a_to = a_from
        if last_from <= a_from:
            a_to = min(max(first_to, a_from), b_to)
        if b_to > a_from or tile.segment >= n_shared:
            tiles[n] = tile
            tiles[n].a_from, tiles[n].a_to = a_from, a_to
            tiles[n].b_at, tiles[n].b_len = s.to_slots + a_to, b_to - a_to
            n += 1
    return tiles[:n]
