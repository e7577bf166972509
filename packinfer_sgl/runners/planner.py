"""Plans of SGLang's batches: one for as long as a decode batch stays the same, one for each batch of other kinds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.fitting import DoesNotFit, Fitted, fit
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.runners.arena import Paths, Regroup
from packinfer_sgl.runners.metrics import Stats


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
        overflow: Callable[[Plan], dict[str, str]] = lambda plan: {},
        most_slots: int = 1 << 62,
    ) -> None:
        """
        Args:
            grouping: see ``config.Config``.
            room_tokens: how many steps a plan may live.
            regroup: where shared spans have contiguous copies, if there is an arena.
            overflow, most_slots: what of a plan cannot be run (``fitting.fit``); it then gives way.
        """
        self.shape, self.cost, self.policy, self.grouping = shape, cost, policy, grouping
        self.room_tokens, self.stats, self.overflow, self.regroup = room_tokens, stats, overflow, regroup
        self.most_slots = most_slots
        self._rows: Rows | None = None
        self._lens = np.zeros(0, np.int64)
        self._steps_left = 0
        # compiles the planning code where no compiled form of it lies on disk, which takes seconds: not in a request
        two_rows = PrefixTree.from_neighbours((0, 1), (1,))
        kept = prune(two_rows, shape, cost)
        for once in (None, two_rows):
            make_plan(
                kept, np.full(2, 2, np.int32), policy, kv_tokens_unique=3, room_tokens=room_tokens, listed_once=once
            )

    def step(
        self,
        rows: Rows | None,
        lens: np.ndarray,
        tree_without_rows: Callable[[], PrefixTree],
        tree_by_slots: Callable[[], PrefixTree] | None = None,
    ) -> bool:
        """Whether this decode step needs a new plan, which then is ``self.plan``.

        Args:
            rows: the scheduler's batch, or None if it is not known.
            lens: [n] int64 KV tokens of each row, the new one included.
            tree_without_rows: who shares what, if ``rows`` cannot tell.
            tree_by_slots: the same, dear but complete: all that equal slots show, for batches of which what is known
                does not fit.
        """
        holds = (
            rows is not None and self._steps_left > 0 and rows == self._rows and np.array_equal(lens, self._lens + 1)
        )
        trees = tree_without_rows, tree_by_slots
        if holds:
            self._steps_left -= 1
        else:
            self._make_plan(rows, lens.astype(np.int32), *trees)
        if self.regroup is not None:
            if self.regroup.work():
                self._make_plan(rows, lens.astype(np.int32), *trees)
                holds = False
            self.regroup.count_step()
        self._lens = lens.copy()
        self.stats.count_packed(self.plan, int(lens.sum()) - self.plan.kv_tokens_logical)
        return not holds

    def forget(self) -> None:
        """Make a new plan at the next step."""
        self._rows = None

    def _make_plan(
        self,
        rows: Rows | None,
        lens: np.ndarray,
        tree_without_rows: Callable[[], PrefixTree],
        tree_by_slots: Callable[[], PrefixTree] | None,
    ) -> None:
        started = time.perf_counter()
        self.forget()  # whatever happens here, the last plan is not that of these rows
        tree = rows.prefix_tree() if rows is not None else None
        if tree is None:
            tree = tree_without_rows()
        fit_ = functools.partial(
            fit, shape=self.shape, cost=self.cost, policy=self.policy, overflow=self.overflow, grouping=self.grouping,
            kv_lens=lens, saving_lens=lens, room_tokens=self.room_tokens, most_slots=self.most_slots,
        )  # fmt: skip
        try:
            fitted = fit_(tree)
        except DoesNotFit:
            if tree_by_slots is None:
                raise
            tree = tree_by_slots()
            fitted = fit_(tree)
        plan, kept = fitted.plan, fitted.kept
        if self.regroup is not None:
            spans = prune(tree, self.shape, self.cost, "off") if fitted.is_listed_once else kept
            plan = self.regroup.point(plan, spans, rows)
        self._rows, self.plan, self.tree, self._steps_left = rows, plan, tree, self.room_tokens
        self.stats.count_plan(plan, kept, (time.perf_counter() - started) * 1e6, fitted.overflowed)


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
        count: Callable[[Plan, PrefixTree, float, tuple[str, ...]], None],
        packed_us: Callable[[Plan], float],
        stock_us: Callable[[Int32, Int32], float],
        overflow: Callable[[Plan], dict[str, str]],
        most_slots: int = 1 << 62,
    ) -> None:
        """
        Args:
            ways: how groups are chosen and cut; of several the plan that is expected to be fastest is taken.
            grouping: see ``config.Config``.
            count: gets each plan that will run, the spans that it reads once, the microseconds that it took, and what
                gave way (``Fitted``).
            packed_us: expected time of a plan in one layer.
            stock_us: expected time of the stock backend, by new tokens and KV tokens of each row ([n_rows] int32).
            overflow, most_slots: what of a plan cannot be run (``fitting.fit``); it then gives way.
        """
        self.shape, self.ways, self.grouping, self.count, self.overflow = shape, ways, grouping, count, overflow
        self.packed_us, self.stock_us, self.most_slots = packed_us, stock_us, most_slots

    def plan(
        self,
        rows: Rows | None,
        q_lens: Int32,
        kv_lens: Int32,
        tree_by_slots: Callable[[], PrefixTree] | None = None,
    ) -> tuple[Plan, PrefixTree] | None:
        """The plan of a batch and who shares what in it, or None if the stock backend is expected to be faster, or runs
        it because no plan fits.

        Args:
            rows: the scheduler's batch; None if it is not known: then nothing counts as shared.
            q_lens: [n_rows] new tokens of each row, its last.
            kv_lens: [n_rows] KV tokens of each row, the new ones included.
            tree_by_slots: see ``DecodePlanner.step``; with it there is a plan, or DoesNotFit.
        """
        started = time.perf_counter()
        tree = rows.prefix_tree() if rows is not None else None
        if tree is None:  # or a cache without paths
            tree = PrefixTree.unshared(len(kv_lens))
        try:
            packed_us, fitted = self.fastest(tree, q_lens, kv_lens)
        except DoesNotFit:
            if tree_by_slots is None:
                return None
            tree = tree_by_slots()
            packed_us, fitted = self.fastest(tree, q_lens, kv_lens)
        if packed_us > self.stock_us(q_lens, kv_lens):
            return None
        self.count(fitted.plan, fitted.kept, (time.perf_counter() - started) * 1e6, fitted.overflowed)
        return fitted.plan, tree

    def fastest(self, tree: PrefixTree, q_lens: Int32, kv_lens: Int32) -> tuple[float, Fitted]:
        """Of the plans that fit, the one that is expected to be the fastest, and its time. See ``plan``.

        Raises:
            DoesNotFit: there is none.
        """
        found: list[tuple[float, Fitted]] = []
        queries, problem = causal(q_lens, kv_lens), None
        for cost, policy in self.ways:
            kept = prune(tree, self.shape, cost, self.grouping, q_lens)
            if found and not kept.n_nodes:
                continue  # ways differ in what they do with groups
            try:
                fitted = fit(
                    tree, self.shape, cost, policy, self.overflow, grouping=self.grouping, kv_lens=kv_lens,
                    q_lens=q_lens, kept=kept, most_slots=self.most_slots, **queries,
                )  # fmt: skip
            except DoesNotFit as e:
                problem = e
                continue
            found.append((self.packed_us(fitted.plan), fitted))
        if not found:
            assert problem is not None
            raise problem
        return min(found, key=lambda one: one[0])
