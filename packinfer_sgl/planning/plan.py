"""What a plan is: work items, as int32 arrays that the kernels run on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import numpy as np

from packinfer_sgl.planning.prefix_tree import Int32


class Col(IntEnum):
    """Columns of ``Plan.items``; all counts are tokens.

    An item is a tile of queries (``Q_OFF``, ``Q_CNT``: range of query slots) over two runs of KV tokens. Every query of
    the tile sees all of run A; query slot ``s`` sees tokens ``win_lo[s] <= j < win_hi[s]`` of run B.
    """

    Q_OFF = 0
    Q_CNT = 1
    A_OFF = 2  # first entry of run A in the KV slot list
    A_LEN = 3
    A_POS = 4  # KV position of run A's first token
    B_OFF = 5
    B_LEN = 6
    SPLIT = 7  # index of the tile's KV split, added to the slot's first partial row; -1 if no slot of it has any
    TILE_CLASS = 8  # index into TilePolicy.tile_queries
    OPEN_ROW = 9  # the row at whose current length run A ends (it grows while the plan lives), or -1
    NEXT_ITEM = 10  # the item that the same CTA runs after this one, or -1
    CHAIN = 11  # ``Chain``: of a unit of KV that two items compute, one after the other


class Chain(IntFlag):
    """What an item has to do with another's state (``units``): softmax's maximum and sum, and the output so far."""

    HANDS_ON = 1  # instead of a result it leaves its state, where the results of its queries' unit belong
    GOES_ON = 2  # it begins with the state that it finds there


class SpanCol(IntEnum):
    """Columns of ``Plan.spans``: KV tokens of one row, at consecutive entries of the KV slot list."""

    ROW = 0  # of the batch
    START = 1  # KV position of the first token
    TOKENS = 2
    OFFSET = 3  # first entry in the KV slot list
    COPY_SLOT = 4  # slot of the first token if all lie contiguous in a copy; -1: slots are in the row's table


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one batch and where their partial results meet. All arrays int32, on the CPU.

    A query slot is one query token in one tile. Items that are KV splits of the same tile share its slots.

    Attributes:
        items: [n_items, 12], columns ``Col``. First those with which CTAs begin: largest tile class first, within a
            class the CTA with the most work first. Then those that follow others (``NEXT_ITEM``).
        class_indptr: [n_classes + 1] range of the items with which the CTAs of each class begin.
        query_rows: [n_slots] row of q and out.
        partial_rows: [n_slots] partial row of the slot for split 0 (split ``i`` writes the ``i``-th after it), or
            negative: the item writes the output row itself; below -1, ``-2 - row`` is where its state is handed on.
        win_lo, win_hi: [n_slots] window of each query into run B, in tokens of run B.
        merge_indptr: [n_queries + 1] range of each query's partial rows; empty where an item writes the output itself.
        spans: [n_spans, 5], columns ``SpanCol``: from where the KV slot list is filled. Nodes first, as in the tree; a
            node may take several neighbouring spans (those that lie in a contiguous copy in part).
        append_base: [n_rows] the slot of row ``r``'s token at position ``p`` of its tail belongs at entry
            ``append_base[r] + p`` of the KV slot list; [0] if no tail may grow.
        kv_capacity: entries of the KV slot list, room for growing tails included.
        kv_tokens_read: KV tokens that the items read.
        kv_tokens_logical: KV tokens that a prefix-unaware kernel reads.
        kv_tokens_unique: KV tokens that any kernel must read.
        windowed: whether queries may see part of a tile's KV (run B); else all of it is run A.
        n_states: partial rows behind those of ``merge_indptr``: states of queries without partial results.
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
    n_states: int = 0

    @property
    def merged(self) -> np.ndarray:
        """[n] indices of the queries that have partial results."""
        return np.flatnonzero(self.merge_indptr[1:] > self.merge_indptr[:-1])

    @property
    def n_partials(self) -> int:
        """Partial rows: those of all queries' partial results, and states."""
        return int(self.merge_indptr[-1]) + self.n_states
