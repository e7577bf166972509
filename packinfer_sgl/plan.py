"""From a pruned prefix tree to work items: the int32 arrays that the kernels run on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from packinfer_sgl.prefix_tree import Int32, PrefixTree

Int64 = npt.NDArray[np.int64]


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
    SMALL = 8  # 1 for the small tile class
    OPEN_ROW = 9  # run A ends at this row's current length (it grows while the plan lives), or -1


@dataclass(frozen=True)
class TilePolicy:
    """How queries and KV are cut into items.

    Attributes:
        large_queries, small_queries: queries (tokens) of one tile of each class.
        chunk_tokens: longest KV piece of an item.
    """

    large_queries: int
    small_queries: int
    chunk_tokens: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one batch and where their partial results meet. All arrays int32, on the CPU.

    A query slot is one query token in one tile. Items that are KV pieces of the same tile share its slots.

    Attributes:
        items: [n_items, 10], columns ``Col``; large tiles first, longest first within a class.
        query_rows: [n_slots] row of q and out.
        partial_rows: [n_slots] first partial row of the slot (plus the item's ``PIECE``), or -1: the item writes the
            output row itself.
        win_lo, win_hi: [n_slots] window of each query into run B, in tokens of run B.
        merge_indptr: [n_queries + 1] the partial rows of a query; empty where an item writes the output itself.
        spans: [n_spans, 4] row of the batch, first KV position, tokens, offset in the KV slot list: what to copy there.
        append_base: [n_rows] the slot of row ``r``'s token at position ``p`` belongs at ``append_base[r] + p``
            (for positions in its tail).
        kv_capacity: entries of the KV slot list, room for growing tails included.
        kv_tokens_logical: KV tokens that a prefix-unaware kernel reads.
        kv_tokens_unique: KV tokens that any kernel must read.
        kv_tokens_read: KV tokens that the items read.
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
    kv_tokens_logical: int
    kv_tokens_unique: int
    kv_tokens_read: int

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
    n_rows, n_nodes = tree.n_rows, tree.n_nodes
    order = tree.row_order
    kv_by_place = kv_lens[order]
    # segments: the nodes, then one tail for each place
    # a row keeps its empty tail where its queries may see none of its nodes: every query is in some item
    has_tail = (kv_by_place > tree.tail_start) | (tree.tail_start == 0) | (visible is not None)
    (tail_place,) = has_tail.nonzero()
    lo = np.concatenate([tree.row_lo, tail_place]).astype(np.int64)
    hi = np.concatenate([tree.row_hi, tail_place + 1]).astype(np.int64)
    start = np.concatenate([tree.start, tree.tail_start[tail_place]]).astype(np.int64)
    end = np.concatenate([tree.end, kv_by_place[tail_place]]).astype(np.int64)
    is_tail = np.arange(len(lo)) >= n_nodes
    length = end - start
    room = np.where(is_tail, room_tokens, 0)
    kv_off = _exclusive_sum(length + room)
    spans = np.stack([order[lo], start, length, kv_off], 1).astype(np.int32)
    append_base = np.zeros(n_rows, np.int32)
    append_base[order[tail_place]] = (kv_off - start)[n_nodes:]

    # queries of the segments: tokens of the rows in place order
    if qo_indptr is None:
        tokens, token_indptr = order.astype(np.int64), np.arange(n_rows + 1)
    else:
        q_lens = np.diff(qo_indptr).astype(np.int64)[order]
        token_indptr = np.concatenate([[0], np.cumsum(q_lens)])
        tokens = _ranges(qo_indptr[order].astype(np.int64), q_lens)
    n_queries = len(tokens)
    q_first, q_count = token_indptr[lo], token_indptr[hi] - token_indptr[lo]

    # tiles: each segment's queries in equal parts of the class's size
    small = q_count <= policy.small_queries
    tiles_of = -(-q_count // np.where(small, max(policy.small_queries, 1), policy.large_queries))
    seg = np.repeat(np.arange(len(lo)), tiles_of)
    step = -(-q_count[seg] // tiles_of[seg])
    tile_q = (np.arange(len(seg)) - np.repeat(_exclusive_sum(tiles_of), tiles_of)) * step
    tile_count = np.minimum(step, q_count[seg] - tile_q)
    live = tile_count > 0
    if visible is None:
        a_from, a_to, b_to = start[seg], end[seg], end[seg]
    else:
        a_from, a_to, b_to, seen = _runs(tokens, q_first[seg] + tile_q, tile_count, start[seg], end[seg], visible)
        live &= seen | is_tail[seg]
    if not live.all():
        seg, tile_q, tile_count = seg[live], tile_q[live], tile_count[live]
        a_from, a_to, b_to = a_from[live], a_to[live], b_to[live]
    n_tiles = len(seg)
    slot_off = _exclusive_sum(tile_count)
    slot_tile = np.repeat(np.arange(n_tiles), tile_count)
    slot_query = tokens[_ranges(q_first[seg] + tile_q, tile_count)]
    a_len, b_len = a_to - a_from, b_to - a_to
    if visible is None:
        win_lo = win_hi = np.zeros(len(slot_query), np.int32)
    else:
        win_lo, win_hi = (
            np.clip(v[slot_query] - a_to[slot_tile], 0, b_len[slot_tile]).astype(np.int32) for v in visible
        )

    # pieces: run A in near-equal parts; run B rides with the last
    pieces = np.maximum(-(-a_len // policy.chunk_tokens), 1)
    piece_len = -(-a_len // pieces)
    tile = np.repeat(np.arange(n_tiles), pieces)
    piece = np.arange(len(tile)) - np.repeat(_exclusive_sum(pieces), pieces)
    last = piece == pieces[tile] - 1
    done = piece * piece_len[tile]
    items = np.zeros((len(tile), len(Col)), np.int32)
    items[:, Col.Q_OFF] = slot_off[tile]
    items[:, Col.Q_CNT] = tile_count[tile]
    items[:, Col.A_LEN] = np.minimum(piece_len[tile], a_len[tile] - done)
    items[:, Col.A_POS] = a_from[tile] + done
    to_slots = (kv_off - start)[seg]
    items[:, Col.A_OFF] = to_slots[tile] + items[:, Col.A_POS]
    items[:, Col.B_OFF] = (to_slots + a_to)[tile]
    items[:, Col.B_LEN] = np.where(last, b_len[tile], 0)
    items[:, Col.PIECE] = piece
    items[:, Col.SMALL] = small[seg[tile]]
    open_tile = is_tail[seg] & (room_tokens > 0)
    items[:, Col.OPEN_ROW] = np.where(last & open_tile[tile], order[lo[seg[tile]]], -1)
    longest_first = np.lexsort((-(items[:, Col.A_LEN] + items[:, Col.B_LEN]), items[:, Col.SMALL]))

    partial_rows, merge_indptr = _partials(slot_query, pieces[slot_tile], n_queries)
    return Plan(
        items=items[longest_first],
        query_rows=slot_query.astype(np.int32),
        partial_rows=partial_rows,
        win_lo=win_lo,
        win_hi=win_hi,
        merge_indptr=merge_indptr,
        spans=spans,
        append_base=append_base,
        kv_capacity=int((length + room).sum()),
        kv_tokens_logical=int(kv_lens.sum()),
        kv_tokens_unique=kv_tokens_unique,
        kv_tokens_read=int(items[:, [Col.A_LEN, Col.B_LEN]].sum()),
    )


def _exclusive_sum(counts: Int64) -> Int64:
    return np.cumsum(counts) - counts


def _ranges(first: Int64, count: Int64) -> Int64:
    """``first[0], first[0] + 1, ... (count[0] of them), first[1], ...``"""
    return np.repeat(first - _exclusive_sum(count), count) + np.arange(count.sum())


def _runs(
    tokens: Int64, first: Int64, count: Int64, start: Int64, end: Int64, visible: tuple[Int32, Int32]
) -> tuple[Int64, Int64, Int64, npt.NDArray[np.bool_]]:
    """Run A ``[a_from, a_to)`` and run B ``[a_to, b_to)`` of each tile, and whether any query sees any of the span.

    What nobody sees is cut off at both ends. Run A is what all see from the front; if some query's window begins
    inside, all of it is run B.
    """
    lo, hi = (v[tokens] for v in visible)
    bounds = np.stack([first, first + count], 1).ravel()
    # reduceat needs indices below the length; the entry appended after the last query never wins
    least_lo = np.minimum.reduceat(np.append(lo, 2**31 - 1), bounds)[::2]
    most_lo = np.maximum.reduceat(np.append(lo, -1), bounds)[::2]
    least_hi = np.minimum.reduceat(np.append(hi, 2**31 - 1), bounds)[::2]
    most_hi = np.maximum.reduceat(np.append(hi, -1), bounds)[::2]
    b_to = np.clip(most_hi, start, end)
    a_from = np.clip(least_lo, start, b_to)
    a_to = np.where(most_lo > a_from, a_from, np.clip(least_hi, a_from, b_to))
    return a_from, a_to, b_to, b_to > a_from


def _partials(slot_query: Int64, pieces: Int64, n_queries: int) -> tuple[Int32, Int32]:
    """Partial rows: those of one query are consecutive; a query with a single partial result needs none."""
    total = np.bincount(slot_query, weights=pieces, minlength=n_queries).astype(np.int64)
    merged = np.where(total > 1, total, 0)
    merge_indptr = np.concatenate([[0], np.cumsum(merged)]).astype(np.int32)
    by_query = np.argsort(slot_query, kind="stable")
    query, count = slot_query[by_query], pieces[by_query]
    before = _exclusive_sum(count) - np.repeat(_exclusive_sum(total), np.bincount(slot_query, minlength=n_queries))
    partial_rows = np.empty(len(slot_query), np.int32)
    partial_rows[by_query] = np.where(total[query] > 1, merge_indptr[query] + before, -1)
    return partial_rows, merge_indptr
