"""Scripts for SGLang's scripted runtime: what befalls a group in mid-generation. They run in the scheduler, a step at a
time (a ``yield``), and look at packinfer's counters there.

Each plays a family of requests twice: left alone, and disturbed while all of them are read as one group. What they say
must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from sglang.test.scripted_runtime.context.http_post import _http_post_and_await_recv_msg
from sglang.test.scripted_runtime.req_handle import ScriptedReqHandle
from sglang.test.scripted_runtime_chunked_helpers import advance_to_nth_chunk, run_until_all_finished

from packinfer_sgl.serving.metrics import STATS

MEMBERS, TOKENS, SHARED = 6, 40, 160
POOL, CHUNK = 1600, 128  # tokens

Steps = Iterator[None]


def words(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(300, 1200) for _ in range(n)]


def start(t: Any, ids: list[int], tokens: int) -> ScriptedReqHandle:
    """The runtime's own requests are one token again and again: whatever is read of them, the output is the same."""
    t.started = getattr(t, "started", 0) + 1
    rid = f"group-{t.started}"
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    _http_post_and_await_recv_msg(
        t,
        path="/generate",
        json={"input_ids": ids, "sampling_params": params, "rid": rid, "stream": True},
        predicate=lambda message: getattr(message, "rid", None) == rid,
        description=rid,
    )
    return ScriptedReqHandle(rid=rid, context=t)


class Family:
    """Requests behind ``SHARED`` tokens; the later ones have more of their own."""

    def __init__(self, t: Any, tokens: Callable[[int], int]) -> None:
        self.t, self.tokens = t, tokens
        self.handles: list[ScriptedReqHandle] = []
        self.reqs: list[Any] = []

    def grouped(self) -> Steps:
        """Until all are in mid-generation, and one group."""
        prefix = words(0, SHARED)
        yield from run_until_all_finished([start(self.t, prefix, 1)])
        self.handles = [start(self.t, prefix + words(1 + i, 5 + 4 * i), self.tokens(i)) for i in range(MEMBERS)]
        self.reqs = [handle.req for handle in self.handles]
        for _ in range(100):
            if min(self.generated()) >= 8 and STATS.as_dict()["rows_grouped"] == MEMBERS:
                break
            yield
        in_groups(MEMBERS)

    def generated(self) -> list[int]:
        self.reqs = [req or handle.req for req, handle in zip(self.reqs, self.handles)]
        return [0 if req is None else len(req.output_ids) for req in self.reqs]

    def finish(self) -> Steps:
        yield from run_until_all_finished(self.handles)

    def said(self) -> list[list[int]]:
        return [list(req.output_ids) for req in self.reqs]


def in_groups(rows: int) -> None:
    """The last step was packed, and so many requests were read together."""
    state = STATS.as_dict()
    assert state["rows_grouped"] == rows, (rows, state)
    assert "error" not in state["fallback_steps"]


def alone(t: Any, tokens: Callable[[int], int]) -> Iterator[Any]:
    family = Family(t, tokens)
    yield from family.grouped()
    yield from family.finish()
    while not t.is_fully_idle:  # else the cache stays
        yield
    t.flush_cache()
    yield
    assert not t.get_all_node_hit_counts()
    return family.said()


def begin(t: Any, tokens: Callable[[int], int] = lambda i: TOKENS) -> Iterator[Any]:
    expected = yield from alone(t, tokens)
    family = Family(t, tokens)
    yield from family.grouped()
    return expected, family


def steps_after(family: Family, more: int) -> Steps:
    """Until each has generated so much more, or is finished."""
    before, packed = family.generated(), STATS.packed_steps
    for _ in range(200):
        now = family.generated()
        if all(b - a >= more or req.finished() for a, b, req in zip(before, now, family.reqs)):
            break
        yield
    assert STATS.packed_steps >= packed + more


# --- the scripts


def retraction(t: Any) -> Steps:
    """There is no room for the next tokens: some give up their KV and compute it anew, when there is."""
    expected, family = yield from begin(t)
    t.exhaust_kv(leave_pages=3)
    for _ in range(100):
        if any(req.retraction_count for req in family.reqs):
            break
        yield
    retracted = sum(bool(req.retraction_count) for req in family.reqs)
    assert 0 < retracted < MEMBERS, retracted
    t._release_exhausted_pools()
    yield from steps_after(family, 8)
    in_groups(MEMBERS)
    yield from family.finish()
    assert family.said() == expected


def pause(t: Any, mode: str) -> Steps:
    expected, family = yield from begin(t)
    t.pause_generation(mode=mode)
    yield
    steps, generated = STATS.packed_steps, family.generated()
    for _ in range(10):
        yield
    assert STATS.packed_steps == steps and family.generated() == generated
    assert all(bool(req.retraction_count) == (mode == "retract") for req in family.reqs)
    t.continue_generation()
    yield from steps_after(family, 8)
    in_groups(MEMBERS)
    yield from family.finish()
    assert family.said() == expected


def abort(t: Any) -> Steps:
    """The first, which was there before the others, and one in the middle."""
    expected, family = yield from begin(t)
    gone = (0, 3)
    for i in gone:
        t.abort(family.handles[i])
    stay = [i for i in range(MEMBERS) if i not in gone]
    yield from steps_after(family, 8)
    in_groups(len(stay))
    yield from family.finish()
    said = family.said()
    assert [said[i] for i in stay] == [expected[i] for i in stay]
    assert all(len(said[i]) < TOKENS and said[i] == expected[i][: len(said[i])] for i in gone)


def eviction(t: Any) -> Steps:
    """Half of them finish; strangers take the room of their tails, again and again, while the others go on."""
    expected, family = yield from begin(t, lambda i: 12 if i % 2 else 3 * TOKENS)
    yield from run_until_all_finished(family.handles[1::2])
    nodes, steps = set(t.get_all_node_hit_counts()), STATS.packed_steps
    for i in range(3):
        yield from run_until_all_finished([start(t, words(100 + i, POOL // 2), 1)])
        in_groups(MEMBERS // 2)
    assert nodes - set(t.get_all_node_hit_counts()), "nothing was evicted"
    assert STATS.packed_steps > steps and not any(req.finished() for req in family.reqs[::2])
    yield from family.finish()
    assert family.said() == expected


def late_comer(t: Any, aborted: bool) -> Steps:
    """Behind the group's prefix, in chunks, while the others generate."""
    expected, family = yield from begin(t)
    late = start(t, words(0, SHARED) + words(50, 2 * CHUNK + 20), 10)
    yield from advance_to_nth_chunk(late, 1)
    steps = STATS.packed_steps
    if aborted:
        t.abort(late)
    yield from steps_after(family, 8)
    in_groups(MEMBERS if aborted else MEMBERS + 1)
    assert STATS.packed_steps > steps
    yield from family.finish()
    assert family.said() == expected
