"""The CPU: its kernels, and how batches are planned for them."""

from __future__ import annotations

import math

import torch

from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.kernels.reference import LOG2_E, MaskRows, check_sinks
from packinfer_sgl.planning.batch import SlotTable
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import DecodePlanner, ExtendPlanner, Way
from packinfer_sgl.planning.policy import TilePolicy

# A plan lives at most this many steps; a batched product reads (and masks) the room it has not used yet.
ROOM_TOKENS = 32
ARENA_GAIN = 0.3  # share of the time of a scattered span's read that a contiguous copy saves; 0.2 to 0.8 on two cores


def decode_planner(
    shape: AttentionShape, *, grouping: str, room_tokens: int = ROOM_TOKENS, policy: TilePolicy = CPU.decode_policy
) -> DecodePlanner:
    """Plans for batches whose queries see all of their row."""
    cost, limits = CPU.extend_cost(policy.tile_queries[0] * shape.group_size), Capacity.unlimited()
    return DecodePlanner(shape, cost, policy, grouping=grouping, limits=limits, room_tokens=room_tokens)


def extend_planner(shape: AttentionShape, *, grouping: str, always: bool) -> ExtendPlanner:
    """Plans for batches of several new tokens; ``always``: packed, whatever is expected."""
    cost = CPU.extend_cost(CPU.extend_policy.tile_queries[0] * shape.group_size)
    return ExtendPlanner(
        shape,
        (Way(cost, CPU.extend_policy),),
        grouping=grouping,
        limits=Capacity.unlimited(),
        packed_us=lambda plan: CPU.extend_margin * CPU.packed_extend_us(plan, shape),
        stock_us=None if always else lambda q_lens, kv_lens: CPU.stock_extend_us(q_lens, kv_lens, shape),
    )


class CpuRunner:
    """Runs plans by ``kernels.cpu_attention``; a ``Runner``."""

    def __init__(self, shape: AttentionShape, *, room_tokens: int = 0) -> None:
        """``room_tokens``: how many steps a plan may live."""
        self._token_bytes = shape.kv_heads * shape.head_dim * 4
        self._room_tokens = room_tokens
        self._packed: PackedReference | None = None

    @property
    def kv_slots(self) -> torch.Tensor:
        return self._kv_slots

    def load(self, plan: Plan, table: SlotTable) -> None:
        self._packed = None
        if not plan.kv_capacity:  # nobody has KV: there is no slot that even padding could read
            return
        slots = look_up(plan, table)
        # the item of an empty row at the end of the batch points at the entry after the last
        self._kv_slots = torch.cat([slots, slots[:1]])
        # the slot of position p lies at append_base + p; the new token's position is the length - 1
        self._append_base = torch.from_numpy(plan.append_base).long() - 1
        self._packed = PackedReference(plan, token_bytes=self._token_bytes, room_tokens=self._room_tokens)
        if not len(plan.append_base):
            self._packed.bind(self._kv_slots)

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        assert self._packed is not None
        self._kv_slots[self._append_base + kv_lens] = out_slots.long()
        self._packed.bind(self._kv_slots, kv_lens)

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
        if self._packed is None:
            out = torch.empty_like(q) if out is None else out
            lse2 = torch.full(q.shape[:2], -math.inf)
            if sinks is not None:
                check_sinks(sinks, q.shape[1])
                lse2[:] = sinks.float() * LOG2_E
            return out.zero_(), lse2
        out, lse2 = self._packed.run(
            q, k, v, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale, mask=mask, sinks=sinks,
            out=out,
        )  # fmt: skip
        out[len(self._packed.plan.merge_indptr) - 1 :] = 0  # padding
        return out, lse2


def look_up(plan: Plan, table: SlotTable) -> torch.Tensor:
    """[plan.kv_capacity] int64: the spans' slots; room is filled with the span's first slot, whose KV is finite."""
    row, start, length, offset, copied = torch.from_numpy(plan.spans).long().unbind(1)
    ends = torch.cat([offset[1:], offset.new_tensor([plan.kv_capacity])])
    span = torch.repeat_interleave(torch.arange(len(row)), ends - offset)
    within = torch.arange(plan.kv_capacity) - offset[span]
    within = torch.where(within < length[span], within, 0)
    position = start[span] + within
    # a row of SGLang's table, or the place at which a request's pages begin
    width = 1 if table.is_paged else table.entries.shape[1]
    entry = table.rows.long()[row[span]] * width + position // table.page_size
    own = table.entries.reshape(-1)[entry].long() * table.page_size + position % table.page_size
    return torch.where(copied[span] < 0, own, copied[span] + within)
