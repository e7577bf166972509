"""Which requests decode together, what they share, and what a plan for them reads: by the plugin's own planner."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.prefix_tree import PrefixTree


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to one prompt.

    Attributes:
        blocks: [n] int64 what the prompt's leading blocks hold: equal numbers, equal tokens. May end before the prompt.
        block_tokens: tokens of a block.
        arrival_s: None if the file does not tell.
        latency_s: from arrival to the last token, likewise.
    """

    blocks: np.ndarray
    block_tokens: float
    input_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True)
class Load:
    """The requests of a file in the order of their arrival, and what had to be assumed."""

    requests: list[Request]
    kind: str
    notes: list[str]

    @property
    def timed(self) -> bool:
        return self.requests[-1].arrival_s is not None

    @property
    def known(self) -> float:
        """The part of the prompts of which the file tells what they hold."""
        told = sum(min(len(r.blocks) * r.block_tokens, r.input_tokens) for r in self.requests)
        return told / max(sum(r.input_tokens for r in self.requests), 1)


@dataclass(frozen=True)
class Step:
    """A decode step: requests, KV tokens of one layer, and partial results."""

    rows: int
    logical: int
    unique: int
    read: int
    partials: int


class Sharing:
    """Who begins like whom.

    Requests are ranked by what their prompts hold, so that those that begin alike are neighbours; ``shared[i]`` is the
    number of leading tokens that ranks ``i`` and ``i + 1`` have in common, and any two have the least between them.
    """

    def __init__(self, requests: list[Request]) -> None:
        order = sorted(range(len(requests)), key=lambda i: requests[i].blocks.astype(">i8").tobytes())
        self.rank = np.empty(len(requests), np.int64)
        self.rank[order] = np.arange(len(requests))
        self.input_tokens = np.array([request.input_tokens for request in requests], np.int64)
        self.shared = np.array([_common(requests[a], requests[b]) for a, b in zip(order, order[1:])], np.int64)

    def tree(self, rows: np.ndarray) -> PrefixTree:
        """The tree of the requests ``rows``, as SGLang's radix cache has it: what is equal lies in the same slots."""
        ranks = self.rank[rows]
        order = ranks.argsort()
        between = np.minimum.reduceat(self.shared[: ranks.max()], ranks[order][:-1]) if len(rows) > 1 else []
        return PrefixTree.from_neighbours(order.tolist(), between)

    def own_tokens(self, request: int, others: list[int]) -> int:
        """Prompt tokens of a request that none of ``others`` (ranks, ascending) has."""
        rank, tokens = int(self.rank[request]), int(self.input_tokens[request])
        at = bisect.bisect_left(others, rank)
        sides = [(other, rank) for other in others[max(at - 1, 0) : at]]
        sides += [(rank, other) for other in others[at : at + 2] if other != rank][:1]
        return tokens - max((int(self.shared[a:b].min()) for a, b in sides), default=0)

    def computed(self) -> int:
        """Prompt tokens that no earlier request had: those of all prefills, if no prefix was evicted."""
        total, earlier = 0, []
        for request, rank in enumerate(self.rank.tolist()):
            total += max(self.own_tokens(request, earlier), 1)  # the last token gives the first of the answer
            bisect.insort(earlier, rank)
        return total


def _common(a: Request, b: Request) -> int:
    n = min(len(a.blocks), len(b.blocks))
    differ = a.blocks[:n] != b.blocks[:n]
    blocks = int(differ.argmax()) if differ.any() else n
    return min(int(blocks * min(a.block_tokens, b.block_tokens)), a.input_tokens, b.input_tokens)


def in_steps(requests: list[Request]) -> list[Request]:
    """The same with ``arrival_s`` counted in decode steps: at any time as many as those that ran then had tokens."""
    came = np.array([request.arrival_s for request in requests])
    gone = came + [request.latency_s or 0.0 for request in requests]
    rate = np.array([request.output_tokens for request in requests]) / np.maximum(gone - came, 1e-6)
    times = np.unique(np.concatenate([came, gone]))
    runs = ((came <= time) & (time < gone) for time in times[:-1])
    rates = [np.median(rate[those]) if those.any() else 0.0 for those in runs]
    steps = np.concatenate([[0.0], np.cumsum(rates * np.diff(times))])
    return [replace(r, arrival_s=float(step)) for r, step in zip(requests, np.interp(came, times, steps))]


class Timeline:
    """When each request decodes, counted in steps: first come, first served, and prompts take no steps.

    Attributes:
        start, end: [n] int64 a request takes part in steps ``start <= step < end``.
        steps: those in which anybody decodes.
    """

    def __init__(
        self,
        requests: list[Request],
        sharing: Sharing,
        concurrency: int,
        step_s: float | None = None,
        pool_tokens: int | None = None,
    ) -> None:
        """
        Args:
            concurrency: most requests at once.
            step_s: how long a step takes; None: all requests are there from the beginning.
            pool_tokens: room for the prompts and answers of those that run; None: all fit.
        """
        self.input_tokens = sharing.input_tokens
        first = requests[0].arrival_s or 0.0
        start, end = np.zeros((2, len(requests)), np.int64)
        running: list[tuple[int, int]] = []  # end and number of each
        ranks: list[int] = []
        now, held = 0, 0

        def own(i: int) -> int:
            return sharing.own_tokens(i, ranks) + requests[i].output_tokens if pool_tokens else 0

        for i, request in enumerate(requests):
            now = max(now, 0 if step_s is None else int(((request.arrival_s or 0.0) - first) / step_s))
            while running and (
                running[0][0] <= now or len(running) == concurrency or held + own(i) > (pool_tokens or 0)
            ):
                ended, other = heapq.heappop(running)
                now = max(now, ended)
                ranks.remove(int(sharing.rank[other]))
                held -= own(other)
            start[i], end[i] = now, now + max(request.output_tokens - 1, 0)  # the first token is the prefill's
            held += own(i)
            bisect.insort(ranks, int(sharing.rank[i]))
            heapq.heappush(running, (int(end[i]), i))
        self.start, self.end = start, end
        # stretches in which somebody decodes
        order = self.start.argsort(kind="stable")
        reach = np.maximum.accumulate(self.end[order])
        opens = np.flatnonzero(np.concatenate([[True], self.start[order][1:] > reach[:-1]]))
        self._from = self.start[order][opens]
        self._busy = np.concatenate([[0], np.cumsum(np.maximum.reduceat(reach, opens) - self._from)])

    @property
    def steps(self) -> int:
        return int(self._busy[-1])

    def samples(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The requests of a step and their KV tokens (int32), of steps that lie evenly; of all, if ``most`` allows."""
        count = min(most, self.steps)
        for busy in ((np.arange(count) + 0.5) * self.steps / max(count, 1)).astype(np.int64):
            stretch = np.searchsorted(self._busy, busy, "right") - 1
            step = self._from[stretch] + busy - self._busy[stretch]
            rows = np.flatnonzero((self.start <= step) & (step < self.end))
            yield rows, (self.input_tokens[rows] + (step - self.start[rows]) + 1).astype(np.int32)


@dataclass(frozen=True)
class Sharers:
    """``planning.batch.Requests`` of requests that do not run."""

    tree: PrefixTree

    def prefix_tree(self) -> PrefixTree:
        return self.tree


def planned_steps(timeline: Timeline, sharing: Sharing, planner: DecodePlanner, most: int) -> list[Step]:
    """What plans of at most ``most`` steps of ``timeline`` read."""
    return [
        planned_step(StepBatch(np.ones(len(rows), np.int32), kv_lens, requests=Sharers(sharing.tree(rows))), planner)
        for rows, kv_lens in timeline.samples(most)
    ]


def planned_step(batch: StepBatch, planner: DecodePlanner) -> Step:
    plan = planner.plan(batch).plan
    logical = int(batch.kv_lens.sum())
    return Step(len(batch.kv_lens), logical, plan.kv_tokens_unique, plan.kv_tokens_read, plan.n_partials)
