"""Which way verify steps go, and what is compiled before the first request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_planner import EAGER, FakeRows

from packinfer_sgl.planning import prefix_tree
from packinfer_sgl.planning.batch import StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity, DoesNotFit
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import WAY_STEPS, ExtendPlanner, Way
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners import cpu


def test_verify_steps_keep_their_way_for_a_while() -> None:
    """Which way is the fastest is asked again for other requests, after WAY_STEPS steps, and once asked to forget."""
    shape, asked, sign = AttentionShape(1, 1, 8, 4), [], 1
    few, many = (Way(EAGER, TilePolicy(tile_queries=(8, 1), max_split_tokens=most)) for most in (16, 4))

    def packed_us(plan: Plan) -> float:
        asked.append(len(plan.items))
        return float(sign * len(plan.items))

    planner = ExtendPlanner(
        shape, (few, many), grouping="multi", limits=Capacity.unlimited(), packed_us=packed_us, stock_us=None,
        must_fit=True,
    )  # fmt: skip

    def n_items(key: int, step: int) -> int:
        q_lens, kv_lens = np.ones(2, np.int32), np.array([60 + step, 70 + step], np.int32)
        rows = FakeRows((key,), lambda: PrefixTree.from_neighbours(range(2), [40]))
        planned = planner.plan(StepBatch(q_lens, kv_lens, rows, visible=causal(q_lens, kv_lens)))
        assert planned is not None and planned.plan.kv_tokens_logical == 130 + 2 * step
        return len(planned.plan.items)

    least = n_items(1, 0)
    assert len(asked) == 2 and least == min(asked) < max(asked)
    sign = -1
    assert all(n_items(1, step) < max(asked) for step in range(1, WAY_STEPS)) and len(asked) == 2
    assert n_items(1, WAY_STEPS) == max(asked[2:]) > min(asked[2:]) and len(asked) == 4
    n_items(2, 0)
    assert len(asked) == 6
    n_items(2, 1)
    assert len(asked) == 6
    planner.forget()
    n_items(2, 2)
    assert len(asked) == 8
    planner.limits = replace(planner.limits, items=1)  # neither the way before nor another one
    with pytest.raises(DoesNotFit):
        n_items(2, 3)


def test_a_way_that_overflows_is_not_kept() -> None:
    """It may lose the groups that the other way has room for; where both overflow, one is kept again."""
    shape, asked = AttentionShape(1, 1, 8, 4), 0

    def packed_us(plan: Plan) -> float:
        nonlocal asked
        asked += 1
        return float(plan.kv_tokens_read)

    cut, whole = (Way(EAGER, TilePolicy(tile_queries=(8, 1), max_split_tokens=most)) for most in (8, 1000))
    planner = ExtendPlanner(
        shape, (cut, whole), grouping="multi", limits=Capacity.unlimited(), packed_us=packed_us, stock_us=None,
        must_fit=True,
    )  # fmt: skip

    def overflowed(step: int) -> tuple[str, ...]:
        q_lens, kv_lens = np.ones(2, np.int32), np.array([60 + step, 70 + step], np.int32)
        rows = FakeRows((1,), lambda: PrefixTree.from_neighbours(range(2), [40]))
        planned = planner.plan(StepBatch(q_lens, kv_lens, rows, visible=causal(q_lens, kv_lens)))
        assert planned is not None
        return planned.fitted.overflowed

    assert overflowed(0) == () and asked == 2
    assert overflowed(1) == () and asked == 2
    planner.limits = replace(planner.limits, items=4)
    planner.ways = (whole, cut)
    assert overflowed(2) == () and asked == 4 and planner._way is whole
    planner.limits = replace(planner.limits, items=2)
    assert overflowed(3) == ("items",) and asked == 6
    assert overflowed(4) == ("items",) and asked == 6


def test_what_serving_compiles_is_compiled_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree of radix paths, too, which no planner makes by itself."""
    compiled, types = prefix_tree._from_nodes, []

    def spy(*given: np.ndarray) -> np.ndarray:
        types.append([(array.dtype, array.ndim) for array in given])
        return compiled(*given)

    monkeypatch.setattr(prefix_tree, "_from_nodes", spy)
    cpu.decode_planner(AttentionShape(4, 2, 8, 4), grouping="multi").compile()
    assert types == [[(np.int64, 2), (np.int64, 1)]]
