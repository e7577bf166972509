"""The canonical order of the deterministic mode: whatever is grouped and whoever computes them, each row's KV is summed
in the same units, merged in the order of positions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Rows, radix_rows, tree_of

from packinfer_sgl.kernels.tiles import unit_policy
from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity, Fitted, fit, units_capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.planning.units import UNIT_BYTES, choose_unit, steps_within_units, units_of, whole_units

SHAPE = AttentionShape(qo_heads=8, kv_heads=2, head_dim=128, kv_bytes=2)
COST = H200.decode_cost.in_units()


def canonical(tokens: int, unit: int) -> list[tuple[int, int]]:
    """The units of a row, in the order in which they are merged."""
    return [(begin, min(begin + unit, tokens)) for begin in range(0, max(tokens, 1), unit)]


def merged(plan: Plan, query: int) -> list[tuple[int, int]]:
    """[begin, end) of the positions that each of a query's results stands for, in the order of the merge."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for item in plan.items.tolist():
        assert item[Col.B_LEN] == 0 and item[Col.NEXT_ITEM] == -1
        for slot in range(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT]):
            if plan.query_rows[slot] == query:
                part = int(plan.partial_rows[slot])
                at = part + item[Col.SPLIT] if part >= 0 else -1
                found[at].append((item[Col.A_POS], item[Col.A_POS] + item[Col.A_LEN]))
    assert all(len(units) == 1 for units in found.values()), "two items write the same result"
    begin, end = plan.merge_indptr[query : query + 2].tolist()
    assert sorted(found) == ([-1] if begin == end else list(range(begin, end)))
    return [found[at][0] for at in sorted(found)]


def check(plan: Plan, lens: list[int], unit: int) -> None:
    for row, tokens in enumerate(lens):
        assert merged(plan, row) == canonical(tokens, unit)
    open_rows = {int(row) for row in plan.items[:, Col.OPEN_ROW] if row >= 0}
    for item in plan.items.tolist():
        if (row := item[Col.OPEN_ROW]) >= 0:  # what grows is the last unit of a row, read for it alone
            assert item[Col.Q_CNT] == 1 and item[Col.A_POS] + item[Col.A_LEN] == lens[row]
    if len(plan.append_base):
        assert {row for row, tokens in enumerate(lens) if tokens % unit} <= open_rows


def planned(rows: Rows, unit: int, grouping: str, policy: TilePolicy, limits: Capacity, room: int) -> Fitted:
    lens = np.array([len(row) for row in rows], np.int32)
    batch = StepBatch(np.ones_like(lens), lens)
    tree = whole_units(tree_of(rows), unit)
    return fit(tree, SHAPE, COST, policy, limits, grouping=grouping, batch=batch, room_tokens=room)


@st.composite
def rows_of_units(draw: st.DrawFn) -> Rows:
    return [row for row in draw(radix_rows(max_rows=9, max_own=24)) if row] or [[0]]


def growing(rows: Rows) -> Rows:
    """The same with a newest token of its own for each, as rows have it that grow."""
    return [[*row, 10**6 + r] for r, row in enumerate(rows)]


UNITS = st.sampled_from([1, 2, 4, 7])
POLICIES = st.integers(1, 5).map(lambda queries: TilePolicy((queries,), max_split_tokens=1 << 30))


@settings(max_examples=600)
@given(rows_of_units(), UNITS, POLICIES, st.sampled_from(["multi", "single", "off"]), st.integers(0, 3))
def test_each_row_is_merged_from_the_same_units(rows: Rows, unit: int, policy: TilePolicy, grouping: str, room: int):
    policy, rows = replace(policy, unit_tokens=unit), growing(rows) if room else rows
    fitted = planned(rows, unit, grouping, policy, Capacity.unlimited(), room)
    check(fitted.plan, [len(row) for row in rows], unit)


@settings(max_examples=600)
@given(rows_of_units(), UNITS, POLICIES, st.sampled_from(["multi", "single", "off"]), st.data())
def test_what_does_not_fit_is_cut_in_the_same_units(rows: Rows, unit: int, policy: TilePolicy, grouping: str, data):
    """The buffers of graphs, for as many rows of such a length, and a pool that holds no token twice."""
    policy, room = replace(policy, unit_tokens=unit), data.draw(st.integers(0, 3))
    rows = growing(rows) if room else rows
    pool = len({slot for row in rows for slot in row})
    limits = units_capacity(
        unit, max_rows=len(rows), context_tokens=max(map(len, rows)), pool_tokens=pool, room_tokens=room, row_spans=2
    )
    once = pool + (len(rows) - 1) * (unit - 1) + len(rows) * room
    limits = replace(limits, kv_slots=data.draw(st.sampled_from([limits.kv_slots, once])), spans=len(rows))
    fitted = planned(rows, unit, grouping, policy, limits, room)
    assert limits.holds(fitted.plan)
    check(fitted.plan, [len(row) for row in rows], unit)


@settings(max_examples=200)
@given(rows_of_units(), UNITS)
def test_sharing_is_cut_down_to_whole_units(rows: Rows, unit: int) -> None:
    tree = tree_of(rows)
    cut = whole_units(tree, unit)
    cut.check_integrity()
    assert not (cut.end % unit).any() and not (cut.tail_start % unit).any()
    # and no further: places share all whole units that they did
    for a in range(tree.n_rows):
        for b in range(a + 1, tree.n_rows):
            shared, now = (
                max((int(t.end[i]) for i in range(t.n_nodes) if t.row_lo[i] <= a and b < t.row_hi[i]), default=0)
                for t in (tree, cut)
            )
            assert now == shared // unit * unit


def test_planted_faults_are_seen() -> None:
    rows = [[*range(20), 30 + r] for r in range(3)]
    lens = [21] * 3
    policy = TilePolicy((4,), max_split_tokens=1 << 30, unit_tokens=4)
    plan = planned(rows, 4, "multi", policy, Capacity.unlimited(), 2).plan
    check(plan, lens, 4)
    swapped = plan.items.copy()
    first, second = np.flatnonzero(swapped[:, Col.Q_CNT] == 3)[:2]
    swapped[[first, second], Col.SPLIT] = swapped[[second, first], Col.SPLIT]
    not_in_units = replace(policy, unit_tokens=0, max_split_tokens=5)
    faulty = [
        replace(plan, items=swapped),
        planned(rows, 4, "multi", not_in_units, Capacity.unlimited(), 2).plan,
        planned(rows, 5, "multi", replace(policy, unit_tokens=5), Capacity.unlimited(), 2).plan,
    ]
    for wrong in faulty:
        with pytest.raises(AssertionError):
            check(wrong, lens, 4)


def test_a_tree_of_parts_of_units_is_refused() -> None:
    tree, policy = PrefixTree.from_neighbours((0, 1), (3,)), TilePolicy((4,), 1 << 30, unit_tokens=2)
    with pytest.raises(ValueError, match="units of 2 tokens are for nodes of whole units"):
        make_plan(tree, np.array([4, 5], np.int32), policy, kv_tokens_unique=6)
    with pytest.raises(ValueError, match="units of 2 tokens"):
        whole = whole_units(tree, 2)
        make_plan(whole, np.array([4, 5], np.int32), policy, kv_tokens_unique=6, listed_once=tree)


@settings(max_examples=200)
@given(rows_of_units(), UNITS, st.integers(1, 9))
def test_a_plan_lives_until_a_row_begins_a_unit(rows: Rows, unit: int, steps: int) -> None:
    policy, rows = TilePolicy((4,), max_split_tokens=1 << 30, unit_tokens=unit), growing(rows)
    planner = DecodePlanner(SHAPE, COST, policy, grouping="multi", limits=Capacity.unlimited(), room_tokens=4)

    class Known:
        def prefix_tree(self) -> PrefixTree:
            return tree_of(rows)

    requests, lens = Known(), np.array([len(row) for row in rows], np.int32)
    for _ in range(steps):
        plan = planner.plan(StepBatch(np.ones_like(lens), lens, requests=requests)).plan
        # as the kernel reads it: items that grow end where their row does
        items = plan.items.copy()
        grows = items[:, Col.OPEN_ROW] >= 0
        items[grows, Col.A_LEN] = lens[items[grows, Col.OPEN_ROW]] - items[grows, Col.A_POS]
        check(replace(plan, items=items), lens.tolist(), unit)
        lens = lens + np.int32(1)


def test_steps_within_units() -> None:
    assert steps_within_units(np.array([5, 8, 3], np.int32), 4) == 0
    assert steps_within_units(np.array([5, 9, 2], np.int32), 4) == 2
    assert steps_within_units(np.zeros(0, np.int32), 4) == 4


@pytest.mark.parametrize(("rows", "context"), [(256, 8192), (256, 131072), (512, 262144), (1, 100), (4096, 10**6)])
def test_the_unit_is_the_shortest_that_fits(rows: int, context: int) -> None:
    shape = AttentionShape(32, 8, 128, 2)
    unit = choose_unit(shape, max_rows=rows, context_tokens=context)
    row_bytes = 32 * 129 * 4

    def fits(unit: int) -> bool:
        return rows * units_of(context, unit) * row_bytes <= UNIT_BYTES

    assert unit % 512 == 0 and (unit == 512 or not fits(unit // 2)) and (fits(unit) or unit >= context)
    assert unit_policy(shape, unit).unit_tokens == unit


def test_units_of_parts_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="units of 96 tokens are not of whole blocks of 64"):
        unit_policy(SHAPE, 96)


def test_units_of_one_prefix_are_read_side_by_side() -> None:
    """Tiles of the same unit follow each other, so that one of them finds it in a cache."""
    lens = np.full(8, 16, np.int32)
    tree = PrefixTree.from_neighbours(range(8), [16] * 7)
    plan = make_plan(tree, lens, TilePolicy((2,), 1 << 30, unit_tokens=4), kv_tokens_unique=16)
    assert plan.items[:, Col.A_POS].tolist() == [p for p in (0, 4, 8, 12) for _ in range(4)]
