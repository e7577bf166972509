"""Contiguous copies of shared spans, in KV slots that are kept free for them: the arena.

After some churn the slots of a prefix lie scattered over the pool, and are read more slowly than KV in one piece. So
hot shared spans are copied, and plans point at the copies. SGLang's table, tree and free list never change, and a copy
may be dropped at any time.

When a copy is right: it is named by the radix node that its span ends with. As long as a node is in SGLang's tree, the
tokens up to its end, their slots and what these hold stay the same (a split only moves the node's beginning), and no
other node gets its id. Copies are looked up by the nodes on the paths of running requests, which are in the tree. So a
copy that is found is right; that of a node which is gone is not found, and is replaced in time.

When a copy is made: when reading the scattered slots has cost as much as the copy will, whatever is to come (ski
rental, Karlin et al. 1988: at most twice the cost of knowing the future). Copies that the plan does not read make room,
the least useful first (GreedyDual, Cao and Irani 1997: benefit per slot, aged by what was replaced since).
"""

from __future__ import annotations

import dataclasses
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree

RUN_TOKENS = 64  # slots that follow each other for this long are read as fast as a copy
COPY_TOKENS = 256  # what a copy costs besides its tokens, in KV tokens read
STEP_BYTES = 128 << 20  # most KV that a step copies
FP8_NAN = 0x7F  # the byte of a NaN in e4m3
SPANS_PER_ROW = 4  # a plan gets no more spans than this for each row


class Paths(Protocol):
    """The running batch (``serving.batch_rows.BatchRows``)."""

    def paths(self, rows: list[int]) -> Sequence[tuple[int, Sequence[int], Sequence[int]]]: ...


class Extents:
    """A range of slots, handed out in pieces without gaps: the first hole that is long enough."""

    def __init__(self, slots: range) -> None:
        self._holes = [(slots.start, slots.stop)]

    @property
    def free_tokens(self) -> int:
        return sum(stop - start for start, stop in self._holes)

    def take(self, tokens: int) -> int:
        """First slot of ``tokens`` slots, or -1 if no hole is that long."""
        for i, (start, stop) in enumerate(self._holes):
            if stop - start >= tokens:
                self._holes[i : i + 1] = [(start + tokens, stop)] if stop - start > tokens else []
                return start
        return -1

    def give_back(self, start: int, tokens: int) -> None:
        insort(self._holes, (start, start + tokens))
        holes: list[tuple[int, int]] = []
        for begin, end in self._holes:
            if holes and holes[-1][1] == begin:
                begin = holes.pop()[0]
            holes.append((begin, end))
        self._holes = holes


@dataclass(eq=False)
class Span:
    """KV positions [start, end) of the path to radix node ``node``, which ends there: copied, or perhaps to be.

    Attributes:
        pool_row: row of ``req_to_token`` that holds them, in the present plan.
        tiles: how often a step reads them.
        scattered: share of the most that a copy can save; 0: the slots are as good as contiguous.
        runs: how many runs the slots form, on its way from the device, and when it has arrived.
        lost_tokens: what scattered reads have cost so far, in KV tokens read.
        slot: first slot of the copy, -1: none yet.
        filled_tokens: how much of it is there.
        worth: GreedyDual's rank.
    """

    node: int
    start: int
    end: int
    pool_row: int = 0
    tiles: int = 1
    scattered: float = 1.0
    runs: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
    lost_tokens: float = 0.0
    slot: int = -1
    filled_tokens: int = 0
    worth: float = 0.0

    @property
    def tokens(self) -> int:
        return self.end - self.start


class Arena:
    """The arena of one KV pool. In each step: ``point`` if the plan is new, then ``work``, then ``count_step``.

    Copies are made on the current stream: before the attention kernels of this step, after those of the last.
    """

    def __init__(
        self,
        slots: range,
        buffers: Sequence[torch.Tensor],
        req_to_token: torch.Tensor,
        copy_slots: Callable[[torch.Tensor, int], None],
        *,
        gain: float,
        tile_queries: int,
        force: bool,
    ) -> None:
        """
        Args:
            slots: the arena: rows of the buffers that nobody else uses.
            buffers: keys and values of all layers, each [slots, kv_heads, head_dim].
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            copy_slots: copies the KV of slots ([n] int32) in all buffers to as many slots from the given one on.
            gain: share of the time of a scattered span's read that a copy saves.
            tile_queries: most queries that read a span together.
            force: debugging: copy every span at once, and each step again, after a look at what the copy holds.
        """
        self.slots, self.gain, self.tile_queries, self.force = slots, gain, tile_queries, force
        self._buffers, self._req_to_token, self._copy_slots = buffers, req_to_token, copy_slots
        self._token_bytes = sum(buffer[0].nbytes for buffer in buffers)
        self._step_tokens = len(slots) if force else -(-STEP_BYTES // self._token_bytes)
        self._clock = 0.0
        self.copies = self.copied_tokens = self.hits = self.refused = self.replaced = 0
        self.shared_tokens_read = self.contiguous_tokens_read = 0
        self._plan_shared = self._plan_copied = 0  # tokens of the plan's shared spans, and of those in the arena
        self.drop()

    def drop(self) -> None:
        """Forget every copy."""
        self._extents = Extents(self.slots)
        self._copies: dict[int, Span] = {}  # complete ones, by node
        self._waiting: dict[int, Span] = {}  # what the plan reads scattered, by node
        self._used: dict[int, Span] = {}  # copies that the plan reads, by node

    def point(self, plan: Plan, kept: PrefixTree, rows: Paths | None) -> Plan:
        """``plan`` with its shared spans pointing at their copies.

        Args:
            plan: of a decode step; its first spans are the nodes of ``kept``.
            kept: the spans that are read once.
            rows: the batch; None if it is not known, and nothing can be found.
        """
        before, self._waiting, self._used = self._waiting, {}, {}
        self._plan_shared = self._plan_copied = 0
        sources: list[tuple[int, int, int]] = []
        spans: list[tuple[int, ...]] = []
        all_tiles = (-(-(kept.row_hi - kept.row_lo) // self.tile_queries)).tolist()
        nodes = plan.spans[: kept.n_nodes].tolist()
        paths = rows.paths([row for row, *_ in nodes]) if rows is not None else [(0, (), ())] * len(nodes)
        for i, (row, start, tokens, offset, _) in enumerate(nodes):
            pool_row, ids, ends = paths[i]
            node_at, tiles = dict(zip(ends, ids)), all_tiles[i]
            parts = self._cover(ids, ends, start, start + tokens)
            if len(spans) + len(parts) + len(plan.spans) - i - 1 > SPANS_PER_ROW * kept.n_rows:
                parts, node_at = [(start, start + tokens, None)], {}
            for first, stop, span in parts:
                slot = -1
                if span is not None:
                    slot = span.slot + first - span.start
                    span.worth = self._clock + tiles * span.scattered
                    self._used[span.node] = span
                    self._plan_copied += stop - first
                    sources.append((pool_row, first, stop))
                elif stop in node_at:
                    span = Span(node_at[stop], first, stop)
                    if (known := before.get(span.node)) is not None and known.start == first:
                        span = before.pop(span.node)
                    self._waiting[span.node] = span
                if span is not None:
                    span.pool_row, span.tiles = pool_row, tiles
                spans.append((row, first, stop - first, offset + first - start, slot))
            self._plan_shared += tokens
            self.hits += any(span is not None for *_, span in parts)
        for span in before.values():  # no longer read
            if span.slot >= 0:
                self._extents.give_back(span.slot, span.tokens)
        pointed = np.array(spans, np.int32).reshape(-1, plan.spans.shape[1])
        plan = dataclasses.replace(plan, spans=np.concatenate([pointed, plan.spans[kept.n_nodes :]]))
        if self.force:
            pool_rows = [pool_row for pool_row, *_ in rows.paths(list(range(kept.n_rows)))] if rows is not None else []
            scattered = [(pool_rows[s[0]], s[1], s[1] + s[2]) for s in plan.spans.tolist() if sources and s[4] < 0]
            self._sources = self._slots(sources)
            # rows outside a group may hold what it copied, too, and read it where it was
            self._sources = self._sources[~torch.isin(self._sources, self._slots(scattered))]
        return plan

    def _slots(self, held: list[tuple[int, int, int]]) -> torch.Tensor:
        """[n] int64, on the device: the slots at positions [first, stop) of rows of SGLang's table."""
        slots = [self._req_to_token[pool_row, first:stop].long() for pool_row, first, stop in held]
        return torch.cat([torch.zeros(0, dtype=torch.int64, device=self._req_to_token.device), *slots])

    def _cover(
        self, ids: Sequence[int], ends: Sequence[int], start: int, end: int
    ) -> list[tuple[int, int, Span | None]]:
        """Positions [start, end) of a path in parts [first, stop), each with the copy that holds it, or None."""
        parts: list[tuple[int, int, Span | None]] = []
        at = end
        for node, stop in zip(reversed(ids), reversed(ends)):
            span = self._copies.get(node)
            if span is not None and stop <= end and max(span.start, start) < min(stop, at):
                if stop < at:
                    parts.append((stop, at, None))
                parts.append((max(span.start, start), min(stop, at), span))
                at = parts[-1][0]
        if start < at:
            parts.append((start, at, None))
        return parts[::-1]

    def work(self) -> bool:
        """Copy what is due. True if the next step should be planned anew, to read new copies.

        Ranks of tensor parallelism need not agree: their copies hold what is read without them.
        """
        if self.force:
            for span in self._used.values():
                self._check(span)
                self._fill(span, 0, span.tokens)
        left, finished = self._step_tokens, False
        for span in list(self._waiting.values()):
            span.lost_tokens += self.gain * span.tiles * span.tokens
            if left == 0 or not (self._is_due(span) and self._has_slots(span)):
                continue
            tokens = min(left, span.tokens - span.filled_tokens)
            self._fill(span, span.filled_tokens, tokens)
            span.filled_tokens += tokens
            left -= tokens
            if span.filled_tokens == span.tokens:
                self._copies[span.node] = self._used[span.node] = self._waiting.pop(span.node)
                self.copies += 1
                finished = True
        return finished

    def _is_due(self, span: Span) -> bool:
        cost_tokens = 2 * span.tokens + COPY_TOKENS
        if self.force or span.slot >= 0:
            return True
        if span.lost_tokens < cost_tokens:
            return False
        # so far the slots were taken for scattered altogether; to count their runs waits for nobody
        if span.runs is None:
            span.runs = _count_runs(self._source(span, 0, span.tokens))
        runs, arrived = span.runs
        if arrived is not None and not arrived.query():
            return False
        span.scattered = max(0.0, 1 - span.tokens / int(runs) / RUN_TOKENS)
        return span.lost_tokens * span.scattered >= cost_tokens

    def _has_slots(self, span: Span) -> bool:
        """Whether the copy has room, if need be in place of copies that the plan does not read."""
        if span.slot < 0:
            span.slot = self._extents.take(span.tokens)
            unused = sorted((c for c in self._copies.values() if c.node not in self._used), key=lambda c: c.worth)
            enough = self._extents.free_tokens + sum(c.tokens for c in unused) >= span.tokens
            while span.slot < 0 and enough and unused:
                least = unused.pop(0)
                self._clock = least.worth
                self._extents.give_back(least.slot, least.tokens)
                del self._copies[least.node]
                self.replaced += 1
                span.slot = self._extents.take(span.tokens)
        if span.slot < 0:
            self.refused += 1
            span.lost_tokens = 0.0  # it asks again when it has lost as much again
        return span.slot >= 0

    def _source(self, span: Span, begin: int, tokens: int) -> torch.Tensor:
        return self._req_to_token[span.pool_row, span.start + begin : span.start + begin + tokens]

    def _fill(self, span: Span, begin: int, tokens: int) -> None:
        self._copy_slots(self._source(span, begin, tokens), span.slot + begin)
        self.copied_tokens += tokens

    def _check(self, span: Span) -> None:
        source = self._source(span, 0, span.tokens).long()
        for buffer in self._buffers:
            if not torch.equal(buffer[source], buffer[span.slot : span.slot + span.tokens]):
                raise RuntimeError(
                    f"packinfer: the arena's copy of tokens {span.start} to {span.end} differs from SGLang's KV; "
                    "please report this with the SGLang version"
                )

    @contextmanager
    def sources_hidden(self, *buffers: torch.Tensor) -> Iterator[None]:
        """For debugging (``force``): inside, the slots that the plan reads copies of are NaN in ``buffers``."""
        bits = [buffer.view(torch.uint8) if buffer.itemsize == 1 else buffer for buffer in buffers]
        held = [buffer[self._sources] for buffer in bits]
        for buffer in bits:
            buffer[self._sources] = FP8_NAN if buffer.dtype == torch.uint8 else float("nan")
        try:
            yield
        finally:
            for buffer, values in zip(bits, held):
                buffer[self._sources] = values

    def count_step(self) -> None:
        """A step runs on the plan."""
        self.shared_tokens_read += self._plan_shared
        as_good = sum(span.tokens for span in self._waiting.values() if span.scattered == 0)
        self.contiguous_tokens_read += self._plan_copied + as_good

    def as_dict(self) -> dict[str, int]:
        """Plain numbers: ``arena`` of ``/server_info``."""
        totals = ("copies", "hits", "refused", "replaced", "shared_tokens_read", "contiguous_tokens_read")
        return {
            "tokens": len(self.slots),
            "used_tokens": len(self.slots) - self._extents.free_tokens,
            "spans": len(self._copies),
            "copied_bytes": self.copied_tokens * self._token_bytes,
            **{name: getattr(self, name) for name in totals},
        }


def _count_runs(slots: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """How many runs of consecutive slots; on a GPU there when the event has happened."""
    runs = ((slots.diff() != 1).sum() + 1).to("cpu", non_blocking=True)
    if slots.device.type == "cpu":
        return runs, None
    arrived = torch.cuda.Event()
    arrived.record()
    return runs, arrived
