"""KV pieces: how the tokens of each query tile are divided, so that no program works long after the others.

Compiled by numba: loops over tiles and pieces, which as array operations took five times as long. What is compiled is
kept on disk for as long as its file does not change, so functions of this file call none of another.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit

# Tokens [begin, end) of a tile's run A, the ``nth`` piece of it, in a program that from here on takes as long as for
# ``cost`` tokens of a full tile. The last piece of a tail that grows is shorter than the others by what it may grow:
# where programs are done together, a longer one would delay each step.
PIECE = np.dtype([(name, np.int64) for name in ("tile", "nth", "begin", "end", "program", "cost")])
# into how many pieces the longest tile may go, where programs take the next when they are free; and how much faster
# that must be able to become to be looked into
COUNTS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64])
CLEARLY = 1.01
# candidate lengths of a piece elsewhere
CHUNKS = np.array([256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 1 << 30])


@njit(cache=True)
def cut_pieces(tiles, policy):  # type: ignore[no-untyped-def]
    """Cut the tiles' KV tokens; sets ``pieces`` of each and returns all, in the order of the tiles."""
    n_shares, share = 0, 0.0
    for tile_class in range(len(policy)):
        at = np.flatnonzero(tiles.tile_class == tile_class)
        if len(at) == 0:
            continue
        mine, timing = tiles[at], policy[tile_class]
        if timing.taken > 0:
            count = _count_taken(mine, timing)
        else:
            chunk = _best_chunk(mine, timing)
            if len(mine) == len(tiles):
                chunk, n_shares, share = _best_alone(mine, timing, chunk)
            count = np.maximum(-(-(mine.a_to - mine.a_from) // chunk), 1)
        for i, n in zip(at, count):
            tiles[i].pieces = n
    if n_shares > 0:
        return _in_shares(tiles, n_shares, share, policy[tiles[0].tile_class])
    pieces = np.empty(tiles.pieces.sum(), PIECE)
    n = 0
    for i, tile in enumerate(tiles):
        tokens, grows = tile.a_to - tile.a_from, tile.grows
        if np.isnan(policy[tile.tile_class].parallel):  # pieces are as long as they may be, not as fast as they can
            grows = 0
        length = -(-(tokens + grows) // tile.pieces)
        if (tile.pieces - 1) * length >= tokens:  # the last piece would have no tokens
            length = -(-tokens // tile.pieces)
        for nth in range(tile.pieces):
            piece = pieces[n]
            piece.tile, piece.nth, piece.program = i, nth, n
            piece.begin = tile.a_from + nth * length
            piece.end = min(piece.begin + length, tile.a_to)
            piece.cost = piece.end - piece.begin + (tile.b_len if nth == tile.pieces - 1 else 0)
            timing = policy[tile.tile_class]
            if _half(tile, timing):
                piece.cost = int(piece.cost * timing.half)
            n += 1
    return pieces


@njit
def _best_chunk(tiles, timing):  # type: ignore[no-untyped-def]
    """The longest piece with which the tiles of a class are done first.

    Work is spread over waves of ``parallel`` pieces. A last wave that is not full costs as much as a full one, so good
    lengths are sharp minima, not a slope.
    """
    tokens = tiles.a_to - tiles.a_from
    best_chunk, best_us = timing.chunk_tokens, np.inf
    for chunk in CHUNKS:
        if np.isnan(timing.parallel):
            break
        pieces, partials, busy_us, longest_us = 0, 0, 0.0, 0.0
        for i in range(len(tiles)):
            n = max(-(-tokens[i] // chunk), 1)
            piece_us = timing.fixed_us + timing.token_us * tokens[i] / n
            pieces += n
            busy_us += n * piece_us / timing.parallel
            longest_us = max(longest_us, piece_us)
            if n > 1:
                partials += n * tiles[i].queries
        waves = pieces / timing.parallel
        us = max(busy_us * np.ceil(waves) / waves, longest_us) + partials * timing.partial_us
        if us < best_us:
            best_chunk, best_us = min(chunk, timing.chunk_tokens), us
        if chunk >= tokens.max():
            break
    return best_chunk


@njit
def _count_taken(tiles, timing):  # type: ignore[no-untyped-def]
    """Into how many pieces each tile goes, where whichever program is free takes the next piece, the longest first.

    What is longer than a part of the longest tile is cut, all of it or what is left after the last whole rounds.
    """
    heads = int(timing.taken)
    programs = round(timing.parallel * heads)
    tokens = tiles.a_to - tiles.a_from
    token_us = timing.token_us * np.where(_half(tiles, timing), timing.half, 1.0)
    longest_first = (-tokens).argsort(kind="mergesort")
    fewest = np.maximum(-(-tokens // timing.chunk_tokens), 1)
    best, best_us, least_us = fewest, np.inf, 0.0
    for most in COUNTS:
        if best_us < CLEARLY * least_us:
            break
        chunk = max(-(-tokens.max() // most), 1)
        if most > 1 and chunk < 2 * timing.block:
            break
        if chunk > timing.chunk_tokens:
            continue
        rounds = int((tokens > chunk).sum() / timing.parallel)
        for whole in range(rounds, -1, -1):
            if 0 < whole < rounds - 1:
                continue
            count = np.maximum(-(-tokens // chunk), 1)
            stay = longest_first[: int(whole * timing.parallel)]
            count[stay] = fewest[stay]
            if most > 1 and count.sum() > max(4 * timing.parallel, 2 * len(tiles)):
                continue
            blocks = np.ceil((tokens + tiles.b_len) / count / timing.block)
            each_us = timing.fixed_us + token_us * timing.block * blocks
            partials_us = (count * tiles.queries)[count > 1].sum() * timing.partial_us
            all_us = (each_us * count).sum() * heads / programs  # if all programs are done at once
            if most == 1:
                least_us = all_us
            if CLEARLY * (all_us + partials_us) > best_us:
                continue
            busy = [0.0] * programs
            for us in -np.sort(-np.repeat(each_us, count)):
                for _ in range(heads):
                    heapq.heapreplace(busy, busy[0] + us)
            us = max(busy) + partials_us
            if us < best_us:
                best, best_us = count, us
    return best


@njit
def _half(tiles, timing):  # type: ignore[no-untyped-def]
    """Whether half of a tile's rows suffice, where that makes it faster: of one tile, or of each."""
    return (timing.taken > 0) & (2 * tiles.queries <= timing.tile_queries)


@njit
def _best_alone(tiles, timing, chunk):  # type: ignore[no-untyped-def]
    """How to cut the tiles of a class that runs alone: into pieces of at most ``chunk`` tokens, not at all, or into
    equal shares, so that no program is left when others are done (Stream-K, https://arxiv.org/abs/2301.03598).

    Returns:
        The longest piece; the number of shares, or 0 for none; the tokens of a share, an item's fixed time counted as
        tokens.
    """
    n = int(timing.shares)
    if n == 0:
        return chunk, 0, 0.0
    best_us = _pieces_us(tiles, timing, chunk)
    if timing.chunk_tokens >= (tiles.a_to - tiles.a_from).max():
        uncut_us = _pieces_us(tiles, timing, timing.chunk_tokens)
        if uncut_us <= best_us:
            best_us, chunk = uncut_us, timing.chunk_tokens
    fixed = timing.fixed_us / timing.token_us
    share = ((tiles.a_to - tiles.a_from + tiles.b_len).sum() + (len(tiles) + n) * fixed) / n
    token_us = timing.token_us * n / timing.parallel
    shares_us = share / (1 - np.exp(-timing.drain)) * token_us + 2 * n * tiles.queries.max() * timing.partial_us
    if shares_us < best_us and share <= timing.chunk_tokens:
        return chunk, n, share + tiles.grows.sum() / n
    return chunk, 0, 0.0


@njit
def _pieces_us(tiles, timing, chunk):  # type: ignore[no-untyped-def]
    """When ``shares`` programs are done with pieces of at most ``chunk`` tokens, longest first."""
    n = int(timing.shares)
    tokens = tiles.a_to - tiles.a_from
    count = np.maximum(-(-tokens // chunk), 1)
    length = -np.sort(-np.repeat(tokens / count, count)) + timing.fixed_us / timing.token_us
    launched = int(timing.launched)
    ends = [0.0] * n  # in tokens that each program reads while all run
    for i in range(min(len(length), launched)):  # a program begins when another ends
        heapq.heapreplace(ends, ends[0] + length[i::launched].sum())
    us, last = 0.0, 0.0
    for i, end in enumerate(sorted(ends)):
        running = (n - i) / n
        # fewer programs draw less from memory, but not in proportion
        us += (end - last) * running / (1 - np.exp(-timing.drain * running))
        last = end
    partials = (count * tiles.queries)[count > 1].sum()
    return us * timing.token_us * n / timing.parallel + partials * timing.partial_us


@njit
def _in_shares(tiles, n_shares, share, timing):  # type: ignore[no-untyped-def]
    """``cut_pieces`` into equal shares."""
    pieces = np.empty(len(tiles) + n_shares, PIECE)
    fixed = timing.fixed_us / timing.token_us
    least = int(3 * fixed)  # tokens; a shorter piece costs more than it balances
    done, nth_share, n = 0.0, 0, 0
    program, program_share = -1, -1
    for i, tile in enumerate(tiles):
        begin, tile.pieces = tile.a_from, 0
        while True:
            left = tile.a_to - begin
            while nth_share < n_shares - 1 and (nth_share + 1) * share - done < (fixed + min(left, least)) / 2:
                nth_share += 1
            room = (nth_share + 1) * share - done - fixed
            length = left
            cut = max(int(room), least, 1)
            if cut < left and nth_share < n_shares - 1 and left + tile.grows > room + least:
                length = cut
            if nth_share != program_share:
                program, program_share = program + 1, nth_share
            piece = pieces[n]
            piece.tile, piece.nth, piece.program = i, tile.pieces, program
            piece.begin, piece.end = begin, begin + length
            piece.cost = length + (tile.b_len if length == left else 0)
            n, tile.pieces, done, begin = n + 1, tile.pieces + 1, done + fixed + piece.cost, begin + length
            if begin == tile.a_to:
                done += tile.grows
                break
            nth_share += 1
    pieces = pieces[:n]
    for i in range(n - 2, -1, -1):
        if pieces[i].program == pieces[i + 1].program:
            pieces[i].cost += pieces[i + 1].cost
    return pieces
