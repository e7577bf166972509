"""What planners of decode and verify steps keep from one step to the next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_planner import EAGER, FakeRows

from packinfer_sgl.planning.batch import StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity, DoesNotFit
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import WAY_STEPS, DecodePlanner, ExtendPlanner, Way
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree


@pytest.mark.parametrize("kind", ["decode", "verify"])
def test_paths_are_read_again_only_for_other_requests(kind: str) -> None:
    """A new plan of requests that stay, for their lengths or because the last one has no room, has the same tree."""
    shape = AttentionShape(1, 1, 8, 4)
    policy, limits, read = TilePolicy(tile_queries=(8, 1), max_split_tokens=8), Capacity.unlimited(), []
    if kind == "decode":
        planner = DecodePlanner(shape, EAGER, policy, grouping="multi", limits=limits, room_tokens=0)
    else:
        planner = ExtendPlanner(
            shape, (Way(EAGER, policy),), grouping="multi", limits=limits, packed_us=lambda _: 1.0, stock_us=None,
            must_fit=True,
        )  # fmt: skip

    def plan(key: int, lens: list[int], shared: list[int]) -> list[int]:
        def tree() -> PrefixTree:
            read.append(key)
            return PrefixTree.from_neighbours(range(len(lens)), shared)

        q_lens, kv_lens = np.ones(len(lens), np.int32), np.array(lens, np.int32)
        planned = planner.plan(StepBatch(q_lens, kv_lens, FakeRows((key,), tree), visible=causal(q_lens, kv_lens)))
        assert planned is not None and planned.plan.kv_tokens_logical == sum(lens)
        return planned.tree.end.tolist()

    assert plan(1, [30, 40], [20]) == [20] and read == [1]
    assert plan(1, [31, 41], [20]) == [20] and plan(1, [39, 42], [20]) == [20] and read == [1]
    assert plan(2, [39, 42], [10]) == [10] and read == [1, 2]
    assert plan(1, [39, 42, 50], [20, 0]) == [20] and read == [1, 2, 1]


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
