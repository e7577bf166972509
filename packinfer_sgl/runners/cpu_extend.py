"""Packed extend on the CPU: the plan of a batch, its slots, and the reference kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.planning.groups import CPU, AttentionShape, CostModel
from packinfer_sgl.planning.plan import Col, Plan, TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.runners.cpu_decode import check_shared_slots, snapshot_slots
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import ExtendPlanner, Rows

# Measured on one core with SGLang's torch_native, which computes the queries of cached tokens, too: rates of both, and
# what a layer, an item and (torch_native) a request cost besides. Packed must win clearly: the fit is off by a fifth.
PACKED_FLOPS_PER_US, STOCK_FLOPS_PER_US = 3.7e4, 4.5e4
LAYER_US, ITEM_US, REQUEST_US = 500.0, 200.0, 250.0
CLEARLY = 1.25


# With more queries to a tile the logits leave the CPU's cache: 64 measured best from 8 to 64 queries a request.
TILES = TilePolicy(tile_queries=(64, 1), chunk_tokens=1024, ride_tokens=256)
# The reference copies keys and values before it multiplies: what sharing saves is the copy, whatever the products.
COST = replace(CPU, flops_per_us=math.inf)


def cost_of(shape: AttentionShape) -> CostModel:
    return replace(COST, large_rows=TILES.tile_queries[0] * shape.group_size)


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
            packed_us=self.packed_us,
            stock_us=(lambda q_lens, kv_lens: math.inf) if always else self.stock_us,
        )

    def packed_us(self, plan: Plan) -> float:
        """Expected time of a plan in one layer."""
        items = plan.items.astype(np.int64)
        seen = (items[:, Col.Q_CNT] * (items[:, Col.A_LEN] + items[:, Col.B_LEN])).sum()
        return CLEARLY * (LAYER_US + len(items) * ITEM_US + self._flops(seen) / PACKED_FLOPS_PER_US)

    def stock_us(self, q_lens: Int32, kv_lens: Int32) -> float:
        """Expected time of ``torch_native`` in one layer."""
        seen = (kv_lens.astype(np.int64) ** 2).sum() / 2
        return self._flops(seen) / STOCK_FLOPS_PER_US + len(kv_lens) * REQUEST_US

    def _flops(self, seen: float) -> float:
        """Of so many pairs of a query token and a KV token."""
        return 4 * self.shape.qo_heads * self.shape.head_dim * seen

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
