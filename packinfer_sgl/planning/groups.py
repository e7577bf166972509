"""Which shared spans are worth reading once: a cost model, and the prefix tree pruned by it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree


@dataclass(frozen=True)
class AttentionShape:
    """What one layer's attention moves and multiplies.

    Attributes:
        qo_heads, kv_heads: heads of this tensor-parallel rank.
        head_dim: elements of one head.
        kv_bytes: bytes of one KV element.
    """

    qo_heads: int
    kv_heads: int
    head_dim: int
    kv_bytes: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.qo_heads // self.kv_heads


@dataclass(frozen=True)
class CostModel:
    """How long a device takes for work items; a model, so only ratios matter.

    Attributes:
        bytes_per_us: read bandwidth of device memory.
        reread_bytes_per_us: bandwidth of reading the same KV again shortly after (from a cache).
        flops_per_us: rate of the attention tile's products, padding counted as work.
        item_us: fixed time of a work item of one KV head.
        partial_us: fixed time of one partial result of one query, written and merged.
        partial_bytes_per_us: rate of writing and reading back partial results.
        large_rows, small_rows: query rows (tokens x group size) of the two tile classes.
        small_as_rows: so many rows of a large tile take as long as a small one.
        least_saving: how many times fewer KV tokens a decode step must read with groups than without. Rows that share
            nothing can be divided into equal shares, which the other terms do not know.
    """

    bytes_per_us: float
    reread_bytes_per_us: float
    flops_per_us: float
    item_us: float
    partial_us: float
    partial_bytes_per_us: float
    large_rows: int
    small_rows: int
    small_as_rows: float
    least_saving: float

    def tiles(self, shape: AttentionShape, queries: int) -> tuple[int, float]:
        """Into how many tiles so many queries go, and the rows of a large tile that take as long as each."""
        query_rows = queries * shape.group_size
        if query_rows <= self.small_rows:
            return -(-query_rows // self.small_rows), self.small_as_rows
        return -(-query_rows // self.large_rows), self.large_rows

    def read_us(self, shape: AttentionShape, queries: int) -> tuple[float, float]:
        """Time of reading a span once for so many queries: us per KV token, and us besides."""
        tiles, rows = self.tiles(shape, queries)
        kv_bytes = 2 * shape.kv_heads * shape.head_dim * shape.kv_bytes
        moved = kv_bytes / self.bytes_per_us + (tiles - 1) * (kv_bytes / self.reread_bytes_per_us)
        multiplied = tiles * rows * (4 * shape.kv_heads * shape.head_dim / self.flops_per_us)
        return max(moved, multiplied), tiles * shape.kv_heads * self.item_us

    def partials_us(self, shape: AttentionShape) -> float:
        """Time of one partial result of one query (float32 output and ``lse2`` of all heads), in us."""
        return self.partial_us + 2 * shape.qo_heads * (shape.head_dim + 1) * 4 / self.partial_bytes_per_us


# H200: fitted to kernels/packed.py (bf16, random slots; scripts/fit_costs.py). CPU: kernels/reference.py on two
# cores, where gathering KV is what costs, whatever the number of queries.
H200 = CostModel(
    bytes_per_us=4.81e06,
    reread_bytes_per_us=5.5e6,
    flops_per_us=2.79e08,
    item_us=0.02,
    partial_us=0,
    partial_bytes_per_us=3.02e06,
    large_rows=64,
    small_rows=16,
    small_as_rows=16,
    # of 27 batches of unequal rows with one prefix, those that read 1.04 to 1.33 times less took 0.87 to 1.09 of the
    # speed without groups, those that read 1.55 times less or more 1.06 to 1.35
    least_saving=1.4,
)
CPU = CostModel(
    bytes_per_us=6e3,
    reread_bytes_per_us=6e3,
    flops_per_us=math.inf,
    item_us=5.0,
    partial_us=0.0,
    partial_bytes_per_us=6e3,
    large_rows=1 << 20,
    small_rows=1,
    small_as_rows=1,
    least_saving=1.0,
)


def prune(
    tree: PrefixTree,
    shape: AttentionShape,
    cost: CostModel,
    mode: str = "multi",
    q_lens: Int32 | None = None,
    kv_lens: Int32 | None = None,
    partials_us: float | None = None,
) -> PrefixTree:
    """The tree of the spans that are worth a work item of their own; the cheapest choice under ``cost``.

    A node that is not kept is read by each of its children and by each row that hangs on it: their spans begin
    earlier. The choice is exact: a dynamic programme over (node, position at which its span would begin).

    Args:
        tree: who shares what.
        mode: ``multi`` keeps any set of nodes, ``single`` at most one on each row's path, ``off`` none.
        q_lens: [n_rows] int32 query tokens of each row; default: one each (decode).
        kv_lens: [n_rows] int32 KV tokens of each row: no node is kept where all together save less than
            ``CostModel.least_saving``. Default: keep them.
        partials_us: price of one partial result of one query; default: its time by ``cost``.
    """
    if mode == "off" or tree.n_nodes == 0:
        return _without_nodes(tree)
    queries, own_us = tree.row_hi - tree.row_lo, cost.read_us(shape, 1)[0] * (tree.row_hi - tree.row_lo)
    if q_lens is not None:
        at_place = q_lens[tree.row_order]
        each, which = np.unique(at_place, return_inverse=True)
        us_of = np.array([cost.read_us(shape, n)[0] for n in each.tolist()])[which]
        queries, own_us = (
            before[tree.row_hi] - before[tree.row_lo]
            for before in (np.concatenate([[0], np.cumsum(x)]) for x in (at_place, us_of))
        )
    prices = {n: cost.read_us(shape, n) for n in set(queries.tolist())}
    kept, begin = _choose(
        tree.parent,
        tree.depth,
        tree.start,
        tree.end,
        np.array([prices[n] for n in queries.tolist()]),
        own_us,
        queries * (cost.partials_us(shape) if partials_us is None else partials_us),
        mode == "multi",
    )
    nodes = _keep(tree.parent, tree.row_lo, tree.row_hi, tree.end, tree.n_rows, kept, begin)
    pruned = PrefixTree(tree.row_order, *nodes)
    if kv_lens is not None:
        tiles = [cost.tiles(shape, rows)[0] for rows in (pruned.row_hi - pruned.row_lo).tolist()]
        read = (pruned.end - pruned.start) @ np.array(tiles, np.int64) + (kv_lens - pruned.tail_start).sum()
        if kv_lens.sum() < cost.least_saving * read:
            return _without_nodes(tree)
    return pruned


def _without_nodes(tree: PrefixTree) -> PrefixTree:
    none = np.zeros(0, np.int32)
    return PrefixTree(tree.row_order, none, none, none, none, none, none, np.zeros(tree.n_rows, np.int32))


@njit(cache=True)
def _choose(parent, depth, start, end, read_us, own_us, partials_us, multi):  # type: ignore[no-untyped-def]
    """Which nodes to keep ([n_nodes] bool), and where their spans then begin ([n_nodes] int32).

    Of each node's rows ``read_us`` ([n_nodes, 2]) is ``CostModel.read_us`` of all their queries, ``own_us`` the time of
    one KV token if each row reads it alone, ``partials_us`` that of one partial result of each query. Place
    ``at[i] + k`` of a table stands for node ``i`` with the ``k`` nodes above it declined, so that its span would begin
    where that of its ``k``-th ancestor does.
    """
    n = len(parent)
    at = (depth + 1).cumsum() - (depth + 1)
    places = 0 if n == 0 else at[-1] + depth[-1] + 1
    alone_us = own_us.copy()  # of the rows in no child
    for i in range(n):
        if parent[i] >= 0:
            alone_us[parent[i]] -= own_us[i]
    below_us = np.zeros(n)  # the least that all below costs if the node is kept
    declined_us = np.zeros(places)  # and if it is not
    keep = np.zeros(places, np.bool_)
    for i in range(n - 1, -1, -1):
        above, ancestor = parent[i], i
        kept_above_us = 0.0
        for k in range(depth[i] + 1):
            begin = start[ancestor]
            ancestor = parent[ancestor]
            # the first kept node on a path makes the row's tail a partial, too
            keep_us = below_us[i] + (end[i] - begin) * read_us[i, 0] + read_us[i, 1]
            keep_us += partials_us[i] * (2 if begin == 0 else 1)
            decline_us = declined_us[at[i] + k] + (end[i] - begin) * alone_us[i]
            # mode single: a node is kept under declined ones only
            keep[at[i] + k] = keep_us <= decline_us and (multi or begin == 0)
            best_us = keep_us if keep[at[i] + k] else decline_us
            if k > 0:
                declined_us[at[above] + k - 1] += best_us
            else:
                kept_above_us = best_us
        if above >= 0:
            if not multi:  # below the kept node every row reads alone
                kept_above_us = below_us[i] + (end[i] - start[i]) * own_us[i]
            below_us[above] += kept_above_us

    kept = np.zeros(n, np.bool_)
    begins = start.copy()
    declined_above = np.zeros(n, np.int32)
    has_kept_above = np.zeros(n, np.bool_)
    for i in range(n):
        above = parent[i]
        if above >= 0:
            has_kept_above[i] = kept[above] or has_kept_above[above]
            if not kept[above]:
                declined_above[i], begins[i] = declined_above[above] + 1, begins[above]
        kept[i] = keep[at[i] + declined_above[i]] and (multi or not has_kept_above[i])
    return kept, begins


@njit(cache=True)
def _keep(parent, row_lo, row_hi, end, n_rows, kept, begins):  # type: ignore[no-untyped-def]
    """The ``kept`` nodes, with spans from ``begins``, as the fields of a PrefixTree from ``parent`` on."""
    n = len(parent)
    lowest, depth = np.full(n, -1, np.int32), np.full(n, -1, np.int32)  # of the kept node at or above
    for i in range(n):
        if parent[i] >= 0:
            lowest[i], depth[i] = lowest[parent[i]], depth[parent[i]]
        if kept[i]:
            lowest[i], depth[i] = i, depth[i] + 1
    nodes = kept.nonzero()[0]
    nodes = nodes[(depth[nodes].astype(np.int64) * n_rows + row_lo[nodes]).argsort()]
    new_index = np.full(n, -1, np.int32)
    new_parent = np.full(len(nodes), -1, np.int32)
    tail_start = np.zeros(n_rows, np.int32)
    for new, i in enumerate(nodes):
        new_index[i] = new
        if parent[i] >= 0 and lowest[parent[i]] >= 0:
            new_parent[new] = new_index[lowest[parent[i]]]
        tail_start[row_lo[i] : row_hi[i]] = end[i]  # deeper nodes come later and overwrite
    return new_parent, depth[nodes], row_lo[nodes], row_hi[nodes], begins[nodes], end[nodes], tail_start
