"""KV splits: the tokens of each query tile, laid out as the work of CTAs.

Compiled by numba: loops over tiles and splits, which as array operations took five times as long. numba invalidates its
cache per file, so compiled functions here must not call compiled functions of other files.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Split ``nth`` of a tile is tokens [begin, end) of its run A, and, if it is the last, run B. From this split on, CTA
# ``cta`` has as much to do as for ``cost`` tokens of a full tile; splits of one CTA are neighbours.
SPLIT = np.dtype([(name, np.int64) for name in ("tile", "nth", "begin", "end", "cta", "cost")])


@njit(cache=True)
def even_splits(tiles, n_splits, policy):  # type: ignore[no-untyped-def]
    """``n_splits[i]`` splits of almost equal length of each tile ``i``, in the order of the tiles, each with its CTA.

    The last split of a tail that grows is shorter by what it may grow: where CTAs end together, a longer one would
    delay each step.
    """
    splits = np.empty(n_splits.sum(), SPLIT)
    n = 0
    for i, tile in enumerate(tiles):
        timing = policy[tile.tile_class]
        tokens, grows = tile.a_to - tile.a_from, tile.grows
        if np.isnan(timing.parallel):  # no timings: splits are as long as they may be, nothing is balanced
            grows = 0
        length = -(-(tokens + grows) // n_splits[i])
        if (n_splits[i] - 1) * length >= tokens:  # the last split would have no tokens
            length = -(-tokens // n_splits[i])
        for nth in range(n_splits[i]):
            split = splits[n]
            split.tile, split.nth, split.cta = i, nth, n
            split.begin = tile.a_from + nth * length
            split.end = min(split.begin + length, tile.a_to)
            split.cost = split.end - split.begin + (tile.b_len if nth == n_splits[i] - 1 else 0)
            if timing.dynamic > 0 and 2 * tile.queries <= timing.tile_queries:
                split.cost = int(split.cost * timing.half_tile_factor)
            n += 1
    return splits


@njit(cache=True)
def unit_splits(tiles, unit_tokens):  # type: ignore[no-untyped-def]
    """One split for each unit of ``unit_tokens`` positions of each tile, each with its own CTA (``units``).

    The tiles of one segment, which are neighbours, follow each other unit by unit: those that run at the same time
    read the same KV.

    Returns:
        The splits, and how many each tile has.
    """
    n_splits = np.empty(len(tiles), np.int64)
    for i, tile in enumerate(tiles):
        n_splits[i] = max(-(-(tile.a_to - tile.a_from) // unit_tokens), 1)
    splits = np.empty(n_splits.sum(), SPLIT)
    n, first = 0, 0
    while first < len(tiles):
        last = first
        while last < len(tiles) and tiles[last].segment == tiles[first].segment:
            last += 1
        for nth in range(n_splits[first]):
            for i in range(first, last):
                tile, split = tiles[i], splits[n]
                split.tile, split.nth, split.cta = i, nth, n
                split.begin = tile.a_from + nth * unit_tokens
                split.end = min(split.begin + unit_tokens, tile.a_to)
                split.cost = split.end - split.begin
                n += 1
        first = last
    return splits, n_splits


@njit(cache=True)
def stream_k(tiles, n_ctas, share, policy):  # type: ignore[no-untyped-def]
    """All tiles' KV divided into equal shares, one for each CTA (Stream-K, https://arxiv.org/abs/2301.03598).

    Invariant: the tiles' work lies on one line in their order, each split with its tokens and an item's fixed time
    counted as tokens. ``done`` is the end of what has been laid out, and CTA ``s`` owns [s * share, (s + 1) * share). A
    split belongs to the CTA in whose share it begins, and ends with the share or with its tile, whichever comes first.
    Exceptions spare splits of fewer than ``least`` tokens: a split begins the next share if less than half of what
    ``least`` tokens cost is left of this one, has at least ``least`` tokens if its tile has, and takes the rest of its
    tile if at most ``least`` tokens would be left over. So no share but the last ends more than ``least`` tokens late
    or ``(fixed + least) / 2`` early.

    Args:
        tiles: all of one class.
        share: length of a share on that line.
        policy: ``TilePolicy.table``.

    Returns:
        The splits, and how many each tile has.
    """
    splits = np.empty(len(tiles) + n_ctas, SPLIT)
    n_splits = np.zeros(len(tiles), np.int64)
    timing = policy[tiles[0].tile_class]
    fixed = timing.fixed_us / timing.token_us
    least = int(3 * fixed)  # tokens; a shorter split costs more than it balances
    done, at_share, n = 0.0, 0, 0
    cta, share_of_cta = -1, -1  # shares too short for a split have no CTA
    for i, tile in enumerate(tiles):
        begin = tile.a_from
        while True:
            left = tile.a_to - begin
            while at_share < n_ctas - 1 and (at_share + 1) * share - done < (fixed + min(left, least)) / 2:
                at_share += 1
            room = (at_share + 1) * share - done - fixed
            length = left
            to_boundary = max(int(room), least, 1)
            if to_boundary < left and at_share < n_ctas - 1 and left + tile.grows > room + least:
                length = to_boundary
            if at_share != share_of_cta:
                cta, share_of_cta = cta + 1, at_share
            split = splits[n]
            split.tile, split.nth, split.cta = i, n_splits[i], cta
            split.begin, split.end = begin, begin + length
            split.cost = length + (tile.b_len if length == left else 0)
            n, n_splits[i], done, begin = n + 1, n_splits[i] + 1, done + fixed + split.cost, begin + length
            if begin == tile.a_to:
                done += tile.grows
                break
            at_share += 1
    splits = splits[:n]
    for i in range(n - 2, -1, -1):
        if splits[i].cta == splits[i + 1].cta:
            splits[i].cost += splits[i + 1].cost
    return splits, n_splits
