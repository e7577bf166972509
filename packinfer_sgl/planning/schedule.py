"""How the KV of query tiles is split, so that no CTA works long after the others.

Three schedules, by what the kernel of a tile class does: waves of splits, Stream-K where a class is alone, and a queue
from which CTAs take items (``SplitTiming.dynamic``). The deterministic mode has none: splits are units of KV.

Compiled by numba: loops over tiles and splits, which as array operations took five times as long. numba invalidates its
cache per file, so what is cached here must take no function or constant from another file (``items``).
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

# Candidates for the longest split in waves, in tokens.
SPLIT_CANDIDATES = np.array([256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 1 << 30])
# Candidates for the number of splits of the longest tile in a queue. A count is skipped unless it could be at least 1 %
# faster than the best so far.
COUNT_CANDIDATES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64])
MIN_GAIN = 1.01

# Split ``nth`` of a tile is tokens [begin, end) of its run A, and, if it is the last, run B. From this split on, CTA
# ``cta`` has as much to do as for ``cost`` tokens of a full tile; splits of one CTA are neighbours.
SPLIT = np.dtype([(name, np.int64) for name in ("tile", "nth", "begin", "end", "cta", "cost")])


@njit
def split_tiles(tiles, policy):  # type: ignore[no-untyped-def]
    """Split the KV of all tiles.

    Args:
        tiles: [n_tiles] of ``query_tiles.TILE``.
        policy: ``TilePolicy.table``.

    Returns:
        [n] of ``SPLIT``, and [n_tiles] int64 splits of each tile.
    """
    if policy[0].unit_tokens > 0:
        return _unit_splits(tiles, policy[0].unit_tokens)
    n_splits, n_ctas, share = _choose(tiles, policy)
    if n_ctas > 0:
        return _stream_k(tiles, n_ctas, share, policy)
    return _even_splits(tiles, n_splits, policy), n_splits


@njit(cache=True)
def makespan_us(item_us: np.ndarray, heads: int, ctas: int) -> float:
    """When ``ctas`` CTAs that take the next item when they are free are done with all heads of all items, in the order
    of ``item_us`` ([n] us of an item of one head)."""
    return max(_finish_us(item_us, heads, ctas))  # type: ignore[no-any-return]


@njit(cache=True)
def extend_makespan_us(  # type: ignore[no-untyped-def]
    items, columns, group_size, warpgroup_rows, warpgroups, full_us, saved_us, block, block_part, width, item_us, heads,
    ctas,
):  # fmt: skip
    """The same of the items of an extend plan, longest first.

    Args:
        items: ``Plan.items``.
        columns: those of the queries, and of the tokens of run A and run B.
        group_size: query heads of a KV head.
        warpgroup_rows, warpgroups: rows of a warpgroup, and how many a tile has.
        full_us, saved_us: time of a block, and what less it takes if one warpgroup only has rows.
        block, block_part: KV tokens of a block, and what part they are of one that these times were measured with.
        width: times as long as was measured.
        item_us: time of an item besides its blocks.
    """
    us, (q_cnt, a_len, b_len) = np.empty(len(items)), columns
    for i in range(len(items)):
        idle = warpgroups - -(-items[i, q_cnt] * group_size // warpgroup_rows)
        block_us = full_us - saved_us * idle / max(warpgroups - 1, 1)
        blocks = -(-(items[i, a_len] + items[i, b_len]) // block) * block_part
        us[i] = blocks * (block_us * width) + item_us
    return max(_finish_us(-np.sort(-us), heads, ctas))


@njit
def _finish_us(item_us, heads, ctas):  # type: ignore[no-untyped-def]
    """The same for each CTA, in no order."""
    busy = [0.0] * ctas
    for us in item_us:
        for _ in range(heads):
            heapq.heapreplace(busy, busy[0] + us)
    return busy


@njit
def _choose(tiles, policy):  # type: ignore[no-untyped-def]
    """Splits of each tile ([n_tiles]); or, for Stream-K, the number of CTAs (else 0) and the tokens of a share."""
    n_splits = np.zeros(len(tiles), np.int64)
    n_ctas, share = 0, 0.0
    for tile_class in range(len(policy)):
        at = np.flatnonzero(tiles.tile_class == tile_class)
        if len(at) == 0:
            continue
        mine, timing = tiles[at], policy[tile_class]
        if timing.dynamic > 0:
            n_splits[at] = _splits_for_queue(mine, timing)
        else:
            longest = _longest_for_waves(mine, timing)
            if len(mine) == len(tiles):
                longest, n_ctas, share = _stream_k_or_waves(mine, timing, longest)
            n_splits[at] = np.maximum(-(-(mine.a_to - mine.a_from) // longest), 1)
    return n_splits, n_ctas, share


@njit
def _longest_for_waves(tiles, timing):  # type: ignore[no-untyped-def]
    """The longest split, in tokens, with which the tiles of a class are done first.

    Work is spread over waves of ``parallel`` splits. A last wave that is not full costs as much as a full one, so good
    lengths are sharp minima, not a slope.
    """
    tokens = tiles.a_to - tiles.a_from
    best, best_us = timing.max_split_tokens, np.inf
    for longest in SPLIT_CANDIDATES:
        if np.isnan(timing.parallel):
            break
        splits, partials, busy_us, longest_us = 0, 0, 0.0, 0.0
        for i in range(len(tiles)):
            n = max(-(-tokens[i] // longest), 1)
            split_us = timing.fixed_us + timing.token_us * tokens[i] / n
            splits += n
            busy_us += n * split_us / timing.parallel
            longest_us = max(longest_us, split_us)
            if n > 1:
                partials += n * tiles[i].queries
        waves = splits / timing.parallel
        us = max(busy_us * np.ceil(waves) / waves, longest_us) + partials * timing.partial_us
        if us < best_us:
            best, best_us = min(longest, timing.max_split_tokens), us
        if longest >= tokens.max():
            break
    return best


@njit
def _splits_for_queue(tiles, timing):  # type: ignore[no-untyped-def]
    """Splits of each tile where CTAs take items from a queue, longest first.

    A candidate splits all tiles that are longer than a part of the longest one, or only those of them that are left
    after a number of whole rounds of the CTAs.
    """
    heads = int(timing.dynamic)
    ctas = round(timing.parallel * heads)
    tokens = tiles.a_to - tiles.a_from
    is_half = 2 * tiles.queries <= timing.tile_queries
    token_us = timing.token_us * np.where(is_half, timing.half_tile_factor, 1.0)
    longest_first = (-tokens).argsort(kind="mergesort")
    fewest = np.maximum(-(-tokens // timing.max_split_tokens), 1)
    best, best_us, least_us = fewest, np.inf, 0.0
    for most in COUNT_CANDIDATES:
        if best_us < MIN_GAIN * least_us:
            break
        longest = max(-(-tokens.max() // most), 1)
        if most > 1 and longest < 2 * timing.block:
            break
        if longest > timing.max_split_tokens:
            continue
        rounds = int((tokens > longest).sum() / timing.parallel)
        for whole in range(rounds, -1, -1):
            if 0 < whole < rounds - 1:
                continue
            count = np.maximum(-(-tokens // longest), 1)
            unsplit = longest_first[: int(whole * timing.parallel)]
            count[unsplit] = fewest[unsplit]
            if most > 1 and count.sum() > max(4 * timing.parallel, 2 * len(tiles)):
                continue
            blocks = np.ceil((tokens + tiles.b_len) / count / timing.block)
            each_us = timing.fixed_us + token_us * timing.block * blocks
            partials_us = (count * tiles.queries)[count > 1].sum() * timing.partial_us
            balanced_us = (each_us * count).sum() * heads / ctas  # if all CTAs end together
            if most == 1:
                least_us = balanced_us
            if MIN_GAIN * (balanced_us + partials_us) > best_us:
                continue
            us = max(_finish_us(-np.sort(-np.repeat(each_us, count)), heads, ctas)) + partials_us
            if us < best_us:
                best, best_us = count, us
    return best


@njit
def _stream_k_or_waves(tiles, timing, longest):  # type: ignore[no-untyped-def]
    """How to split a class that runs alone: into splits of at most ``longest`` tokens, not at all, or by Stream-K.

    Returns:
        The longest split in tokens; CTAs of Stream-K, or 0 for none; the tokens of a share, an item's fixed time
        counted as tokens.
    """
    n = int(timing.stream_k_ctas)
    if n == 0:
        return longest, 0, 0.0
    best_us = _waves_us(tiles, timing, longest)
    if timing.max_split_tokens >= (tiles.a_to - tiles.a_from).max():
        unsplit_us = _waves_us(tiles, timing, timing.max_split_tokens)
        if unsplit_us <= best_us:
            best_us, longest = unsplit_us, timing.max_split_tokens
    fixed = timing.fixed_us / timing.token_us
    share = ((tiles.a_to - tiles.a_from + tiles.b_len).sum() + (len(tiles) + n) * fixed) / n
    token_us = timing.token_us * n / timing.parallel
    share_us = share / (1 - np.exp(-timing.bw_saturation)) * token_us
    stream_k_us = share_us + 2 * n * tiles.queries.max() * timing.partial_us
    if stream_k_us < best_us and share <= timing.max_split_tokens:
        return longest, n, share + tiles.grows.sum() / n
    return longest, 0, 0.0


@njit
def _waves_us(tiles, timing, longest):  # type: ignore[no-untyped-def]
    """When ``stream_k_ctas`` CTAs are done with splits of at most ``longest`` tokens, longest first."""
    n = int(timing.stream_k_ctas)
    tokens = tiles.a_to - tiles.a_from
    count = np.maximum(-(-tokens // longest), 1)
    length = -np.sort(-np.repeat(tokens / count, count)) + timing.fixed_us / timing.token_us
    launched = int(timing.launched)
    # in tokens; a launched CTA has every ``launched``-th split, and begins when one that runs ends
    work = np.array([length[i::launched].sum() for i in range(min(len(length), launched))])
    us, last = 0.0, 0.0
    for i, end in enumerate(sorted(_finish_us(work, 1, n))):
        running = (n - i) / n
        # fewer CTAs draw less from memory, but not in proportion
        us += (end - last) * running / (1 - np.exp(-timing.bw_saturation * running))
        last = end
    partials = (count * tiles.queries)[count > 1].sum()
    return us * timing.token_us * n / timing.parallel + partials * timing.partial_us


@njit
def _even_splits(tiles, n_splits, policy):  # type: ignore[no-untyped-def]
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
        if timing.dynamic > 0:  # a block that only what may grow begins would be paid for at each step
            block = int(timing.block)
            even = -(-tokens // n_splits[i])
            length = min(length, -(-even // block) * block)
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


@njit
def _unit_splits(tiles, unit_tokens):  # type: ignore[no-untyped-def]
    """One split for each unit of ``unit_tokens`` positions in which a tile has tokens, each with its own CTA
    (``units``).

    The tiles of one segment, which are neighbours, follow each other unit by unit: those that run at the same time
    read the same KV.

    Returns:
        The splits, and how many each tile has.
    """
    n_splits = np.empty(len(tiles), np.int64)
    for i, tile in enumerate(tiles):
        n_splits[i] = max(-(-tile.a_to // unit_tokens) - tile.a_from // unit_tokens, 1)
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
                unit = tile.a_from // unit_tokens + nth
                split.begin = max(unit * unit_tokens, tile.a_from)
                split.end = min((unit + 1) * unit_tokens, tile.a_to)
                split.cost = split.end - split.begin
                n += 1
        first = last
    return splits, n_splits


@njit
def _stream_k(tiles, n_ctas, share, policy):  # type: ignore[no-untyped-def]
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
