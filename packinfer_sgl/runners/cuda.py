"""CUDA: the Triton and Gluon kernels, and how batches are planned for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.kernels.tiles import (
    Tile,
    decode_cost,
    device_profile,
    multiprocessors,
    policy_of,
    shape_tiles,
    tile_policy,
)
from packinfer_sgl.planning.batch import SlotTable, StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.fitting import BUFFER_BYTES, Capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import DecodePlanner, ExtendPlanner, Way
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200

# A plan lives at most this many steps: as tails grow, programs that were equal no longer are. The kernels read what a
# tail holds, not its room.
ROOM_TOKENS = 64
INLINE_TAIL_TOKENS = 4096  # at a tile; unmeasured beyond tails of 200 tokens
WARM_UP_KV = 512
ARENA_GAIN = 0.05  # share of the time of a scattered span's read that a contiguous copy saves; 0.02 to 0.1 on an H200


def growing_limits(shape: AttentionShape) -> Capacity:
    """What plans may need in buffers that grow with them."""
    row_bytes = shape.qo_heads * (shape.head_dim + 1) * 4
    return Capacity.unlimited(partials=BUFFER_BYTES // row_bytes, kv_slots=BUFFER_BYTES // 4)


def decode_planner(
    shape: AttentionShape,
    device: torch.device,
    *,
    grouping: str,
    limits: Capacity,
    room_tokens: int = ROOM_TOKENS,
    unit_tokens: int = 0,
    masked: bool = False,
) -> DecodePlanner:
    """Plans for batches whose queries see all of their row; with ``unit_tokens`` in units of so many tokens.

    Its plans are for ``tiles.shape_tiles`` with the same ``unit_tokens`` and ``masked``.
    """
    policy = tile_policy(shape, device, unit_tokens=unit_tokens, masked=masked)
    tiles = shape_tiles(shape, device, unit_tokens=unit_tokens, masked=masked)
    cost = decode_cost(shape, tiles, device_profile(device))
    return DecodePlanner(shape, cost, policy, grouping=grouping, limits=limits, room_tokens=room_tokens)


def extend_planner(
    shape: AttentionShape,
    tiles: tuple[Tile, ...],
    sms: int,
    *,
    grouping: str,
    always: bool,
    profile: DeviceProfile = H200,
    limits: Capacity | None = None,
    must_fit: bool = False,
) -> ExtendPlanner:
    """Plans for batches of several new tokens: groups leave partial results, or, if their tails are short, these are
    inlined and partial results are few.

    Args:
        tiles: ``tiles.shape_tiles`` of the GPU.
        sms: its multiprocessors.
        always: every batch is packed, whatever is expected.
        profile: the GPU's times.
        limits: default: ``growing_limits``.
    """
    policy, cost = policy_of(shape, tiles, sms, profile), profile.extend_cost(tiles[0].rows)
    inlining = replace(policy, max_inline_tail_tokens=INLINE_TAIL_TOKENS)
    return ExtendPlanner(
        shape,
        (Way(cost, policy), Way(cost.without_partials(), inlining)),
        grouping=grouping,
        limits=growing_limits(shape) if limits is None else limits,
        packed_us=lambda plan: (
            profile.extend_margin * profile.packed_extend_us(plan, shape, sms, tiles[0].rows, tiles[0].tokens)
        ),
        stock_us=None if always else lambda q, kv: profile.stock_extend_us(q, kv, shape, sms),
        must_fit=must_fit,
    )


class CudaRunner:
    """Runs plans by the GPU kernels, on the current device; a ``Runner``. One call at a time."""

    def __init__(
        self,
        shape: AttentionShape,
        tiles: tuple[Tile, ...],
        device: torch.device,
        *,
        capacity: Capacity | None = None,
        replayed: bool = False,
    ) -> None:
        """
        Args:
            tiles: the classes by which plans are cut (``tiles.shape_tiles``).
            capacity: buffers of this size, at fixed addresses, so that captured graphs replay any plan; None: they grow
                with the plans.
            replayed: see ``PackedCuda``.
        """
        self.shape, self.tiles, self.device, self.capacity, self.replayed = shape, tiles, device, capacity, replayed
        self._packed = None if capacity is None else self._buffers_of(capacity)

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 0 if self._packed is None else self._packed.nbytes

    @property
    def kv_slots(self) -> torch.Tensor:
        return self._loaded.kv_slots

    def load(self, plan: Plan, table: SlotTable) -> None:
        packed = self._buffers(plan)
        packed.load(plan)
        packed.snapshot(table.entries, table.rows, table.page_size)
        self._page_size, self._windowed = table.page_size, plan.windowed

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        self._loaded.append(kv_lens, out_slots)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor | None = None,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        v_scale: float = 1.0,
        mask: MaskRows | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = self._loaded
        return packed.run(
            q, k, v, packed.kv_slots if kv_lens is None else kv_lens, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, v_scale=v_scale, page_size=self._page_size, windowed=self._windowed,
            mask=None if mask is None else (mask.mask, mask.row_start), sinks=sinks, out=out,
        )  # fmt: skip

    def free(self) -> None:
        """Give back the buffers; those that grow come back with the next plan."""
        self._packed = None

    @property
    def _loaded(self) -> PackedCuda:
        assert self._packed is not None, "load a plan first"
        return self._packed

    def _buffers(self, plan: Plan) -> PackedCuda:
        """Those at hand, or larger ones, if they grow and the plan needs them."""
        if self._packed is None or (self.capacity is None and not self._packed.capacity.holds(plan)):
            have = Capacity.of(plan) if self._packed is None else self._packed.capacity
            self._packed = None  # the old ones make room first
            self._packed = self._buffers_of(have.grown(plan))
        return self._packed

    def _buffers_of(self, capacity: Capacity) -> PackedCuda:
        shape = self.shape
        return PackedCuda(
            capacity, self.tiles, qo_heads=shape.qo_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            device=self.device, replayed=self.replayed,
        )  # fmt: skip


def warm_up(
    planner: ExtendPlanner,
    runner: CudaRunner,
    k: torch.Tensor,
    v: torch.Tensor,
    dtype: torch.dtype,
    logits_soft_cap: float,
    sinks: Sequence[torch.Tensor | None] = (None,),
) -> None:
    """Run attention and merge in each form that extend batches may need, so that no request waits for a compiler.

    Of the KV only slot 0 is read, which belongs to no request.

    Args:
        k, v: a layer's, as for ``Runner.run``.
        dtype: of its queries.
        logits_soft_cap: the layer's, as for ``Runner.run``.
        sinks: of layers of each form, as for ``Runner.run``.
    """
    shape, sms = runner.shape, multiprocessors(k.device)
    policy = policy_of(shape, runner.tiles, sms, device_profile(k.device))
    cut = replace(policy, timings=None, max_split_tokens=WARM_UP_KV // 4)
    tree = PrefixTree.unshared(2)
    table = SlotTable(k.new_zeros(1, 1 << 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int64, device=k.device))
    # merges of few queries, of more, and of many; where there are two tile classes, a prompt is of the large one
    few = sms // shape.qo_heads
    for queries in (*([few - 1] if few > 1 else []), max(17, few + 1), 32 * sms // shape.qo_heads):
        q_lens = np.array([queries, 1], np.int32)
        kv_lens = q_lens + np.int32(WARM_UP_KV)
        batch = StepBatch(q_lens, kv_lens, visible=causal(q_lens, kv_lens))
        planner.fastest(tree, batch)  # numba compiles, too
        if planner.stock_us is not None:
            planner.stock_us(q_lens, kv_lens)
        plan = make_plan(
            tree, kv_lens, cut, kv_tokens_unique=int(kv_lens.sum()), qo_indptr=batch.qo_indptr, visible=batch.visible
        )
        runner.load(plan, table)
        q = torch.zeros(queries + 1, shape.qo_heads, shape.head_dim, dtype=dtype, device=k.device)
        for form in sinks:
            runner.run(q, k, v, sm_scale=1.0, logits_soft_cap=logits_soft_cap, sinks=form)
    planner.packed_us(plan)  # compiles, too; asked where two ways are compared
    runner.free()  # batches need larger buffers
