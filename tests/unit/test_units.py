"""The canonical order of the deterministic mode: whatever is grouped and whoever computes them, each row's KV is summed
in the same units, merged in the order of positions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

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
from packinfer_sgl.planning.plan import Chain, Col, Plan
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.planning.units import (
    UNIT_BYTES,
    are_in_units,
    choose_unit,
    steps_within_units,
    units_of,
    within_units,
)

SHAPE = AttentionShape(qo_heads=8, kv_heads=2, head_dim=128, kv_bytes=2)
COST = H200.decode_cost.in_units()


def canonical(tokens: int, unit: int) -> list[tuple[int, int]]:
    """The units of a row, in the order in which they are merged."""
    return [(begin, min(begin + unit, tokens)) for begin in range(0, max(tokens, 1), unit)]


def merged(plan: Plan, query: int) -> list[tuple[int, int]]:
    """[begin, end) of the positions that each of a query's results stands for, in the order of the merge."""
    found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    for item in plan.items.tolist():
        assert item[Col.B_LEN] == 0 and item[Col.NEXT_ITEM] == -1
        for slot in range(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT]):
            if plan.query_rows[slot] == query:
                part = int(plan.partial_rows[slot])
                at = part + item[Col.SPLIT] if part >= 0 else -1
                state = at if part >= 0 or not item[Col.CHAIN] else -2 - part
                assert part >= 0 or not item[Col.CHAIN] or plan.merge_indptr[-1] <= state < plan.n_partials
                span = item[Col.A_POS], item[Col.A_POS] + item[Col.A_LEN]
                found[at].append((*span, item[Col.CHAIN], state))
                # it runs in the first launch, or in the one that waits for the first
                goes_on = bool(item[Col.CHAIN] & Chain.GOES_ON)
                assert item[Col.TILE_CLASS] == goes_on * (len(plan.class_indptr) - 2)
    begin, end = plan.merge_indptr[query : query + 2].tolist()
    assert sorted(found) == ([-1] if begin == end else list(range(begin, end)))
    units = []
    for at in sorted(found):
        parts = sorted(
            found[at]
        )  # of a unit: one item, or two, the second of which goes on with the state of the first
        assert [chain for _, _, chain, _ in parts] in ([0], [Chain.HANDS_ON, Chain.GOES_ON])
        assert all(a[1] == b[0] and a[3] == b[3] for a, b in pairwise(parts))
        units.append((parts[0][0], parts[-1][1]))
    return units


def check(plan: Plan, lens: list[int], unit: int) -> None:
    for row, tokens in enumerate(lens):
        assert merged(plan, row) == canonical(tokens, unit)
    open_rows = {int(row) for row in plan.items[:, Col.OPEN_ROW] if row >= 0}
    for item in plan.items.tolist():
        if (row := item[Col.OPEN_ROW]) >= 0:  # what grows is the last unit of a row, read for it alone
            assert item[Col.Q_CNT] == 1 and item[Col.A_POS] + item[Col.A_LEN] == lens[row]
    if len(plan.append_base):
        assert {row for row, tokens in enumerate(lens) if tokens % unit} <= open_rows


def planned(rows: Rows, grouping: str, policy: TilePolicy, limits: Capacity, room: int) -> Fitted:
    lens = np.array([len(row) for row in rows], np.int32)
    batch = StepBatch(np.ones_like(lens), lens)
    tree = within_units(tree_of(rows), lens, policy)
    return fit(tree, SHAPE, COST, policy, limits, grouping=grouping, batch=batch, room_tokens=room)


@st.composite
def rows_of_units(draw: st.DrawFn) -> Rows:
    return [row for row in draw(radix_rows(max_rows=9, max_own=24)) if row] or [[0]]


def growing(rows: Rows) -> Rows:
    """The same with a newest token of its own for each, as rows have it that grow."""
    return [[*row, 10**6 + r] for r, row in enumerate(rows)]


def policy_of(queries: int, unit: int, block: int = 0) -> TilePolicy:
    return TilePolicy((queries, queries), max_split_tokens=1 << 30, unit_tokens=unit, block_tokens=block)


# units, and the blocks at which spans may end within them; 0: they may not
UNITS = st.sampled_from([(1, 0), (2, 0), (4, 0), (7, 0), (2, 1), (4, 1), (4, 2), (7, 1), (6, 2), (9, 3), (16, 1)])
POLICIES = st.builds(lambda queries, unit: policy_of(queries, *unit), st.integers(1, 5), UNITS)
GROUPINGS = st.sampled_from(["multi", "single", "off"])


@settings(max_examples=600)
@given(rows_of_units(), POLICIES, GROUPINGS, st.integers(0, 3))
def test_each_row_is_merged_from_the_same_units(rows: Rows, policy: TilePolicy, grouping: str, room: int):
    rows = growing(rows) if room else rows
    fitted = planned(rows, grouping, policy, Capacity.unlimited(), room)
    check(fitted.plan, [len(row) for row in rows], policy.unit_tokens)


@settings(max_examples=600)
@given(rows_of_units(), POLICIES, GROUPINGS, st.data())
def test_what_does_not_fit_is_cut_in_the_same_units(rows: Rows, policy: TilePolicy, grouping: str, data):
    """The buffers of graphs, for as many rows of such a length, and a pool that holds no token twice; by the planner,
    which takes whole units where parts of them do not fit."""
    unit, room = policy.unit_tokens, data.draw(st.integers(0, 3))
    rows = growing(rows) if room else rows
    pool = len({slot for row in rows for slot in row})
    limits = units_capacity(
        unit, max_rows=len(rows), context_tokens=max(map(len, rows)), pool_tokens=pool, room_tokens=room, row_spans=2
    )
    once = pool + (len(rows) - 1) * (unit - 1) + len(rows) * room
    limits = replace(limits, kv_slots=data.draw(st.sampled_from([limits.kv_slots, once])), spans=len(rows))
    planner = DecodePlanner(SHAPE, COST, policy, grouping=grouping, limits=limits, room_tokens=room)
    lens = np.array([len(row) for row in rows], np.int32)
    plan = planner._fit(tree_of(rows), StepBatch(np.ones_like(lens), lens)).plan
    assert limits.holds(plan)
    check(plan, lens.tolist(), unit)


def shared_by(tree: PrefixTree, a: int, b: int) -> int:
    """Tokens that places ``a`` and ``b`` have in common."""
    return max((int(tree.end[i]) for i in range(tree.n_nodes) if tree.row_lo[i] <= a and b < tree.row_hi[i]), default=0)


@settings(max_examples=400)
@given(rows_of_units(), POLICIES)
def test_sharing_is_cut_down_to_units(rows: Rows, policy: TilePolicy) -> None:
    tree, lens = tree_of(rows), np.array([len(row) for row in rows], np.int32)
    unit, block = policy.unit_tokens, policy.block_tokens or policy.unit_tokens
    cut = within_units(tree, lens, policy)
    cut.check_integrity()
    assert are_in_units(cut, lens, policy)
    for a in range(tree.n_rows):
        for b in range(a + 1, tree.n_rows):
            before, now = shared_by(tree, a, b), shared_by(cut, a, b)
            # all whole units, and of the next one a part in whole blocks or none
            assert before // unit * unit <= now <= before and (now % unit == 0 or now % block == 0)
            if tree.n_rows == 2 and before < lens.min():
                assert now == before // block * block


def test_of_ends_within_a_unit_the_one_stays_that_saves_most() -> None:
    lens = np.full(8, 100, np.int32)
    few_queries, many = policy_of(2, 16, 2), policy_of(8, 16, 2)

    def ends(shared: list[int], policy: TilePolicy) -> list[int]:
        return within_units(PrefixTree.from_neighbours(range(8), shared), lens, policy).end.tolist()

    # all share 4 tokens of the second unit, two halves 14
    assert ends([30, 30, 30, 20, 30, 30, 30], many) == [16, 30, 30]  # 7 x 4 against 2 x 3 x 14
    assert ends([22, 22, 22, 20, 22, 22, 22], many) == [16, 22, 22]
    assert ends([20, 20, 22, 20, 20, 20, 20], many) == [20]
    assert ends([22, 22, 20, 20, 20, 20, 20], many) == [20]
    # and where a tile holds two queries, neither saves more than half of what it shares
    assert ends([30, 20, 20, 20, 20, 20, 20], few_queries) == [20]  # 4 x 4 against 14
    assert ends([30, 18, 18, 18, 18, 18, 18], few_queries) == [16, 30]  # 4 x 2
    # eight rows and 20 tokens, of which four and 22 save less than pairs of these and 50, but all together more
    rows = policy_of(8, 64, 2)
    assert ends([34 + 16, 22, 34 + 16, 20, 20, 20, 20], rows) == [20]


@pytest.mark.parametrize(("context", "shared", "own"), [(512, [400] * 139, 50), (1024, [600, 600, 500] * 66, 300)])
def test_short_rows_have_room_for_their_groups(context: int, shared: list[int], own: int) -> None:
    """Of rows with one or two units each a part of one is read for all."""
    policy, n = unit_policy(SHAPE, 512), len(shared) + 1
    limits = units_capacity(512, max_rows=n, context_tokens=context, pool_tokens=10**6, room_tokens=0, row_spans=2)
    planner = DecodePlanner(SHAPE, COST, policy, grouping="multi", limits=limits, room_tokens=0)
    lens = np.full(n, max(shared) + own, np.int32)
    fitted = planner._fit(PrefixTree.from_neighbours(range(n), shared), StepBatch(np.ones_like(lens), lens))
    assert fitted.overflowed == () and fitted.plan.kv_tokens_read < 0.7 * fitted.plan.kv_tokens_logical
    check(fitted.plan, lens.tolist(), 512)


def test_what_parts_of_units_overflowed_is_told_of_the_whole_ones_that_fit() -> None:
    lens, policy = np.array([9, 9, 7, 12, 12], np.int32), policy_of(2, 4, 1)
    tree, batch = PrefixTree.from_neighbours(range(5), [7, 0, 5, 10]), StepBatch(np.ones(5, np.int32), lens)
    limits = Capacity(queries=5, slots=14, items=14, spans=5, partials=14, kv_slots=39)
    told = [
        DecodePlanner(SHAPE, COST, some, grouping="multi", limits=limits, room_tokens=0)._fit(tree, batch).overflowed
        for some in (replace(policy, block_tokens=0), policy)
    ]
    assert "items" not in told[0] and told[1] == ("items", *told[0])


def test_planted_faults_are_seen() -> None:
    rows = [[*range(20), 30 + r] for r in range(3)]
    lens = [21] * 3
    policy = policy_of(4, 4, 1)
    rows = [[*row[:18], *row[20:]] for row in rows]  # two of the tokens of the fifth unit are shared
    lens = [19] * 3
    plan = planned(rows, "multi", policy, Capacity.unlimited(), 2).plan
    check(plan, lens, 4)
    assert sorted(plan.items[:, Col.CHAIN].tolist()) == [0] * 4 + [Chain.HANDS_ON] + [Chain.GOES_ON] * 3
    swapped = plan.items.copy()
    first, second = np.flatnonzero(swapped[:, Col.Q_CNT] == 3)[:2]
    swapped[[first, second], Col.SPLIT] = swapped[[second, first], Col.SPLIT]
    alone = plan.items.copy()
    alone[:, Col.CHAIN] = 0
    tree, row_lens = within_units(tree_of(rows), np.array(lens, np.int32), policy), np.array(lens, np.int32)
    not_in_units = replace(policy, unit_tokens=0, max_split_tokens=5)
    faulty = [
        replace(plan, items=swapped),
        replace(plan, items=alone),
        make_plan(tree, row_lens, not_in_units, kv_tokens_unique=21),
        planned(rows, "multi", policy_of(4, 5), Capacity.unlimited(), 2).plan,
    ]
    for wrong in faulty:
        with pytest.raises(AssertionError):
            check(wrong, lens, 4)


@pytest.mark.parametrize(
    ("shared", "lens", "policy"),
    [
        ([3], [9, 9], policy_of(4, 2)),  # not of whole units
        ([3], [9, 9], policy_of(4, 4, 2)),  # not of whole blocks
        ([6, 4], [9, 9, 9], policy_of(4, 8, 2)),  # two ends within one unit
        ([6], [6, 9], policy_of(4, 8, 2)),  # a row without tokens to go on with
    ],
)
def test_a_tree_of_other_parts_of_units_is_refused(shared: list[int], lens: list[int], policy: TilePolicy) -> None:
    tree, kv_lens = PrefixTree.from_neighbours(range(len(lens)), shared), np.array(lens, np.int32)
    with pytest.raises(ValueError, match=f"units of {policy.unit_tokens} tokens are for nodes that end where they may"):
        make_plan(tree, kv_lens, policy, kv_tokens_unique=6)
    with pytest.raises(ValueError, match=f"units of {policy.unit_tokens} tokens"):
        cut = within_units(tree, kv_lens, policy)
        make_plan(cut, kv_lens, policy, kv_tokens_unique=6, listed_once=tree)


@settings(max_examples=200)
@given(rows_of_units(), UNITS, st.integers(1, 9))
def test_a_plan_lives_until_a_row_begins_a_unit(rows: Rows, unit: tuple[int, int], steps: int) -> None:
    policy, rows = policy_of(4, *unit), growing(rows)
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
        check(replace(plan, items=items), lens.tolist(), policy.unit_tokens)
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
    plan = make_plan(tree, lens, policy_of(2, 4), kv_tokens_unique=16)
    assert plan.items[:, Col.A_POS].tolist() == [p for p in (0, 4, 8, 12) for _ in range(4)]
