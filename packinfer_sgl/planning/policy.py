"""How plans are cut: tile sizes, and the timings by which the KV of each tile is split."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class SplitTiming:
    """Times of KV splits of one tile class; a model, fitted to a device (``device_profile.DeviceProfile``).

    Attributes:
        parallel: items that run at once (all KV heads of an item counted as one).
        fixed_us: time of an item besides its tokens.
        token_us: time of one KV token of an item while ``parallel`` of them run.
        partial_us: time that one query's partial result adds to the layer (written, and read by the merge).
        stream_k_ctas: CTAs (all KV heads counted as one) among which the KV tokens of all tiles may be divided if no
            other class has tiles; 0 for never.
        launched: CTAs of the launch, counted like ``stream_k_ctas``; beyond that number, a CTA runs several splits in
            turn.
        bw_saturation: with a fraction ``f`` of ``stream_k_ctas`` active, achieved bandwidth is
            ``1 - exp(-bw_saturation * f)`` of the peak.
        dynamic: number of KV heads if items are scheduled dynamically (a work queue, longest first), else 0. ``block``
            and ``half_tile_factor`` apply only then.
        block: KV tokens of a block; a partial block takes as long as a full one.
        half_tile_factor: cost per token of a tile with at most half its rows in use, relative to a full tile.
    """

    parallel: float
    fixed_us: float
    token_us: float
    partial_us: float
    stream_k_ctas: int
    launched: int
    bw_saturation: float
    dynamic: int = 0
    block: int = 1
    half_tile_factor: float = 1.0


@dataclass(frozen=True)
class TilePolicy:
    """How queries and KV are cut into items.

    Attributes:
        tile_queries: most queries (tokens) of one tile of each class, largest class first. A span is cut into tiles of
            the smallest class that holds all its queries, else of the largest.
        max_split_tokens: longest KV split of an item.
        timings: of each class: splits are then chosen so that all CTAs end together, and ``max_split_tokens`` is only
            an upper bound. None: splits are as long as ``max_split_tokens`` allows.
        max_inline_tail_tokens: most tokens of private tails that one tile of a shared span may hold as its run B.
        unit_tokens: if not 0, each item covers one unit of KV positions, from a multiple of ``unit_tokens`` to the next
            or to the end of the row (``units``), whatever ``timings`` and ``max_split_tokens`` say. All its tile
            classes are for as many queries: an item that goes on from another's state is of the last, any other of the
            first.
        block_tokens: with units: spans may end at multiples of so many tokens, once within each unit of a row, and the
            unit is then computed by two items, one after the other; 0: they end at units only.
    """

    tile_queries: tuple[int, ...]
    max_split_tokens: int
    timings: tuple[SplitTiming, ...] | None = None
    max_inline_tail_tokens: int = 0
    unit_tokens: int = 0
    block_tokens: int = 0

    @cached_property
    def table(self) -> np.ndarray:
        """[n_classes] of ``TILE_CLASS``: the same policy as compiled functions take it."""
        nan = math.nan
        unknown = SplitTiming(nan, nan, nan, nan, stream_k_ctas=0, launched=0, bw_saturation=nan)
        timings = self.timings or [unknown] * len(self.tile_queries)
        classes = zip(self.tile_queries, timings, strict=True)
        both = self.max_split_tokens, self.max_inline_tail_tokens, self.unit_tokens, self.block_tokens
        return np.array([(queries, *both, *astuple(timing)) for queries, timing in classes], TILE_CLASS)


# A tile class as the compiled functions of ``query_tiles`` and ``schedule`` take it.
TILE_CLASS = np.dtype(
    [(name, np.int64) for name in ("tile_queries", "max_split_tokens", "max_inline_tail_tokens")]
    + [(name, np.int64) for name in ("unit_tokens", "block_tokens")]
    + [(f.name, np.float64) for f in fields(SplitTiming)]
)
