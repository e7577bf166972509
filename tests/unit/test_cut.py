"""Shares are equal, and are chosen where pieces would leave programs idle; pieces taken in turn leave few idle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.cut import make_plan
from packinfer_sgl.plan import Col, PieceTiming, Plan, TilePolicy
from packinfer_sgl.prefix_tree import PrefixTree

FIXED, PROGRAMS = 40, 20  # tokens that an item's fixed time is worth; programs that run at once


def policy(partial_us: float) -> TilePolicy:
    last = PieceTiming(PROGRAMS * 0.8, FIXED * 1.0, 1.0, partial_us, PROGRAMS, 2 * PROGRAMS, 3.0)
    first = PieceTiming(PROGRAMS * 0.8, FIXED * 1.0, 1.0, partial_us, 0, PROGRAMS, np.nan)
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
            item = int(plan.items[item, Col.NEXT])
        found.append(load)
    return found


@given(st.lists(st.integers(1, 9000), min_size=PROGRAMS + 1, max_size=90))
def test_shares_are_equal(lens: list[int]) -> None:
    plan = plan_of(lens)
    programs = loads(plan)
    if (plan.items[:, Col.NEXT] < 0).all():
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
    assert (plan_of([4000] * 20).items[:, Col.NEXT] < 0).all()
    assert len(loads(plan_of([100] * 21))) == 21  # too short to cut
    assert len(loads(plan_of([4000] * 62, partial_us=1e3))) == 62  # partial results cost more than idle programs


def test_tails_beside_nodes_are_not_divided() -> None:
    rows = 62
    shared = PrefixTree.from_neighbours(range(rows), [512] * (rows - 1))
    plan = make_plan(shared, np.full(rows, 4512, np.int32), policy(0.0), kv_tokens_unique=512 + 4000 * rows)
    assert (plan.items[:, Col.NEXT] < 0).all() and len(plan.class_indptr) == 3


HEADS, BLOCK = 2, 16


def in_turn(lens: list[int], partial_us: float, chunk_tokens: int = 1 << 30) -> tuple[float, Plan]:
    """When all programs are done that take the pieces of rows that share nothing in turn, and the plan."""
    timing = PieceTiming(PROGRAMS / HEADS, FIXED, 1.0, partial_us, 0, PROGRAMS, np.nan, in_turn=HEADS, block=BLOCK)
    tree = PrefixTree.unshared(len(lens))
    cut = TilePolicy((4,), chunk_tokens, (timing,))
    plan = make_plan(tree, np.array(lens, np.int32), cut, kv_tokens_unique=sum(lens))
    busy = np.zeros(PROGRAMS)
    for i, tokens in enumerate(np.repeat(plan.items[:, Col.A_LEN], HEADS).tolist()):
        nth, place = divmod(i, PROGRAMS)
        busy[place if nth % 2 == 0 else PROGRAMS - 1 - place] += FIXED + -(-tokens // BLOCK) * BLOCK
    return float(busy.max()), plan


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.sampled_from([0.0, 1.0, 1e6]))
def test_cut_in_turn_is_no_slower_than_whole(lens: list[int], partial_us: float) -> None:
    whole = np.zeros(PROGRAMS)
    for i, tokens in enumerate(sorted((t for t in lens for _ in range(HEADS)), reverse=True)):
        nth, place = divmod(i, PROGRAMS)
        whole[place if nth % 2 == 0 else PROGRAMS - 1 - place] += FIXED + -(-tokens // BLOCK) * BLOCK
    us, plan = in_turn(lens, partial_us)
    assert us + partial_us * plan.n_partials <= whole.max() + 1e-6
    if partial_us == 1e6:
        assert plan.n_partials == 0


def test_the_last_round_alone_is_cut() -> None:
    per_round = PROGRAMS // HEADS
    lens = [1600] * (3 * per_round + 1)  # one row more than three rounds take
    us, plan = in_turn(lens, partial_us=1.0)
    lengths = sorted(plan.items[:, Col.A_LEN].tolist())
    assert us < 3.4 * (1600 + FIXED) and lengths.count(1600) >= 3 * per_round - 1
    assert in_turn([1600] * per_round, partial_us=0.0)[1].n_partials == 0  # a whole round: nothing to cut


def test_pieces_in_turn_obey_the_longest_allowed() -> None:
    assert in_turn([1600] * 3, partial_us=1e6, chunk_tokens=500)[1].items[:, Col.A_LEN].max() <= 500
