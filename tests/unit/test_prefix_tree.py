"""Trees from neighbours, radix paths and page tables against the sets of rows that brute force finds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Rows, radix_rows, ragged, shared_spans, spans_of, tree_of

from packinfer_sgl.planning.prefix_tree import FIELDS, PrefixTree


def assert_tree(tree: PrefixTree, rows: list[list[int]]) -> None:
    """``tree`` is the tree of exactly the spans that ``rows`` share, and keeps every promise of its class."""
    assert sorted(tree.row_order.tolist()) == list(range(len(rows)))
    spans = spans_of(tree)
    assert len(set(spans)) == len(spans)
    assert set(spans) == shared_spans(rows)
    for i, (holders, start, _) in enumerate(spans):
        above = [j for j, (other, _, _) in enumerate(spans) if other > holders]
        parent = min(above, key=lambda j: len(spans[j][0]), default=-1)
        assert (tree.parent[i], tree.depth[i]) == (parent, len(above)) and parent < i
        assert start == (tree.end[parent] if above else 0)
    assert (np.diff(tree.depth) >= 0).all()
    for place, row in enumerate(tree.row_order.tolist()):
        assert tree.tail_start[place] == max((end for holders, _, end in spans if row in holders), default=0)
    assert all(getattr(tree, name).dtype == np.int32 for name in FIELDS)
    tree.check_integrity()


@given(st.lists(st.integers(0, 6), max_size=9), st.integers(1, 1000), st.randoms(use_true_random=False))
def test_from_neighbours(shared: list[int], scale: int, random) -> None:
    shared = [n * scale for n in shared]
    order = random.sample(range(len(shared) + 1), len(shared) + 1)
    tree = PrefixTree.from_neighbours(order, shared)
    # rows written out: token p of places i and j is the same thing iff all shares between them exceed p
    leader = np.arange(len(order))
    rows: list[list[int]] = [[] for _ in order]
    levels = sorted({0, *shared})
    for lo, hi in pairwise(levels):
        for i, n in enumerate(shared):
            leader[i + 1] = leader[i] if n >= hi else i + 1
        for place, row in enumerate(order):
            rows[row].append(int(leader[place]) + 100 * lo)
    in_levels = PrefixTree.from_neighbours(order, [levels.index(n) for n in shared])
    assert_tree(in_levels, rows)
    assert spans_of(tree) == [(holders, levels[start], levels[end]) for holders, start, end in spans_of(in_levels)]
    tree.check_integrity()


@st.composite
def radix_paths(draw: st.DrawFn, rows: Rows) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Paths through a radix tree that holds ``rows`` and others that have gone: nodes also end where nobody parts."""
    nodes = {tuple(rows[min(holders)][:end]) for holders, _, end in shared_spans(rows)}
    for row in rows:
        nodes |= {tuple(row[:end]) for end in draw(st.lists(st.integers(1, len(row)), max_size=2))} if row else set()
    ids = dict(zip(sorted(nodes), draw(st.permutations(range(len(nodes)))), strict=True))
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    paths, ends = [], []
    for row in rows:
        positions = [end for end in range(1, len(row) + 1) if tuple(row[:end]) in ids]
        if draw(st.booleans()):  # the tree does not own all of this row's tokens
            positions = positions[: draw(st.integers(0, len(positions)))]
        path = tuple(ids[tuple(row[:end])] for end in positions)
        paths.append(known.setdefault(path, path) if draw(st.booleans()) else path)
        ends.append(tuple(positions))
    return paths, ends


@given(st.data())
def test_from_paths_and_from_slots_agree(data: st.DataObject) -> None:
    rows = data.draw(radix_rows())
    paths, ends = data.draw(radix_paths(rows))
    limits = [end[-1] if end else 0 for end in ends]
    by_paths, by_slots = PrefixTree.from_paths(paths, ends), tree_of(rows, limits)
    assert_tree(by_paths, [row[:n] for row, n in zip(rows, limits, strict=True)])
    assert by_paths.row_order.tolist() == sorted(range(len(rows)), key=paths.__getitem__)
    assert set(spans_of(by_paths)) == set(spans_of(by_slots))


# Page ids whose byte order, in the wrong endianness, is another order than their own; repeats and equal pages after
# different ones do not occur in a radix tree, but a caller of the wrapper may hand them in.
PAGE_TABLES = st.lists(
    st.lists(st.sampled_from([0, 1, 2, 255, 256, 65536, 2**31 - 1]), max_size=5), min_size=1, max_size=7
)


@settings(max_examples=400)
@given(st.one_of(radix_rows(), PAGE_TABLES), st.integers(1, 64), st.data())
def test_from_slots(tables: list[list[int]], page_size: int, data: st.DataObject) -> None:
    limits = [data.draw(st.integers(0, len(table) * page_size)) for table in tables]
    rows = [
        [page * page_size + p for page in table for p in range(page_size)][:n]
        for table, n in zip(tables, limits, strict=True)
    ]
    tree = PrefixTree.from_slots(*ragged(tables), page_size, np.array(limits, np.int32))
    assert_tree(tree, rows)


@given(radix_rows())
def test_unique_tokens(rows: Rows) -> None:
    kv_lens = np.array([len(row) for row in rows], np.int32)
    assert tree_of(rows).unique_tokens(kv_lens) == len({slot for row in rows for slot in row})


@given(radix_rows(), st.data())
def test_unique_tokens_of_rows_that_grew(rows: Rows, data: st.DataObject) -> None:
    tree = tree_of(rows)
    grown = [row + [-1 - r] * data.draw(st.integers(0, 3)) for r, row in enumerate(rows)]
    own = sum(len(g) - len(row) for g, row in zip(grown, rows, strict=True))
    expected = len({slot for row in rows for slot in row}) + own
    assert tree.unique_tokens(np.array([len(g) for g in grown], np.int32)) == expected


@given(st.data())
def test_nodes_beyond_what_a_row_may_share_are_left_out(data: st.DataObject) -> None:
    rows = data.draw(radix_rows())
    paths, ends = data.draw(radix_paths(rows))
    limits = [data.draw(st.integers(0, len(row))) for row in rows]
    usable = [sum(end <= limit for end in row_ends) for row_ends, limit in zip(ends, limits, strict=True)]
    expected = PrefixTree.from_paths(
        [path[:n] for path, n in zip(paths, usable, strict=True)],
        [row_ends[:n] for row_ends, n in zip(ends, usable, strict=True)],
    )
    nodes = sorted({node for path, row_ends in zip(paths, ends, strict=True) for node in zip(path, row_ends)})
    index = {node: i for i, (node, _) in enumerate(nodes)}
    above = {path[i]: index[path[i - 1]] if i else -1 for path in paths for i in range(len(path))}
    table = np.array([(node, above[node], end) for node, end in nodes], np.int64).reshape(-1, 3)
    tree = PrefixTree.from_nodes(table, [index[path[-1]] if path else -1 for path in paths], limits)
    assert all(np.array_equal(getattr(tree, name), getattr(expected, name)) for name in FIELDS)


def test_a_chain_of_equal_members_is_one_node() -> None:
    tree = PrefixTree.from_paths([(7, 3, 9), (7, 3, 9), (7, 3)], [(4, 5, 8), (4, 5, 8), (4, 5)])
    assert [(sorted(holders), start, end) for holders, start, end in spans_of(tree)] == [
        ([0, 1, 2], 0, 5),
        ([0, 1], 5, 8),
    ]


@pytest.mark.parametrize("n_rows", [0, 1, 5])
def test_unshared_rows_have_tails_only(n_rows: int) -> None:
    tree = PrefixTree.unshared(n_rows)
    assert tree.row_order.tolist() == list(range(n_rows)) and tree.n_nodes == 0
    assert tree.tail_start.tolist() == [0] * n_rows
