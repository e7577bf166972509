"""Planners: from a batch to the plan that a runner runs. They count nothing and launch nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.fitting import Capacity, DoesNotFit, Fitted, fit
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.planning.units import steps_within_units, within_units


@dataclass(frozen=True, eq=False)
class Planned:
    """What a planner found.

    Attributes:
        fitted: the plan, and how it came to fit.
        tree: who shares what, before grouping.
        took_us: microseconds that it took.
        is_new: whether the runner has yet to load it.
    """

    fitted: Fitted
    tree: PrefixTree
    took_us: float
    is_new: bool = True

    @property
    def plan(self) -> Plan:
        return self.fitted.plan


class KnownTree:
    """Who shares what in the last batch; it is the same while the requests compare equal, for they hold the same slots,
    and what a step appends is each row's own."""

    def __init__(self) -> None:
        self._requests: Any = None
        self._tree: PrefixTree | None = None

    def of(self, batch: StepBatch) -> PrefixTree:
        if self._tree is None or batch.requests is None or not batch.requests == self._requests:
            self._tree = None
            tree = batch.tree()
            self._requests, self._tree = batch.requests, tree
        return self._tree


class DecodePlanner:
    """Plans decode batches, and others whose groups need not know what each query sees; keeps the plan of the last one.

    A plan holds while the requests compare equal, every row has grown by exactly one token since the step before, the
    tails have room, and, where the policy has units, no row begins a new one.
    """

    def __init__(
        self,
        shape: AttentionShape,
        cost: CostModel,
        policy: TilePolicy,
        *,
        grouping: str,
        limits: Capacity,
        room_tokens: int,
    ) -> None:
        """
        Args:
            grouping: see ``config.Config``.
            limits: what of a plan can be run.
            room_tokens: how many steps a plan may live.
        """
        self.shape, self.cost, self.policy, self.grouping = shape, cost, policy, grouping
        self.limits, self.room_tokens = limits, room_tokens
        self._known = KnownTree()
        self._last: Planned | None = None
        self._requests: Any = None
        self._lens = b""  # bytes of the last step's ``kv_lens``
        self._steps_left = 0

    def compile(self) -> None:
        """Compile the planning code where no compiled form of it lies on disk: that takes seconds, which a request
        should not wait for."""
        two = StepBatch(np.ones(2, np.int32), np.full(2, 2, np.int32))
        tree = PrefixTree.from_paths(((0,), (0,)), ((1,), (1,)))  # as the requests' radix paths
        plan = self._fit(tree, two).plan
        Capacity.of(replace(plan, spans=plan.spans))  # as the arena does
        prune(tree, self.shape, self.cost, kv_lens=two.kv_lens)  # for plans that do not fit at first

    def plan(self, batch: StepBatch) -> Planned:
        """The plan of this step.

        Raises:
            DoesNotFit: nothing fits ``limits``.
        """
        lens = batch.kv_lens
        holds = (
            batch.requests is not None
            and self._last is not None
            and self._steps_left > 0
            and batch.requests == self._requests
            and (lens - _ONE).tobytes() == self._lens
        )
        if holds:
            assert self._last is not None
            self._steps_left -= 1
            self._lens = lens.tobytes()
            if self._last.is_new:
                self._last = Planned(self._last.fitted, self._last.tree, 0.0, is_new=False)
            return self._last
        started = time.perf_counter()
        self.forget()  # whatever happens here, the last plan is not that of these rows
        tree, fitted = _fit_known(batch, self._known, self._fit)
        planned = Planned(fitted, tree, (time.perf_counter() - started) * 1e6)
        self._last, self._requests = planned, batch.requests
        self._lens, self._steps_left = lens.tobytes(), self.room_tokens
        if unit := self.policy.unit_tokens:
            self._steps_left = min(self._steps_left, steps_within_units(lens, unit))
        return planned

    def forget(self) -> None:
        """Make a new plan at the next step."""
        self._last = self._requests = None

    def _fit(self, tree: PrefixTree, batch: StepBatch) -> Fitted:
        if not self.policy.unit_tokens:
            return self._fit_tree(tree, batch, self.policy, batch.unique_tokens)
        unique = tree.unique_tokens(batch.kv_lens) if batch.unique_tokens is None else batch.unique_tokens
        try:
            return self._fit_tree(within_units(tree, batch.kv_lens, self.policy), batch, self.policy, unique)
        except DoesNotFit as e:  # parts of units take more items; whole ones always fit, if the tree shows all sharing
            whole = replace(self.policy, block_tokens=0)
            fitted = self._fit_tree(within_units(tree, batch.kv_lens, whole), batch, whole, unique)
            return replace(fitted, overflowed=tuple(dict.fromkeys((*e.overflowed, *fitted.overflowed))))

    def _fit_tree(self, tree: PrefixTree, batch: StepBatch, policy: TilePolicy, unique: int | None) -> Fitted:
        one_each = batch.is_one_each
        return fit(
            tree, self.shape, self.cost, policy, self.limits, grouping=self.grouping, batch=batch,
            q_lens=None if one_each else batch.q_lens, saving_lens=batch.kv_lens if one_each else None,
            unique_tokens=unique, room_tokens=self.room_tokens,
        )  # fmt: skip


# How many verify steps go one way. With 4 drafts each, rows are at most 28 tokens longer in the last of them. By the
# H200 record, 490,000 steps of random batches with 2 to 8 drafts take 0.07 % longer than by the best way on average;
# 0.9 % of them take over 4 % more, the worst 1.4 times as long.
WAY_STEPS = 8


class Way(NamedTuple):
    """One way to group and cut a batch."""

    cost: CostModel
    policy: TilePolicy


class ExtendPlanner:
    """Plans batches whose queries see a part of their row each: prefill, chunked prefill, decodes among them (mixed
    batches, one new token each), drafts to verify.

    Of several ways the one that is expected to be fastest is taken; and, if so asked, only where it is expected to be
    faster than the stock backend. Verify steps need a new plan each, but their ways are compared once in ``WAY_STEPS``
    while the requests compare equal: in between their rows grow by a few tokens each.
    """

    def __init__(
        self,
        shape: AttentionShape,
        ways: tuple[Way, ...],
        *,
        grouping: str,
        limits: Capacity,
        packed_us: Callable[[Plan], float],
        stock_us: Callable[[Int32, Int32], float] | None,
        must_fit: bool = False,
    ) -> None:
        """
        Args:
            grouping: see ``config.Config``.
            limits: what of a plan can be run.
            packed_us: expected time of a plan in one layer, its margin included.
            stock_us: expected time of the stock backend, by ``q_lens`` and ``kv_lens``; None: packed is always
                preferred.
            must_fit: whether batches must be packed, as a captured graph of verify steps runs them; else the stock
                backend runs what does not fit.
        """
        self.shape, self.ways, self.grouping, self.limits = shape, ways, grouping, limits
        self.packed_us, self.stock_us, self.must_fit = packed_us, stock_us, must_fit
        self._known = KnownTree()
        self._way = ways[0]  # the fastest for ``_way_of``
        self._way_of: PrefixTree | None = None
        self._overflowed: tuple[str, ...] = ()  # on the way to its plan
        self._steps_left = 0

    def plan(self, batch: StepBatch) -> Planned | None:
        """The plan of this batch; None if the stock backend runs it: expected to be faster, or because nothing fits.

        Raises:
            DoesNotFit: nothing fits ``limits``, and the batch must be packed.
        """
        started = time.perf_counter()
        if self.must_fit:
            tree, fitted = _fit_known(batch, self._known, self._by_the_last_way)
        else:
            tree = batch.tree()
            try:
                packed_us, fitted, _ = self.fastest(tree, batch)
            except DoesNotFit:
                return None
            if self.stock_us is not None and packed_us > self.stock_us(batch.q_lens, batch.kv_lens):
                return None
        return Planned(fitted, tree, (time.perf_counter() - started) * 1e6)

    def forget(self) -> None:
        """Compare the ways at the next step."""
        self._way_of = None

    def fastest(self, tree: PrefixTree, batch: StepBatch) -> tuple[float, Fitted, Way]:
        """Of the plans that fit, the one that is expected to be the fastest: its time (0 if nobody compares it), the
        plan, and its way.

        Args:
            tree: who shares what in ``batch``.

        Raises:
            DoesNotFit: there is none.
        """
        found: list[tuple[Fitted, Way]] = []
        problem: DoesNotFit | None = None
        for way in self.ways:
            if found and not tree.n_nodes:
                break
            try:
                found.append((self._fit(tree, batch, way, needs_groups=bool(found)), way))
            except DoesNotFit as e:
                problem = e
        if len(found) == 1 and self.stock_us is None:
            return 0.0, *found[0]
        if not found:
            assert problem is not None
            raise problem
        return min(((self.packed_us(fitted.plan), fitted, way) for fitted, way in found), key=lambda one: one[0])

    def _by_the_last_way(self, tree: PrefixTree, batch: StepBatch) -> Fitted:
        if tree is self._way_of and self._steps_left > 0:
            self._steps_left -= 1
            try:
                fitted = self._fit(tree, batch, self._way)
                if fitted.overflowed == self._overflowed:
                    return fitted
            except DoesNotFit:
                pass
            # another way may fit, or with more groups
        _, fitted, self._way = self.fastest(tree, batch)
        self._way_of, self._overflowed, self._steps_left = tree, fitted.overflowed, WAY_STEPS - 1
        return fitted

    def _fit(self, tree: PrefixTree, batch: StepBatch, way: Way, *, needs_groups: bool = False) -> Fitted:
        """``needs_groups``: ways differ in what they do with groups, so a second one without them is the first."""
        return fit(
            tree, self.shape, way.cost, way.policy, self.limits, grouping=self.grouping, batch=batch,
            q_lens=batch.q_lens, needs_groups=needs_groups,
        )  # fmt: skip


Planner = DecodePlanner | ExtendPlanner
_ONE = np.int32(1)


T = TypeVar("T")


def _fit_known(
    batch: StepBatch, known: KnownTree, fit_tree: Callable[[PrefixTree, StepBatch], T]
) -> tuple[PrefixTree, T]:
    """Fit by the tree that is known; if that shows too little sharing to fit, by the slots themselves."""
    tree = known.of(batch)
    try:
        return tree, fit_tree(tree, batch)
    except DoesNotFit:
        if batch.table is None or batch.table.is_paged:
            raise
        tree = batch.tree_by_slots()
        return tree, fit_tree(tree, batch)
