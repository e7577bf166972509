"""Packed decode on CUDA: plans in buffers at fixed addresses, so that a captured graph replays any of them."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import device_profile, tile_policy, tiles_for
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import decode_capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners.arena import SPANS_PER_ROW, Regroup
from packinfer_sgl.runners.cpu_decode import audit_reads, check_shared_slots, tree_by_slots
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import DecodePlanner, Rows

logger = logging.getLogger(__name__)

# A plan lives at most this many steps: as tails grow, programs that were equal no longer are. The kernels read what a
# tail holds, not its room.
ROOM_TOKENS = 64


class CudaDecode:
    """Turns each decode batch into work for the Triton kernels.

    A step uploads a new plan and snapshots its slots, or keeps both; ``append``, which a graph may capture, then enters
    the new slots. Kernels never read ``req_to_token``: SGLang rewrites it while they run.
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        grouping: str,
        check: bool,
        req_to_token: torch.Tensor,
        pool_tokens: int,
        max_rows: int,
        stats: Stats,
        regroup: Regroup | None = None,
    ) -> None:
        """
        Args:
            req_to_token: [pool rows, max context] int32 on the GPU, SGLang's table of slots.
            pool_tokens: KV tokens in the pool.
            max_rows: most rows of a batch.
            grouping, check: see ``config.Config``.
            regroup: the arena, if there is one.
        """
        self.check, self.req_to_token, self.max_rows, self.stats = check, req_to_token, max_rows, stats
        device = req_to_token.device
        capacity = decode_capacity(
            shape, max_rows=max_rows, context_tokens=req_to_token.shape[1], pool_tokens=pool_tokens,
            room_tokens=ROOM_TOKENS, row_spans=SPANS_PER_ROW,
        )  # fmt: skip
        self._packed = PackedCuda(
            capacity, tiles_for(shape.head_dim, device), qo_heads=shape.qo_heads, kv_heads=shape.kv_heads,
            head_dim=shape.head_dim, device=device,
        )  # fmt: skip
        self._planner = DecodePlanner(
            shape,
            device_profile(device).decode_cost,
            tile_policy(shape, device),
            grouping=grouping,
            room_tokens=ROOM_TOKENS,
            stats=stats,
            regroup=regroup,
            overflow=capacity.overflow,
            most_slots=capacity.slots,
        )
        logger.info("packinfer: decode buffers for %d rows: %.0f MB", max_rows, self._packed.nbytes / 1e6)

    def step(self, rows: Rows | None, pool_rows: torch.Tensor, lens: np.ndarray) -> None:
        """Make the plan of this decode step the loaded one.

        Args:
            rows: the scheduler's batch, or None if it is not known: then nothing counts as shared, unless the batch
                fits only if it is (``tree_by_slots``).
            pool_rows: [n] row of ``req_to_token`` of each request, on the GPU.
            lens: [n] int64 KV tokens of each row, the new one included.
        """
        by_slots = functools.partial(tree_by_slots, self.req_to_token, pool_rows, lens)
        if self._planner.step(rows, lens, lambda: PrefixTree.unshared(len(lens)), by_slots):
            if self.check:
                check_shared_slots(self._planner.tree, self.req_to_token, pool_rows)
            self._load(self._planner.plan, pool_rows)
        if self.check:
            audit_reads(
                self._planner.plan, self._packed.kv_slots, self.req_to_token, pool_rows, lens, self.stats,
                newest_is_there=False,
            )  # fmt: skip

    def step_alone(self, pool_rows: torch.Tensor, lens: np.ndarray) -> None:
        """As ``step``, of a batch of which nothing else is known, and without the arena: when that failed."""
        regroup, self._planner.regroup = self._planner.regroup, None
        try:
            self.step(None, pool_rows, lens)
        finally:
            self._planner.regroup = regroup

    def forget(self) -> None:
        """Make a new plan at the next step."""
        self._planner.forget()

    def step_for_capture(self, pool_rows: torch.Tensor) -> None:
        """Load a plan for rows of one token each, as graphs are captured with."""
        n = len(pool_rows)
        ones = np.ones(n, np.int32)
        tree = PrefixTree.unshared(n)
        plan = make_plan(tree, ones, self._planner.policy, kv_tokens_unique=n, room_tokens=ROOM_TOKENS)
        self._planner.forget()
        self._load(plan, pool_rows)

    def _load(self, plan: Plan, pool_rows: torch.Tensor) -> None:
        self._packed.load(plan)
        self._packed.snapshot(self.req_to_token, pool_rows)

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        """Enter each row's newest slot in the slot list. Both [n], on the GPU; may be captured."""
        self._packed.append(kv_lens, out_slots)

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
        """Attention of one layer, [n, qo_heads, head_dim]; may be captured. See ``PackedCuda.run``."""
        return self._packed.run(q, k, v, kv_lens, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)[0]
