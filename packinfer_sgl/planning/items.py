"""From a pruned prefix tree to work items."""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.plan import Col, Plan, TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.planning.schedule import cut_pieces
from packinfer_sgl.planning.slot_list import list_by_reader, list_once


def make_plan(
    tree: PrefixTree,
    kv_lens: Int32,
    policy: TilePolicy,
    *,
    kv_tokens_unique: int,
    qo_indptr: Int32 | None = None,
    visible: tuple[Int32, Int32] | None = None,
    room_tokens: int = 0,
    listed_once: PrefixTree | None = None,
) -> Plan:
    """Cut the tree's spans and the rows' tails into work items.

    Args:
        tree: the spans to read once (``groups.prune``).
        kv_lens: [n_rows] int32 KV tokens of each row; at least the end of the row's lowest node.
        policy: tile sizes and the longest piece.
        kv_tokens_unique: ``PrefixTree.unique_tokens`` of the tree before pruning.
        qo_indptr: [n_rows + 1] int32 query tokens of each row; default: one each (decode).
        visible: [n_queries] int32 first KV position that each query sees, and the one after its last (causal,
            sliding window); default: all of its row.
        room_tokens: how many tokens each tail may grow while the plan lives (decode only).
        listed_once: the tree before pruning: no KV token that it shows as shared then stands twice in the slot list,
            which costs partial results (``slot_list.list_once``). Default: spans that no node keeps are listed for
            each row that reads them.
    """
    windows = visible is not None
    see_from, see_to = visible or (np.zeros(0, np.int32), np.zeros(0, np.int32))
    if qo_indptr is None:
        qo_indptr = np.arange(tree.n_rows + 1, dtype=np.int32)
    nodes = (tree.row_lo, tree.row_hi, tree.start, tree.end)
    sees = (see_from, see_to, windows)
    listed = (tree.row_order, nodes, tree.tail_start, kv_lens, windows, room_tokens)
    if listed_once is None:
        segments, n_shared, spans, append_base, kv_capacity = list_by_reader(*listed)
    else:
        w = listed_once
        whole = (w.parent, w.row_lo, w.row_hi, w.start, w.end, w.tail_start)
        segments, n_shared, spans, append_base, kv_capacity = list_once(*listed, whole)
    queries, place_of, tiles = _tiles(tree.row_order, segments, n_shared, qo_indptr, sees, policy.table, room_tokens)
    pieces = cut_pieces(tiles, policy.table)
    items, *others, kv_tokens_read = _items(
        tree.row_order, segments, n_shared, queries, place_of, tiles, pieces, sees, len(policy.table), room_tokens
    )
    items = items.view(np.int32).reshape(-1, len(Col))
    if room_tokens == 0:  # nothing grows
        append_base = append_base[:0]
    tokens = (kv_capacity, kv_tokens_read, int(kv_lens.sum()), kv_tokens_unique)
    arrays_and_tokens = (items, *others, spans, append_base, *tokens)
    return Plan(*arrays_and_tokens, windows)


# Below, compiled by numba: loops over segments, tiles and items, which as array operations took five times as long.
# What is compiled is kept on disk for as long as its file does not change, so it calls nothing of other files.

# ``queries`` queries, from the ``first`` in place order, over the segment's KV positions [a_from, a_to) as run A and
# ``b_len`` entries of the slot list from ``b_at`` on as run B: the segment's next positions, or, with ``ride``, tails
# of the queries' rows. Run A of a tail may grow by up to ``grows`` tokens while the plan lives.
TILE = np.dtype(
    [(name, np.int64) for name in ("segment", "tile_class", "first", "queries", "a_from", "a_to", "b_at", "b_len")]
    + [("ride", np.bool_), ("pieces", np.int64), ("grows", np.int64)]
)
ITEM = np.dtype([(column.name.lower(), np.int32) for column in Col])


@njit(cache=True)
def _tiles(row_order, segments, n_shared, qo_indptr, sees, policy, room_tokens):  # type: ignore[no-untyped-def]
    """The queries in place order, the place of each, and their tiles."""
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
        tiles = _ride(tiles, segments, n_shared, queries, place_of, see_from, see_to, policy[0].ride_tokens)
        tiles = _set_runs(tiles, segments, n_shared, queries, see_from, see_to)
    return queries, place_of, tiles


@njit
def _whole_tiles(segments, query_at, policy):  # type: ignore[no-untyped-def]
    """Each segment's queries in equal parts of the class's size; run A is the whole segment."""
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
            tile.a_from, tile.a_to, tile.b_at, tile.b_len, tile.ride = s.start, s.end, s.to_slots + s.end, 0, False
            n += 1
    return tiles


@njit
def _ride(tiles, segments, n_shared, queries, place_of, see_from, see_to, ride_tokens):  # type: ignore[no-untyped-def]
    """Let short tails ride: where no node lies below a node, the tails of its rows become run B of its tiles.

    The packed regions of PackInfer (https://arxiv.org/abs/2602.06072): suffixes of several requests side by side in
    one tile over their common prefix, and no partial results. It takes queries that all see the whole node, and no tile
    with more than ``ride_tokens`` of tails. Returns the tiles that are left.
    """
    rides = np.ones(n_shared, np.bool_)
    on_node = np.full(len(segments) - n_shared, -1, np.int64)  # of each place, the lowest node
    for i in range(n_shared):  # deeper nodes come later and overwrite
        s = segments[i]
        for above in on_node[s.lo : s.hi]:
            if above >= 0:
                rides[above] = False
        on_node[s.lo : s.hi] = i
    for tile in tiles:
        if tile.segment < n_shared and rides[tile.segment]:
            s = segments[tile.segment]
            begin, end = _tails(tile, segments[n_shared:], queries, place_of, see_to)
            mine = queries[tile.first : tile.first + tile.queries]
            rides[tile.segment] = (
                end - begin <= ride_tokens and see_from[mine].max() == 0 and see_to[mine].min() >= s.end
            )
    n = 0
    for tile in tiles:
        node = tile.segment if tile.segment < n_shared else on_node[tile.segment - n_shared]
        if node < 0 or not rides[node]:
            tiles[n] = tile
            n += 1
        elif tile.segment < n_shared:
            tiles[n] = tile
            begin, end = _tails(tile, segments[n_shared:], queries, place_of, see_to)
            tiles[n].b_at, tiles[n].b_len, tiles[n].ride = begin, end - begin, True
            n += 1
    return tiles[:n]


@njit
def _tails(tile, tails, queries, place_of, see_to):  # type: ignore[no-untyped-def]
    """Entries of the slot list from the tail of the tile's first query to what its queries of the last row see."""
    last = tile.first + tile.queries - 1
    first_tail, last_tail = tails[place_of[tile.first]], tails[place_of[last]]
    end = last_tail.start
    for at in range(tile.first, last + 1):
        if place_of[at] == place_of[last]:
            end = max(end, see_to[queries[at]])
    return first_tail.start + first_tail.to_slots, end + last_tail.to_slots


@njit
def _set_runs(tiles, segments, n_shared, queries, see_from, see_to):  # type: ignore[no-untyped-def]
    """Run A and run B by what the queries see; returns the tiles that are left.

    What nobody sees is cut off at both ends. Run A is what all see from the front; if some query's window begins
    inside, all of it is run B. A tile of a node that nobody sees is dropped.
    """
    n = 0
    for tile in tiles:
        s = segments[tile.segment]
        if tile.ride:
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


@njit(cache=True)
def _items(  # type: ignore[no-untyped-def]
    row_order, segments, n_shared, queries, place_of, tiles, pieces, sees, n_classes, room_tokens
):
    """``Plan.items`` to ``Plan.merge_indptr``, and ``kv_tokens_read``."""
    see_from, see_to, windows = sees
    slots = tiles.queries.sum()
    query_rows, partial_rows = np.empty(slots, np.int32), np.empty(slots, np.int32)
    win_lo, win_hi = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    merge_indptr = _merge_indptr(tiles, queries)
    used = np.zeros(len(queries), np.int32)  # partial rows of each query that earlier tiles have taken
    slot_of = np.empty(len(tiles), np.int64)  # of each tile, the first
    has_partials = np.zeros(len(tiles), np.bool_)
    slot = 0
    for i, tile in enumerate(tiles):
        slot_of[i] = slot
        segment = segments[tile.segment]
        for at in range(tile.first, tile.first + tile.queries):
            query = queries[at]
            query_rows[slot] = query
            if merge_indptr[query + 1] > merge_indptr[query]:
                partial_rows[slot] = merge_indptr[query] + used[query]
                used[query] += tile.pieces
                has_partials[i] = True
            else:
                partial_rows[slot] = -1
            if windows:
                begin = see_from[query]
                if tile.ride:
                    segment = segments[n_shared + place_of[at]]
                    begin = segment.start
                win_lo[slot] = min(max(begin + segment.to_slots - tile.b_at, 0), tile.b_len)
                win_hi[slot] = min(max(see_to[query] + segment.to_slots - tile.b_at, 0), tile.b_len)
            slot += 1

    item_of, class_indptr = _order(pieces, tiles, n_classes)
    items = np.empty(len(pieces), ITEM)
    kv_tokens_read = 0
    for i, piece in enumerate(pieces):
        tile, item = tiles[piece.tile], items[item_of[i]]
        segment = segments[tile.segment]
        last = piece.nth == tile.pieces - 1
        item.q_off, item.q_cnt, item.tile_class = slot_of[piece.tile], tile.queries, tile.tile_class
        item.a_off, item.a_len, item.a_pos = segment.to_slots + piece.begin, piece.end - piece.begin, piece.begin
        # run B comes with the last piece
        item.b_off, item.b_len = tile.b_at, tile.b_len if last else 0
        item.piece = piece.nth if has_partials[piece.tile] else -1
        is_open = room_tokens > 0 and last and tile.segment >= n_shared
        item.open_row = row_order[segment.lo] if is_open else -1
        item.next = item_of[i + 1] if i + 1 < len(pieces) and pieces[i + 1].program == piece.program else -1
        kv_tokens_read += item.a_len + item.b_len
    return items, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, kv_tokens_read


@njit
def _order(pieces, tiles, n_classes):  # type: ignore[no-untyped-def]
    """Where each piece stands among the items, and ``class_indptr``."""
    key = np.empty(len(pieces), np.int64)
    class_indptr = np.zeros(n_classes + 1, np.int32)
    for i, piece in enumerate(pieces):
        begins = i == 0 or pieces[i - 1].program != piece.program  # a program
        tile_class = tiles[piece.tile].tile_class
        key[i] = ((tile_class if begins else n_classes) << 40) - piece.cost
        if begins:
            class_indptr[tile_class + 1] += 1
    at = np.empty(len(pieces), np.int64)
    at[key.argsort(kind="mergesort")] = np.arange(len(pieces))
    return at, class_indptr.cumsum().astype(np.int32)


@njit
def _merge_indptr(tiles, queries):  # type: ignore[no-untyped-def]
    """Partial rows: those of one query are consecutive; a query with a single partial result needs none."""
    results = np.zeros(len(queries), np.int64)
    for tile in tiles:
        for query in queries[tile.first : tile.first + tile.queries]:
            results[query] += tile.pieces
    merge_indptr = np.zeros(len(queries) + 1, np.int32)
    for query in range(len(queries)):
        merge_indptr[query + 1] = merge_indptr[query] + (results[query] if results[query] > 1 else 0)
    return merge_indptr
