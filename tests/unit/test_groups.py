"""Pruning by cost: against every subset of nodes, with a cost of each choice that is computed row by row here."""

from __future__ import annotations

import math
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import members, spans_of

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.cpu_profile import CPU as CPU_PROFILE
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.prefix_tree import FIELDS, PrefixTree
from packinfer_sgl.planning.profiles import H200 as H200_PROFILE

H200, CPU = H200_PROFILE.decode_cost, CPU_PROFILE.extend_cost(1 << 20)
LLAMA_8B = AttentionShape(qo_heads=32, kv_heads=8, head_dim=128, kv_bytes=2)


def read_us(cost: CostModel, shape: AttentionShape, tokens: int, queries: int) -> float:
    """Time of the work items that read ``tokens`` KV tokens for ``queries`` queries, by the words of ``CostModel``."""
    query_rows = queries * (shape.qo_heads // shape.kv_heads)
    small = query_rows <= cost.small_rows
    tiles = 1 if small else math.ceil(query_rows / cost.large_rows)
    tile_rows = cost.small_as_rows if small else cost.large_rows
    token_bytes = 2 * shape.kv_heads * shape.head_dim * shape.kv_bytes  # K and V
    flops = 2 * 2 * tiles * tile_rows * shape.kv_heads * shape.head_dim  # QK and PV, a multiply and an add each
    moved = token_bytes / cost.bytes_per_us + (tiles - 1) * token_bytes / cost.reread_bytes_per_us
    return tokens * max(moved, flops / cost.flops_per_us) + tiles * shape.kv_heads * cost.item_us


def tail_us(cost: CostModel, shape: AttentionShape, tokens: int, queries: int) -> float:
    return read_us(cost, shape, tokens, queries) - read_us(cost, shape, 0, queries)


def partial_us(cost: CostModel, shape: AttentionShape) -> float:
    result_bytes = shape.qo_heads * (shape.head_dim + 1) * 4  # float32 output and its lse2
    return cost.partial_us + 2 * result_bytes / cost.partial_bytes_per_us  # written and read back


def choice_us(
    tree: PrefixTree,
    kept: tuple[int, ...],
    shape: AttentionShape,
    cost: CostModel,
    q_lens: np.ndarray | None = None,
) -> float:
    """Cost of reading the ``kept`` nodes of ``tree`` once each, and all else row by row."""
    queries = [1] * tree.n_rows if q_lens is None else q_lens.tolist()
    total = 0.0
    for node in kept:
        above = [other for other in kept if members(tree, other) > members(tree, node)]
        begin = max((int(tree.end[other]) for other in above), default=0)
        total += read_us(cost, shape, int(tree.end[node]) - begin, sum(queries[row] for row in members(tree, node)))
    for place in range(tree.n_rows):
        on_path = [int(tree.end[node]) for node in kept if tree.row_lo[node] <= place < tree.row_hi[node]]
        own = queries[int(tree.row_order[place])]
        total += own * partial_us(cost, shape) * (len(on_path) + 1 if on_path else 0)
        total += tail_us(cost, shape, int(tree.tail_start[place]) - max(on_path, default=0), own)
    return total


def chosen(tree: PrefixTree, pruned: PrefixTree) -> tuple[int, ...]:
    """The nodes of ``tree`` that ``pruned`` keeps; ``pruned`` must be a sound tree over the same rows."""
    pruned.check_integrity()
    assert pruned.row_order.tolist() == tree.row_order.tolist()
    index = {(holders, end): i for i, (holders, _, end) in enumerate(spans_of(tree))}
    kept = tuple(index[holders, end] for holders, _, end in spans_of(pruned))
    assert len(set(kept)) == len(kept) and (np.diff(pruned.depth) >= 0).all()
    for i, (holders, start, _) in enumerate(spans_of(pruned)):
        above = [j for j, (other, _, _) in enumerate(spans_of(pruned)) if other > holders]
        parent = max(above, key=lambda j: pruned.depth[j], default=-1)
        assert pruned.parent[i] == parent and start == (pruned.end[parent] if above else 0)
    for place, row in enumerate(tree.row_order.tolist()):
        assert pruned.tail_start[place] == max(
            (end for holders, _, end in spans_of(pruned) if row in holders), default=0
        )
    assert all(getattr(pruned, name).dtype == np.int32 for name in FIELDS)
    return kept


def allowed(tree: PrefixTree, mode: str) -> list[tuple[int, ...]]:
    subsets = chain.from_iterable(combinations(range(tree.n_nodes), n) for n in range(tree.n_nodes + 1))
    if mode == "multi":
        return list(subsets)
    return [s for s in subsets if not any(members(tree, a) & members(tree, b) for a, b in combinations(s, 2))]


def positive(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    if draw(st.booleans()):
        return draw(st.sampled_from([H200, CPU]))
    small = draw(st.integers(1, 32))
    return CostModel(
        bytes_per_us=draw(positive(1e3, 1e7)),
        reread_bytes_per_us=draw(positive(1e3, 1e8)),
        flops_per_us=draw(positive(1e4, 1e9)),
        item_us=draw(positive(1e-4, 1e2)),
        partial_us=draw(positive(1e-4, 1.0)),
        partial_bytes_per_us=draw(positive(1e3, 1e7)),
        large_rows=draw(st.integers(small, 128)),
        small_rows=small,
        small_as_rows=draw(positive(1, 64)),
        least_saving=draw(st.floats(0.5, 3)),
    )


@st.composite
def shapes(draw: st.DrawFn) -> AttentionShape:
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    group = draw(st.sampled_from([1, 4, 5, 7, 8]))
    return AttentionShape(
        kv_heads * group, kv_heads, draw(st.sampled_from([64, 128])), draw(st.sampled_from([1, 2, 4]))
    )


@st.composite
def trees(draw: st.DrawFn, max_nodes: int) -> PrefixTree:
    """Up to ``max_nodes`` nodes on spans of one token to thousands, with up to tens of rows each."""
    token = draw(st.sampled_from([1, 7, 30, 200, 3000]))
    steps = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=max_nodes))
    spread = draw(st.integers(0, token - 1))
    shared = [level * token + level * level * spread for level, repeats in steps for _ in range(repeats)]
    return PrefixTree.from_neighbours(range(len(shared) + 1), shared)


@given(st.integers(1, 500), shapes(), cost_models())
def test_the_model_says_what_its_words_say(queries: int, shape: AttentionShape, cost: CostModel) -> None:
    token_us, fixed_us = cost.read_us(shape, queries)
    assert fixed_us == pytest.approx(read_us(cost, shape, 0, queries), rel=1e-12)
    assert token_us * 1000 + fixed_us == pytest.approx(read_us(cost, shape, 1000, queries), rel=1e-12)
    assert cost.partials_us(shape) == pytest.approx(partial_us(cost, shape), rel=1e-12)


@settings(max_examples=800)
@given(trees(6), shapes(), cost_models(), st.sampled_from(["multi", "single"]), st.data())
def test_no_choice_is_cheaper(
    tree: PrefixTree, shape: AttentionShape, cost: CostModel, mode: str, data: st.DataObject
) -> None:
    q_lens = None  # decode
    if data.draw(st.booleans()):
        most = data.draw(st.sampled_from([3, 40, 500]))
        lens = data.draw(st.lists(st.integers(1, most), min_size=tree.n_rows, max_size=tree.n_rows))
        q_lens = np.array(lens, np.int32)
    kept = chosen(tree, prune(tree, shape, cost, mode, q_lens))
    choices = allowed(tree, mode)
    assert tuple(sorted(kept)) in choices
    us = choice_us(tree, kept, shape, cost, q_lens)
    assert us <= choice_us(tree, (), shape, cost, q_lens) * (1 + 1e-9)
    assert us == pytest.approx(min(choice_us(tree, s, shape, cost, q_lens) for s in choices), rel=1e-9)


@settings(max_examples=300)
@given(trees(20), shapes(), cost_models(), st.sampled_from(["multi", "single"]))
def test_never_dearer_than_no_grouping(tree: PrefixTree, shape: AttentionShape, cost: CostModel, mode: str) -> None:
    kept = chosen(tree, prune(tree, shape, cost, mode))
    us = choice_us(tree, kept, shape, cost)
    assert us <= choice_us(tree, (), shape, cost) * (1 + 1e-9)
    # nor than any choice that differs in one node
    for node in range(tree.n_nodes):
        other = tuple(set(kept) ^ {node})
        if mode == "multi" or not any(members(tree, a) & members(tree, b) for a, b in combinations(other, 2)):
            assert us <= choice_us(tree, other, shape, cost) * (1 + 1e-9)


@given(trees(6), shapes(), cost_models())
def test_off_keeps_nothing(tree: PrefixTree, shape: AttentionShape, cost: CostModel) -> None:
    pruned = prune(tree, shape, cost, "off")
    assert chosen(tree, pruned) == () and not pruned.tail_start.any()


@given(trees(12), shapes(), cost_models(), st.sampled_from(["multi", "single"]), st.data())
def test_groups_that_save_little_are_dropped(
    tree: PrefixTree, shape: AttentionShape, cost: CostModel, mode: str, data: st.DataObject
) -> None:
    own = data.draw(st.lists(st.integers(1, 300), min_size=tree.n_rows, max_size=tree.n_rows))
    kv_lens = np.zeros(tree.n_rows, np.int32)
    kv_lens[tree.row_order] = tree.tail_start + np.array(own, np.int32)
    kept, pruned = prune(tree, shape, cost, mode), prune(tree, shape, cost, mode, kv_lens=kv_lens)
    read = 0
    for begin, end, low, high in zip(kept.start, kept.end, kept.row_lo, kept.row_hi):
        rows = int(high - low) * shape.group_size
        read += int(end - begin) * math.ceil(rows / (cost.small_rows if rows <= cost.small_rows else cost.large_rows))
    read += sum(int(kv_lens[row]) - int(tail) for row, tail in zip(kept.row_order, kept.tail_start))
    worth = kept.n_nodes > 0 and kv_lens.sum() >= cost.least_saving * read
    assert chosen(tree, pruned) == (chosen(tree, kept) if worth else ())
    assert pruned.tail_start.tolist() == (kept.tail_start.tolist() if worth else [0] * tree.n_rows)


# one H200, 32/8 heads, rows of unequal length behind one prefix: time without groups over that with them
@pytest.mark.parametrize(
    ("rows", "shared", "own", "times_faster"),
    [(16, 128, 3000, 0.92), (48, 128, 400, 0.95), (48, 256, 3000, 0.87), (48, 512, 1500, 0.94), (64, 512, 1500, 0.98),
     (16, 256, 400, 1.21), (48, 512, 400, 1.30), (64, 256, 400, 1.08), (64, 512, 400, 1.27)],
)  # fmt: skip
def test_groups_are_kept_where_they_were_faster(rows: int, shared: int, own: int, times_faster: float) -> None:
    tree = levels([1, rows], [shared, own])
    kv_lens = shared + (own * np.linspace(0.4, 1.6, rows)).astype(np.int32)
    kept = prune(tree, LLAMA_8B, H200, kv_lens=kv_lens)
    assert prune(tree, LLAMA_8B, H200).n_nodes == 1 and kept.n_nodes == (times_faster > 1)


def levels(rows: list[int], tokens: list[int]) -> PrefixTree:
    """A regular tree: level ``i`` has ``rows[i]`` nodes of ``tokens[i]`` tokens; the last level is the rows' own."""
    ends = np.cumsum(tokens).tolist()
    shared = []
    for place, following in pairwise(range(rows[-1])):
        same = [place * n // rows[-1] == following * n // rows[-1] for n in rows[:-1]]
        shared.append(ends[sum(same) - 1] if any(same) else 0)
    return PrefixTree.from_neighbours(range(rows[-1]), shared)


# kernels' workloads: one prompt of 16k tokens before 64 rows; 2k before 8 of 1k before 8 rows each; 1, 4, 16, 512 nodes
D1 = levels([1, 64], [16384, 512])
D3 = levels([1, 8, 64], [2048, 1024, 256])
D11 = levels([1, 4, 16, 512], [1024, 256, 128, 32])


@pytest.mark.parametrize("mode", ["multi", "single"])
@pytest.mark.parametrize(("tree", "nodes"), [(D1, 1), (D3, 9), (D11, 21)], ids=["D1", "D3", "D11"])
def test_grouping_is_chosen(tree: PrefixTree, nodes: int, mode: str) -> None:
    assert tree.n_nodes == nodes
    pruned = prune(tree, LLAMA_8B, H200, mode)
    kept = chosen(tree, pruned)
    assert (pruned.tail_start > 0).all()
    assert choice_us(tree, kept, LLAMA_8B, H200) < choice_us(tree, (), LLAMA_8B, H200) / 2
    # by symmetry the best choice keeps all nodes of a level or none
    by_level = [
        tuple(i for i in range(nodes) if tree.depth[i] in depths)
        for n in range(4 if mode == "multi" else 2)
        for depths in combinations(range(int(tree.depth[-1]) + 1), n)
    ]
    best_us = min(choice_us(tree, s, LLAMA_8B, H200) for s in by_level)
    assert choice_us(tree, kept, LLAMA_8B, H200) == pytest.approx(best_us, rel=1e-9)


def test_a_span_too_short_to_pay_is_declined() -> None:
    """At 32/8 heads two rows need some hundred tokens in common: their partial results cost as much."""
    keeps = [prune(levels([1, 2], [n, 100]), LLAMA_8B, H200).n_nodes for n in (1, 8, 400, 1000)]
    assert keeps == [0, 0, 1, 1]
