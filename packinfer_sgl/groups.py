"""Which shared spans are worth reading once: a cost model, and the prefix tree pruned by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import add

from packinfer_sgl.prefix_tree import PrefixTree


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
    """

    bytes_per_us: float
    reread_bytes_per_us: float
    flops_per_us: float
    item_us: float
    partial_us: float
    partial_bytes_per_us: float
    large_rows: int
    small_rows: int

    def read_us(self, shape: AttentionShape, rows: int) -> tuple[float, float]:
        """Time of reading a span once for ``rows`` queries: us per KV token, and us besides."""
        query_rows = rows * shape.group_size
        tile = self.small_rows if query_rows <= self.small_rows else self.large_rows
        tiles = -(-query_rows // tile)
        kv_bytes = 2 * shape.kv_heads * shape.head_dim * shape.kv_bytes
        moved = kv_bytes / self.bytes_per_us + (tiles - 1) * (kv_bytes / self.reread_bytes_per_us)
        multiplied = tiles * tile * (4 * shape.kv_heads * shape.head_dim / self.flops_per_us)
        return max(moved, multiplied), tiles * shape.kv_heads * self.item_us

    def tail_us_per_token(self, shape: AttentionShape) -> float:
        """Time of one more KV token of a row that reads alone, in us."""
        return self.read_us(shape, 1)[0]

    def partials_us(self, shape: AttentionShape) -> float:
        """Time of one partial result of one query (float32 output and ``lse2`` of all heads), in us."""
        return self.partial_us + 2 * shape.qo_heads * (shape.head_dim + 1) * 4 / self.partial_bytes_per_us


# H200: fitted to kernels/packed.py (bf16, random slots; scripts/tune_kernels.py). CPU: kernels/reference.py on two
# cores, where gathering KV is what costs, whatever the number of queries.
H200 = CostModel(
    bytes_per_us=4.3e6,
    reread_bytes_per_us=5.5e6,
    flops_per_us=4.6e8,
    item_us=0.02,
    partial_us=0.004,
    partial_bytes_per_us=1.65e6,
    large_rows=64,
    small_rows=16,
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
)


def prune(tree: PrefixTree, shape: AttentionShape, cost: CostModel, mode: str = "multi") -> PrefixTree:
    """The tree of the spans that are worth a work item of their own; the cheapest choice under ``cost``.

    A node that is not kept is read by each of its children and by each row that hangs on it: their spans begin
    earlier. The choice is exact: a dynamic programme over (node, position at which its span would begin).

    Args:
        tree: who shares what.
        mode: ``multi`` keeps any set of nodes, ``single`` at most one on each row's path, ``off`` none.
    """
    # Plain Python: a tree has tens of nodes, and NumPy calls for each of its levels cost more than a loop.
    n, multi = tree.n_nodes, mode == "multi"
    if mode == "off" or n == 0:
        return _keep(tree, [False] * n, [0] * n)
    parent, start, end = tree.parent.tolist(), tree.start.tolist(), tree.end.tolist()
    rows = (tree.row_hi - tree.row_lo).tolist()
    prices = {r: cost.read_us(shape, r) for r in set(rows)}
    tail_us, partial_us = cost.tail_us_per_token(shape), cost.partials_us(shape)
    alone = rows.copy()  # rows in no child
    for r, above in zip(rows, parent):
        if above >= 0:
            alone[above] -= r
    alone_us = [r * tail_us for r in alone]
    least_us = alone_us.copy()  # the least that a token of the span costs if the node is not kept
    # A node that pays against that pays whatever is chosen above and below it: costs are linear in the span.
    sure = [False] * n
    for i in range(n - 1, -1, -1):
        token_us, item_us = prices[rows[i]]
        declined_us = least_us[i]
        sure[i] = multi and (declined_us - token_us) * (end[i] - start[i]) >= item_us + 2 * rows[i] * partial_us
        if parent[i] >= 0:
            least_us[parent[i]] += token_us if token_us < declined_us else declined_us
    if all(sure):
        return tree

    # The others, and below them: `begins` are the positions where the node's span may begin (first if its parent is
    # kept, then as the parent's), with the cost of the subtree down to sure nodes, for each. Below a sure node there
    # is one such place and nothing to choose, and its subtree adds the same to every choice above.
    begins: list[list[int]] = [[s] for s in start] if multi else [[0]] * n
    keep_us: list[list[float]] = [[]] * n
    decline_us: list[list[float]] = [[]] * n
    rest_us = [0.0] * n  # single: every row reads the rest of its chain alone
    unsure = [i for i in range(n) if not sure[i] or (parent[i] >= 0 and not sure[parent[i]])]
    for i in unsure:
        above = parent[i]
        if multi and above >= 0 and not sure[above]:
            begins[i] = [start[i], *begins[above]]
        token_us, item_us = prices[rows[i]]
        partials_us = rows[i] * partial_us
        # the first kept node on a path makes the row's tail a partial, too
        keep_us[i] = [(end[i] - b) * token_us + item_us + (partials_us if b else 2 * partials_us) for b in begins[i]]
        decline_us[i] = [(end[i] - b) * alone_us[i] for b in begins[i]]
    for i in reversed(unsure):
        above = parent[i]
        if not multi:
            keep_us[i][0] += rest_us[i]
        if above < 0 or sure[above]:
            continue
        best = keep_us[i] if sure[i] else list(map(min, keep_us[i], decline_us[i]))
        if multi:
            first = best[0]
            keep_us[above] = [us + first for us in keep_us[above]]
            best = best[1:]
        else:
            rest_us[above] += rest_us[i] + rows[i] * (end[i] - start[i]) * tail_us
        decline_us[above] = list(map(add, decline_us[above], best))

    kept = sure.copy()
    place = [0] * n  # index into begins; -1 below the one node that mode single keeps
    for i in unsure:
        above = parent[i]
        if above >= 0:
            if multi:
                place[i] = 0 if kept[above] else place[above] + 1
            elif kept[above] or place[above] < 0:
                place[i] = -1
        kept[i] = sure[i] or (place[i] >= 0 and keep_us[i][place[i]] <= decline_us[i][place[i]])
    if multi and all(kept):
        return tree
    return _keep(tree, kept, [begins[i][place[i]] for i in range(n)])


def _keep(tree: PrefixTree, kept: list[bool], start: list[int]) -> PrefixTree:
    """The tree of the ``kept`` nodes, whose spans now begin at ``start``."""
    n = tree.n_nodes
    parent, row_lo, row_hi, end = tree.parent.tolist(), tree.row_lo.tolist(), tree.row_hi.tolist(), tree.end.tolist()
    lowest = [-1] * (n + 1)  # lowest kept node at or above; the last entry stands for "no parent"
    depth = [-1] * (n + 1)
    tail_start = [0] * tree.n_rows
    for i, above in enumerate(parent):
        at = lowest[above]
        if kept[i]:
            lowest[i], depth[i] = i, depth[at] + 1
            tail_start[row_lo[i] : row_hi[i]] = [end[i]] * (row_hi[i] - row_lo[i])
        else:
            lowest[i] = at
    order = sorted((i for i in range(n) if kept[i]), key=lambda i: (depth[i], row_lo[i]))
    new_index = [-1] * (n + 1)
    for new, i in enumerate(order):
        new_index[i] = new
    nodes = [(new_index[lowest[parent[i]]], depth[i], row_lo[i], row_hi[i], start[i], end[i]) for i in order]
    return PrefixTree.of_nodes(tree.row_order, nodes, tail_start)
