"""What a plan is: work items, as int32 arrays that the kernels run on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

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


# The arrays of ``Plan.block`` in their order, each from a multiple of BLOCK_ALIGN entries on: first the header, which
# the device has in whole (of it the kernels read ``counts``), last what only the host reads.
ARRAYS = (
    "header", "items", "query_rows", "partial_rows", "win_lo", "win_hi", "merge_indptr", "merged", "spans",
    "append_base", "class_indptr",
)  # fmt: skip
BLOCK_ALIGN = 4
MAX_CLASSES = 3  # tile classes of which the header tells
MAX_ARRAYS = 16


class Header(IntEnum):
    """Where in the header of ``Plan.block`` what stands. It begins with ``counts``: the first entries of
    ``Plan.class_indptr``, and some numbers."""

    NEXT_TICKET = MAX_CLASSES + 1  # of the extend kernel's tile scheduler; 0 between launches
    N_MERGED = 5  # entries of ``merged``: the queries that have partial results; 0 for plans without windows
    N_QUERIES = 6
    N_SPANS = 7
    STARTS = 8  # of each array its first entry in the block, and of those past the last the end; MAX_ARRAYS + 1
    LENGTHS = STARTS + MAX_ARRAYS + 1  # of each array
    GROW = LENGTHS + MAX_ARRAYS  # of each class, whether items with which CTAs begin grow
    FOLLOWED = GROW + MAX_CLASSES  # the same: are followed by others
    CHAINED = FOLLOWED + MAX_CLASSES  # the same: have to do with another's state
    HAS_RUN_B = CHAINED + MAX_CLASSES
    N_PARTIALS = HAS_RUN_B + 1
    N_STATES = N_PARTIALS + 1
    SIZE = 56


def length_at(array: str) -> int:
    """Where in the header of ``Plan.block`` the length of one of ``ARRAYS`` stands."""
    return int(Header.LENGTHS) + ARRAYS.index(array)


@dataclass(frozen=True, eq=False)
class Plan:
    """Work items of one batch and where their partial results meet. All arrays int32, on the CPU.

    Planners make plans as one block of memory, which is loaded as it is; the arrays are views that are made when they
    are asked for.

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
        return self.header[Header.N_PARTIALS]

    if TYPE_CHECKING:

        @property
        def block(self) -> Int32:
            """All arrays and the header, in the order of ``ARRAYS``."""

        @property
        def header(self) -> list[int]:
            """Numbers of the plan (``Header``)."""
    else:

        def __getattr__(self, name: str) -> Any:
            if name == "block":
                value = pack(
                    self.items, self.class_indptr, self.query_rows, self.partial_rows, self.win_lo, self.win_hi,
                    self.merge_indptr, self.spans, self.append_base, self.windowed, self.n_states,
                )  # fmt: skip
            elif name == "header":
                value = self.block[: Header.SIZE].tolist()
            elif name in ARRAYS:
                start = self.header[Header.STARTS + ARRAYS.index(name)]
                value = self.block[start : start + self.header[length_at(name)]]
                columns = {"items": len(Col), "spans": len(SpanCol)}.get(name)
                value = value if columns is None else value.reshape(-1, columns)
            else:
                raise AttributeError(name)
            self.__dict__[name] = value
            return value

    @classmethod
    def of_block(
        cls, block: Int32, kv_capacity: int, kv_tokens_read: int, kv_tokens_logical: int, kv_tokens_unique: int,
        windowed: bool,
    ) -> Plan:  # fmt: skip
        """The plan whose arrays ``pack`` laid into ``block``."""
        plan = cls.__new__(cls)
        header = block[: Header.SIZE].tolist()
        plan.__dict__.update(
            block=block, header=header, kv_capacity=kv_capacity, kv_tokens_read=kv_tokens_read,
            kv_tokens_logical=kv_tokens_logical, kv_tokens_unique=kv_tokens_unique, windowed=windowed,
            n_states=header[Header.N_STATES],
        )  # fmt: skip
        return plan


_NEXT_TICKET, _N_MERGED, _N_QUERIES, _N_SPANS = 4, 5, 6, 7
_STARTS, _LENGTHS, _GROW, _FOLLOWED = (int(at) for at in (Header.STARTS, Header.LENGTHS, Header.GROW, Header.FOLLOWED))
_CHAINED, _HAS_RUN_B, _SIZE = int(Header.CHAINED), int(Header.HAS_RUN_B), int(Header.SIZE)
_N_PARTIALS, _N_STATES = int(Header.N_PARTIALS), int(Header.N_STATES)
_OPEN_ROW, _NEXT_ITEM, _CHAIN, _B_LEN = int(Col.OPEN_ROW), int(Col.NEXT_ITEM), int(Col.CHAIN), int(Col.B_LEN)
N_ARRAYS = len(ARRAYS)


@njit(cache=True)
def pack(  # type: ignore[no-untyped-def]
    items, class_indptr, query_rows, partial_rows, win_lo, win_hi, merge_indptr, spans, append_base, windowed, n_states
):
    """``Plan.block`` of these fields of a plan."""
    n_queries, n_merged = len(merge_indptr) - 1, 0
    if windowed:  # else no kernel asks for them
        for query in range(n_queries):
            n_merged += merge_indptr[query + 1] > merge_indptr[query]
    lengths = (
        _SIZE, items.size, len(query_rows), len(partial_rows), len(win_lo), len(win_hi), n_queries + 1, n_merged,
        spans.size, len(append_base), len(class_indptr),
    )  # fmt: skip
    total = 0
    for length in lengths:
        total += -(-length // BLOCK_ALIGN) * BLOCK_ALIGN
    block = np.zeros(total, np.int32)
    starts, at = block[_STARTS : _STARTS + MAX_ARRAYS + 1], 0
    for i in range(MAX_ARRAYS + 1):
        starts[i] = at
        if i < N_ARRAYS:
            block[_LENGTHS + i] = lengths[i]
            at += -(-lengths[i] // BLOCK_ALIGN) * BLOCK_ALIGN
    block[starts[1] : starts[1] + lengths[1]] = items.reshape(-1)
    block[starts[2] : starts[2] + lengths[2]] = query_rows
    block[starts[3] : starts[3] + lengths[3]] = partial_rows
    block[starts[4] : starts[4] + lengths[4]] = win_lo
    block[starts[5] : starts[5] + lengths[5]] = win_hi
    block[starts[6] : starts[6] + lengths[6]] = merge_indptr
    if windowed:
        at = starts[7]
        for query in range(n_queries):
            if merge_indptr[query + 1] > merge_indptr[query]:
                block[at] = query
                at += 1
    block[starts[8] : starts[8] + lengths[8]] = spans.reshape(-1)
    block[starts[9] : starts[9] + lengths[9]] = append_base
    block[starts[10] : starts[10] + lengths[10]] = class_indptr
    n_classes = min(len(class_indptr) - 1, MAX_CLASSES)
    block[: n_classes + 1] = class_indptr[: n_classes + 1]
    block[_N_MERGED], block[_N_QUERIES], block[_N_SPANS] = n_merged, n_queries, len(spans)
    for tile_class in range(n_classes):
        for i in range(class_indptr[tile_class], class_indptr[tile_class + 1]):
            block[_GROW + tile_class] |= items[i, _OPEN_ROW] >= 0
            block[_FOLLOWED + tile_class] |= items[i, _NEXT_ITEM] >= 0
            block[_CHAINED + tile_class] |= items[i, _CHAIN] > 0
    if windowed:
        for i in range(len(items)):
            block[_HAS_RUN_B] |= items[i, _B_LEN] > 0
    block[_N_PARTIALS], block[_N_STATES] = merge_indptr[-1] + n_states, n_states
    return block
