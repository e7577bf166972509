"""Verify steps of speculative decoding on the GPU: each row's drafts are a chain; grouped by prefix like decode."""

from __future__ import annotations

import functools

import numpy as np
import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import device_profile, multiprocessors, tiles_for
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import verify_capacity
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners.cpu_decode import audit_reads, check_shared_slots, tree_by_slots
from packinfer_sgl.runners.cuda_extend import extend_planner
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import Rows


class CudaVerify:
    """Turns verify steps into work for the extend kernels, in buffers at fixed addresses, so that a captured graph
    replays any of them.

    Each step has a plan of its own: rows grow by as many drafts as were accepted.
    """

    def __init__(
        self,
        shape: AttentionShape,
        drafts: int,
        *,
        grouping: str,
        check: bool,
        req_to_token: torch.Tensor,
        pool_tokens: int,
        max_rows: int,
        stats: Stats,
    ) -> None:
        """
        Args:
            drafts: tokens of each row, a chain.
            req_to_token: [pool rows, max context] int32 on the GPU, SGLang's table of slots.
            pool_tokens: KV tokens in the pool.
            max_rows: most rows of a batch.
            grouping, check: see ``config.Config``.
        """
        self.drafts, self.check, self.req_to_token = drafts, check, req_to_token
        self.max_rows, self.stats = max_rows, stats
        device = req_to_token.device
        tiles = tiles_for(shape.head_dim, device, extend=True)
        capacity = verify_capacity(
            shape, drafts, max(1, tiles[0].rows // shape.group_size), max_rows=max_rows,
            context_tokens=req_to_token.shape[1], pool_tokens=pool_tokens,
        )  # fmt: skip
        heads = {"qo_heads": shape.qo_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        self._packed = PackedCuda(capacity, tiles, **heads, device=device, replayed=True)
        self._planner = extend_planner(
            shape, tiles, multiprocessors(device), grouping=grouping, count=stats.count_verify, always=True,
            profile=device_profile(device), overflow=capacity.overflow, most_slots=capacity.slots,
        )  # fmt: skip

    def step(self, rows: Rows | None, pool_rows: torch.Tensor, lens: np.ndarray) -> None:
        """Make the plan of this verify step the loaded one.

        Args:
            rows: the scheduler's batch, or None if it is not known: then nothing counts as shared, unless the batch
                fits only if it is (``tree_by_slots``).
            pool_rows: [n] row of ``req_to_token`` of each request, on the GPU.
            lens: [n] int64 KV tokens of each row, its drafts not included.
        """
        kv_lens = lens.astype(np.int32) + np.int32(self.drafts)
        by_slots = functools.partial(tree_by_slots, self.req_to_token, pool_rows, kv_lens)
        planned = self._planner.plan(rows, np.full(len(lens), self.drafts, np.int32), kv_lens, by_slots)
        assert planned is not None  # no stock backend is expected to be faster, and DoesNotFit is raised
        plan, tree = planned
        if self.check:
            check_shared_slots(tree, self.req_to_token, pool_rows)
        self._load(plan, pool_rows)
        if self.check:
            audit_reads(
                plan, self._packed.kv_slots, self.req_to_token, pool_rows, kv_lens, self.stats, drafts=self.drafts
            )

    def step_alone(self, pool_rows: torch.Tensor, lens: np.ndarray) -> None:
        """As ``step``, of a batch of which nothing else is known: when that failed."""
        self.step(None, pool_rows, lens)

    def step_for_capture(self, pool_rows: torch.Tensor) -> None:
        """Load a plan for rows of nothing but drafts."""
        n = len(pool_rows)
        lens = np.full(n, self.drafts, np.int32)
        self._load(self._planner.fastest(PrefixTree.unshared(n), lens, lens)[1].plan, pool_rows)

    def _load(self, plan: Plan, pool_rows: torch.Tensor) -> None:
        self._packed.load(plan)
        self._packed.snapshot(self.req_to_token, pool_rows)

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
        """Attention of one layer, [n * drafts, qo_heads, head_dim]; may be captured. See ``PackedCuda.run``."""
        return self._packed.run(
            q, k, v, kv_lens, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, windowed=True
        )[0]  # fmt: skip
