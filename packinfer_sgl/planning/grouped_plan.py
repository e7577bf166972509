"""From a prefix tree to a plan in one compiled call: prune it, cut it into tiles and splits, and lay out the items.

Where planning runs once in a while, nothing of it is in a cache, and each compiled call, each array that crosses it and
each numpy function cost more than the loops. So the stages are called from one compiled function (cached as in
``items``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from packinfer_sgl.planning import items
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.groups import prune_nodes
from packinfer_sgl.planning.items import plan_block, sources
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree, count_unique
from packinfer_sgl.planning.units import nodes_are_in_units

STAGES = (prune_nodes, count_unique, nodes_are_in_units, plan_block)
_NONE = np.zeros(0, np.int32)


def grouped_plan(
    tree: PrefixTree,
    kv_lens: Int32,
    shape: AttentionShape,
    cost: CostModel,
    policy: TilePolicy,
    *,
    mode: str,
    q_lens: Int32 | None,
    n_queries: int,
    saving_lens: Int32 | None,
    partials_us: float | None,
    visible: tuple[Int32, Int32] | None,
    room_tokens: int,
    once: bool,
    unique_tokens: int | None,
    needs_groups: bool,
) -> tuple[PrefixTree, Plan | None, bool]:
    """``make_plan`` of ``prune``'s tree.

    Args:
        tree: who shares what; where the policy has units, cut down to them (``units.within_units``).
        mode, q_lens, partials_us: see ``prune``; ``saving_lens``: its ``kv_lens``.
        n_queries: sum of ``q_lens``.
        kv_lens, visible, room_tokens: see ``make_plan``.
        once: whether no token that ``tree`` shows as shared stands twice in the slot list.
        unique_tokens: ``Plan.kv_tokens_unique``; None: what ``tree`` says.
        needs_groups: whether there is a plan only if any span is kept.

    Returns:
        The spans that are kept; the plan, None if it needs groups and has none; and whether any span would be kept but
        for ``saving_lens``.

    Raises:
        ValueError: as ``make_plan``.
    """
    windowed, n_rows = visible is not None, tree.n_rows
    see_from, see_to = visible or (_NONE, _NONE)
    kept, (block, kv_capacity, read, logical, unique), too_little = _grouped_plan(
        tree.block, kv_lens, _NONE if q_lens is None else q_lens, see_from, see_to, windowed,
        cost.prices(shape, 1 << n_queries.bit_length()),
        cost.partials_us(shape) if partials_us is None else partials_us,
        mode != "off", mode == "multi", saving_lens is not None, cost.least_saving, policy.table, room_tokens, once,
        -1 if unique_tokens is None else unique_tokens, needs_groups,
    )  # fmt: skip
    plan = Plan.of_block(block, kv_capacity, read, logical, unique, windowed) if len(block) else None
    return PrefixTree.of_block(kept, n_rows), plan, too_little


def _compiled(key: str) -> Any:
    """The compiled function; ``key`` becomes part of that of numba's cache."""

    @njit(cache=True)
    def grouped_plan(  # type: ignore[no-untyped-def]
        block, kv_lens, q_lens, see_from, see_to, windows,
        prices, partial_us, groups, multi, saves, least_saving, policy, room_tokens, once, unique_tokens,
        needs_groups,
    ):  # fmt: skip
        key  # noqa: B018
        n_rows, none = len(kv_lens), np.zeros(0, np.int32)
        row_order, tail_start, nodes = block[:n_rows], block[n_rows : 2 * n_rows], block[2 * n_rows :]
        nodes = nodes.reshape((6, len(nodes) // 6))
        parent, depth, row_lo, row_hi, start, end = nodes[0], nodes[1], nodes[2], nodes[3], nodes[4], nodes[5]
        qo_indptr = np.arange(n_rows + 1).astype(np.int32)
        if len(q_lens) > 0:
            for row in range(n_rows):
                qo_indptr[row + 1] = qo_indptr[row] + q_lens[row]
        tree = parent, depth, row_lo, row_hi, start, end
        kept = none, none, none, none, none, none, np.zeros(n_rows, np.int32)
        unit = policy[0].unit_tokens
        if unit > 0:
            block_tokens = policy[0].block_tokens if policy[0].block_tokens > 0 else unit
            if windows or not nodes_are_in_units(row_order, start, end, tail_start, kv_lens, unit, block_tokens):
                raise ValueError("units are for nodes that end where they may and whose rows see all of them")
        too_little = False
        if groups and len(parent) > 0:
            kept = prune_nodes(
                row_order, tree, q_lens, prices, partial_us, multi, kv_lens if saves else none, least_saving
            )
            if saves and len(kept[0]) == 0:
                without = prune_nodes(row_order, tree, q_lens, prices, partial_us, multi, none, least_saving)
                too_little = len(without[0]) > 0
        n_kept = len(kept[0])
        of_kept = np.empty(2 * n_rows + 6 * n_kept, np.int32)
        of_kept[:n_rows], of_kept[n_rows : 2 * n_rows] = row_order, kept[6]
        for i, field in enumerate(kept[:6]):
            begin = 2 * n_rows + i * n_kept
            of_kept[begin : begin + n_kept] = field
        if needs_groups and n_kept == 0:
            return of_kept, (none, 0, 0, 0, 0), too_little
        whole = np.empty((5, len(parent) if once else 0), np.int32)
        if once:
            whole[0], whole[1:] = parent, nodes[2:]
        packed, kv_capacity, read = plan_block(
            row_order, kept[2:6], kept[6], once, whole, tail_start, kv_lens, qo_indptr, see_from, see_to, windows,
            policy, room_tokens,
        )  # fmt: skip
        unique = unique_tokens if unique_tokens >= 0 else count_unique(start, end, tail_start, kv_lens)
        return of_kept, (packed, kv_capacity, read, kv_lens.sum(), unique), too_little

    return grouped_plan


_grouped_plan = _compiled(sources((*STAGES, *items.STAGES)))
