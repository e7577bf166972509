"""Units of KV: the canonical order in which the deterministic mode sums a row's KV, whatever runs beside it.

KV positions are cut at absolute multiples of a unit of U tokens. Each work item covers one unit, [kU, (k + 1)U), or the
last, shorter one of a row, and a query's partial results are merged in the order of positions. So a plan decides who
computes a unit, never how (docs/architecture.md, "The deterministic mode").
"""

from __future__ import annotations

import numpy as np

from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree

UNIT_TOKENS = 512  # the shortest unit that is chosen; a multiple of every kernel's block
UNIT_BYTES = 5 << 28  # most memory for the partial results of captured graphs: units of 512 at 32 heads, 131,072 tokens


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


def whole_units(tree: PrefixTree, unit_tokens: int) -> PrefixTree:
    """The same sharing, cut down to whole units: nodes begin and end at multiples of ``unit_tokens``, and a row reads
    the up to ``unit_tokens - 1`` tokens that it shares beyond them by itself."""
    shared = np.zeros(max(tree.n_rows - 1, 0), np.int32)  # tokens that places i and i + 1 have in common
    for lo, hi, end in zip(tree.row_lo.tolist(), tree.row_hi.tolist(), tree.end.tolist()):
        shared[lo : hi - 1] = end  # deeper nodes come later and overwrite
    return PrefixTree.from_neighbours(tree.row_order.tolist(), (shared // unit_tokens * unit_tokens).tolist())


def steps_within_units(kv_lens: Int32, unit_tokens: int) -> int:
    """How many more tokens each row may get until the first of them begins a new unit."""
    return int((-kv_lens % unit_tokens).min(initial=unit_tokens))
