"""The estimate's timeline and sharing against a slow model of the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.tools.estimate_batches import Request, Sharing, Timeline, in_steps

STEP_S = 0.5

loads = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 8)),
    min_size=1,
    max_size=12,
)


def requests_of(load) -> list[Request]:
    arrivals = sorted(arrival for _, _, arrival in load)
    return [
        Request(np.array(prompt), 1.0, len(prompt), tokens, STEP_S * arrival)
        for (prompt, tokens, _), arrival in zip(load, arrivals)
    ]


def prefixes(request: Request) -> set[tuple[int, ...]]:
    return {tuple(request.blocks[: i + 1]) for i in range(request.input_tokens)}


@given(loads)
def test_what_a_batch_shares(load):
    requests = requests_of(load)
    sharing = Sharing(requests)
    earlier: set[tuple[int, ...]] = set()
    computed = 0
    for request in requests:
        computed += max(len(prefixes(request) - earlier), 1)
        earlier |= prefixes(request)
    assert sharing.computed() == computed
    for rows in (np.arange(len(load)), np.arange(0, len(load), 2)):
        tree = sharing.tree(rows)
        tree.check_integrity()
        lens = np.array([requests[i].input_tokens + 3 for i in rows], np.int32)
        told = set().union(*(prefixes(requests[i]) for i in rows))
        # tail_start is by place
        assert tree.unique_tokens(lens[tree.row_order]) == len(told) + 3 * len(rows)


@given(loads, st.integers(1, 4), st.one_of(st.none(), st.integers(12, 30)))
def test_who_runs_when(load, concurrency, pool_tokens):
    requests = requests_of(load)
    timeline = Timeline(requests, Sharing(requests), concurrency, STEP_S, pool_tokens)

    waiting, running, batches, step = list(range(len(requests))), {}, [], 0
    while waiting or running:
        running = {i: left for i, left in running.items() if left}
        while waiting and round(requests[waiting[0]].arrival_s / STEP_S) <= step + first_step(requests):
            among = [*running, waiting[0]]
            held = len(set().union(*(prefixes(requests[i]) for i in among)))
            held += sum(requests[i].output_tokens for i in among)
            if running and (len(running) == concurrency or held > (pool_tokens or held)):
                break
            if requests[waiting[0]].output_tokens > 1:
                running[waiting[0]] = requests[waiting[0]].output_tokens - 1
            waiting.pop(0)
        if running:
            lens = {i: requests[i].input_tokens + requests[i].output_tokens - left for i, left in running.items()}
            batches.append(sorted(lens.items()))
        running = {i: left - 1 for i, left in running.items()}
        step += 1
    said = [list(zip(rows.tolist(), lens.tolist())) for rows, lens in timeline.samples(10**6)]
    assert said == batches and timeline.steps == len(batches)


def first_step(requests: list[Request]) -> int:
    return round(requests[0].arrival_s / STEP_S)


def test_samples_lie_evenly():
    requests = [Request(np.array([i]), 1.0, 1, 101, 1000.0 * i) for i in range(2)]
    timeline = Timeline(requests, Sharing(requests), 2, 1.0)
    assert timeline.steps == 200
    said = [(rows.tolist(), lens.tolist()) for rows, lens in timeline.samples(4)]
    assert said == [([0], [27]), ([0], [77]), ([1], [27]), ([1], [77])]


def test_blocks_of_many_tokens():
    """A prompt's last block may be a part of one; what is known of a prompt may end before it does."""
    blocks = [[1, 2], [1, 2], [1, 3], [1]]
    requests = [Request(np.array(b), 512.0, 700, 2) for b in blocks]
    sharing = Sharing(requests)
    assert sharing.rank.tolist() == [1, 2, 3, 0]
    assert sharing.shared.tolist() == [512, 700, 512]
    assert sharing.computed() == 700 + 1 + 188 + 188


def test_arrivals_in_steps_follow_the_speed_of_the_log():
    """Ten tokens a second, nobody, then 40 a second."""
    log = [(0.0, 2.0, 20), (1.0, 1.0, 10), (5.0, 1.0, 40), (5.5, 0.5, 20)]
    requests = [Request(np.array([i]), 1.0, 1, tokens, came, took) for i, (came, took, tokens) in enumerate(log)]
    assert [request.arrival_s for request in in_steps(requests)] == [0.0, 10.0, 20.0, 40.0]
