"""Query tiles: the queries of each segment of KV in groups of a tile's size, and the KV that each tile reads.

Compiled by numba: loops over segments and queries, which as array operations took five times as long. numba invalidates
its cache per file, so compiled functions here must not call compiled functions of other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# ``queries`` queries, from the ``first`` in place order, over the segment's KV positions [a_from, a_to) as run A and
# ``b_len`` entries of the slot list from ``b_at`` on as run B: the segment's next positions, or, with ``inline``, tails
# of the queries' rows. Run A of a tail may grow by up to ``grows`` tokens while the plan lives.
TILE = np.dtype(
    [(name, np.int64) for name in ("segment", "tile_class", "first", "queries", "a_from", "a_to", "b_at", "b_len")]
    + [("inline", np.bool_), ("grows", np.int64)]
)


@njit(cache=True)
def query_tiles(row_order, segments, n_shared, qo_indptr, sees, policy, room_tokens):  # type: ignore[no-untyped-def]
    """The tiles of all segments.

    Args:
        row_order: ``PrefixTree.row_order``.
        segments, n_shared: see ``slot_list``.
        qo_indptr, room_tokens: see ``items.make_plan``.
        sees: first KV position that each query sees, the one after its last ([n_queries] int32), and whether any query
            sees less than all of its row; if not, the arrays are not read.
        policy: ``TilePolicy.table``.

    Returns:
        The queries in place order, the place of each ([n_queries] int32), and [n_tiles] of ``TILE`` in the order of
        the segments.
    """
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
    see_from, see_to, windows = sees
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
            mine = queries[tile.first : tile.first + tile.queries]
            is_inlined[tile.segment] = end - begin <= most and see_from[mine].max() == 0 and see_to[mine].min() >= s.end
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
        mine = queries[tile.first : tile.first + tile.queries]
        b_to = min(max(see_to[mine].max(), s.start), s.end)
        a_from = min(max(see_from[mine].min(), s.start), b_to)
        a_to = a_from
        if see_from[mine].max() <= a_from:
            a_to = min(max(see_to[mine].min(), a_from), b_to)
        if b_to > a_from or tile.segment >= n_shared:
            tiles[n] = tile
            tiles[n].a_from, tiles[n].a_to = a_from, a_to
            tiles[n].b_at, tiles[n].b_len = s.to_slots + a_to, b_to - a_to
            n += 1
    return tiles[:n]
