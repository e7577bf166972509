"""For debugging: whether a loaded plan reads, for each query, exactly the KV slots that SGLang's table names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.prefix_tree import Int32


def check_reads(
    plan: Plan,
    kv_slots: np.ndarray,
    held: Sequence[np.ndarray],
    row_of_query: Int32,
    seen: Int32,
    *,
    newest_is_there: bool,
) -> None:
    """Raise RuntimeError unless each query reads each of its tokens once, from the slot that holds it.

    Tokens in contiguous copies (``SpanCol.COPY_SLOT``) are counted, not compared: the arena has a check of its own.

    Args:
        plan: the loaded plan; its tails may have grown since it was made.
        kv_slots: [plan.kv_capacity] slot list that the kernels read.
        held: of each row, the slots of its KV tokens by SGLang's table.
        row_of_query: [n_queries] row of each query.
        seen: [n_queries] number of leading tokens of its row that each query sees.
        newest_is_there: whether the slot list has each row's last token; else it is entered when the kernels run.
    """
    items = plan.items
    position = np.full(len(kv_slots), -1, np.int64)  # of each entry of the slot list
    copied = np.zeros(len(kv_slots), np.bool_)
    for _, first, tokens, offset, copy in plan.spans.tolist():
        position[offset : offset + tokens] = np.arange(first, first + tokens)
        copied[offset : offset + tokens] = copy >= 0
    open_items = items[items[:, Col.OPEN_ROW] >= 0]
    for row, end in zip(
        open_items[:, Col.OPEN_ROW].tolist(), (open_items[:, Col.A_POS] + open_items[:, Col.A_LEN]).tolist()
    ):
        base = int(plan.append_base[row])
        position[base + end : base + len(held[row])] = np.arange(end, len(held[row]))

    reads = [np.zeros(len(held[row]), np.int64) for row in row_of_query.tolist()]
    for item in items.tolist():
        a_len, open_row = item[Col.A_LEN], item[Col.OPEN_ROW]
        if open_row >= 0:
            a_len = len(held[open_row]) - item[Col.A_POS]
        for at in range(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT]):
            query = int(plan.query_rows[at])
            row = int(row_of_query[query])
            lo, hi = max(int(plan.win_lo[at]), 0), min(int(plan.win_hi[at]), item[Col.B_LEN])
            entry = np.concatenate(
                [item[Col.A_OFF] + np.arange(a_len), item[Col.B_OFF] + np.arange(lo, max(lo, hi))]
            ).astype(np.int64)
            at_position = position[entry]
            if ((at_position < 0) | (at_position >= len(held[row]))).any():
                raise _fault(
                    f"query {query} reads entries of the slot list that hold none of its {len(held[row])} tokens"
                )
            np.add.at(reads[query], at_position, 1)
            compared = ~copied[entry]
            if not newest_is_there:
                compared &= at_position < len(held[row]) - 1
            wrong = np.flatnonzero(compared & (kv_slots[entry] != held[row][at_position]))
            if len(wrong):
                token, slot = at_position[wrong[0]], kv_slots[entry][wrong[0]]
                raise _fault(
                    f"row {row} of the batch reads its token {token} in KV slot {slot}, which lies in slot "
                    f"{held[row][token]} by SGLang's table ({len(wrong)} tokens of an item are off)"
                )
    for query, counts in enumerate(reads):
        expected = np.arange(len(counts)) < seen[query]
        if (counts != expected).any():
            token = int(np.flatnonzero(counts != expected)[0])
            raise _fault(
                f"query {query} reads token {token} of its row {counts[token]} times, not {int(expected[token])}"
            )


def _fault(what: str) -> RuntimeError:
    return RuntimeError(
        f"packinfer: a plan is not that of its batch: {what}; please report this with the SGLang version"
    )
