"""Plans of SGLang's batches: one for as long as a decode batch stays the same, one for each batch of other kinds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from packinfer_sgl.cut import make_plan
from packinfer_sgl.groups import AttentionShape, CostModel, prune
from packinfer_sgl.metrics import Stats
from packinfer_sgl.plan import Plan, TilePolicy
from packinfer_sgl.prefix_tree import Int32, PrefixTree
from packinfer_sgl.regroup import Paths, Regroup


class Rows(Paths, Protocol):
    """A batch that can be compared with the next one and knows who shares what (``radix.BatchRows``)."""

    def prefix_tree(self) -> PrefixTree | None: ...


class DecodePlanner:
    """Keeps the plan of the running decode batch.

    A plan holds while the batch compares equal, every row has grown by exactly one token since the step before, and
    the tails have room.

    Attributes:
        plan: the plan of the last step.
        tree: who shares what in it, before pruning by cost.
    """

    plan: Plan
    tree: PrefixTree

    def __init__(
        self,
        shape: AttentionShape,
        cost: CostModel,
        policy: TilePolicy,
        *,
        grouping: str,
        room_tokens: int,
        stats: Stats,
        regroup: Regroup | None = None,
        fits: Callable[[Plan], bool] = lambda plan: True,
    ) -> None:
        """
        Args:
            grouping: see ``config.Config``.
            room_tokens: how many steps a plan may live.
            regroup: where shared spans have contiguous copies, if there is an arena.
            fits: whether a plan can be run; if not, it is made smaller.
        """
        self.shape, self.cost, self.policy = shape, cost, policy
        self.room_tokens, self.stats, self.fits, self.regroup = room_tokens, stats, fits, regroup
        uncut = dataclasses.replace(policy, chunk_tokens=1 << 30, timings=None)
        self._attempts = ((grouping, policy), (grouping, uncut), ("single", uncut))  # each smaller than the one before
        self._rows: Rows | None = None
        self._lens = np.zeros(0, np.int64)
        self._steps_left = 0
        # compiles the planning code where no compiled form of it lies on disk, which takes seconds: not in a request
        two_rows = PrefixTree.from_neighbours((0, 1), (1,))
        kept = prune(two_rows, shape, cost)
        make_plan(kept, np.full(2, 2, np.int32), policy, kv_tokens_unique=3, room_tokens=room_tokens)

    def step(self, rows: Rows | None, lens: np.ndarray, tree_without_rows: Callable[[], PrefixTree]) -> bool:
        """Whether this decode step needs a new plan, which then is ``self.plan``.

        Args:
            rows: the scheduler's batch, or None if it is not known.
            lens: [n] int64 KV tokens of each row, the new one included.
            tree_without_rows: who shares what, if ``rows`` cannot tell.
        """
        holds = (
            rows is not None and self._steps_left > 0 and rows == self._rows and np.array_equal(lens, self._lens + 1)
        )
        if holds:
            self._steps_left -= 1
        else:
            self._make_plan(rows, lens.astype(np.int32), tree_without_rows)
        if self.regroup is not None:
            if self.regroup.work():
                self._make_plan(rows, lens.astype(np.int32), tree_without_rows)
                holds = False
            self.regroup.count_step()
        self._lens = lens.copy()
        self.stats.count_packed(self.plan, int(lens.sum()) - self.plan.kv_tokens_logical)
        return not holds

    def forget(self) -> None:
        """Make a new plan at the next step."""
        self._rows = None

    def _make_plan(self, rows: Rows | None, lens: np.ndarray, tree_without_rows: Callable[[], PrefixTree]) -> None:
        started = time.perf_counter()
        tree = rows.prefix_tree() if rows is not None else None
        if tree is None:
            tree = tree_without_rows()
        unique = tree.unique_tokens(lens)
        for grouping, policy in self._attempts:
            kept = prune(tree, self.shape, self.cost, grouping, kv_lens=lens)
            plan = make_plan(kept, lens, policy, kv_tokens_unique=unique, room_tokens=self.room_tokens)
            if self.fits(plan):
                break
        else:
            raise RuntimeError("packinfer: a batch does not fit the buffers; please report this")
        if self.regroup is not None:
            plan = self.regroup.point(plan, kept, rows)
        self._rows, self.plan, self.tree, self._steps_left = rows, plan, tree, self.room_tokens
        self.stats.count_plan(plan, kept, (time.perf_counter() - started) * 1e6)


def causal(q_lens: Int32, kv_lens: Int32) -> dict[str, Any]:
    """What the new tokens of each row, its last, see: arguments of ``make_plan``."""
    qo_indptr = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    row = np.repeat(np.arange(len(q_lens)), q_lens)
    position = kv_lens[row] - qo_indptr[row + 1] + np.arange(len(row), dtype=np.int32)
    return {"qo_indptr": qo_indptr, "visible": (np.zeros(len(row), np.int32), position + 1)}


class ExtendPlanner:
    """Plans batches of several new tokens a row: prefill, chunked prefill, and decodes among them (mixed batches, one
    new token each); drafts to verify.

    Each batch goes to whom a cost model expects to be faster, the packed kernels or the stock backend.
    """

    def __init__(
        self,
        shape: AttentionShape,
        ways: tuple[tuple[CostModel, TilePolicy], ...],
        *,
        grouping: str,
        count: Callable[[Plan, PrefixTree, float], None],
        packed_us: Callable[[Plan], float],
        stock_us: Callable[[Int32, Int32], float],
        fits: Callable[[Plan], bool] = lambda plan: True,
    ) -> None:
        """
        Args:
            ways: how groups are chosen and cut; of several the plan that is expected to be fastest is taken.
            grouping: see ``config.Config``.
            count: gets each plan that will run, the spans that it reads once, and the microseconds that it took.
            packed_us: expected time of a plan in one layer.
            stock_us: expected time of the stock backend, by new tokens and KV tokens of each row ([n_rows] int32).
            fits: whether a plan can be run; if not, less is shared.
        """
        self.shape, self.count, self.fits = shape, count, fits
        self.packed_us, self.stock_us = packed_us, stock_us
        uncut = tuple((cost, dataclasses.replace(policy, chunk_tokens=1 << 30, timings=None)) for cost, policy in ways)
        # each smaller than the one before
        modes = dict.fromkeys((grouping, "single", "off"))
        self._attempts = (*((mode, ways) for mode in modes), ("single", uncut), ("off", uncut))

    def plan(self, rows: Rows | None, q_lens: Int32, kv_lens: Int32) -> tuple[Plan, PrefixTree] | None:
        """The plan of a batch and who shares what in it, or None if the stock backend is expected to be faster.

        Args:
            rows: the scheduler's batch; None if it is not known: then nothing counts as shared.
            q_lens: [n_rows] new tokens of each row, its last.
            kv_lens: [n_rows] KV tokens of each row, the new ones included.
        """
        started = time.perf_counter()
        tree = rows.prefix_tree() if rows is not None else None
        if tree is None:  # or a cache without paths
            tree = PrefixTree.unshared(len(kv_lens))
        found = self.fastest(tree, q_lens, kv_lens)
        if found is None:
            return None
        packed_us, plan, kept = found
        if packed_us > self.stock_us(q_lens, kv_lens):
            return None
        self.count(plan, kept, (time.perf_counter() - started) * 1e6)
        return plan, tree

    def fastest(self, tree: PrefixTree, q_lens: Int32, kv_lens: Int32) -> tuple[float, Plan, PrefixTree] | None:
        """The plan that is expected to be the fastest of those that fit, or None. See ``plan``.

        Returns:
            its expected time, the plan, and the spans that it reads once.
        """
        queries = causal(q_lens, kv_lens)
        unique = tree.unique_tokens(kv_lens)
        for grouping, ways in self._attempts:
            plans: list[tuple[float, Plan, PrefixTree]] = []
            for cost, policy in ways:
                kept = prune(tree, self.shape, cost, grouping, q_lens)
                if plans and not kept.n_nodes:
                    continue  # ways differ in what they do with groups
                plan = make_plan(kept, kv_lens, policy, kv_tokens_unique=unique, **queries)
                if self.fits(plan):
                    plans.append((self.packed_us(plan), plan, kept))
            if plans:
                return min(plans, key=lambda found: found[0])
        return None
