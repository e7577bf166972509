"""Where the kernels find what in a plan's int32 arrays: constants that mirror ``Col``, ``SpanCol`` and ``counts``."""

from __future__ import annotations

import triton.language as tl

from packinfer_sgl.planning.plan import Chain, Col, SpanCol

# columns of ``Plan.items``, in the order of ``Col``
Q_OFF, Q_CNT, A_OFF, A_LEN, A_POS, B_OFF, B_LEN, SPLIT, TILE_CLASS, OPEN_ROW, NEXT_ITEM, CHAIN = (
    tl.constexpr(int(column)) for column in Col
)
N_COLS = tl.constexpr(len(Col))
HANDS_ON = tl.constexpr(int(Chain.HANDS_ON))  # of CHAIN

# columns of ``Plan.spans``, in the order of ``SpanCol``
SPAN_ROW, SPAN_START, SPAN_TOKENS, SPAN_OFFSET, SPAN_COPY_SLOT = (tl.constexpr(int(column)) for column in SpanCol)
N_SPAN_COLS = tl.constexpr(len(SpanCol))

# entries of ``counts`` on the device; before these, the up to MAX_CLASSES + 1 entries of ``Plan.class_indptr``
NEXT_TICKET = tl.constexpr(4)  # of the extend kernel's tile scheduler; 0 between launches
N_MERGED = tl.constexpr(5)
N_QUERIES = tl.constexpr(6)
N_SPANS = tl.constexpr(7)
N_COUNTS = 8
MAX_CLASSES = 3
