"""Which shared spans are worth reading once: a cost model, and the prefix tree pruned by it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packinfer_sgl.prefix_tree import Int32, PrefixTree

Float64 = npt.NDArray[np.float64]


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
        item_us: fixed time of a work item (all KV heads together).
        large_rows, small_rows: query rows (tokens x group size) of the two tile classes.
    """

    bytes_per_us: float
    reread_bytes_per_us: float
    flops_per_us: float
    item_us: float
    large_rows: int
    small_rows: int

    def item_cost_us(self, shape: AttentionShape, rows: Float64) -> tuple[Float64, Float64]:
        """Time of reading a span once for ``rows`` queries ([n] float64): [n] us per KV token, and [n] us besides."""
        query_rows = rows * shape.group_size
        tile = np.where(query_rows <= self.small_rows, self.small_rows, self.large_rows)
        tiles = np.ceil(query_rows / tile)
        kv_bytes = 2 * shape.kv_heads * shape.head_dim * shape.kv_bytes
        moved = kv_bytes / self.bytes_per_us + (tiles - 1) * (kv_bytes / self.reread_bytes_per_us)
        multiplied = tiles * tile * (4 * shape.kv_heads * shape.head_dim / self.flops_per_us)
        return np.maximum(moved, multiplied), tiles * self.item_us

    def tail_us_per_token(self, shape: AttentionShape) -> float:
        """Time of one more KV token of a row that reads alone, in us."""
        return float(self.item_cost_us(shape, np.ones(1))[0][0])

    def partial_us(self, shape: AttentionShape) -> float:
        """Time of writing and reading back one partial result of one query (float32 output and ``lse2``), in us."""
        return 2 * shape.qo_heads * (shape.head_dim + 1) * 4 / self.bytes_per_us


# H200: fitted to Triton prototypes on that device (bf16, random slots). CPU: kernels/reference.py on two cores, where
# gathering KV is what costs, whatever the number of queries.
H200 = CostModel(
    bytes_per_us=4.3e6, reread_bytes_per_us=5.5e6, flops_per_us=4.6e8, item_us=0.024, large_rows=64, small_rows=16
)
CPU = CostModel(
    bytes_per_us=6e3, reread_bytes_per_us=6e3, flops_per_us=math.inf, item_us=20.0, large_rows=1 << 20, small_rows=1
)


def prune(tree: PrefixTree, shape: AttentionShape, cost: CostModel, mode: str = "multi") -> PrefixTree:
    """The tree of the spans that are worth a work item of their own; the cheapest choice under ``cost``.

    A node that is not kept is read by each of its children and by each row that hangs on it: their spans begin
    earlier. The choice is exact: a dynamic programme over (node, ancestor at which the node's span would begin),
    deepest level first.

    Args:
        tree: who shares what.
        mode: ``multi`` keeps any set of nodes, ``single`` at most one on each row's path, ``off`` none.
    """
    n = tree.n_nodes
    if mode == "off" or n == 0:
        return _keep(tree, [False] * n, np.zeros(n, np.int32))
    rows = (tree.row_hi - tree.row_lo).astype(np.float64)
    has_parent = tree.parent >= 0
    alone = rows - np.bincount(tree.parent[has_parent], weights=rows[has_parent], minlength=n)  # rows in no child
    token_us, item_us = cost.item_cost_us(shape, rows)
    tail_us = cost.tail_us_per_token(shape)
    partial_us = cost.partial_us(shape) * rows
    if mode == "multi":
        # Costs are linear in the span, so if each node pays with all its children kept and its rows' only partials
        # its own, then no other choice is cheaper.
        children_us = np.bincount(tree.parent[has_parent], weights=token_us[has_parent], minlength=n)
        saved_us = (children_us + alone * tail_us - token_us) * (tree.end - tree.start)
        if (saved_us >= item_us + 2 * partial_us).all():
            return tree

    levels = int(tree.depth[-1]) + 1
    first_of_level = np.searchsorted(tree.depth, np.arange(levels + 1))
    # begin[i, j]: where the span of node i begins if its lowest kept ancestor stands right above depth j
    begin = np.zeros((n, levels))
    for d in range(levels):
        level = slice(first_of_level[d], first_of_level[d + 1])
        if d:
            begin[level, :d] = begin[tree.parent[level], :d]
        begin[level, d:] = tree.start[level, None]
    span = tree.end[:, None] - begin
    keep_us = span * token_us[:, None] + (item_us + partial_us)[:, None]
    keep_us[:, 0] += partial_us  # the first kept node on a path makes the tail a partial, too
    decline_us = span * (alone * tail_us)[:, None]
    if mode == "single":
        # nothing below a kept node is grouped: every row reads the rest of its chain alone
        below_us = rows * (tree.end - tree.start) * tail_us
        own_us = below_us.copy()
        for d in range(levels - 1, 0, -1):
            level = slice(first_of_level[d], first_of_level[d + 1])
            np.add.at(below_us, tree.parent[level], below_us[level])
        keep_us += (below_us - own_us)[:, None]
    for d in range(levels - 1, 0, -1):
        level = slice(first_of_level[d], first_of_level[d + 1])
        best = np.minimum(keep_us[level], decline_us[level])
        np.add.at(decline_us, tree.parent[level], best)
        if mode == "multi":
            np.add.at(keep_us, tree.parent[level], best[:, d, None])
    # top down, in plain Python: cheaper than NumPy calls for each level of a small tree
    cheaper = (keep_us <= decline_us).tolist()
    parent, depth = tree.parent.tolist(), tree.depth.tolist()
    kept = [False] * n
    state = [0] * n  # depth at which the node's span begins; -1 below the one node that mode single keeps
    for i in range(n):
        above = parent[i]
        if above >= 0:
            state[i] = state[above] if not kept[above] else depth[i] if mode == "multi" else -1
        kept[i] = state[i] >= 0 and cheaper[i][state[i]]
    return _keep(tree, kept, begin[np.arange(n), state].astype(np.int32))


def _keep(tree: PrefixTree, kept: list[bool], start: Int32) -> PrefixTree:
    """The tree of the ``kept`` nodes, whose spans now begin at ``start``."""
    n = tree.n_nodes
    parent, row_lo, row_hi, end = tree.parent.tolist(), tree.row_lo.tolist(), tree.row_hi.tolist(), tree.end.tolist()
    lowest = [-1] * (n + 1)  # lowest kept node at or above; the last entry stands for "no parent"
    depth = [-1] * (n + 1)
    for i in range(n):
        above = lowest[parent[i]]
        lowest[i] = i if kept[i] else above
        depth[i] = depth[above] + 1
    order = sorted((i for i in range(n) if kept[i]), key=lambda i: (depth[i], row_lo[i]))
    new_index = [-1] * (n + 1)
    tail_start = np.zeros(tree.n_rows, np.int32)
    for new, i in enumerate(order):
        new_index[i] = new
        tail_start[row_lo[i] : row_hi[i]] = end[i]
    index = np.array(order, np.intp)
    return PrefixTree(
        tree.row_order,
        np.array([new_index[lowest[parent[i]]] for i in order], np.int32),
        np.array([depth[i] for i in order], np.int32),
        tree.row_lo[index],
        tree.row_hi[index],
        start[index],
        tree.end[index],
        tail_start,
    )
