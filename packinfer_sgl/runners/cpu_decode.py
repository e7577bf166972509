"""Packed decode on the CPU: the plan of the batch, its slots, and the reference kernels."""

from __future__ import annotations

import numpy as np
import torch

from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.planning.audit import check_reads
from packinfer_sgl.planning.groups import AttentionShape, CostModel
from packinfer_sgl.planning.plan import Plan, TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners.arena import Regroup
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.runners.planner import DecodePlanner, Rows

# A CPU plan lives at most this many steps; a batched product reads (and masks) the room it has not used yet.
ROOM_TOKENS = 32


class CpuDecode:
    """Turns each decode batch into work for the reference kernels.

    The slots of a plan are a snapshot of ``req_to_token``; steps that keep the plan append their new slots.
    """

    def __init__(
        self,
        shape: AttentionShape,
        cost: CostModel,
        policy: TilePolicy,
        *,
        grouping: str,
        check: bool,
        req_to_token: torch.Tensor,
        stats: Stats,
        regroup: Regroup | None = None,
    ) -> None:
        """
        Args:
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            grouping, check: see ``config.Config``.
            regroup: the arena, if there is one.
        """
        self.shape, self.check, self.req_to_token, self.stats = shape, check, req_to_token, stats
        self._planner = DecodePlanner(
            shape, cost, policy, grouping=grouping, room_tokens=ROOM_TOKENS, stats=stats, regroup=regroup
        )

    def step(
        self, rows: Rows | None, pool_rows: torch.Tensor, kv_lens: torch.Tensor, out_slots: torch.Tensor
    ) -> PackedReference:
        """The work of this decode step.

        Args:
            rows: the scheduler's batch, or None to find sharing by equal slots instead.
            pool_rows: [n] row of ``req_to_token`` of each request.
            kv_lens: [n] int64 KV tokens of each row, the new one included.
            out_slots: [n] slot of the new token.
        """
        lens = kv_lens.numpy()
        if self._planner.step(rows, lens, lambda: tree_by_slots(self.req_to_token, pool_rows, lens)):
            plan = self._planner.plan
            self._kv_slots = snapshot_slots(plan, self.req_to_token, pool_rows)
            # the slot of position p lies at append_base + p; the new token's position is the length - 1
            self._append_base = torch.from_numpy(plan.append_base).long() - 1
            if self.check:
                check_shared_slots(self._planner.tree, self.req_to_token, pool_rows)
            token_bytes = self.shape.kv_heads * self.shape.head_dim * 4
            self._packed = PackedReference(plan, token_bytes=token_bytes, room_tokens=ROOM_TOKENS)
        else:
            self._kv_slots[self._append_base + kv_lens] = out_slots.long()
        self._packed.bind(self._kv_slots, kv_lens)
        if self.check:
            audit_reads(self._planner.plan, self._kv_slots, self.req_to_token, pool_rows, lens, self.stats)
        return self._packed

    def forget(self) -> None:
        """Make a new plan at the next step."""
        self._planner.forget()

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
        """Attention of one layer, [n, qo_heads, head_dim]. See ``PackedReference.run``."""
        return self._packed.run(q, k, v, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)[0]


def tree_by_slots(req_to_token: torch.Tensor, pool_rows: torch.Tensor, kv_lens: np.ndarray) -> PrefixTree:
    """Who shares what by the slots themselves; on a GPU it waits for them.

    Args:
        req_to_token, pool_rows: as for ``snapshot_slots``, on the CPU or on the GPU.
        kv_lens: [n] KV tokens of each row.
    """
    indptr = np.concatenate([[0], np.cumsum(kv_lens)]).astype(np.int32)
    slots = np.concatenate([np.zeros(0, np.int32), *held_slots(req_to_token, pool_rows, kv_lens)])
    return PrefixTree.from_slots(indptr, slots, 1, kv_lens.astype(np.int32))


def held_slots(req_to_token: torch.Tensor, pool_rows: torch.Tensor, kv_lens: np.ndarray) -> list[np.ndarray]:
    """Of each row the slots of its KV tokens, int32, on the CPU; row by row, as a GPU may have no memory to spare."""
    return [req_to_token[row, :n].cpu().numpy() for row, n in zip(pool_rows.tolist(), kv_lens.tolist())]


def snapshot_slots(plan: Plan, req_to_token: torch.Tensor, pool_rows: torch.Tensor) -> torch.Tensor:
    """[plan.kv_capacity] int64: the spans' slots; room is filled with the span's first slot, whose KV is finite.

    Args:
        req_to_token: [pool rows, max context] int32.
        pool_rows: [n] row of it of each request.
    """
    row, start, length, offset, copied = torch.from_numpy(plan.spans).long().unbind(1)
    ends = torch.cat([offset[1:], offset.new_tensor([plan.kv_capacity])])
    span = torch.repeat_interleave(torch.arange(len(row)), ends - offset)
    within = torch.arange(plan.kv_capacity) - offset[span]
    within = torch.where(within < length[span], within, 0)
    own = req_to_token[pool_rows.long()[row[span]], start[span] + within].long()
    return torch.where(copied[span] < 0, own, copied[span] + within)


def check_shared_slots(tree: PrefixTree, req_to_token: torch.Tensor, pool_rows: torch.Tensor) -> None:
    """Raise RuntimeError unless the rows of each node hold equal slots.

    Args:
        req_to_token, pool_rows: as for ``snapshot_slots``, on the CPU or on the GPU.
    """
    order = torch.from_numpy(tree.row_order).long().to(pool_rows.device)
    table = req_to_token[pool_rows.long()[order]]
    for i in range(tree.n_nodes):
        held = table[tree.row_lo[i] : tree.row_hi[i], tree.start[i] : tree.end[i]]
        if not bool((held == held[0]).all()):
            raise RuntimeError(
                f"packinfer: requests grouped on tokens {tree.start[i]} to {tree.end[i]} hold different KV slots; "
                "please report this with the SGLang version"
            )


def audit_reads(
    plan: Plan,
    kv_slots: torch.Tensor,
    req_to_token: torch.Tensor,
    pool_rows: torch.Tensor,
    kv_lens: np.ndarray,
    stats: Stats,
    *,
    drafts: int = 1,
    newest_is_there: bool = True,
) -> None:
    """For debugging: raise RuntimeError unless the kernels will read the slots of SGLang's table. Waits for a GPU.

    Args:
        kv_slots: the slot list of ``plan`` that the kernels read.
        req_to_token, pool_rows: as for ``tree_by_slots``.
        kv_lens: [n] KV tokens of each row, of which its queries are the last.
        drafts: queries of each row.
        newest_is_there: see ``check_reads``.
    """
    held = held_slots(req_to_token, pool_rows, kv_lens)
    row = np.repeat(np.arange(len(held), dtype=np.int32), drafts)
    seen = np.repeat(kv_lens, drafts) - np.tile(np.arange(drafts)[::-1], len(held))
    check_reads(plan, kv_slots.cpu().numpy(), held, row, seen.astype(np.int32), newest_is_there=newest_is_there)
    stats.audited_steps += 1
