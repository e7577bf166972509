"""Shares are equal, and are chosen where pieces would leave programs idle; pieces that are taken leave few idle."""

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

FIXED, PROGRAMS = 40, 20  # tokens that an item's fixed time is worth; programs that run at once


def policy(partial_us: float) -> TilePolicy:
    last = SplitTiming(PROGRAMS * 0.8, FIXED * 1.0, 1.0, partial_us, PROGRAMS, 2 * PROGRAMS, 3.0)
    first = SplitTiming(PROGRAMS * 0.8, FIXED * 1.0, 1.0, partial_us, 0, PROGRAMS, np.nan)
    return TilePolicy((16, 4), 1 << 30, (first, last))


def plan_of(lens: list[int], partial_us: float = 1.0) -> Plan:
    """Rows that share nothing."""
    nothing_shared = PrefixTree.from_neighbours(range(len(lens)), [0] * (len(lens) - 1))
    return make_plan(nothing_shared, np.array(lens, np.int32), policy(partial_us), kv_tokens_unique=sum(lens))


def loads(plan: Plan) -> list[int]:
    """Tokens of each program, an item's fixed time counted as tokens."""
    found = []
    for item in range(plan.class_indptr[-1]):
        load = 0
        while item >= 0:
            load += int(plan.items[item, Col.A_LEN]) + FIXED
            item = int(plan.items[item, Col.NEXT_ITEM])
        found.append(load)
    return found


@given(st.lists(st.integers(1, 9000), min_size=PROGRAMS + 1, max_size=90))
def test_shares_are_equal(lens: list[int]) -> None:
    plan = plan_of(lens)
    programs = loads(plan)
    if (plan.items[:, Col.NEXT_ITEM] < 0).all():
        return  # pieces balance as well
    assert len(programs) <= PROGRAMS
    share = (sum(lens) + (len(lens) + PROGRAMS) * FIXED) / PROGRAMS
    # a cut comes late by at most the shortest piece worth having (three times FIXED), early by half of what that piece
    # costs (four times FIXED); what a program has lies between two cuts
    moved = 3 * FIXED + 4 * FIXED / 2 + 1
    assert max(programs) <= share + moved
    assert sum(load < share - moved for load in programs) <= 1, "only the last may have less to do"


def test_what_does_not_fill_its_last_wave_is_divided() -> None:
    assert len(loads(plan_of([4000] * 62))) == PROGRAMS  # 3 waves and a tenth
    assert len(loads(plan_of([4000] * 20))) == PROGRAMS  # one each: nothing to cut
    assert (plan_of([4000] * 20).items[:, Col.NEXT_ITEM] < 0).all()
    assert len(loads(plan_of([100] * 21))) == 21  # too short to cut
    assert len(loads(plan_of([4000] * 62, partial_us=1e3))) == 62  # partial results cost more than idle programs


def test_a_tail_that_grows_has_a_shorter_last_piece() -> None:
    """One row among all programs: while it grows, no piece is ever longer than it needs to be in the end."""
    room, lens = 64, np.array([9000], np.int32)
    tree = PrefixTree.unshared(1)
    cut = [policy(0.0), replace(policy(0.0), timings=tuple(replace(t, stream_k_ctas=0) for t in policy(0.0).timings))]
    for each in cut:  # into shares, or into pieces
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


def taken_us(tokens: list[int]) -> float:
    """When all programs are done of which the next free one takes the next piece of all heads, the longest first."""
    busy = [0.0] * PROGRAMS
    for n in sorted((n for n in tokens for _ in range(HEADS)), reverse=True):
        heapq.heapreplace(busy, busy[0] + FIXED + -(-n // BLOCK) * BLOCK)
    return max(busy)


def taken_plan(lens: list[int], partial_us: float, chunk_tokens: int = 1 << 30) -> tuple[float, Plan]:
    """How rows that share nothing are cut, and when that is done."""
    timing = SplitTiming(PROGRAMS / HEADS, FIXED, 1.0, partial_us, 0, PROGRAMS, np.nan, dynamic=HEADS, block=BLOCK)
    policy = TilePolicy((1,), chunk_tokens, (timing,))
    tree = PrefixTree.unshared(len(lens))
    plan = make_plan(tree, np.array(lens, np.int32), policy, kv_tokens_unique=sum(lens))
    return taken_us(plan.items[:, Col.A_LEN].tolist()), plan


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.sampled_from([0.0, 1.0, 1e6]))
def test_pieces_that_are_taken_are_done_no_later_than_whole_rows(lens: list[int], partial_us: float) -> None:
    us, plan = taken_plan(lens, partial_us)
    # the pieces of a row are of almost one length
    assert us + partial_us * plan.n_partials <= taken_us(lens) + BLOCK * len(plan.items) * HEADS / PROGRAMS
    if partial_us == 1e6:
        assert plan.n_partials == 0
    assert (np.diff(plan.items[:, Col.A_LEN]) <= 0).all(), "the longest first"


def test_the_last_round_alone_is_cut() -> None:
    per_round = PROGRAMS // HEADS
    us, plan = taken_plan([1600] * (3 * per_round + 1), partial_us=1.0)  # one row more than three rounds take
    lengths = sorted(plan.items[:, Col.A_LEN].tolist())
    assert us < 3.4 * (1600 + FIXED) and lengths.count(1600) >= 3 * per_round - 1
    assert taken_plan([1600] * per_round, partial_us=0.0)[1].n_partials == 0  # a whole round: nothing to cut


def test_pieces_that_are_taken_obey_the_longest_allowed() -> None:
    for rows in (3, 9, 33):
        assert taken_plan([1600] * rows, partial_us=1e6, chunk_tokens=500)[1].items[:, Col.A_LEN].max() <= 500


def test_a_tile_with_half_the_rows_comes_later_than_a_full_one_of_as_many_tokens() -> None:
    timing = SplitTiming(4.0, 1.0, 1.0, 1e6, 0, 4, np.nan, dynamic=1, half_tile_factor=0.5)
    policy = TilePolicy((8,), 1 << 30, (timing,))
    for few, many in ((300, 200), (500, 200)):
        lens, new = np.array([few, many], np.int32), np.array([0, 2, 10], np.int32)
        visible = (np.zeros(10, np.int32), np.repeat(lens, np.diff(new)))
        tree = PrefixTree.unshared(2)
        plan = make_plan(tree, lens, policy, kv_tokens_unique=few + many, qo_indptr=new, visible=visible)
        assert plan.items[0, Col.Q_CNT] == (8 if few == 300 else 2)


def test_shares_of_rows_with_windows_have_no_item_of_negative_length() -> None:
    """Where a window hides all of run A, a share has nothing to cut of it."""
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
