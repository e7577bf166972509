"""From a pruned prefix tree to a plan: segments of the slot list, query tiles, their splits, and the work items.

numba's cache of a compiled function sees changes of the function's own file only, not of the functions and constants
that it takes from others. So the stages, which stand in several files, are not cached by themselves: one compiled
function calls them, and has the contents of all those files in the key of its cache.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from packinfer_sgl.planning.item_arrays import item_arrays
from packinfer_sgl.planning.plan import Plan, pack
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.planning.query_tiles import query_tiles
from packinfer_sgl.planning.schedule import split_tiles
from packinfer_sgl.planning.units import are_in_units

STAGES = (query_tiles, split_tiles, item_arrays, pack)
_NONE, _NO_NODES = np.zeros(0, np.int32), np.zeros((5, 0), np.int32)


def sources(stages: tuple[Any, ...]) -> str:
    """A hash of the files in which these compiled functions stand."""
    files = (sys.modules[stage.__module__].__file__ or "" for stage in stages)
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _compiled(key: str) -> Any:
    """The compiled function; ``key`` becomes part of that of numba's cache."""

    @njit(cache=True)
    def plan_block(  # type: ignore[no-untyped-def]
        row_order, nodes, tail_start, once, whole, whole_tail, kv_lens, qo_indptr, see_from, see_to, windows, policy,
        room_tokens,
    ):  # fmt: skip
        """``Plan.block``, ``Plan.kv_capacity`` and ``Plan.kv_tokens_read``.

        Args:
            nodes: of the tree of kept spans row_lo, row_hi, start and end.
            once, whole, whole_tail: see ``query_tiles``.
            see_from, see_to: ``make_plan``'s ``visible``; [0] without ``windows``.
            policy: ``TilePolicy.table``.
        """
        key  # noqa: B018
        row_lo, row_hi, start, end = nodes
        segments, n_shared, spans, append_base, kv_capacity, queries, place_of, tiles = query_tiles(
            row_order, row_lo, row_hi, start, end, tail_start, once, whole, whole_tail, kv_lens, qo_indptr,
            see_from, see_to, windows, policy, room_tokens,
        )  # fmt: skip
        splits, n_splits = split_tiles(tiles, policy)
        items, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, n_states, read = item_arrays(
            row_order, segments, n_shared, queries, place_of, tiles, splits, n_splits, see_from, see_to, windows,
            len(policy), room_tokens, policy[0].unit_tokens,
        )  # fmt: skip
        block = pack(
            items, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, spans,
            append_base if room_tokens > 0 else append_base[:0], windows, n_states,
        )  # fmt: skip
        return block, kv_capacity, read

    return plan_block


plan_block = _compiled(sources(STAGES))


def make_plan(
    tree: PrefixTree,
    kv_lens: Int32,
    policy: TilePolicy,
    *,
    kv_tokens_unique: int,
    qo_indptr: Int32 | None = None,
    visible: tuple[Int32, Int32] | None = None,
    room_tokens: int = 0,
    listed_once: PrefixTree | None = None,
) -> Plan:
    """Cut the tree's spans and the rows' tails into work items.

    Args:
        tree: the spans to read once (``groups.prune``).
        kv_lens: [n_rows] int32 KV tokens of each row; at least the end of the row's lowest node.
        policy: tile sizes and how tiles are split.
        kv_tokens_unique: ``PrefixTree.unique_tokens`` of the tree before pruning.
        qo_indptr: [n_rows + 1] int32 query tokens of each row; default: one each (decode).
        visible: [n_queries] int32 first KV position that each query sees, and the one after its last (causal,
            sliding window); default: all of its row.
        room_tokens: how many tokens each tail may grow while the plan lives (decode only).
        listed_once: the tree before pruning: no KV token that it shows as shared then stands twice in the slot list,
            which costs partial results (``query_tiles``). Default: spans that no node keeps are listed for
            each row that reads them.

    Raises:
        ValueError: the policy has units, and the tree has nodes that end elsewhere (``units.are_in_units``), or the
            batch has windows.
    """
    windowed = visible is not None
    see_from, see_to = visible or (_NONE, _NONE)
    if (unit := policy.unit_tokens) and (
        windowed or not all(are_in_units(t, kv_lens, policy) for t in (tree, listed_once or tree))
    ):
        raise ValueError(
            f"units of {unit} tokens are for nodes that end where they may ({policy.block_tokens or unit} tokens) and "
            "whose rows see all of them"
        )
    if qo_indptr is None:
        qo_indptr = np.arange(tree.n_rows + 1, dtype=np.int32)
    whole, whole_tail = _NO_NODES, _NONE
    if (w := listed_once) is not None:
        whole, whole_tail = np.stack([w.parent, w.row_lo, w.row_hi, w.start, w.end]), w.tail_start
    block, kv_capacity, read = plan_block(
        tree.row_order, (tree.row_lo, tree.row_hi, tree.start, tree.end), tree.tail_start, listed_once is not None,
        whole, whole_tail, kv_lens, qo_indptr, see_from, see_to, windowed, policy.table, room_tokens,
    )  # fmt: skip
    return Plan.of_block(block, kv_capacity, read, sum(kv_lens.tolist()), kv_tokens_unique, windowed)
