"""Every pair of a query and a KV token it sees is in exactly one work item, and every result has one place to go."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DECODE, Case, cases, keep_nodes, tree_of

from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree

ROOM = "room"


def tail_starts(case: Case, plan: Plan) -> dict[int, int]:
    """Where the tail of each row begins; listed once, what of it stands in the row's own part of the list."""
    starts = dict(zip(case.kept.row_order.tolist(), case.kept.tail_start.tolist(), strict=True))
    if case.once:
        assert len(plan.spans) == len(starts)
        starts = {row: max(starts[row], first) for row, first, *_ in plan.spans.tolist()}
    return starts


def kv_list(case: Case, plan: Plan) -> list[tuple[int, int] | str | None]:
    """(position, slot) of each entry of the KV slot list; no two spans and no room may overlap."""
    entries: list[tuple[int, int] | str | None] = [None] * plan.kv_capacity
    for row, first, tokens, offset, _ in plan.spans.tolist():
        for i in range(tokens):
            assert entries[offset + i] is None
            entries[offset + i] = (first + i, case.rows[row][first + i])
    assert len(plan.append_base) == (len(case.rows) if case.room else 0)
    for row, start in tail_starts(case, plan).items() if case.room else ():
        length, base = len(case.rows[row]), int(plan.append_base[row])
        for p in range(start, length):
            assert entries[base + p] == (p, case.rows[row][p])
        if length > start:
            for p in range(length, length + case.room):
                assert base + p >= 0 and entries[base + p] is None
                entries[base + p] = ROOM
    assert None not in entries, "an entry that nobody uses"
    return entries


def follow(plan: Plan, item: int) -> list[int]:
    """The items of the CTA that begins with ``item``."""
    cta = [item]
    while (item := int(plan.items[item, Col.NEXT_ITEM])) >= 0 and len(cta) <= len(plan.items):
        cta.append(item)
    return cta


def check_items(case: Case, plan: Plan) -> None:
    """Capacity, classes and order of the items."""
    assert plan.items.dtype == np.int32 and plan.items.shape == (len(plan.items), len(Col))
    begins = int(plan.class_indptr[-1])  # the items with which CTAs begin
    ctas = [follow(plan, i) for i in range(begins)]
    assert sorted(i for cta in ctas for i in cta) == list(range(len(plan.items))), "each item runs once"
    sizes = []
    for cta in ctas:
        tile_class, tokens = plan.items[cta[0], Col.TILE_CLASS], plan.items[cta][:, [Col.A_LEN, Col.B_LEN]].sum()
        timing = case.policy.timings[tile_class] if case.policy.timings else None
        if timing and timing.dynamic and 2 * plan.items[cta[0], Col.Q_CNT] <= case.policy.tile_queries[tile_class]:
            tokens = tokens * timing.half_tile_factor
        sizes.append((bool(tile_class), -int(tokens)))
    assert sizes == sorted(sizes), "large tiles first, longest first within a class"
    for tile_class, (first, last) in enumerate(itertools.pairwise(plan.class_indptr.tolist())):
        assert (plan.items[first:last, Col.TILE_CLASS] == tile_class).all()
    if (plan.items[begins:, Col.TILE_CLASS] == 0).any():
        raise AssertionError("only the last class, whose kernel knows NEXT_ITEM, is divided by Stream-K")
    open_rows = Counter(int(i[Col.OPEN_ROW]) for i in plan.items if i[Col.OPEN_ROW] >= 0)
    growing = [row for row, start in tail_starts(case, plan).items() if case.room and len(case.rows[row]) > start]
    assert open_rows == Counter(growing)
    for item in plan.items:
        policy = case.policy
        assert 1 <= item[Col.Q_CNT] <= (policy.tile_queries[-1] if item[Col.TILE_CLASS] else policy.tile_queries[0])
        assert 0 <= item[Col.Q_OFF] and item[Col.Q_OFF] + item[Col.Q_CNT] <= len(plan.query_rows)
        assert 0 <= item[Col.A_LEN] <= policy.max_split_tokens and 0 <= item[Col.B_LEN]
        for off, length in ((Col.A_OFF, Col.A_LEN), (Col.B_OFF, Col.B_LEN)):
            assert item[length] == 0 or 0 <= item[off] <= item[off] + item[length] <= plan.kv_capacity
        if (row := int(item[Col.OPEN_ROW])) >= 0:
            assert item[Col.A_POS] + item[Col.A_LEN] == len(case.rows[row]) and item[Col.B_LEN] == 0
            assert plan.query_rows[item[Col.Q_OFF]] == row and item[Col.Q_CNT] == 1


def check_coverage(case: Case, plan: Plan) -> None:
    entries, starts = kv_list(case, plan), tail_starts(case, plan)
    tail_at = {row: offset for row, _, _, offset, _ in plan.spans[case.kept.n_nodes :].tolist()}
    seen: dict[int, Counter] = defaultdict(Counter)
    for item in plan.items.tolist():
        run_a = entries[item[Col.A_OFF] : item[Col.A_OFF] + item[Col.A_LEN]]
        run_b = entries[item[Col.B_OFF] : item[Col.B_OFF] + item[Col.B_LEN]]
        positions = [entry[0] for entry in [*run_a, *run_b]]
        slots = range(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT])
        wanted = [case.seen(int(plan.query_rows[slot])) for slot in slots]
        rows = {case.query_row[plan.query_rows[slot]] for slot in slots}
        in_a_row = positions
        if case.once:  # then other rows' parts of the list stand everywhere
            inlined = positions != list(range(item[Col.A_POS], item[Col.A_POS] + len(positions)))
        else:
            inlined = run_b and item[Col.B_OFF] >= min(tail_at[row] for row in rows)
        if len(rows) > 1 and run_b and inlined:
            # inlined tails stand side by side, as many as the policy allows
            in_a_row = [entry[0] for entry in run_a]
            assert len(run_b) <= case.policy.max_inline_tail_tokens
        assert in_a_row == list(range(item[Col.A_POS], item[Col.A_POS] + len(in_a_row)))
        if positions:  # what nobody in the tile sees is cut off at both ends
            assert min(r.start for r in wanted) <= positions[0] and positions[-1] < max(r.stop for r in wanted)
        else:  # an empty item is a tail's: a node of which a tile sees nothing has none for it
            assert item[Col.A_POS] >= starts[case.query_row[plan.query_rows[slots[0]]]]
        for slot in slots:
            lo, hi = int(plan.win_lo[slot]), int(plan.win_hi[slot])
            assert lo >= 0 and (not run_b or hi <= len(run_b))
            seen[int(plan.query_rows[slot])].update([*run_a, *(run_b[lo:hi])])
    for query, row in enumerate(case.query_row):
        assert seen[query] == Counter((p, case.rows[row][p]) for p in case.seen(query))
    assert set(seen) <= set(range(len(case.query_row)))


def check_destinations(case: Case, plan: Plan) -> None:
    """A query is written once by one item, or merged from its own range of partial rows, each written once."""
    n_queries = len(case.query_row)
    direct: Counter[int] = Counter()
    partial: dict[int, list[int]] = defaultdict(list)
    for item in plan.items.tolist():
        for slot in range(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT]):
            query, first = int(plan.query_rows[slot]), int(plan.partial_rows[slot])
            if first < 0:
                direct[query] += 1
            else:
                partial[query].append(first + item[Col.SPLIT])
    assert plan.merge_indptr.shape == (n_queries + 1,) and plan.merge_indptr[0] == 0
    assert plan.n_partials == sum(map(len, partial.values()))
    for query in range(n_queries):
        merged = list(range(plan.merge_indptr[query], plan.merge_indptr[query + 1]))
        assert sorted(partial[query]) == merged and len(merged) != 1
        assert direct[query] == (0 if merged else 1)


@settings(max_examples=1500)
@given(cases())
def test_every_query_and_token_is_in_exactly_one_item(case: Case) -> None:
    plan = case.plan()
    assert plan.windowed is (case.windows is not None) and not (plan.items[:, Col.B_LEN].any() and not plan.windowed)
    check_items(case, plan)
    check_coverage(case, plan)
    check_destinations(case, plan)


def test_a_tail_that_an_earlier_query_sees_further_than_the_last_is_read() -> None:
    tree = PrefixTree.from_neighbours((0, 1), (1,))
    windows = [(0, 1), (0, 2), (0, 1)]
    indptr = np.array([0, 1, 3], np.int32)
    case = Case([[6], [6, 7]], tree, tree, TilePolicy((3, 1), 1 << 30), indptr, [0, 1, 1], windows, 0)
    check_coverage(case, case.plan())


@given(cases(DECODE))
def test_tokens_counted(case: Case) -> None:
    if case.once:
        plan, case = case.plan(), replace(case, once=False)
        assert plan.kv_capacity == plan.kv_tokens_unique + case.room * len(case.rows)
        assert plan.kv_tokens_read == case.plan().kv_tokens_read
    plan = case.plan()
    assert plan.kv_tokens_logical == sum(map(len, case.rows))
    assert plan.kv_tokens_unique == case.tree.unique_tokens(case.kv_lens)
    if case.tree.tail_start.tolist() == tree_of(case.rows).tail_start.tolist():
        assert plan.kv_tokens_unique == len({slot for row in case.rows for slot in row})
    read = 0
    small = {}  # by entry of the KV slot list
    for segment, (_, _, tokens, offset, _) in enumerate(plan.spans.tolist()):
        tail = segment >= case.kept.n_nodes
        queries = 1 if tail else int(case.kept.row_hi[segment] - case.kept.row_lo[segment])
        fits = queries <= case.policy.tile_queries[-1]
        read += tokens * (1 if fits else -(-queries // case.policy.tile_queries[0]))
        small |= dict.fromkeys(range(offset, offset + tokens), fits)
    assert plan.kv_tokens_read == read
    for item in plan.items:
        assert bool(item[Col.TILE_CLASS]) == small[int(item[Col.A_OFF])]


@given(cases())
def test_a_token_is_read_by_no_more_tiles_than_its_queries_need(case: Case) -> None:
    case = replace(case, once=False)
    plan = case.plan()
    assert plan.kv_tokens_read == int(plan.items[:, [Col.A_LEN, Col.B_LEN]].sum())
    reads: Counter[int] = Counter()  # by entry of the KV slot list
    for item in plan.items.tolist():
        for off, length in ((Col.A_OFF, Col.A_LEN), (Col.B_OFF, Col.B_LEN)):
            reads.update(range(item[off], item[off] + item[length]))
    for segment, (row, _, tokens, offset, _) in enumerate(plan.spans.tolist()):
        holders = {row}
        if segment < case.kept.n_nodes:
            holders = set(case.kept.row_order[case.kept.row_lo[segment] : case.kept.row_hi[segment]].tolist())
        queries = sum(row in holders for row in case.query_row)
        tiles = 1 if queries <= case.policy.tile_queries[-1] else -(-queries // case.policy.tile_queries[0])
        if case.policy.max_inline_tail_tokens and segment >= case.kept.n_nodes and case.windows is not None:
            tiles += queries > 1  # an inlined tail goes where its queries do, and a tile may begin amid them
        assert all(reads[offset + i] <= tiles for i in range(tokens))


@st.composite
def some_see_nothing(draw: st.DrawFn) -> Case:
    """Rows without KV; rows with more queries than KV under a causal mask; windows that lie before or behind all KV."""
    case = draw(cases(("full", "causal", "any", "decode")))
    rows = [*case.rows, *([[]] * draw(st.integers(0, 2)))]
    if case.windows is None:  # decode or full: only rows without KV see nothing
        q_lens = (
            [1] * len(rows) if case.qo_indptr is None else [*np.diff(case.qo_indptr), *([2] * len(rows))][: len(rows)]
        )
        windows = None
    else:
        q_lens = [draw(st.integers(int(r == 0), 4)) for r in range(len(rows))]
        windows = []
        for row, n in zip(rows, q_lens, strict=True):
            for i in range(n):
                end = max(len(row) - n + i + 1, 0)
                windows.append(draw(st.sampled_from([(0, end), (0, 0), (len(row), len(row))])))
    tree = tree_of(rows)
    return Case(
        rows=rows, tree=tree, kept=keep_nodes(tree, set(range(tree.n_nodes))), policy=case.policy,
        qo_indptr=None if case.qo_indptr is None else np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        query_row=[r for r, n in enumerate(q_lens) for _ in range(n)], windows=windows, room=0,
    )  # fmt: skip


@given(some_see_nothing())
def test_queries_that_see_nothing(case: Case) -> None:
    plan = case.plan()
    check_coverage(case, plan)
    check_destinations(case, plan)


def test_short_tails_are_inlined_in_the_tiles_of_their_prefix() -> None:
    """Three suffixes behind four tokens: two tiles of four queries, each over the prefix and what it sees of them."""
    rows = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8], [0, 1, 2, 3, 9, 10, 11]]
    windows = [(0, 5), (0, 6), (0, 5), (0, 6), (0, 7), (0, 5), (0, 6), (0, 7)]
    case = Case(
        rows=rows, tree=tree_of(rows), kept=tree_of(rows), policy=TilePolicy((4, 1), 1000, max_inline_tail_tokens=6),
        qo_indptr=np.array([0, 2, 5, 8], np.int32), query_row=[0, 0, 1, 1, 1, 2, 2, 2], windows=windows, room=0,
    )  # fmt: skip
    plan = case.plan()
    check_coverage(case, plan)
    columns = [Col.Q_CNT, Col.A_OFF, Col.A_LEN, Col.B_OFF, Col.B_LEN]
    assert sorted(plan.items[:, columns].tolist()) == [[4, 0, 4, 4, 4], [4, 0, 4, 6, 6]] and plan.n_partials == 0
    apart = replace(case, policy=TilePolicy((4, 1), 1000, max_inline_tail_tokens=5)).plan()
    assert len(apart.items) == 5 and apart.n_partials == 16


@pytest.mark.parametrize("qo_indptr", [None, np.array([0, 1, 2], np.int32)])
def test_a_plan_without_grouping_has_one_item_per_row(qo_indptr: np.ndarray | None) -> None:
    tree = keep_nodes(tree_of([[1, 2, 3], [1, 2, 4]]), set())
    plan = make_plan(tree, np.array([3, 3], np.int32), TilePolicy((4, 1), 8), kv_tokens_unique=4, qo_indptr=qo_indptr)
    assert (len(plan.items), plan.n_partials, plan.kv_tokens_read) == (2, 0, 6)
