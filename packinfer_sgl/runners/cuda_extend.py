"""Packed extend on the GPU: the plan of a batch and its slots, in buffers that grow with the batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import Tile, device_profile, multiprocessors, policy_of, tiles_for
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.fitting import BUFFER_BYTES, Capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.runners.cpu_decode import check_shared_slots
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import ExtendPlanner, Rows, causal

RIDE_TOKENS = 4096  # at a tile; unmeasured beyond tails of 200 tokens
WARM_UP_KV = 512


def _overflow(plan: Plan, shape: AttentionShape) -> dict[str, str]:
    partials = BUFFER_BYTES // (shape.qo_heads * (shape.head_dim + 1) * 4)
    need = Capacity.of(plan)
    return replace(need, partials=partials, kv_slots=BUFFER_BYTES // 4).overflow(plan)


def extend_planner(
    shape: AttentionShape,
    tiles: tuple[Tile, ...],
    sms: int,
    *,
    grouping: str,
    count: Callable[[Plan, PrefixTree, float, tuple[str, ...]], None],
    always: bool,
    profile: DeviceProfile = H200,
    overflow: Callable[[Plan], dict[str, str]] | None = None,
    most_slots: int = 1 << 62,
) -> ExtendPlanner:
    """Groups leave partial results, or, if their tails are short, these ride with them and partial results are few.

    Args:
        tiles: ``tiles.tiles_for`` the GPU.
        sms: its multiprocessors.
        always: run every batch packed, whatever is expected.
        profile: the GPU's times.
        count, overflow, most_slots: see ``ExtendPlanner``; by default plans fit within ``BUFFER_BYTES``.
    """
    policy, cost = policy_of(shape, tiles, sms, profile), profile.extend_cost(tiles[0].rows)
    riding = replace(policy, max_inline_tail_tokens=RIDE_TOKENS)
    return ExtendPlanner(
        shape,
        ((cost, policy), (cost.without_partials(), riding)),
        grouping=grouping,
        count=count,
        packed_us=lambda plan: (
            profile.extend_margin * profile.packed_extend_us(plan, shape, sms, tiles[0].rows, tiles[0].tokens)
        ),
        stock_us=lambda q, kv: math.inf if always else profile.stock_extend_us(q, kv, shape, sms),
        overflow=overflow or (lambda plan: _overflow(plan, shape)),
        most_slots=most_slots,
    )


class CudaExtend:
    """Turns extend batches into work for the Triton kernels."""

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
            req_to_token: [pool rows, max context] int32 on the GPU, SGLang's table of slots.
            grouping, check: see ``config.Config``.
            always: see ``extend_planner``.
        """
        self.shape, self.check, self.req_to_token = shape, check, req_to_token
        device = req_to_token.device
        self._tiles = tiles_for(shape.head_dim, device, extend=True)
        self._planner = extend_planner(
            shape, self._tiles, multiprocessors(device), grouping=grouping, count=stats.count_extend, always=always,
            profile=device_profile(device),
        )  # fmt: skip
        self._packed: PackedCuda | None = None

    def step(self, rows: Rows, pool_rows: torch.Tensor, q_lens: Int32, kv_lens: Int32) -> bool:
        """Prepare this batch on the current stream; False if the stock backend runs it. As ``CpuExtend.step``."""
        planned = self._planner.plan(rows, q_lens, kv_lens)
        if planned is None:
            return False
        plan, tree = planned
        if self.check:
            check_shared_slots(tree, self.req_to_token, pool_rows)
        packed = self._buffers(plan)
        packed.load(plan)
        packed.snapshot(self.req_to_token, pool_rows)
        return True

    def warm_up(self, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, logits_soft_cap: float) -> None:
        """Run attention and merge in each form that batches may need, so that no request waits for a compiler.

        Of the KV only slot 0 is read, which belongs to no request.

        Args:
            k, v: a layer's, as for ``run``.
            dtype: of its queries.
            logits_soft_cap: the layer's, as for ``run``.
        """
        shape, sms = self.shape, multiprocessors(k.device)
        cut = replace(
            policy_of(shape, self._tiles, sms, device_profile(k.device)), timings=None, max_split_tokens=WARM_UP_KV // 4
        )
        tree = PrefixTree.unshared(2)
        # merges of few queries, of more, and of many; where there are two tile classes, a prompt is of the large one
        few = sms // shape.qo_heads
        for queries in (*([few - 1] if few > 1 else []), max(17, few + 1), 32 * sms // shape.qo_heads):
            q_lens = np.array([queries, 1], np.int32)
            kv_lens = q_lens + WARM_UP_KV
            plan = make_plan(tree, kv_lens, cut, kv_tokens_unique=int(kv_lens.sum()), **causal(q_lens, kv_lens))
            self._planner.fastest(tree, q_lens, kv_lens)  # numba compiles, too
            self._planner.stock_us(q_lens, kv_lens)
            self._buffers(plan).load(plan)
            q = torch.zeros(queries + 1, shape.qo_heads, shape.head_dim, dtype=dtype, device=k.device)
            self.run(
                q, k, v, torch.from_numpy(kv_lens).long().to(k.device), sm_scale=1.0, logits_soft_cap=logits_soft_cap
            )
        self._packed = None  # batches need larger buffers

    def _buffers(self, plan: Plan) -> PackedCuda:
        have = self._packed.capacity if self._packed is not None else Capacity.of(plan)
        if self._packed is None or not have.holds(plan):
            shape, self._packed = self.shape, None  # the old ones make room first
            device = self.req_to_token.device
            heads = {"qo_heads": shape.qo_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
            self._packed = PackedCuda(have.grown(plan), self._tiles, **heads, device=device)
        return self._packed

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
        """Attention of one layer, [n_tokens, qo_heads, head_dim]. See ``PackedCuda.run``."""
        assert self._packed is not None
        return self._packed.run(
            q, k, v, kv_lens, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, windowed=True
        )[0]  # fmt: skip
