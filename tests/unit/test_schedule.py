"""Stream-K divides evenly, and is chosen where waves would leave CTAs idle; splits in a queue leave few idle."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import SplitTiming, TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree

FIXED, CTAS = 40, 20  # tokens that an item's fixed time is worth; CTAs that run at once


def policy(partial_us: float) -> TilePolicy:
    last = SplitTiming(CTAS * 0.8, FIXED * 1.0, 1.0, partial_us, CTAS, 2 * CTAS, 3.0)
    first = SplitTiming(CTAS * 0.8, FIXED * 1.0, 1.0, partial_us, 0, CTAS, np.nan)
    return TilePolicy((16, 4), 1 << 30, (first, last))


def plan_of(lens: list[int], partial_us: float = 1.0) -> Plan:
    """Rows that share nothing."""
    nothing_shared = PrefixTree.from_neighbours(range(len(lens)), [0] * (len(lens) - 1))
    return make_plan(nothing_shared, np.array(lens, np.int32), policy(partial_us), kv_tokens_unique=sum(lens))


def loads(plan: Plan) -> list[int]:
    """Tokens of each CTA, an item's fixed time counted as tokens."""
    found = []
    for item in range(plan.class_indptr[-1]):
        load = 0
        while item >= 0:
            load += int(plan.items[item, Col.A_LEN]) + FIXED
            item = int(plan.items[item, Col.NEXT_ITEM])
        found.append(load)
    return found


@given(st.lists(st.integers(1, 9000), min_size=CTAS + 1, max_size=90))
def test_shares_are_equal(lens: list[int]) -> None:
    plan = plan_of(lens)
    ctas = loads(plan)
    if (plan.items[:, Col.NEXT_ITEM] < 0).all():
        return  # waves balance as well
    assert len(ctas) <= CTAS
    share = (sum(lens) + (len(lens) + CTAS) * FIXED) / CTAS
    # a share ends late by at most the shortest split worth having (three times FIXED), early by half of what that split
    # costs (four times FIXED); what a CTA has lies between two such ends
    moved = 3 * FIXED + 4 * FIXED / 2 + 1
    assert max(ctas) <= share + moved
    assert sum(load < share - moved for load in ctas) <= 1, "only the last may have less to do"


def test_what_does_not_fill_its_last_wave_is_divided_by_stream_k() -> None:
    assert len(loads(plan_of([4000] * 62))) == CTAS  # 3 waves and a tenth
    assert len(loads(plan_of([4000] * 20))) == CTAS  # one each: nothing to split
    assert (plan_of([4000] * 20).items[:, Col.NEXT_ITEM] < 0).all()
    assert len(loads(plan_of([100] * 21))) == 21  # too short to split
    assert len(loads(plan_of([4000] * 62, partial_us=1e3))) == 62  # partial results cost more than idle CTAs


def test_a_tail_that_grows_has_a_shorter_last_split() -> None:
    """One row among all CTAs: while it grows, no split is ever longer than it needs to be in the end."""
    room, lens = 64, np.array([9000], np.int32)
    tree = PrefixTree.unshared(1)
    cut = [policy(0.0), replace(policy(0.0), timings=tuple(replace(t, stream_k_ctas=0) for t in policy(0.0).timings))]
    for each in cut:  # by Stream-K, or in waves
        plan = make_plan(tree, lens, each, kv_tokens_unique=9000, room_tokens=room)
        assert len(plan.items) > 5 and plan.kv_tokens_read == 9000
        is_open = plan.items[:, Col.OPEN_ROW] >= 0
        grown = plan.items[:, Col.A_LEN] + room * is_open
        assert is_open.sum() == 1 and grown.max() - grown.min() <= FIXED


def test_tails_beside_nodes_are_not_divided() -> None:
    rows = 62
    shared = PrefixTree.from_neighbours(range(rows), [512] * (rows - 1))
    plan = make_plan(shared, np.full(rows, 4512, np.int32), policy(0.0), kv_tokens_unique=512 + 4000 * rows)
    assert (plan.items[:, Col.NEXT_ITEM] < 0).all() and len(plan.class_indptr) == 3


HEADS, BLOCK = 2, 16


def queue_us(tokens: list[int]) -> float:
    """When all CTAs are done that take splits of all heads from a queue, longest first."""
    busy = [0.0] * CTAS
    for n in sorted((n for n in tokens for _ in range(HEADS)), reverse=True):
        heapq.heapreplace(busy, busy[0] + FIXED + -(-n // BLOCK) * BLOCK)
    return max(busy)


def queue_plan(lens: list[int], partial_us: float, max_split_tokens: int = 1 << 30) -> tuple[float, Plan]:
    """How rows that share nothing are split, and when that is done."""
    timing = SplitTiming(CTAS / HEADS, FIXED, 1.0, partial_us, 0, CTAS, np.nan, dynamic=HEADS, block=BLOCK)
    policy = TilePolicy((1,), max_split_tokens, (timing,))
    tree = PrefixTree.unshared(len(lens))
    plan = make_plan(tree, np.array(lens, np.int32), policy, kv_tokens_unique=sum(lens))
    return queue_us(plan.items[:, Col.A_LEN].tolist()), plan


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.sampled_from([0.0, 1.0, 1e6]))
def test_a_queue_of_splits_is_done_no_later_than_whole_rows(lens: list[int], partial_us: float) -> None:
    us, plan = queue_plan(lens, partial_us)
    # the splits of a row are of almost one length
    assert us + partial_us * plan.n_partials <= queue_us(lens) + BLOCK * len(plan.items) * HEADS / CTAS
    if partial_us == 1e6:
        assert plan.n_partials == 0
    assert (np.diff(plan.items[:, Col.A_LEN]) <= 0).all(), "the longest first"


def test_the_last_round_alone_is_split() -> None:
    per_round = CTAS // HEADS
    us, plan = queue_plan([1600] * (3 * per_round + 1), partial_us=1.0)  # one row more than three rounds take
    lengths = sorted(plan.items[:, Col.A_LEN].tolist())
    assert us < 3.4 * (1600 + FIXED) and lengths.count(1600) >= 3 * per_round - 1
    assert queue_plan([1600] * per_round, partial_us=0.0)[1].n_partials == 0  # a whole round: nothing to split


def test_splits_in_a_queue_obey_the_longest_allowed() -> None:
    for rows in (3, 9, 33):
        assert queue_plan([1600] * rows, partial_us=1e6, max_split_tokens=500)[1].items[:, Col.A_LEN].max() <= 500


def test_a_tile_with_half_the_rows_comes_later_than_a_full_one_of_as_many_tokens() -> None:
    timing = SplitTiming(4.0, 1.0, 1.0, 1e6, 0, 4, np.nan, dynamic=1, half_tile_factor=0.5)
    policy = TilePolicy((8,), 1 << 30, (timing,))
    for few, many in ((300, 200), (500, 200)):
        lens, new = np.array([few, many], np.int32), np.array([0, 2, 10], np.int32)
        visible = (np.zeros(10, np.int32), np.repeat(lens, np.diff(new)))
        tree = PrefixTree.unshared(2)
        plan = make_plan(tree, lens, policy, kv_tokens_unique=few + many, qo_indptr=new, visible=visible)
        assert plan.items[0, Col.Q_CNT] == (8 if few == 300 else 2)


def test_stream_k_of_rows_with_windows_has_no_item_of_negative_length() -> None:
    """Where a window hides all of run A, Stream-K has nothing to divide."""
    small = SplitTiming(3.0, 0.3, 1.0, 0.0, 7, 14, 2.0)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        new, before = rng.integers(1, 4, 3), rng.integers(0, 33, 3)
        lens, indptr = (new + before).astype(np.int32), np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        to = np.concatenate([np.arange(n) + b + 1 for n, b in zip(new, before)]).astype(np.int32)
        visible = (np.maximum(to - 3, 0).astype(np.int32), to)
        policy = TilePolicy((8, 4), 1 << 30, (small, small))
        tree = PrefixTree.unshared(3)
        plan = make_plan(tree, lens, policy, kv_tokens_unique=int(lens.sum()), qo_indptr=indptr, visible=visible)
        assert (plan.items[:, [Col.A_LEN, Col.B_LEN]] >= 0).all(), seed
