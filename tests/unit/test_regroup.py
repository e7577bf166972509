"""The arena under a radix tree that splits, evicts and is flushed: what plans read of it is what SGLang holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from radix_server import HEADS, LAYERS, Server
from test_planner import EAGER

from packinfer_sgl.runners import arena as regroup
from packinfer_sgl.runners import cuda
from packinfer_sgl.runners.arena import Extents


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Copies cost little, and take several steps."""
    monkeypatch.setattr(regroup, "COPY_TOKENS", 0)
    monkeypatch.setattr(regroup, "STEP_BYTES", 7 * 2 * LAYERS * HEADS * 8 * 4)


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


@settings(max_examples=60)
@given(
    st.lists(EVENTS, min_size=5, max_size=50),
    st.integers(10, 60),
    st.integers(5, 60),
    st.booleans(),
    st.sampled_from(["multi", "single"]),
)
def test_any_history(events: list[tuple[str, int, int]], slots: int, arena: int, force: bool, grouping: str) -> None:
    server = Server(slots, arena, force=force, grouping=grouping)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the kernels are no longer interpreted")
@pytest.mark.parametrize("force", [False, True])
def test_on_the_kernels(force: bool, monkeypatch) -> None:
    """Triton's, interpreted: the copy, the slot list of plans, and attention over it."""
    monkeypatch.setattr(cuda, "device_profile", lambda device: SimpleNamespace(decode_cost=EAGER))
    monkeypatch.setattr(regroup, "STEP_BYTES", 7 * 2 * LAYERS * HEADS * 64 * 4)
    server = Server(120, 40, force=force, dim=64, kernels=True)
    for tokens in ([0] * 20 + [1], [0] * 20 + [2], [0] * 8 + [3] * 9 + [4], [0] * 8 + [3] * 9 + [5]):
        server.start(tokens)
    for _ in range(6):
        server.step()
    assert len(arena_spans(server)) >= 3 and server.arena.copies >= 3
    for request in server.running[1:3]:
        server.finish(request, keep=True)
    server.start([0] * 20 + [1] + [6] * 5)
    for _ in range(3):
        server.step()
    assert arena_spans(server)


def arena_spans(server: Server) -> list[tuple[int, int, int]]:
    """(first position, tokens, slot) of what the plan reads in the arena."""
    return [(first, tokens, slot) for _, first, tokens, _, slot in server.path._loaded.spans.tolist() if slot >= 0]


def test_forced_everything_shared_is_read_in_the_arena() -> None:
    server = prefix_of_20(force=True)
    server.step()
    assert arena_spans(server) == [], "the copy is read from the next step on"
    for step in range(1, 6):
        server.step()
        assert arena_spans(server) == [(0, 20, 200)]
        said = server.arena.as_dict()
        assert said["shared_tokens_read"] == 20 + said["contiguous_tokens_read"] == 20 * (step + 1)
        assert said["copied_bytes"] == 20 * (step + 1) * 2 * LAYERS * HEADS * 8 * 4
    assert said["copies"] == said["spans"] == 1 and said["hits"] == 1 and said["used_tokens"] == 20


def test_forced_what_others_read_alone_stays() -> None:
    """Of two branches only one is a group: the other reads the slots that both hold, which must not be NaN then."""
    server = Server(200, 60, force=True, grouping="single")
    for tokens in ([0] * 8 + [1] * 30 + [2], [0] * 8 + [1] * 30 + [3], [0] * 8 + [4]):
        server.start(tokens)
    server.settle()
    assert arena_spans(server) == [(0, 38, 200)]


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
    """Reading scattered slots costs 10 tokens a step here, a copy 50; and a few slots are neighbours by chance."""
    monkeypatch.setattr(regroup, "COPY_TOKENS", 10)
    assert steps(prefix_of_20(gain=0.5), 9) == [(0, 0)] * 5 + [(7, 0), (14, 0), (20, 0), (20, 1)]


def test_a_step_copies_no_more_than_its_share() -> None:
    assert steps(prefix_of_20(), 4) == [(7, 0), (14, 0), (20, 0), (20, 1)]


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
    row = server.running[0].row
    server.finish(server.running[0], keep=False)
    server.start([9] * 25)
    assert server.running[-1].row == row, "the table's row that was copied from is another request's now"
    assert steps(server, 3)[1:] == [(20, 0), (20, 1)]


def test_a_split_keeps_the_copy_of_both_parts() -> None:
    """Requests that leave the prefix half-way split its node: the lower part still names the copy of all 20 tokens."""
    server = prefix_of_20(force=True)
    server.settle()
    server.start([0] * 12 + [7])
    server.settle()
    # of the upper part, whose readers are not all below, there is no copy by name
    assert arena_spans(server) == [(0, 12, 220), (12, 8, 212)]
    assert server.arena.copies == 2


def test_spans_of_a_batch_that_shrinks_are_found_in_older_copies() -> None:
    server = Server(200, 60, force=True)
    for length, own in ((20, 1), (20, 2), (30, 3), (30, 4)):
        server.start([0] * 20 + [9] * (length - 20) + [own])
    server.settle()
    assert arena_spans(server) == [(0, 20, 200), (20, 10, 220)]
    for request in server.running[:2]:
        server.finish(request, keep=False)
    server.step()  # both are one span now
    assert arena_spans(server) == [(0, 20, 200), (20, 10, 220)] and server.arena.copies == 2


def test_a_plan_with_too_many_spans_reads_scattered_slots(monkeypatch) -> None:
    server = Server(200, 60, force=True)
    for length, own in ((20, 1), (20, 2), (30, 3), (30, 4)):
        server.start([0] * 20 + [9] * (length - 20) + [own])
    server.settle()
    for request in server.running[:2]:
        server.finish(request, keep=False)
    monkeypatch.setattr(regroup, "SPANS_PER_ROW", 1.5)
    server.step()
    assert arena_spans(server) == [] and server.arena.copies == 2 and len(server.path._loaded.spans) == 3


def test_an_evicted_prefix_comes_back_to_a_new_copy() -> None:
    server = prefix_of_20(force=True)
    server.settle()
    for request in list(server.running):
        server.finish(request, keep=False)
    while leaves := [node for node in server.nodes() if not node.children]:
        server.evict(leaves[0])
    for i in range(2):
        server.start([0] * 20 + [i + 1])
    server.settle()
    assert arena_spans(server) == [(0, 20, 220)] and server.arena.copies == 2


def two_prefixes(arena: int) -> Server:
    """Two spans of 20 tokens were read, that of all zeros with more readers; only the last one still is."""
    server = Server(300, arena, force=True)
    for token, readers in ((0, 9), (1, 2)):
        for i in range(readers):
            server.start([token] * 20 + [i + 2])
        server.settle()
        for request in list(server.running):
            server.finish(request, keep=False)
    for i in range(2):
        server.start([2] * 20 + [i + 3])
    return server


def test_the_least_useful_copy_makes_room() -> None:
    server = two_prefixes(arena=40)
    server.settle()
    assert arena_spans(server) == [(0, 20, 320)], "in place of the one with two readers"
    assert server.arena.replaced == 1 and server.arena.as_dict()["used_tokens"] == 40


def test_copies_in_use_are_not_replaced() -> None:
    server = prefix_of_20(force=True, arena=30)
    server.settle()
    for i in range(2):
        server.start([1] * 20 + [i + 3])
    server.step()
    said = server.arena.as_dict()
    assert arena_spans(server) == [(0, 20, 200)] and said["refused"] > 0 and said["replaced"] == 0
    assert said["contiguous_tokens_read"] == 20 + 20 and said["shared_tokens_read"] == 20 + 20 + 40


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
    server.settle()
    rows = [r.row for r in server.running]
    lens = torch.tensor([len(r.slots) for r in server.running])
    server.path.step(server.batch(None, torch.tensor(rows), lens, torch.tensor([r.slots[-1] for r in server.running])))
    assert arena_spans(server) == [] and server.arena.copies == 1
