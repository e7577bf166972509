"""Which shared spans are worth reading once: the prefix tree, pruned by a cost model."""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree

_NOT_GIVEN = np.zeros(0, np.int32)


def prune(
    tree: PrefixTree,
    shape: AttentionShape,
    cost: CostModel,
    mode: str = "multi",
    q_lens: Int32 | None = None,
    kv_lens: Int32 | None = None,
    partials_us: float | None = None,
) -> PrefixTree:
    """The tree of the spans that are worth work items of their own: the cheapest choice under ``cost``.

    Spans below a node that is not kept begin earlier: each child, and each row that ends there, reads the node's
    tokens itself. The choice is exact: a dynamic programme over (node, position at which its span would begin).

    Args:
        tree: who shares what.
        mode: ``multi`` keeps any set of nodes, ``single`` at most one on each row's path, ``off`` none.
        q_lens: [n_rows] int32 query tokens of each row; default: one each (decode).
        kv_lens: [n_rows] int32 KV tokens of each row: if all kept nodes together do not make a decode step read
            ``CostModel.least_saving`` times fewer KV tokens, none is kept. Default: no such test.
        partials_us: price of one partial result of one query; default: its time by ``cost``.
    """
    if mode == "off" or tree.n_nodes == 0:
        return without_nodes(tree)
    of_rows = _NOT_GIVEN if q_lens is None else q_lens
    most = tree.n_rows if q_lens is None else sum(q_lens.tolist())
    nodes = tree.parent, tree.depth, tree.row_lo, tree.row_hi, tree.start, tree.end
    fields = prune_nodes(
        tree.row_order, nodes, of_rows,
        cost.prices(shape, 1 << most.bit_length()), cost.partials_us(shape) if partials_us is None else partials_us,
        mode == "multi", _NOT_GIVEN if kv_lens is None else kv_lens, cost.least_saving,
    )  # fmt: skip
    return PrefixTree(tree.row_order, *fields)


def without_nodes(tree: PrefixTree) -> PrefixTree:
    """The tree with nothing to read together."""
    none = _NOT_GIVEN
    return PrefixTree(tree.row_order, none, none, none, none, none, none, np.zeros(tree.n_rows, np.int32))


@njit(cache=True)
def prune_nodes(  # type: ignore[no-untyped-def]
    row_order, nodes, q_lens, prices, partial_us, multi, kv_lens, least_saving
):
    """The fields of ``prune``'s tree from ``parent`` on.

    Args:
        nodes: the tree's fields from ``parent`` to ``end``.
        q_lens, kv_lens: as for ``prune``; [0] for none.
        prices: ``CostModel.prices``.
        partial_us: time of one partial result of one query.
    """
    parent, depth, row_lo, row_hi, start, end = nodes
    n_rows, n = len(row_order), len(parent)
    read_us, own_us, partials_us = np.empty((n, 2)), np.empty(n), np.empty(n)
    before, before_us = np.zeros(n_rows + 1, np.int64), np.zeros(n_rows + 1)
    for place in range(len(q_lens)):
        queries = q_lens[row_order[place]]
        before[place + 1] = before[place] + queries
        before_us[place + 1] = before_us[place] + prices[queries, 0]
    for i in range(n):
        lo, hi = row_lo[i], row_hi[i]
        queries, own_us[i] = hi - lo, prices[1, 0] * (hi - lo)
        if len(q_lens) > 0:
            queries, own_us[i] = before[hi] - before[lo], before_us[hi] - before_us[lo]
        read_us[i, 0], read_us[i, 1], partials_us[i] = prices[queries, 0], prices[queries, 1], queries * partial_us
    kept, begins = _choose(parent, depth, start, end, read_us, own_us, partials_us, multi)
    if len(kv_lens) > 0:
        # all kept nodes together must make a decode step read ``least_saving`` times fewer KV tokens
        held, read = 0, 0
        tail_start = np.zeros(n_rows, np.int64)
        for i in range(n):
            if kept[i]:
                read += (end[i] - begins[i]) * int(prices[row_hi[i] - row_lo[i], 2])
                tail_start[row_lo[i] : row_hi[i]] = end[i]  # deeper nodes come later and overwrite
        for row in range(n_rows):
            held += kv_lens[row]
            read += kv_lens[row] - tail_start[row]
        if held < least_saving * read:
            kept[:] = False
    return _keep(parent, row_lo, row_hi, end, n_rows, kept, begins)


@njit
def _choose(parent, depth, start, end, read_us, own_us, partials_us, multi):  # type: ignore[no-untyped-def]
    """Which nodes to keep ([n_nodes] bool), and where their spans then begin ([n_nodes] int32).

    Entry ``at[i] + k`` of a table stands for node ``i`` with the ``k`` nodes above it declined: its span then begins
    where that of its ``k``-th ancestor does.

    Args:
        read_us: [n_nodes, 2] ``CostModel.read_us`` of all queries of the node's rows.
        own_us: [n_nodes] time of one KV token if each of the node's rows reads it alone.
        partials_us: [n_nodes] time of one partial result of each query of the node's rows.
        multi: whether a path may have several kept nodes.
    """
    n = len(parent)
    at = (depth + 1).cumsum() - (depth + 1)
    entries = 0 if n == 0 else at[-1] + depth[-1] + 1
    alone_us = own_us.copy()  # of the rows that are in no child
    for i in range(n):
        if parent[i] >= 0:
            alone_us[parent[i]] -= own_us[i]
    below_us = np.zeros(n)  # least cost of everything below the node if it is kept
    declined_us = np.zeros(entries)  # the same if it is declined
    keep = np.zeros(entries, np.bool_)
    for i in range(n - 1, -1, -1):
        above, ancestor = parent[i], i
        kept_above_us = 0.0
        for k in range(depth[i] + 1):
            begin = start[ancestor]
            ancestor = parent[ancestor]
            # with the first kept node on its path, the result of a row's tail becomes a partial, too
            keep_us = below_us[i] + (end[i] - begin) * read_us[i, 0] + read_us[i, 1]
            keep_us += partials_us[i] * (2 if begin == 0 else 1)
            decline_us = declined_us[at[i] + k] + (end[i] - begin) * alone_us[i]
            # mode single: only a node whose ancestors are all declined may be kept
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


@njit
def _keep(parent, row_lo, row_hi, end, n_rows, kept, begins):  # type: ignore[no-untyped-def]
    """The ``kept`` nodes, with spans from ``begins``, as the fields of a PrefixTree from ``parent`` on."""
    n = len(parent)
    lowest, depth = np.full(n, -1, np.int32), np.full(n, -1, np.int32)  # of the lowest kept node at or above
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
