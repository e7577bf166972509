"""Where the kernels find what in a plan's int32 arrays: constants that mirror ``Col``, ``SpanCol`` and ``Header``."""

from __future__ import annotations

import triton.language as tl

from packinfer_sgl.planning import plan
from packinfer_sgl.planning.plan import ARRAYS, Chain, Col, Header, SpanCol

# columns of ``Plan.items``, in the order of ``Col``
Q_OFF, Q_CNT, A_OFF, A_LEN, A_POS, B_OFF, B_LEN, SPLIT, TILE_CLASS, OPEN_ROW, NEXT_ITEM, CHAIN = (
    tl.constexpr(int(column)) for column in Col
)
N_COLS = tl.constexpr(len(Col))
HANDS_ON = tl.constexpr(int(Chain.HANDS_ON))  # of CHAIN

# columns of ``Plan.spans``, in the order of ``SpanCol``
SPAN_ROW, SPAN_START, SPAN_TOKENS, SPAN_OFFSET, SPAN_COPY_SLOT = (tl.constexpr(int(column)) for column in SpanCol)
N_SPAN_COLS = tl.constexpr(len(SpanCol))

# entries of ``Plan.block``'s header; before these, the up to MAX_CLASSES + 1 entries of ``Plan.class_indptr``
NEXT_TICKET, N_MERGED, N_QUERIES, N_SPANS = (
    tl.constexpr(int(at)) for at in (Header.NEXT_TICKET, Header.N_MERGED, Header.N_QUERIES, Header.N_SPANS)
)
STARTS = tl.constexpr(int(Header.STARTS))
SPANS_START = tl.constexpr(int(Header.STARTS) + ARRAYS.index("spans"))
MAX_ARRAYS = tl.constexpr(plan.MAX_ARRAYS)
