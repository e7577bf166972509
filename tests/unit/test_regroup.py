"""The arena under a radix tree that splits, evicts and is flushed: what plans read of it is what SGLang holds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention64
from test_planner import EAGER

from packinfer_sgl import regroup
from packinfer_sgl.cpu_decode import CpuDecode
from packinfer_sgl.groups import AttentionShape
from packinfer_sgl.kernels.reference import copy_slots
from packinfer_sgl.metrics import Stats
from packinfer_sgl.plan import TilePolicy
from packinfer_sgl.prefix_tree import PrefixTree
from packinfer_sgl.regroup import Extents, Regroup

HEADS, DIM, LAYERS = 1, 8, 2
CONTEXT, POOL_ROWS = 64, 12


@dataclass(eq=False)
class Node:
    """As in SGLang: a split gives the upper part a new id, and ids are given out once."""

    id: int
    parent: Node | None
    tokens: list[int]
    slots: list[int]
    children: list[Node] = field(default_factory=list)
    locks: int = 0

    def path(self) -> list[Node]:
        return [*self.parent.path(), self] if self.parent else []


@dataclass(eq=False)
class Request:
    row: int
    tokens: list[int]
    node: Node
    protected: int
    slots: list[int]


class Rows(NamedTuple):
    reqs: list[Request]
    rows: list[tuple[int, int, int]]

    def path(self, row: int) -> tuple[int, list[int], list[int]]:
        request = self.reqs[row]
        nodes = request.node.path()
        ends = torch.tensor([len(node.tokens) for node in nodes]).cumsum(0).tolist() if nodes else []
        return request.row, [node.id for node in nodes], ends

    def prefix_tree(self) -> PrefixTree:
        paths = [self.path(row) for row in range(len(self.reqs))]
        return PrefixTree.from_paths([tuple(ids) for _, ids, _ in paths], [tuple(ends) for *_, ends in paths])


class Server:
    """A pool, a tree and a batch; every slot is NaN until written, and holds other numbers each time."""

    def __init__(self, slots: int, arena: int, *, force: bool = False, gain: float = 1e9) -> None:
        self.table = torch.zeros(POOL_ROWS, CONTEXT, dtype=torch.int32)
        self.buffers = [torch.full((slots + arena, HEADS, DIM), math.nan) for _ in range(2 * LAYERS)]
        self.random = torch.Generator().manual_seed(0)
        self.free = torch.randperm(slots, generator=self.random).tolist()
        self.ids = iter(range(1 << 30))
        self.root = Node(next(self.ids), None, [], [])
        self.running: list[Request] = []
        copy = functools.partial(copy_slots, self.buffers)
        self.arena = Regroup(
            range(slots, slots + arena), self.buffers, self.table, copy, gain=gain, tile_queries=8, force=force
        )
        self.stats = Stats()
        self.decode = CpuDecode(
            AttentionShape(HEADS, HEADS, DIM, 4),
            EAGER,
            TilePolicy((8, 1), 16),
            grouping="multi",
            verify=True,
            req_to_token=self.table,
            stats=self.stats,
            regroup=self.arena,
        )

    def nodes(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found += node.children
        return found[1:]

    def alloc(self, n: int) -> list[int] | None:
        while len(self.free) < n:
            leaves = [node for node in self.nodes() if not node.children and not node.locks]
            if not leaves:
                return None
            self.evict(leaves[0])
        slots, self.free = self.free[:n], self.free[n:]
        for buffer in self.buffers:
            buffer[slots] = torch.randn(n, HEADS, DIM, generator=self.random)
        return slots

    def release(self, slots: list[int]) -> None:
        for buffer in self.buffers:
            buffer[slots] = math.nan
        self.free += slots

    def evict(self, leaf: Node) -> None:
        leaf.parent.children.remove(leaf)
        self.release(leaf.slots)

    def match(self, tokens: list[int]) -> tuple[Node, int]:
        """The node that ends where ``tokens`` leave the tree, split off if need be, and how many tokens that are."""
        node, at = self.root, 0
        while True:
            below = next((c for c in node.children if at < len(tokens) and c.tokens[0] == tokens[at]), None)
            if below is None:
                return node, at
            n = 0
            while n < len(below.tokens) and at + n < len(tokens) and below.tokens[n] == tokens[at + n]:
                n += 1
            if n < len(below.tokens):
                upper = Node(next(self.ids), node, below.tokens[:n], below.slots[:n], [below], below.locks)
                node.children[node.children.index(below)] = upper
                below.parent, below.tokens, below.slots = upper, below.tokens[n:], below.slots[n:]
                return upper, at + n
            node, at = below, at + n

    def insert(self, tokens: list[int], slots: list[int]) -> Node:
        """Slots that the tree holds already are freed."""
        node, at = self.match(tokens)
        held = [slot for above in node.path() for slot in above.slots]
        self.release([slot for slot, kept in zip(slots[:at], held) if slot != kept])
        if at == len(tokens):
            return node
        leaf = Node(next(self.ids), node, tokens[at:], slots[at:])
        node.children.append(leaf)
        return leaf

    def lock(self, node: Node, by: int) -> None:
        for above in node.path():
            above.locks += by

    def start(self, tokens: list[int]) -> None:
        if len(self.running) == POOL_ROWS - 1:
            return
        node, at = self.match(tokens)
        self.lock(node, 1)
        own = self.alloc(len(tokens) - at)
        self.lock(node, -1)
        if own is None:
            return
        slots = [slot for above in node.path() for slot in above.slots] + own
        node = self.insert(tokens, slots)
        self.lock(node, 1)
        row = next(r for r in range(1, POOL_ROWS) if r not in {r.row for r in self.running})
        self.table[row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        self.running.append(Request(row, list(tokens), node, len(tokens), slots))

    def finish(self, request: Request, keep: bool) -> None:
        self.running.remove(request)
        self.lock(request.node, -1)
        if keep:
            self.insert(request.tokens, request.slots)
        else:
            self.release(request.slots[request.protected :])

    def flush(self) -> None:
        for request in list(self.running):
            self.finish(request, keep=False)
        for node in self.nodes():
            self.release(node.slots)
        self.root = Node(next(self.ids), None, [], [])
        self.arena.drop()

    def step(self) -> None:
        for request in list(self.running):
            slot = self.alloc(1)
            if slot is None:
                return self.finish(self.running[-1], keep=False)  # retracted
            self.table[request.row, len(request.slots)] = slot[0]
            request.slots += slot
            request.tokens.append(100 + request.row)
        if not self.running:
            return None
        rows = Rows(list(self.running), [(r.row, r.node.id, r.protected) for r in self.running])
        lens = torch.tensor([len(r.slots) for r in self.running])
        pool_rows = torch.tensor([r.row for r in self.running])
        packed = self.decode.step(rows, pool_rows, lens, torch.tensor([r.slots[-1] for r in self.running]))
        for k, v in zip(self.buffers[:LAYERS], self.buffers[LAYERS:]):
            q = torch.randn(len(lens), HEADS, DIM, generator=self.random)
            expected = attention64(q, k, v, [r.slots for r in self.running], 0.3)
            if self.arena.force:
                with self.arena.sources_hidden(k, v):
                    got = packed.run(q, k, v, sm_scale=0.3)
            else:
                got = packed.run(q, k, v, sm_scale=0.3)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        self.check_accounts()
        return None

    def check_accounts(self) -> None:
        arena, said = self.arena, self.arena.as_dict()
        held = [s for s in (*arena._copies.values(), *arena._waiting.values()) if s.slot >= 0]
        slots = [slot for s in held for slot in range(s.slot, s.slot + s.tokens)]
        assert len(slots) == len(set(slots)) == said["used_tokens"] and set(slots) <= set(arena.slots)
        assert said["contiguous_tokens_read"] <= said["shared_tokens_read"]
        assert said["spans"] == len(arena._copies)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Copies cost little, and take several steps."""
    monkeypatch.setattr(regroup, "COPY_TOKENS", 0)
    monkeypatch.setattr(regroup, "STEP_BYTES", 7 * 2 * LAYERS * HEADS * DIM * 4)


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=60))
def test_extents(size: int, events: list[tuple[int, int]]) -> None:
    extents, held = Extents(range(5, 5 + size)), []
    for tokens, which in events:
        if which and which <= len(held):
            extents.give_back(*held.pop(which - 1))
        else:
            free = sorted(set(range(5, 5 + size)) - {s for a, n in held for s in range(a, a + n)})
            fits = any(set(range(s, s + tokens)) <= set(free) for s in free)
            start = extents.take(tokens)
            assert (start >= 0) == fits
            if fits:
                assert set(range(start, start + tokens)) <= set(free)
                held.append((start, tokens))
        assert extents.free_tokens == size - sum(n for _, n in held)
    for extent in held:
        extents.give_back(*extent)
    assert extents.take(size) == 5


EVENTS = st.tuples(
    st.sampled_from(["step", "step", "step", "start", "start", "end", "drop", "evict", "flush"]),
    st.integers(0, 5),
    st.integers(1, 14),
)


@settings(max_examples=150)
@given(st.lists(EVENTS, min_size=5, max_size=50), st.integers(10, 60), st.integers(5, 60), st.booleans())
def test_any_history(events: list[tuple[str, int, int]], slots: int, arena: int, force: bool) -> None:
    server = Server(slots, arena, force=force)
    for event, which, length in events:
        if event == "start":  # leaves the path of all zeros somewhere
            server.start([0] * (length // 2) + [which] * (length - length // 2))
        elif event in ("end", "drop") and which < len(server.running):
            server.finish(server.running[which], keep=event == "end")
        elif event == "evict":
            leaves = [node for node in server.nodes() if not node.children and not node.locks]
            if which < len(leaves):
                server.evict(leaves[which])
        elif event == "flush" and which == 0:
            server.flush()
        server.step()


def prefix_of_20(force: bool = False, gain: float = 1e9, arena: int = 60, readers: int = 3) -> Server:
    server = Server(200, arena, force=force, gain=gain)
    for i in range(readers):
        server.start([0] * 20 + [i + 1])
    return server


def arena_spans(server: Server) -> list[tuple[int, int, int]]:
    """(first position, tokens, slot) of what the plan reads in the arena."""
    return [
        (first, tokens, slot) for _, first, tokens, _, slot in server.decode._planner.plan.spans.tolist() if slot >= 0
    ]


def test_forced_everything_shared_is_read_in_the_arena() -> None:
    server = prefix_of_20(force=True)
    for step in range(5):
        server.step()
        assert arena_spans(server) == [(0, 20, 200)]
        said = server.arena.as_dict()
        assert said["shared_tokens_read"] == said["contiguous_tokens_read"] == 20 * (step + 1)
        assert said["copied_bytes"] == 20 * (step + 1) * 2 * LAYERS * HEADS * DIM * 4
    assert said["copies"] == said["spans"] == 1 and said["hits"] == 1 and said["used_tokens"] == 20


def test_forced_a_copy_that_differs_stops_the_server() -> None:
    server = prefix_of_20(force=True)
    server.step()
    server.buffers[3][207] += 1
    with pytest.raises(
        RuntimeError, match=r"^packinfer: the arena's copy of tokens 0 to 20 differs from SGLang's KV; .*"
    ):
        server.step()


def steps(server: Server, n: int) -> list[tuple[int, int]]:
    """After each step: tokens copied since the start, and spans that the plan reads in the arena."""
    seen = []
    for _ in range(n):
        server.step()
        seen.append((server.arena.copied_tokens, len(arena_spans(server))))
    return seen


def test_a_copy_is_made_when_scattered_reads_have_cost_as_much(monkeypatch) -> None:
    """Reading scattered slots costs 10 tokens a step here, a copy 50; and a few of the slots are neighbours by chance."""
    monkeypatch.setattr(regroup, "COPY_TOKENS", 10)
    assert steps(prefix_of_20(gain=0.5), 8) == [(0, 0)] * 5 + [(7, 0), (14, 0), (20, 1)]


def test_a_step_copies_no_more_than_its_share() -> None:
    assert steps(prefix_of_20(), 4) == [(7, 0), (14, 0), (20, 1), (20, 1)]


def test_more_readers_than_a_tile_lose_more() -> None:
    """20 tokens in two tiles: 20 lost in each step, 40 is the price."""
    assert steps(prefix_of_20(gain=0.5, readers=9), 3)[1:] == [(0, 0), (7, 0)]


def test_contiguous_slots_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(regroup, "RUN_TOKENS", 16)
    server = Server(200, 60)
    server.free.sort()
    for i in range(2):
        server.start([0] * 40 + [i + 1] * 3)
    assert steps(server, 3) == [(0, 0)] * 3
    said = server.arena.as_dict()
    assert said["used_tokens"] == 0 and said["contiguous_tokens_read"] == said["shared_tokens_read"] == 3 * 40


def test_a_span_that_left_the_plan_half_copied_gives_its_slots_back() -> None:
    server = prefix_of_20(readers=2)
    assert steps(server, 1) == [(7, 0)] and server.arena.as_dict()["used_tokens"] == 20
    server.finish(server.running[0], keep=True)
    server.step()
    assert server.arena.as_dict()["used_tokens"] == 0


def test_half_a_copy_is_finished_for_other_readers() -> None:
    server = prefix_of_20()
    assert steps(server, 1) == [(7, 0)]
    server.finish(server.running[0], keep=False)
    assert steps(server, 2) == [(14, 0), (20, 1)]


def test_a_split_keeps_the_copy_of_both_parts() -> None:
    """Requests that leave the prefix half-way split its node: the lower part still names the copy of all 20 tokens."""
    server = prefix_of_20(force=True)
    server.step()
    server.start([0] * 12 + [7])
    server.step()
    # of the upper part, whose readers are not all below, there is no copy by name
    assert arena_spans(server) == [(0, 12, 220), (12, 8, 212)]
    assert server.arena.copies == 2


def test_spans_of_a_batch_that_shrinks_are_found_in_older_copies() -> None:
    server = Server(200, 60, force=True)
    for length, own in ((20, 1), (20, 2), (30, 3), (30, 4)):
        server.start([0] * 20 + [9] * (length - 20) + [own])
    server.step()
    assert arena_spans(server) == [(0, 20, 200), (20, 10, 220)]
    for request in server.running[:2]:
        server.finish(request, keep=False)
    server.step()  # both are one span now
    assert arena_spans(server) == [(0, 20, 200), (20, 10, 220)] and server.arena.copies == 2


def test_an_evicted_prefix_comes_back_to_a_new_copy() -> None:
    server = prefix_of_20(force=True)
    server.step()
    for request in list(server.running):
        server.finish(request, keep=False)
    while leaves := [node for node in server.nodes() if not node.children]:
        server.evict(leaves[0])
    for i in range(2):
        server.start([0] * 20 + [i + 1])
    server.step()
    assert arena_spans(server) == [(0, 20, 220)] and server.arena.copies == 2


def two_prefixes(arena: int) -> Server:
    """Two spans of 20 tokens were read, that of all zeros with more readers; only the last one still is."""
    server = Server(300, arena, force=True)
    for token, readers in ((0, 9), (1, 2)):
        for i in range(readers):
            server.start([token] * 20 + [i + 2])
        server.step()
        for request in list(server.running):
            server.finish(request, keep=False)
    for i in range(2):
        server.start([2] * 20 + [i + 3])
    return server


def test_the_least_useful_copy_makes_room() -> None:
    server = two_prefixes(arena=40)
    server.step()
    assert arena_spans(server) == [(0, 20, 320)], "in place of the one with two readers"
    assert server.arena.replaced == 1 and server.arena.as_dict()["used_tokens"] == 40


def test_copies_in_use_are_not_replaced() -> None:
    server = prefix_of_20(force=True, arena=30)
    server.step()
    for i in range(2):
        server.start([1] * 20 + [i + 3])
    server.step()
    said = server.arena.as_dict()
    assert arena_spans(server) == [(0, 20, 200)] and said["refused"] > 0 and said["replaced"] == 0
    assert said["contiguous_tokens_read"] == 20 + 20 and said["shared_tokens_read"] == 20 + 40


def test_a_span_longer_than_the_arena_is_refused() -> None:
    server = prefix_of_20(arena=19)
    assert steps(server, 3) == [(0, 0)] * 3
    assert server.arena.refused == 3 and server.arena.as_dict()["used_tokens"] == 0


def test_dropped_copies_are_gone() -> None:
    server = prefix_of_20(force=True)
    server.step()
    server.flush()
    assert server.arena.as_dict()["used_tokens"] == server.arena.as_dict()["spans"] == 0


def test_a_batch_that_is_not_known_reads_no_copy() -> None:
    server = prefix_of_20(force=True)
    server.step()
    rows = [r.row for r in server.running]
    lens = torch.tensor([len(r.slots) for r in server.running])
    server.decode.step(None, torch.tensor(rows), lens, torch.tensor([r.slots[-1] for r in server.running]))
    assert arena_spans(server) == [] and server.arena.copies == 1
