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


CHUNKS = np.array([256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 1 << 30])


@dataclass(frozen=True)
class TilePolicy:
    """How queries and KV are cut into items.

    Attributes:
        tile_queries: most queries (tokens) of one tile of each class, largest class first. A span is cut into tiles of
            the smallest class that holds all its queries, else of the largest (see ``classes``).
        chunk_tokens: longest KV piece of an item.
        timings: of each class: pieces are then cut so that each class fills its waves, and ``chunk_tokens`` only
            bounds them. None: as long as ``chunk_tokens`` allows.
    """

    tile_queries: tuple[int, ...]
    chunk_tokens: int
    timings: tuple[PieceTiming, ...] | None = None

    def classes(self, tokens: Int64, queries: Int64) -> Int64:
        """The tile class of spans of so many KV tokens and queries ([n_spans] each)."""
        tile_class = np.zeros(len(queries), np.int64)
        for size in self.tile_queries[1:]:
            tile_class += queries <= size
        if len(self.tile_queries) > 2:
            # two classes of large tiles that take turns cannot fill the device; the second then takes all
            first, second = tokens[tile_class == 0].sum(), tokens[tile_class == 1].sum()
            if 4 * second > first:
                tile_class = np.maximum(tile_class, 1)
        return tile_class

    def pieces(self, tokens: Int64, queries: Int64, tile_class: Int64) -> Int64:
        """Into how many pieces each tile's KV tokens are cut ([n_tiles] each)."""
        pieces = np.maximum(-(-tokens // self.chunk_tokens), 1)
        for i, timing in enumerate(self.timings or ()):
            (tiles,) = (tile_class == i).nonzero()
            if len(tiles):
                chunk = min(_best_chunk(tokens[tiles], queries[tiles], timing), self.chunk_tokens)
                pieces[tiles] = np.maximum(-(-tokens[tiles] // chunk), 1)
        return pieces


def _best_chunk(tokens: Int64, queries: Int64, timing: PieceTiming) -> int:
    """The longest piece for which a class of tiles is done first.

    Work is spread over waves of ``parallel`` pieces. A last wave that is not full costs as much as a full one, so
    good lengths are sharp minima, not a slope.
    """
    longest = int(tokens.max())
    chunks = CHUNKS[: int(CHUNKS.searchsorted(longest)) + 1]
    pieces = np.maximum(-(-tokens // chunks[:, None]), 1)
    piece_us = timing.fixed_us + timing.token_us * (tokens / pieces)
    waves = pieces.sum(1) / timing.parallel
    busy_us = (pieces * piece_us).sum(1) / timing.parallel
    partials = ((pieces * (pieces > 1)) @ queries) * timing.partial_us
    us = np.maximum(busy_us * np.ceil(waves) / waves, piece_us.max(1)) + partials
    return int(chunks[us.argmin()])


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
    # segments: the nodes, then one tail for each place
    n_nodes, order = tree.n_nodes, tree.row_order
    kv_by_place = kv_lens[order]
    if visible is None:
        tail_place = ((kv_by_place > tree.tail_start) | (tree.tail_start == 0)).nonzero()[0]
    else:
        # an empty tail stays where a query may see none of the row's nodes: every query is in some item
        tail_place = np.arange(tree.n_rows)
    segments = np.empty((4, n_nodes + len(tail_place)), np.int64)
    lo, hi, start, end = segments
    lo[:n_nodes], hi[:n_nodes], start[:n_nodes], end[:n_nodes] = tree.row_lo, tree.row_hi, tree.start, tree.end
    lo[n_nodes:], hi[n_nodes:] = tail_place, tail_place + 1
    start[n_nodes:], end[n_nodes:] = tree.tail_start[tail_place], kv_by_place[tail_place]
    length = end - start
    capacity = length.copy()
    capacity[n_nodes:] += room_tokens
    kv_off = _exclusive_sum(capacity)
    to_slots = kv_off - start  # from a KV position of the segment to its entry of the slot list
    spans = np.stack([order[lo], start, length, kv_off], 1).astype(np.int32)
    append_base = np.zeros(tree.n_rows, np.int32)
    append_base[order[tail_place]] = to_slots[n_nodes:]

    # queries of the segments: tokens of the rows in place order
    if qo_indptr is None:
        tokens = order.astype(np.int64)
        q_first, q_count = lo, hi - lo
    else:
        q_lens = np.diff(qo_indptr).astype(np.int64)[order]
        token_indptr = np.concatenate([[0], np.cumsum(q_lens)])
        tokens = _ranges(qo_indptr[order].astype(np.int64), q_lens)
        q_first, q_count = token_indptr[lo], token_indptr[hi] - token_indptr[lo]
    n_queries = len(tokens)

    # tiles: each segment's queries in equal parts of the class's size
    tile_class = policy.classes(length, q_count)
    tiles_of = -(-q_count // np.array(policy.tile_queries)[tile_class])
    seg, nth = _expand(tiles_of)
    step = -(-q_count // np.maximum(tiles_of, 1))
    tile_q = nth * step[seg]
    tile_count = np.minimum(step[seg], q_count[seg] - tile_q)
    tile_q += q_first[seg]
    if visible is None:
        a_from, a_to, b_len = start[seg], end[seg], np.zeros(0, np.int64)
    else:
        a_from, a_to, b_to, seen = _runs(tokens, tile_q, tile_count, start[seg], end[seg], visible)
        (live,) = ((tile_count > 0) & (seen | (seg >= n_nodes))).nonzero()
        seg, tile_q, tile_count = seg[live], tile_q[live], tile_count[live]
        a_from, a_to, b_len = a_from[live], a_to[live], (b_to - a_to)[live]
    slot_tile, nth = _expand(tile_count)
    slot_query = tokens[tile_q[slot_tile] + nth]
    if visible is None:
        win_lo = win_hi = np.zeros(len(slot_query), np.int32)
    else:
        win_lo, win_hi = (
            np.clip(v[slot_query] - a_to[slot_tile], 0, b_len[slot_tile]).astype(np.int32) for v in visible
        )

    # pieces: run A in near-equal parts; run B rides with the last
    a_len = a_to - a_from
    pieces = policy.pieces(a_len, tile_count, tile_class[seg])
    tile, piece = _expand(pieces)
    piece_len = (-(-a_len // pieces))[tile]
    done = piece * piece_len
    last = piece == pieces[tile] - 1
    tile_seg = seg[tile]
    columns = np.zeros((len(Col), len(tile)), np.int64)
    columns[Col.Q_OFF] = _exclusive_sum(tile_count)[tile]
    columns[Col.Q_CNT] = tile_count[tile]
    a_len = columns[Col.A_LEN] = np.minimum(piece_len, a_len[tile] - done)
    position = columns[Col.A_POS] = a_from[tile] + done
    columns[Col.A_OFF] = position + to_slots[tile_seg]
    columns[Col.PIECE] = piece
    item_class = columns[Col.TILE_CLASS] = tile_class[tile_seg]
    columns[Col.OPEN_ROW] = np.where(last & (tile_seg >= n_nodes), order[lo[tile_seg]], -1) if room_tokens else -1
    total_len = a_len
    if visible is not None:
        columns[Col.B_OFF] = to_slots[tile_seg] + a_to[tile]
        columns[Col.B_LEN] = np.where(last, b_len[tile], 0)
        total_len = a_len + columns[Col.B_LEN]
    longest_first = np.argsort((item_class << 32) - total_len, kind="stable")

    partial_rows, merge_indptr = _partials(slot_query, pieces[slot_tile], n_queries)
    return Plan(
        items=columns.T[longest_first].astype(np.int32),
        query_rows=slot_query.astype(np.int32),
        partial_rows=partial_rows,
        win_lo=win_lo,
        win_hi=win_hi,
        merge_indptr=merge_indptr,
        spans=spans,
        append_base=append_base,
        kv_capacity=int(capacity.sum()),
        kv_tokens_logical=int(kv_lens.sum()),
        kv_tokens_unique=kv_tokens_unique,
        kv_tokens_read=int(total_len.sum()),
    )


def _exclusive_sum(counts: Int64) -> Int64:
    return counts.cumsum() - counts


def _expand(counts: Int64) -> tuple[Int64, Int64]:
    """For ``counts[i]`` copies of each ``i``: the ``i`` of each copy, and its number among them."""
    index = np.arange(len(counts)).repeat(counts)
    return index, np.arange(len(index)) - _exclusive_sum(counts)[index]


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
    merge_indptr = np.zeros(n_queries + 1, np.int32)
    np.where(total > 1, total, 0).cumsum(out=merge_indptr[1:])
    by_query = slot_query.argsort(kind="stable")
    query, count = slot_query[by_query], pieces[by_query]
    before = _exclusive_sum(count) - _exclusive_sum(total)[query]
    partial_rows = np.empty(len(slot_query), np.int32)
    partial_rows[by_query] = np.where(total[query] > 1, merge_indptr[query] + before, -1)
    return partial_rows, merge_indptr
