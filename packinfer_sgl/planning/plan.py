"""What a plan is: work items as int32 arrays that the kernels run on, and the policy by which they are cut."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np

from packinfer_sgl.planning.prefix_tree import Int32


class Col(IntEnum):
    """Columns of ``Plan.items``; all counts are tokens.

    An item is a tile of queries (``Q_OFF``, ``Q_CNT``: range of query slots) over two runs of KV tokens: every query
    of the tile sees all of run A; query slot ``s`` sees tokens ``win_lo[s] <= j < win_hi[s]`` of run B.
    """

    Q_OFF = 0
    Q_CNT = 1
    A_OFF = 2  # first entry of run A in the KV slot list
    A_LEN = 3
    A_POS = 4  # KV position of run A's first token
    B_OFF = 5
    B_LEN = 6
    PIECE = 7  # which of the tile's KV pieces: added to the slot's first partial row; -1 where no slot has any
    TILE_CLASS = 8  # index into TilePolicy.tile_queries
    OPEN_ROW = 9  # run A ends at this row's current length (it grows while the plan lives), or -1
    NEXT = 10  # the item that the same program runs after this one, or -1


@dataclass(frozen=True)
class PieceTiming:
    """How long KV pieces of one tile class take; a model, fitted to a device.

    Attributes:
        parallel: items that run at once (all KV heads of an item counted as one).
        fixed_us: time of an item whatever its length.
        token_us: time of one KV token of an item while ``parallel`` of them run.
        partial_us: time that one query's partial result costs everybody (written, and read by the merge).
        shares: programs (all KV heads counted as one) among which the KV tokens of all tiles may be divided, where no
            other class has tiles; 0 for never.
        launched: programs of the launch, counted as ``shares``; with more pieces than that, each runs several in turn.
        drain: a part ``f`` of so many programs draws ``1 - exp(-drain * f)`` of the bandwidth.
        taken: KV heads, if each of ``parallel`` programs takes the next piece when it is free, the longest first; else
            0. Only then the next two count.
        block: KV tokens that a program takes at once: a part of them takes as long.
        half: part of ``token_us`` where half of a tile's rows suffice.
    """

    parallel: float
    fixed_us: float
    token_us: float
    partial_us: float
    shares: int
    launched: int
    drain: float
    taken: int = 0
    block: int = 1
    half: float = 1.0


@dataclass(frozen=True)
class TilePolicy:
    """How queries and KV are cut into items.

    Attributes:
        tile_queries: most queries (tokens) of one tile of each class, largest class first. A span is cut into tiles of
            the smallest class that holds all its queries, else of the largest.
        chunk_tokens: longest KV piece of an item.
        timings: of each class: pieces are then cut so that each class fills its waves, or into equal shares of all
            tokens, and ``chunk_tokens`` only bounds them. None: as long as ``chunk_tokens`` allows.
        ride_tokens: most tokens of private tails that one tile of a shared span may take along as its run B.
    """

    tile_queries: tuple[int, ...]
    chunk_tokens: int
    timings: tuple[PieceTiming, ...] | None = None
    ride_tokens: int = 0

    @cached_property
    def table(self) -> np.ndarray:
        """[n_classes] of ``CLASS``: the same as the compiled functions take it."""
        nan = math.nan
        unknown = PieceTiming(nan, nan, nan, nan, shares=0, launched=0, drain=nan)
        timings = self.timings or [unknown] * len(self.tile_queries)
        classes = zip(self.tile_queries, timings, strict=True)
        both = self.chunk_tokens, self.ride_tokens
        return np.array([(queries, *both, *astuple(timing)) for queries, timing in classes], CLASS)


# A tile class as the compiled functions of ``cut`` take it.
CLASS = np.dtype(
    [(name, np.int64) for name in ("tile_queries", "chunk_tokens", "ride_tokens")]
    + [(f.name, np.float64) for f in fields(PieceTiming)]
)


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one batch and where their partial results meet. All arrays int32, on the CPU.

    A query slot is one query token in one tile. Items that are KV pieces of the same tile share its slots.

    Attributes:
        items: [n_items, 11], columns ``Col``. First those with which programs begin: largest tile class first, the
            program that takes longest first within a class. Then those that follow others (``NEXT``).
        class_indptr: [n_classes + 1] the items with which the programs of each class begin.
        query_rows: [n_slots] row of q and out.
        partial_rows: [n_slots] first partial row of the slot (plus the item's ``PIECE``), or -1: the item writes the
            output row itself.
        win_lo, win_hi: [n_slots] window of each query into run B, in tokens of run B.
        merge_indptr: [n_queries + 1] the partial rows of a query; empty where an item writes the output itself.
        spans: [n_spans, 5] row of the batch, first KV position, tokens, offset in the KV slot list, and the slot of the
            first token if the others follow it, else -1: they are copied from the row's table. Nodes first, as in the
            tree; a node may take several neighbouring spans (the arena).
        append_base: [n_rows] the slot of row ``r``'s token at position ``p`` belongs at ``append_base[r] + p``
            (for positions in its tail); empty where nothing grows.
        kv_capacity: entries of the KV slot list, room for growing tails included.
        kv_tokens_read: KV tokens that the items read.
        kv_tokens_logical: KV tokens that a prefix-unaware kernel reads.
        kv_tokens_unique: KV tokens that any kernel must read.
        windowed: whether queries may see part of run B.
    """

    items: Int32
    class_indptr: Int32
    query_rows: Int32
    partial_rows: Int32
    win_lo: Int32
    win_hi: Int32
    merge_indptr: Int32
    spans: Int32
    append_base: Int32
    kv_capacity: int
    kv_tokens_read: int
    kv_tokens_logical: int
    kv_tokens_unique: int
    windowed: bool = False

    @property
    def merged(self) -> np.ndarray:
        """[n] queries that have partial results."""
        return np.flatnonzero(self.merge_indptr[1:] > self.merge_indptr[:-1])

    @property
    def n_partials(self) -> int:
        return int(self.merge_indptr[-1])
