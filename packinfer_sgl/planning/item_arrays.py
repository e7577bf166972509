"""Work items as arrays: query slots, where partial results go, and the items in the order in which they are launched.

Compiled by numba: loops over tiles and splits, which as array operations took five times as long. numba invalidates its
cache per file, so compiled functions here must not call compiled functions of other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from packinfer_sgl.planning.plan import Chain, Col

N_COLS = len(Col)
HANDS_ON, GOES_ON = int(Chain.HANDS_ON), int(Chain.GOES_ON)
ITEM = np.dtype([(column.name.lower(), np.int32) for column in Col])


@njit
def item_arrays(  # type: ignore[no-untyped-def]
    row_order,
    segments,
    n_shared,
    queries,
    place_of,
    tiles,
    splits,
    n_splits,
    see_from,
    see_to,
    windows,
    n_classes,
    room_tokens,
    unit_tokens,
):
    """The fields of ``Plan`` from ``items`` to ``merge_indptr``, ``n_states`` and ``kv_tokens_read``.

    Args:
        row_order: ``PrefixTree.row_order``.
        segments, n_shared, queries, place_of, tiles, see_from, see_to, windows: see ``query_tiles``.
        splits, n_splits: see ``schedule.split_tiles``.
        n_classes: tile classes.
        room_tokens: see ``items.make_plan``.
        unit_tokens: see ``TilePolicy``.
    """
    slots = tiles.queries.sum()
    query_rows, partial_rows = np.empty(slots, np.int32), np.empty(slots, np.int32)
    win_lo, win_hi = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    merge_indptr = _merge_indptr(tiles, n_splits, queries, unit_tokens)
    # of each query, partial rows that belong to earlier tiles; of one without any, the row of its state
    used = np.zeros(len(queries), np.int32)
    n_states = 0
    slot_of = np.empty(len(tiles), np.int64)  # first slot of each tile
    has_partials = np.zeros(len(tiles), np.bool_)
    slot = 0
    for i, tile in enumerate(tiles):
        slot_of[i] = slot
        segment = segments[tile.segment]
        goes_on = _is_within(tile.a_from, unit_tokens)
        hands_on = tile.segment < n_shared and _is_within(tile.a_to, unit_tokens)
        for at in range(tile.first, tile.first + tile.queries):
            query = queries[at]
            query_rows[slot] = query
            if merge_indptr[query + 1] > merge_indptr[query]:
                used[query] -= goes_on  # the results of the unit belong where its state is
                partial_rows[slot] = merge_indptr[query] + used[query]
                used[query] += n_splits[i]
                has_partials[i] = True
            elif goes_on or hands_on:
                if not goes_on:
                    used[query] = merge_indptr[-1] + n_states
                    n_states += 1
                partial_rows[slot] = -2 - used[query]
            else:
                partial_rows[slot] = -1
            if windows:
                begin = see_from[query]
                if tile.inline:
                    segment = segments[n_shared + place_of[at]]
                    begin = segment.start
                win_lo[slot] = min(max(begin + segment.to_slots - tile.b_at, 0), tile.b_len)
                win_hi[slot] = min(max(see_to[query] + segment.to_slots - tile.b_at, 0), tile.b_len)
            slot += 1

    item_of, class_indptr = _order(splits, tiles, n_classes, unit_tokens)
    columns = np.empty((len(splits), N_COLS), np.int32)
    items = columns.reshape(-1).view(ITEM)
    kv_tokens_read = 0
    for i, split in enumerate(splits):
        tile, item = tiles[split.tile], items[item_of[i]]
        segment = segments[tile.segment]
        is_last = split.nth == n_splits[split.tile] - 1
        item.q_off, item.q_cnt, item.tile_class = slot_of[split.tile], tile.queries, tile.tile_class
        item.a_off, item.a_len, item.a_pos = segment.to_slots + split.begin, split.end - split.begin, split.begin
        # run B comes with the last split
        item.b_off, item.b_len = tile.b_at, tile.b_len if is_last else 0
        item.split = split.nth if has_partials[split.tile] else -1
        is_open = room_tokens > 0 and is_last and tile.segment >= n_shared
        item.open_row = row_order[segment.lo] if is_open else -1
        item.next_item = item_of[i + 1] if i + 1 < len(splits) and splits[i + 1].cta == split.cta else -1
        item.chain = 0
        if _is_within(split.begin, unit_tokens):
            item.chain, item.tile_class = GOES_ON, n_classes - 1
        if is_last and tile.segment < n_shared and _is_within(split.end, unit_tokens):
            item.chain |= HANDS_ON
        kv_tokens_read += item.a_len + item.b_len
    return columns, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, n_states, kv_tokens_read


@njit
def _is_within(position, unit_tokens):  # type: ignore[no-untyped-def]
    """Whether a KV position lies within a unit, not at its border."""
    return unit_tokens > 0 and position % unit_tokens > 0


@njit
def _order(splits, tiles, n_classes, unit_tokens):  # type: ignore[no-untyped-def]
    """Index of each split among the items, and ``Plan.class_indptr``."""
    key = np.empty(len(splits), np.int64)
    class_indptr = np.zeros(n_classes + 1, np.int32)
    for i, split in enumerate(splits):
        begins_cta = i == 0 or splits[i - 1].cta != split.cta
        tile_class = tiles[split.tile].tile_class
        if _is_within(split.begin, unit_tokens):
            tile_class = n_classes - 1
        key[i] = ((tile_class if begins_cta else n_classes) << 40) - split.cost
        if begins_cta:
            class_indptr[tile_class + 1] += 1
    item_of = np.empty(len(splits), np.int64)
    item_of[key.argsort(kind="mergesort")] = np.arange(len(splits))
    return item_of, class_indptr.cumsum().astype(np.int32)


@njit
def _merge_indptr(tiles, n_splits, queries, unit_tokens):  # type: ignore[no-untyped-def]
    """``Plan.merge_indptr``: partial rows of one query are consecutive, and a query with a single result needs none."""
    results = np.zeros(len(queries), np.int64)
    for i, tile in enumerate(tiles):
        for query in queries[tile.first : tile.first + tile.queries]:
            results[query] += n_splits[i] - _is_within(tile.a_from, unit_tokens)
    merge_indptr = np.zeros(len(queries) + 1, np.int32)
    for query in range(len(queries)):
        merge_indptr[query + 1] = merge_indptr[query] + (results[query] if results[query] > 1 else 0)
    return merge_indptr
