"""The audit passes the right plan, whatever its shape, and sees each slot, token and query that is off."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases, slot_list, tree_of

from packinfer_sgl.planning.audit import check_reads
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy

NOT_ITS_BATCH = "^packinfer: a plan is not that of its batch: "


def audit(case: Case, plan: Plan, kv_slots: np.ndarray, *, newest_is_there: bool = True) -> None:
    seen = np.array([case.seen(query).stop for query in range(len(case.query_row))], np.int32)
    held = [np.array(row, np.int32) for row in case.rows]
    check_reads(plan, kv_slots, held, np.array(case.query_row), seen, newest_is_there=newest_is_there)


@given(cases(("decode", "full", "causal")), st.data())
def test_right_plans_pass_and_each_wrong_slot_is_seen(case: Case, data: st.DataObject) -> None:
    plan = case.plan()
    kv_slots = slot_list(plan, case.rows).numpy()
    audit(case, plan, kv_slots)
    runs = [(Col.A_OFF, Col.A_LEN)]
    read = [off + i for item in plan.items.tolist() for at, n in runs for off in [item[at]] for i in range(item[n])]
    if read:
        kv_slots[data.draw(st.sampled_from(read))] += 1000
        with pytest.raises(RuntimeError, match=NOT_ITS_BATCH + "row .* reads its token .* by SGLang's table"):
            audit(case, plan, kv_slots)


def two_rows(room: int = 3) -> tuple[Case, Plan, np.ndarray]:
    """Four shared tokens, then two and three."""
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9]]
    tree = tree_of(rows)
    case = Case(rows, tree, tree, TilePolicy((4, 1), 1000), None, [0, 1], None, room)
    plan = make_plan(tree, case.kv_lens, case.policy, kv_tokens_unique=9, room_tokens=room)
    return case, plan, slot_list(plan, rows).numpy()


def grown(case: Case, plan: Plan, kv_slots: np.ndarray) -> Case:
    """Each row by a token; its slot is entered, too."""
    new = [[*row, 20 + i] for i, row in enumerate(case.rows)]
    for i, row in enumerate(new):
        kv_slots[plan.append_base[i] + len(row) - 1] = row[-1]
    return dataclasses.replace(case, rows=new)


def test_tails_that_have_grown() -> None:
    case, plan, kv_slots = two_rows()
    for _ in range(2):
        case = grown(case, plan, kv_slots)
        audit(case, plan, kv_slots)
    before = kv_slots.copy()
    case = grown(case, plan, kv_slots)
    audit(case, plan, before, newest_is_there=False)  # the kernels enter it when they run
    with pytest.raises(RuntimeError, match=NOT_ITS_BATCH + "row . of the batch reads its token [89] in KV slot"):
        audit(case, plan, before)


@pytest.mark.parametrize(
    ("column", "by", "says"),
    [
        (Col.A_LEN, -1, "query 0 reads token 3 of its row 0 times, not 1"),
        (Col.Q_CNT, -1, "query 1 reads token 0 of its row 0 times, not 1"),
        (Col.A_OFF, 1, "query . reads token .*|row . .*|query . reads entries .*"),
    ],
)
def test_an_item_that_reads_other_tokens_is_seen(column: Col, by: int, says: str) -> None:
    case, plan, kv_slots = two_rows(room=0)
    shared = np.flatnonzero(plan.items[:, Col.Q_CNT] == 2)
    plan.items[shared, column] += by
    with pytest.raises(RuntimeError, match=NOT_ITS_BATCH + f"({says})"):
        audit(case, plan, kv_slots)


def test_copies_are_counted_and_not_compared() -> None:
    case, plan, kv_slots = two_rows()
    kv_slots[:4] = [100, 101, 102, 103]
    spans = plan.spans.copy()
    spans[0, 4] = 100
    audit(case, dataclasses.replace(plan, spans=spans), kv_slots)
    with pytest.raises(RuntimeError, match=NOT_ITS_BATCH):
        audit(case, plan, kv_slots)
