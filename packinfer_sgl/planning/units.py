"""Units of KV: the canonical order in which the deterministic mode sums a row's KV, whatever runs beside it.

KV positions are cut at absolute multiples of a unit of U tokens. Each work item covers one unit, [kU, (k + 1)U), or the
last, shorter one of a row, and a query's partial results are merged in the order of positions. Where a shared span ends
within a unit, at the border of a block of the kernel, one item reads its part of the unit for all who share it, and
others go on from the state that it leaves. So a plan decides who computes a unit, never how (docs/architecture.md, "The
deterministic mode").
"""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree

UNIT_TOKENS = 512  # the shortest unit that is chosen; a multiple of every kernel's block
# Most memory for partial results of the rows for which a unit is chosen: units of 512 at 32 heads, 131,072 tokens.
# Graphs of more rows take more, and a number for each head of each result comes on top (a state's sum).
UNIT_BYTES = 5 << 28


def units_of(tokens: int, unit_tokens: int) -> int:
    """Units of a row of so many KV tokens; a row without any has one, which is empty."""
    return max(-(-tokens // unit_tokens), 1)


def choose_unit(shape: AttentionShape, *, max_rows: int, context_tokens: int, unit_bytes: int = UNIT_BYTES) -> int:
    """The shortest unit of UNIT_TOKENS times a power of two with which the partial results of ``max_rows`` rows of
    ``context_tokens`` KV tokens each take at most ``unit_bytes``, whatever they share."""
    row_bytes, unit_tokens = shape.qo_heads * (shape.head_dim + 1) * 4, UNIT_TOKENS
    while max_rows * units_of(context_tokens, unit_tokens) * row_bytes > unit_bytes and unit_tokens < context_tokens:
        unit_tokens *= 2
    return unit_tokens


def within_units(tree: PrefixTree, kv_lens: Int32, policy: TilePolicy) -> PrefixTree:
    """The same sharing, cut down so that nodes end where ``policy`` lets them: at whole units, or at whole blocks, once
    within each unit of a row. A row reads what it shares beyond them by itself.

    Where several nodes of a path end within one unit, the one stays that saves the most tokens.

    Args:
        kv_lens: [n_rows] int32 KV tokens of each row.
    """
    unit, block = policy.unit_tokens, policy.block_tokens or policy.unit_tokens
    shared = _shared_within_units(
        tree.row_order, tree.parent, tree.row_lo, tree.row_hi, tree.end, kv_lens, unit, block, policy.tile_queries[0]
    )
    return PrefixTree.from_neighbours(tree.row_order, shared)  # type: ignore[arg-type]


def are_in_units(tree: PrefixTree, kv_lens: Int32, policy: TilePolicy) -> bool:
    """Whether nodes end where ``within_units`` lets them, and no row ends where one of its nodes ends within a unit."""
    unit, block = policy.unit_tokens, policy.block_tokens or policy.unit_tokens
    return bool(nodes_are_in_units(tree.row_order, tree.start, tree.end, tree.tail_start, kv_lens, unit, block))


def steps_within_units(kv_lens: Int32, unit_tokens: int) -> int:
    """How many more tokens each row may get until the first of them begins a new unit."""
    return int((-kv_lens % unit_tokens).min(initial=unit_tokens))


@njit(cache=True)
def _shared_within_units(  # type: ignore[no-untyped-def]
    row_order, parent, row_lo, row_hi, node_end, kv_lens, unit, block, tile_queries
):
    """[n_rows - 1] leading tokens that places ``i`` and ``i + 1`` have in common in the tree of ``within_units``."""
    n = len(parent)
    end = np.empty(n, np.int64)  # of each node, in whole blocks, and before the last token of each row
    for i in range(n):
        least = kv_lens[row_order[row_lo[i]]]
        for place in range(row_lo[i] + 1, row_hi[i]):
            least = min(least, kv_lens[row_order[place]])
        end[i] = node_end[i] // block * block
        if end[i] == least and end[i] % unit:
            end[i] -= block
    in_one = np.zeros(n, np.bool_)  # whether a node and its parent end within the same unit
    for i in range(n):
        above = parent[i]
        in_one[i] = above >= 0 and end[i] % unit and end[above] % unit and end[i] // unit == end[above] // unit
    # most tokens of the unit that a node, or those below it that end there, save
    below, stays = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    for i in range(n - 1, -1, -1):
        rows = row_hi[i] - row_lo[i]
        saved = (rows - -(-rows // tile_queries)) * (end[i] % unit)
        stays[i] = saved >= below[i]
        if in_one[i]:
            below[parent[i]] += max(saved, below[i])
    shared = np.zeros(max(len(row_order) - 1, 0), np.int32)
    covered = np.zeros(n, np.bool_)
    for i in range(n):
        covered[i] = in_one[i] and (covered[parent[i]] or stays[parent[i]])
        if covered[i]:
            end[i] = end[parent[i]]
        elif not stays[i]:
            end[i] -= end[i] % unit
        shared[row_lo[i] : row_hi[i] - 1] = end[i]  # deeper nodes come later and overwrite
    return shared


@njit(cache=True)
def nodes_are_in_units(row_order, start, end, tail_start, kv_lens, unit, block):  # type: ignore[no-untyped-def]
    """The same of the fields of a tree."""
    for i in range(len(end)):
        within = end[i] % unit > 0
        if within and (end[i] % block or (start[i] % unit and start[i] // unit == end[i] // unit)):
            return False
    for place in range(len(row_order)):
        if tail_start[place] % unit and tail_start[place] == kv_lens[row_order[place]]:
            return False
    return True
