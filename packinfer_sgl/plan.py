"""From a pruned prefix tree to work items: the int32 arrays that the kernels run on."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np
from numba import njit

from packinfer_sgl.prefix_tree import Int32, PrefixTree


class Col(IntEnum):
    """Columns of ``Plan.items``; all counts are tokens.

    An item is a tile of queries (``Q_OFF``, ``Q_CNT``: range of query slots) over two runs of KV tokens: every query
    of the tile sees all of run A; query slot ``s`` sees tokens ``win_lo[s] <= j < win_hi[s]`` of run B.
    """

    Q_OFF = 0
    Q_CNT = 1
    A_OFF = 2  # first entry of run A in the KV slot list
    A_LEN = 3
    A_POS = 4  # KV position of run A's first token
    B_OFF = 5
    B_LEN = 6
    PIECE = 7  # which of the tile's KV pieces: added to the slot's first partial row
    TILE_CLASS = 8  # index into TilePolicy.tile_queries
    OPEN_ROW = 9  # run A ends at this row's current length (it grows while the plan lives), or -1


@dataclass(frozen=True)
class PieceTiming:
    """How long KV pieces of one tile class take; a model, fitted to a device.

    Attributes:
        parallel: items that run at once (all KV heads of an item counted as one).
        fixed_us: time of an item whatever its length.
        token_us: time of one KV token of an item while ``parallel`` of them run.
        partial_us: time that one query's partial result costs everybody (written, and read by the merge).
    """

    parallel: float
    fixed_us: float
    token_us: float
    partial_us: float


@dataclass(frozen=True)
class TilePolicy:
    """How queries and KV are cut into items.

    Attributes:
        tile_queries: most queries (tokens) of one tile of each class, largest class first. A span is cut into tiles of
            the smallest class that holds all its queries, else of the largest.
        chunk_tokens: longest KV piece of an item.
        timings: of each class: pieces are then cut so that each class fills its waves, and ``chunk_tokens`` only
            bounds them. None: as long as ``chunk_tokens`` allows.
    """

    tile_queries: tuple[int, ...]
    chunk_tokens: int
    timings: tuple[PieceTiming, ...] | None = None

    @cached_property
    def table(self) -> np.ndarray:
        """[n_classes] of ``CLASS``: the same as the compiled functions take it."""
        timings = self.timings or [PieceTiming(*[math.nan] * 4)] * len(self.tile_queries)
        classes = zip(self.tile_queries, timings, strict=True)
        return np.array([(queries, self.chunk_tokens, *astuple(timing)) for queries, timing in classes], CLASS)


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one batch and where their partial results meet. All arrays int32, on the CPU.

    A query slot is one query token in one tile. Items that are KV pieces of the same tile share its slots.

    Attributes:
        items: [n_items, 10], columns ``Col``; largest tile class first, longest first within a class.
        query_rows: [n_slots] row of q and out.
        partial_rows: [n_slots] first partial row of the slot (plus the item's ``PIECE``), or -1: the item writes the
            output row itself.
        win_lo, win_hi: [n_slots] window of each query into run B, in tokens of run B.
        merge_indptr: [n_queries + 1] the partial rows of a query; empty where an item writes the output itself.
        spans: [n_spans, 5] row of the batch, first KV position, tokens, offset in the KV slot list, and the slot of the
            first token if the others follow it, else -1: they are copied from the row's table. Nodes first, as in the
            tree; a node may take several neighbouring spans (``regroup``).
        append_base: [n_rows] the slot of row ``r``'s token at position ``p`` belongs at ``append_base[r] + p``
            (for positions in its tail).
        kv_capacity: entries of the KV slot list, room for growing tails included.
        kv_tokens_read: KV tokens that the items read.
        kv_tokens_logical: KV tokens that a prefix-unaware kernel reads.
        kv_tokens_unique: KV tokens that any kernel must read.
    """

    items: Int32
    query_rows: Int32
    partial_rows: Int32
    win_lo: Int32
    win_hi: Int32
    merge_indptr: Int32
    spans: Int32
    append_base: Int32
    kv_capacity: int
    kv_tokens_read: int
    kv_tokens_logical: int
    kv_tokens_unique: int

    @property
    def n_partials(self) -> int:
        return int(self.merge_indptr[-1])


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

CLASS = np.dtype(
    [("tile_queries", np.int64), ("chunk_tokens", np.int64), *((f.name, np.float64) for f in fields(PieceTiming))]
)
# KV positions [start, end) for the rows at places [lo, hi): the nodes, then tails. A position ``p`` of it is entry
# ``to_slots + p`` of the slot list.
SEGMENT = np.dtype([(name, np.int64) for name in ("lo", "hi", "start", "end", "to_slots")])
# ``queries`` queries, from the ``first`` in place order, over KV positions: run A [a_from, a_to), run B [a_to, b_to).
TILE = np.dtype(
    [(name, np.int64) for name in ("segment", "tile_class", "first", "queries", "a_from", "a_to", "b_to", "pieces")]
)
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
    _set_pieces(tiles, policy)

    slots = tiles.queries.sum()
    query_rows, partial_rows = np.empty(slots, np.int32), np.empty(slots, np.int32)
    win_lo, win_hi = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    merge_indptr = _merge_indptr(tiles, queries)
    items = np.empty(tiles.pieces.sum(), ITEM)
    order = np.empty(len(items), np.int64)
    used = np.zeros(len(queries), np.int32)  # partial rows of each query that earlier tiles have taken
    slot, n, kv_tokens_read = 0, 0, 0
    for tile in tiles:
        segment = segments[tile.segment]
        a_len, b_len = tile.a_to - tile.a_from, tile.b_to - tile.a_to
        piece_len = -(-a_len // tile.pieces)
        is_tail = tile.segment >= n_nodes
        for piece in range(tile.pieces):
            done, last = piece * piece_len, piece == tile.pieces - 1
            length = min(piece_len, a_len - done)
            item = items[n]
            item.q_off, item.q_cnt, item.tile_class = slot, tile.queries, tile.tile_class
            item.a_off, item.a_len, item.a_pos = segment.to_slots + tile.a_from + done, length, tile.a_from + done
            # run B rides with the last piece
            item.b_off, item.b_len, item.piece = segment.to_slots + tile.a_to, b_len if last else 0, piece
            item.open_row = row_order[segment.lo] if room_tokens > 0 and last and is_tail else -1
            read = length + item.b_len
            kv_tokens_read += read
            order[n] = (tile.tile_class << 40) - read
            n += 1
        for query in queries[tile.first : tile.first + tile.queries]:
            query_rows[slot] = query
            if merge_indptr[query + 1] > merge_indptr[query]:
                partial_rows[slot] = merge_indptr[query] + used[query]
                used[query] += tile.pieces
            else:
                partial_rows[slot] = -1
            if windows:
                win_lo[slot] = min(max(see_from[query] - tile.a_to, 0), b_len)
                win_hi[slot] = min(max(see_to[query] - tile.a_to, 0), b_len)
            slot += 1
    items = items[order.argsort(kind="mergesort")]
    return (
        items, query_rows, partial_rows, win_lo, win_hi, merge_indptr, spans, append_base, kv_capacity, kv_tokens_read,
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
def _set_pieces(tiles, policy):  # type: ignore[no-untyped-def]
    """Into how many pieces the KV tokens of each tile are cut.

    For each class the longest piece is sought with which it is done first. Work is spread over waves of ``parallel``
    pieces. A last wave that is not full costs as much as a full one, so good lengths are sharp minima, not a slope.
    """
    for tile_class in range(len(policy)):
        timing = policy[tile_class]
        mine = tiles[tiles.tile_class == tile_class]
        tokens = mine.a_to - mine.a_from
        best_chunk, best_us = timing.chunk_tokens, np.inf
        for chunk in CHUNKS:
            if len(mine) == 0 or np.isnan(timing.parallel):
                break
            pieces, partials, busy_us, longest_us = 0, 0, 0.0, 0.0
            for i in range(len(mine)):
                n = max(-(-tokens[i] // chunk), 1)
                piece_us = timing.fixed_us + timing.token_us * tokens[i] / n
                pieces += n
                busy_us += n * piece_us / timing.parallel
                longest_us = max(longest_us, piece_us)
                if n > 1:
                    partials += n * mine[i].queries
            waves = pieces / timing.parallel
            us = max(busy_us * np.ceil(waves) / waves, longest_us) + partials * timing.partial_us
            if us < best_us:
                best_chunk, best_us = min(chunk, timing.chunk_tokens), us
            if chunk >= tokens.max():
                break
        for tile in tiles:
            if tile.tile_class == tile_class:
                tile.pieces = max(-(-(tile.a_to - tile.a_from) // best_chunk), 1)


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
