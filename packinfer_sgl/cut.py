"""From a pruned prefix tree to work items."""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

from packinfer_sgl.plan import Col, Plan, TilePolicy
from packinfer_sgl.prefix_tree import Int32, PrefixTree


def make_plan(
    tree: PrefixTree,
    kv_lens: Int32,
    policy: TilePolicy,
    *,
    kv_tokens_unique: int,
    qo_indptr: Int32 | None = None,
    visible: tuple[Int32, Int32] | None = None,
    room_tokens: int = 0,
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
    """
    windows = visible is not None
    see_from, see_to = visible or (np.zeros(0, np.int32), np.zeros(0, np.int32))
    if qo_indptr is None:
        qo_indptr = np.arange(tree.n_rows + 1, dtype=np.int32)
    nodes = (tree.row_lo, tree.row_hi, tree.start, tree.end)
    items, *others = _cut(
        tree.row_order, nodes, tree.tail_start, kv_lens, qo_indptr, see_from, see_to, windows, policy.table, room_tokens
    )  # fmt: skip
    arrays_and_tokens = (items.view(np.int32).reshape(-1, len(Col)), *others, int(kv_lens.sum()), kv_tokens_unique)
    return Plan(*arrays_and_tokens)


# Below, compiled by numba: loops over segments, tiles and items, which as array operations took five times as long.
# All of them stand in this file: what is compiled is kept on disk for as long as this file does not change.

# KV positions [start, end) for the rows at places [lo, hi): the nodes, then tails. A position ``p`` of it is entry
# ``to_slots + p`` of the slot list.
SEGMENT = np.dtype([(name, np.int64) for name in ("lo", "hi", "start", "end", "to_slots")])
# ``queries`` queries, from the ``first`` in place order, over KV positions: run A [a_from, a_to), run B [a_to, b_to).
TILE = np.dtype(
    [(name, np.int64) for name in ("segment", "tile_class", "first", "queries", "a_from", "a_to", "b_to", "pieces")]
)
# Tokens [begin, end) of a tile's run A, the ``nth`` piece of it, in a program that reads ``tokens`` from here on.
PIECE = np.dtype([(name, np.int64) for name in ("tile", "nth", "begin", "end", "program", "tokens")])
ITEM = np.dtype([(column.name.lower(), np.int32) for column in Col])


@njit(cache=True)
def _cut(  # type: ignore[no-untyped-def]
    row_order, nodes, tail_start, kv_lens, qo_indptr, see_from, see_to, windows, policy, room_tokens
):
    """The arrays of a plan, then ``kv_capacity`` and ``kv_tokens_read``."""
    segments, spans, append_base, kv_capacity = _segments(row_order, nodes, tail_start, kv_lens, windows, room_tokens)
    n_nodes, n_rows = len(nodes[0]), len(row_order)
    query_at = np.zeros(n_rows + 1, np.int64)  # of the first query of each place
    queries = np.empty(qo_indptr[n_rows], np.int32)  # in place order
    for place in range(n_rows):
        begin, end = qo_indptr[row_order[place]], qo_indptr[row_order[place] + 1]
        query_at[place + 1] = query_at[place] + end - begin
        queries[query_at[place] : query_at[place + 1]] = np.arange(begin, end)
    tiles = _tiles(segments, n_nodes, query_at, policy)
    if windows:
        tiles = _set_runs(tiles, segments, n_nodes, queries, see_from, see_to)
    pieces = _pieces(tiles, policy)

    slots = tiles.queries.sum()
    query_rows, partial_rows = np.empty(slots, np.int32), np.empty(slots, np.int32)
    win_lo, win_hi = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    merge_indptr = _merge_indptr(tiles, queries)
    used = np.zeros(len(queries), np.int32)  # partial rows of each query that earlier tiles have taken
    slot_of = np.empty(len(tiles), np.int64)  # of each tile, the first
    slot = 0
    for i, tile in enumerate(tiles):
        slot_of[i] = slot
        for query in queries[tile.first : tile.first + tile.queries]:
            query_rows[slot] = query
            if merge_indptr[query + 1] > merge_indptr[query]:
                partial_rows[slot] = merge_indptr[query] + used[query]
                used[query] += tile.pieces
            else:
                partial_rows[slot] = -1
            if windows:
                b_len = tile.b_to - tile.a_to
                win_lo[slot] = min(max(see_from[query] - tile.a_to, 0), b_len)
                win_hi[slot] = min(max(see_to[query] - tile.a_to, 0), b_len)
            slot += 1

    at, class_indptr = _order(pieces, tiles, len(policy))
    items = np.empty(len(pieces), ITEM)
    kv_tokens_read = 0
    for i, piece in enumerate(pieces):
        tile, item = tiles[piece.tile], items[at[i]]
        segment = segments[tile.segment]
        last = piece.nth == tile.pieces - 1
        item.q_off, item.q_cnt, item.tile_class = slot_of[piece.tile], tile.queries, tile.tile_class
        item.a_off, item.a_len, item.a_pos = segment.to_slots + piece.begin, piece.end - piece.begin, piece.begin
        # run B rides with the last piece
        item.b_off, item.b_len, item.piece = (
            segment.to_slots + tile.a_to,
            tile.b_to - tile.a_to if last else 0,
            piece.nth,
        )
        is_open = room_tokens > 0 and last and tile.segment >= n_nodes
        item.open_row = row_order[segment.lo] if is_open else -1
        item.next = at[i + 1] if i + 1 < len(pieces) and pieces[i + 1].program == piece.program else -1
        kv_tokens_read += item.a_len + item.b_len
    return (
        items, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, spans, append_base, kv_capacity,
        kv_tokens_read,
    )  # fmt: skip


@njit
def _segments(row_order, nodes, tail_start, kv_lens, windows, room_tokens):  # type: ignore[no-untyped-def]
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
    spans = np.full((n, 5), -1, np.int32)
    append_base = np.zeros(n_rows, np.int32)
    capacity = 0
    for i in range(n):
        s = segments[i]
        row = row_order[s.lo]
        s.to_slots = capacity - s.start
        spans[i, 0], spans[i, 1], spans[i, 2], spans[i, 3] = row, s.start, s.end - s.start, capacity
        capacity += s.end - s.start
        if i >= n_nodes:
            append_base[row] = s.to_slots
            capacity += room_tokens
    return segments, spans, append_base, capacity


@njit
def _tiles(segments, n_nodes, query_at, policy):  # type: ignore[no-untyped-def]
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
            tile.a_from, tile.a_to, tile.b_to = s.start, s.end, s.end
            n += 1
    return tiles


@njit
def _set_runs(tiles, segments, n_nodes, queries, see_from, see_to):  # type: ignore[no-untyped-def]
    """Run A and run B by what the queries see; returns the tiles that are left.

    What nobody sees is cut off at both ends. Run A is what all see from the front; if some query's window begins
    inside, all of it is run B. A tile of a node that nobody sees is dropped.
    """
    n = 0
    for tile in tiles:
        s = segments[tile.segment]
        mine = queries[tile.first : tile.first + tile.queries]
        b_to = min(max(see_to[mine].max(), s.start), s.end)
        a_from = min(max(see_from[mine].min(), s.start), b_to)
        a_to = a_from
        if see_from[mine].max() <= a_from:
            a_to = min(max(see_to[mine].min(), a_from), b_to)
        if b_to > a_from or tile.segment >= n_nodes:
            tiles[n] = tile
            tiles[n].a_from, tiles[n].a_to, tiles[n].b_to = a_from, a_to, b_to
            n += 1
    return tiles[:n]


# candidate lengths of a piece
CHUNKS = np.array([256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 1 << 30])


@njit
def _pieces(tiles, policy):  # type: ignore[no-untyped-def]
    """Cut the tiles' KV tokens; sets ``pieces`` of each and returns all, in the order of the tiles."""
    chunk, n_shares, share = np.empty(len(policy), np.int64), 0, 0.0
    for tile_class in range(len(policy)):
        mine = tiles[tiles.tile_class == tile_class]
        chunk[tile_class] = _best_chunk(mine, policy[tile_class])
        if 0 < len(mine) == len(tiles) and mine.b_to.sum() == mine.a_to.sum():
            chunk[tile_class], n_shares, share = _best_alone(mine, policy[tile_class], chunk[tile_class])
    if n_shares > 0:
        return _in_shares(tiles, n_shares, share, policy[tiles[0].tile_class])
    for tile in tiles:
        tile.pieces = max(-(-(tile.a_to - tile.a_from) // chunk[tile.tile_class]), 1)
    pieces = np.empty(tiles.pieces.sum(), PIECE)
    n = 0
    for i, tile in enumerate(tiles):
        length = -(-(tile.a_to - tile.a_from) // tile.pieces)
        for nth in range(tile.pieces):
            piece = pieces[n]
            piece.tile, piece.nth, piece.program = i, nth, n
            piece.begin = tile.a_from + nth * length
            piece.end = min(piece.begin + length, tile.a_to)
            piece.tokens = piece.end - piece.begin + (tile.b_to - tile.a_to if nth == tile.pieces - 1 else 0)
            n += 1
    return pieces


@njit
def _best_chunk(tiles, timing):  # type: ignore[no-untyped-def]
    """The longest piece with which the tiles of a class are done first.

    Work is spread over waves of ``parallel`` pieces. A last wave that is not full costs as much as a full one, so good
    lengths are sharp minima, not a slope.
    """
    tokens = tiles.a_to - tiles.a_from
    best_chunk, best_us = timing.chunk_tokens, np.inf
    for chunk in CHUNKS:
        if len(tiles) == 0 or np.isnan(timing.parallel):
            break
        pieces, partials, busy_us, longest_us = 0, 0, 0.0, 0.0
        for i in range(len(tiles)):
            n = max(-(-tokens[i] // chunk), 1)
            piece_us = timing.fixed_us + timing.token_us * tokens[i] / n
            pieces += n
            busy_us += n * piece_us / timing.parallel
            longest_us = max(longest_us, piece_us)
            if n > 1:
                partials += n * tiles[i].queries
        waves = pieces / timing.parallel
        us = max(busy_us * np.ceil(waves) / waves, longest_us) + partials * timing.partial_us
        if us < best_us:
            best_chunk, best_us = min(chunk, timing.chunk_tokens), us
        if chunk >= tokens.max():
            break
    return best_chunk


@njit
def _best_alone(tiles, timing, chunk):  # type: ignore[no-untyped-def]
    """How to cut the tiles of a class that runs alone: into pieces of at most ``chunk`` tokens, not at all, or into
    equal shares, so that no program is left when others are done (Stream-K, https://arxiv.org/abs/2301.03598).

    Returns:
        The longest piece; the number of shares, or 0 for none; the tokens of a share, an item's fixed time counted as
        tokens.
    """
    n = int(timing.shares)
    if n == 0:
        return chunk, 0, 0.0
    best_us = _pieces_us(tiles, timing, chunk)
    if timing.chunk_tokens >= (tiles.a_to - tiles.a_from).max():
        uncut_us = _pieces_us(tiles, timing, timing.chunk_tokens)
        if uncut_us <= best_us:
            best_us, chunk = uncut_us, timing.chunk_tokens
    fixed = timing.fixed_us / timing.token_us
    share = ((tiles.a_to - tiles.a_from).sum() + (len(tiles) + n) * fixed) / n
    token_us = timing.token_us * n / timing.parallel
    shares_us = share / (1 - np.exp(-timing.drain)) * token_us + 2 * n * tiles.queries.max() * timing.partial_us
    return (chunk, n, share) if shares_us < best_us and share <= timing.chunk_tokens else (chunk, 0, 0.0)


@njit
def _pieces_us(tiles, timing, chunk):  # type: ignore[no-untyped-def]
    """When ``shares`` programs are done with pieces of at most ``chunk`` tokens, longest first."""
    n = int(timing.shares)
    tokens = tiles.a_to - tiles.a_from
    count = np.maximum(-(-tokens // chunk), 1)
    length = -np.sort(-np.repeat(tokens / count, count)) + timing.fixed_us / timing.token_us
    launched = int(timing.launched)
    ends = [0.0] * n  # in tokens that each program reads while all run
    for i in range(min(len(length), launched)):  # a program begins when another ends
        heapq.heapreplace(ends, ends[0] + length[i::launched].sum())
    us, last = 0.0, 0.0
    for i, end in enumerate(sorted(ends)):
        running = (n - i) / n
        # fewer programs draw less from memory, but not in proportion
        us += (end - last) * running / (1 - np.exp(-timing.drain * running))
        last = end
    partials = (count * tiles.queries)[count > 1].sum()
    return us * timing.token_us * n / timing.parallel + partials * timing.partial_us


@njit
def _in_shares(tiles, n_shares, share, timing):  # type: ignore[no-untyped-def]
    """``_pieces`` into equal shares."""
    pieces = np.empty(len(tiles) + n_shares, PIECE)
    fixed = timing.fixed_us / timing.token_us
    least = int(3 * fixed)  # tokens; a shorter piece costs more than it balances
    done, nth_share, n = 0.0, 0, 0
    program, program_share = -1, -1
    for i, tile in enumerate(tiles):
        begin, tile.pieces = tile.a_from, 0
        while True:
            left = tile.a_to - begin
            while nth_share < n_shares - 1 and (nth_share + 1) * share - done < (fixed + min(left, least)) / 2:
                nth_share += 1
            room = (nth_share + 1) * share - done - fixed
            length = left
            if nth_share < n_shares - 1 and left > room + least:
                length = max(int(room), least, 1)
            if nth_share != program_share:
                program, program_share = program + 1, nth_share
            piece = pieces[n]
            piece.tile, piece.nth, piece.program = i, tile.pieces, program
            piece.begin, piece.end, piece.tokens = begin, begin + length, length
            n, tile.pieces, done, begin = n + 1, tile.pieces + 1, done + fixed + length, begin + length
            if begin == tile.a_to:
                break
            nth_share += 1
    pieces = pieces[:n]
    for i in range(n - 2, -1, -1):
        if pieces[i].program == pieces[i + 1].program:
            pieces[i].tokens += pieces[i + 1].tokens
    return pieces


@njit
def _order(pieces, tiles, n_classes):  # type: ignore[no-untyped-def]
    """Where each piece stands among the items, and ``class_indptr``."""
    key = np.empty(len(pieces), np.int64)
    class_indptr = np.zeros(n_classes + 1, np.int32)
    for i, piece in enumerate(pieces):
        begins = i == 0 or pieces[i - 1].program != piece.program  # a program
        tile_class = tiles[piece.tile].tile_class
        key[i] = ((tile_class if begins else n_classes) << 40) - piece.tokens
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
