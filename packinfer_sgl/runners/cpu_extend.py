"""Packed extend on the CPU: the plan of a batch, its slots, and the reference kernels."""

from __future__ import annotations

import math

import torch

from packinfer_sgl.kernels.reference import PackedReference
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.runners.cpu_decode import check_shared_slots, snapshot_slots
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import ExtendPlanner, Rows

TILES = CPU.extend_policy


def cost_of(shape: AttentionShape) -> CostModel:
    return CPU.extend_cost(TILES.tile_queries[0] * shape.group_size)


class CpuExtend:
    """Turns each extend batch into work for the reference kernels, or leaves it to the stock backend."""

    def __init__(
        self,
        shape: AttentionShape,
        *,
        grouping: str,
        check: bool,
        req_to_token: torch.Tensor,
        stats: Stats,
        always: bool,
    ) -> None:
        """
        Args:
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            grouping, check: see ``config.Config``.
            always: run every batch packed, whatever is expected.
        """
        self.shape, self.check, self.req_to_token = shape, check, req_to_token
        self._planner = ExtendPlanner(
            shape,
            ((cost_of(shape), TILES),),
            grouping=grouping,
            count=stats.count_extend,
            overflow=lambda plan: {},
            packed_us=lambda plan: CPU.extend_margin * CPU.packed_extend_us(plan, shape),
            stock_us=lambda q, kv: math.inf if always else CPU.stock_extend_us(q, kv, shape),
        )

    def step(self, rows: Rows, pool_rows: torch.Tensor, q_lens: Int32, kv_lens: Int32) -> bool:
        """Prepare this batch; False if the stock backend is expected to be faster.

        Args:
            rows: the scheduler's batch.
            pool_rows: [n] row of ``req_to_token`` of each request.
            q_lens: [n] int32 new tokens of each row.
            kv_lens: [n] int32 KV tokens of each row, the new ones included.
        """
        planned = self._planner.plan(rows, q_lens, kv_lens)
        if planned is None:
            return False
        plan, tree = planned
        if self.check:
            check_shared_slots(tree, self.req_to_token, pool_rows)
        self._packed = PackedReference(plan, token_bytes=self.shape.kv_heads * self.shape.head_dim * 4)
        self._packed.bind(snapshot_slots(plan, self.req_to_token, pool_rows))
        return True

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float,
    ) -> torch.Tensor:
        """Attention of one layer, [n_tokens, qo_heads, head_dim]. See ``PackedReference.run``."""
        out = self._packed.run(q, k, v, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)[0]
        out[len(self._packed.plan.merge_indptr) - 1 :] = 0  # padding
        return out
