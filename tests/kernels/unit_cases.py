"""Batches of the deterministic mode, and the same rows in other company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from cases import Case, random_case

from packinfer_sgl.kernels.tiles import Tile, unit_tiles
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.planning.units import within_units


def unit_case(seed: int, *, unit_tokens: int, tiles: tuple[Tile, ...] | None = None, **more) -> Case:
    """``random_case`` in units, by the tile classes of the mode."""
    group, kv_heads, head_dim = more.get("group", 4), more.get("kv_heads", 2), more.get("head_dim", 64)
    kv_bytes = (more.get("kv_dtype") or more.get("dtype", torch.float32)).itemsize
    shape = AttentionShape(group * kv_heads, kv_heads, head_dim, kv_bytes)
    return random_case(seed, unit_tokens=unit_tokens, tiles=tiles or unit_tiles(shape), **more)


def in_company(
    case: Case,
    rows: Sequence[int],
    unit_tokens: int,
    *,
    grouping: str = "multi",
    once: bool = False,
    room: int = 0,
    parts: bool = True,
) -> Case:
    """Some rows of ``case``, in this order (a row may stand there twice), planned as a batch of their own.

    Args:
        grouping: see ``prune``.
        once: whether each token stands once in the slot list.
        room: tokens that each row may get under the plan.
        parts: whether spans may end within units.
    """
    kv_heads, head_dim = case.k.shape[-2:]
    shape = AttentionShape(case.q.shape[1], kv_heads, head_dim, case.k.element_size())
    slots = [case.slots[row] for row in rows]
    lens = np.array([len(x) for x in slots], np.int32)
    indptr = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    # the newest token of a row that grows is its own
    whole = PrefixTree.from_slots(indptr, torch.cat(slots).numpy().astype(np.int32), 1, lens - (room > 0))
    queries = max(1, case.tiles[0].rows // shape.group_size)
    policy = TilePolicy(
        (queries, queries), 1 << 30, unit_tokens=unit_tokens, block_tokens=case.tiles[0].tokens if parts else 0
    )
    tree = within_units(whole, lens, policy)
    plan = make_plan(
        prune(tree, shape, H200.decode_cost.in_units(), grouping), lens, policy,
        kv_tokens_unique=whole.unique_tokens(lens), room_tokens=room, listed_once=tree if once else None,
    )  # fmt: skip
    at = torch.tensor(rows, device=case.q.device)
    return replace(
        case, plan=plan, q=case.q[at].contiguous(), slots=slots, new=[1] * len(rows), kv_lens=case.kv_lens[at],
        pool_rows=case.pool_rows[at],
    )  # fmt: skip
