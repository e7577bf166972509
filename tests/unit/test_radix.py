"""Which rows of a batch share what, read from requests laid out as SGLang's (whole engines: tests/engine)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packinfer_sgl.planning.prefix_tree import FIELDS, PrefixTree
from packinfer_sgl.serving import radix_paths
from packinfer_sgl.serving.batch_rows import BatchRows
from packinfer_sgl.serving.radix_paths import RadixPaths


def spans(rows: BatchRows) -> set[tuple[int, int, frozenset[int]]]:
    tree = rows.prefix_tree()
    assert tree is not None
    tree.check_integrity()
    return {
        (int(s), int(e), frozenset(tree.row_order[lo:hi].tolist()))
        for s, e, lo, hi in zip(tree.start, tree.end, tree.row_lo, tree.row_hi)
    }


def request(pool_row: int, node: object, protected: int) -> SimpleNamespace:
    kv = SimpleNamespace(req_pool_idx=pool_row, cache_protected_len=protected)
    return SimpleNamespace(kv=kv, last_node=node, retraction_count=0)


def rust_tree(paths: dict[int, list[tuple[int, int]]]) -> SimpleNamespace:
    """A prefix cache of 0.5.23 that knows, for each node, the (id, end) of those above it and itself."""

    def collect_path_info(nodes):
        inner = {i for path in paths.values() for i, _ in path[:-1]}
        return [
            [SimpleNamespace(node_id=i, path_end=end, num_children=int(i in inner)) for i, end in paths[node]]
            for node in nodes
        ]

    return SimpleNamespace(tree_core=SimpleNamespace(collect_path_info=collect_path_info))


def beams_of(group: SimpleNamespace, leader: int) -> SimpleNamespace:
    return SimpleNamespace(entries=[(group, leader, 0, len(group.member_rows_cpu))])


@dataclass(eq=False)
class Node:
    id: int
    parent: Node | None
    key: range

    @property
    def children(self) -> list[int]:
        """Those of a leaf: nothing is split in these tests."""
        return []


class Rows(list):
    def tolist(self) -> list[int]:
        return list(self)


def test_beams_share_their_prompt_which_never_enters_the_tree() -> None:
    tree = rust_tree({0: [], 1: [(1, 40)]})
    reqs = [request(7, 1, 40), request(3, 1, 40)]
    group = SimpleNamespace(member_rows_cpu=Rows([9, 11]), prompt_len=60)
    batch = SimpleNamespace(reqs=reqs, tree_cache=tree, beam_tail=beams_of(group, 1))
    rows = BatchRows.of(batch)
    assert len(reqs) == 2 and len(rows.reqs) == len(rows.rows) == 4  # SGLang's own list stays as it is
    assert [row[0] for row in rows.rows] == [7, 3, 9, 11]
    assert spans(rows) == {(0, 40, frozenset({0, 1, 2, 3})), (40, 60, frozenset({1, 2, 3}))}
    assert rows != BatchRows.of(batch)  # beams may have changed places since: their slots are read anew


def test_a_prompt_that_the_tree_has_is_one_span() -> None:
    tree = rust_tree({1: [(1, 60)]})
    group = SimpleNamespace(member_rows_cpu=Rows([9]), prompt_len=60)
    batch = SimpleNamespace(reqs=[request(7, 1, 60)], tree_cache=tree, beam_tail=beams_of(group, 0))
    assert spans(BatchRows.of(batch)) == {(0, 60, frozenset({0, 1}))}


def test_without_beams_a_batch_that_stays_is_equal() -> None:
    batch = SimpleNamespace(reqs=[request(7, 1, 40), request(3, 1, 40)], tree_cache=rust_tree({1: [(1, 40)]}))
    assert BatchRows.of(batch) == BatchRows.of(batch)
    assert spans(BatchRows.of(batch)) == {(0, 40, frozenset({0, 1}))}


def test_a_request_whose_kv_was_taken_from_it_is_not_equal() -> None:
    """Nor where SGLang does not count that: then nothing tells."""
    batch = SimpleNamespace(reqs=[request(7, 1, 40), request(3, 1, 40)], tree_cache=rust_tree({1: [(1, 40)]}))
    before = BatchRows.of(batch)
    batch.reqs[1].retraction_count = 1
    assert BatchRows.of(batch) != before and BatchRows.of(batch) == BatchRows.of(batch)
    del batch.reqs[1].retraction_count
    assert BatchRows.of(batch) != BatchRows.of(batch)


@pytest.mark.parametrize("by_id", [False, True])  # 0.5.17: its own tree, and the one for models with sliding windows
def test_a_tree_that_is_walked(by_id: bool) -> None:
    root = Node(0, None, range(0))
    upper = Node(1, root, range(30))
    lower = Node(2, upper, range(10))
    nodes = [upper, lower, lower, root]
    if by_id:
        arena = {node.id: node for node in nodes}
        tree = SimpleNamespace(tree_core=SimpleNamespace(root_node=root, node_by_id=arena.__getitem__))
    else:
        tree = SimpleNamespace(root_node=root)
    reqs = [request(i, node.id if by_id else node, 40) for i, node in enumerate(nodes)]
    rows = BatchRows.of(SimpleNamespace(reqs=reqs, tree_cache=tree))
    assert spans(rows) == {(0, 30, frozenset({0, 1, 2})), (30, 40, frozenset({1, 2}))}
    reqs[2].kv.cache_protected_len = 39  # that row's slots are its own where the tree does not own them all
    rows = BatchRows.of(SimpleNamespace(reqs=reqs, tree_cache=tree))
    assert spans(rows) == {(0, 30, frozenset({0, 1, 2}))}


@pytest.mark.contract
@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 9), st.integers(0, 2)), max_size=40))
def test_paths_that_are_known_are_those_that_would_be_read(steps: list[tuple[int, int, int, int]]) -> None:
    """On SGLang's own tree: prompts that leave earlier ones anywhere, which splits nodes, and batches in between."""
    from bench.bench_plan import radix_cache
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    cache, _ = radix_cache()
    known, prompts, requests = RadixPaths(cache), [[]], []
    for i, (back, cut, own, what) in enumerate(steps):
        if what == 2 and own == 0:  # nobody runs
            cache.reset()
            prompts, requests = [[]], []
        prompt = [*prompts[-1 - back % len(prompts)][:cut], *range(100 * i + 1, 100 * i + 2 + own)]
        prompts.append(prompt)
        key = RadixKey(array("q", prompt))
        if what:  # else only looked up, which splits nodes, too
            cache.insert(InsertParams(key=key, value=torch.arange(len(prompt))))
        node, anew = cache.match_prefix(MatchPrefixParams(key=key)).last_device_node, RadixPaths(cache)
        _, ends = anew.path(anew.lowest([node])[0], len(prompt))
        requests.append((node, ends[-1] if ends else 0))
        batch = [requests[(i * cut + j * own) % len(requests)] for j in range(6)] + requests[-2:]
        nodes, limits = [node for node, _ in batch], [tokens - (own == 7) for _, tokens in batch]
        trees = []
        for paths in (known, RadixPaths(cache)):
            lowest = paths.lowest(nodes)
            assert lowest is not None
            trees.append(PrefixTree.from_nodes(paths.nodes, lowest, limits))
        assert all(np.array_equal(*(getattr(tree, name) for tree in trees)) for name in FIELDS)


@pytest.mark.contract
def test_what_is_known_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor when a request joins behind a prefix that is known."""
    from bench.bench_plan import fill, radix_cache

    cache, _ = radix_cache()
    batch = fill(cache, 4, (1, 4), (40, 9))
    read, reader = [], "_collect" if hasattr(getattr(cache, "tree_core", None), "collect_path_info") else "_walk"
    plain = getattr(radix_paths, reader)
    monkeypatch.setattr(radix_paths, reader, lambda tree, nodes: (read.append(len(nodes)), plain(tree, nodes))[1])
    paths, nodes = RadixPaths(cache), [request.last_node for request in batch.reqs]
    for n, expected in ((3, [3]), (3, [3]), (2, [3]), (4, [3, 1]), (4, [3, 1])):
        paths.lowest(nodes[:n])
        assert read == expected


@pytest.mark.contract
def test_a_streaming_session_shares_nothing() -> None:
    """Its requests hold an object of its own in the place of a node, whatever the tree is."""
    from sglang.srt.session.streaming_session import _VirtualNode

    root = Node(0, None, range(0))
    prefix = Node(1, root, range(30))
    for tree, node in ((SimpleNamespace(root_node=root), prefix), (rust_tree({1: [(1, 30)]}), 1)):
        reqs = [request(0, node, 30), request(1, _VirtualNode(), 30), request(2, node, 30)]
        assert spans(BatchRows.of(SimpleNamespace(reqs=reqs, tree_cache=tree))) == {(0, 30, frozenset({0, 2}))}
