"""Decode steps: one plan for as long as the batch stays the same, tails growing token by token."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np
import torch

from packinfer_sgl.groups import AttentionShape, CostModel, prune
from packinfer_sgl.kernels.reference import PackedReference
from packinfer_sgl.metrics import Stats
from packinfer_sgl.plan import Plan, TilePolicy, make_plan
from packinfer_sgl.prefix_tree import PrefixTree

# A CPU plan lives at most this many steps; a batched product reads (and masks) the room it has not used yet.
ROOM_TOKENS = 32


class Rows(Protocol):
    """A batch that can be compared with the next one and knows who shares what (``radix.BatchRows``)."""

    def prefix_tree(self) -> PrefixTree | None: ...


class DecodePlanner:
    """Keeps the plan of the running decode batch and its list of KV slots.

    A plan holds while the batch compares equal, every row has grown by exactly one token since the step before, and
    the tails have room. Anything else takes a new snapshot of the slots from ``req_to_token``.
    """

    def __init__(
        self,
        shape: AttentionShape,
        cost: CostModel,
        policy: TilePolicy,
        *,
        grouping: str,
        verify: bool,
        req_to_token: torch.Tensor,
        stats: Stats,
    ) -> None:
        """
        Args:
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            grouping, verify: see ``config.Config``.
        """
        self.shape, self.cost, self.policy = shape, cost, policy
        self.grouping, self.verify = grouping, verify
        self.req_to_token, self.stats = req_to_token, stats
        self._rows: Rows | None = None
        self._lens = np.zeros(0, np.int64)
        self._steps_left = 0
        self._planned_tokens = 0

    def step(
        self, rows: Rows | None, pool_rows: torch.Tensor, kv_lens: torch.Tensor, out_slots: torch.Tensor
    ) -> PackedReference:
        """The work of this decode step.

        Args:
            rows: the scheduler's batch, or None to find sharing by equal slots instead.
            pool_rows: [n] row of ``req_to_token`` of each request.
            kv_lens: [n] KV tokens of each row, the new one included.
            out_slots: [n] slot of the new token.
        """
        lens = kv_lens.numpy()
        if self._still_holds(rows, lens):
            self._kv_slots[self._append_base + kv_lens] = out_slots.long()
            self._steps_left -= 1
        else:
            self._replan(rows, pool_rows, lens)
        self._lens = lens.copy()
        self._packed.bind(self._kv_slots, kv_lens)
        self.stats.count_packed(self._plan, int(lens.sum()) - self._plan.kv_tokens_logical)
        return self._packed

    def _still_holds(self, rows: Rows | None, lens: np.ndarray) -> bool:
        return rows is not None and self._steps_left > 0 and rows == self._rows and np.array_equal(lens, self._lens + 1)

    def _replan(self, rows: Rows | None, pool_rows: torch.Tensor, lens: np.ndarray) -> None:
        started = time.perf_counter()
        kv_lens = lens.astype(np.int32)
        tree = rows.prefix_tree() if rows is not None else None
        if tree is None:
            tree = self._tree_by_slots(pool_rows, kv_lens)
        kept = prune(tree, self.shape, self.cost, self.grouping)
        plan = make_plan(
            kept, kv_lens, self.policy, kv_tokens_unique=tree.unique_tokens(kv_lens), room_tokens=ROOM_TOKENS
        )
        self._rows, self._plan, self._steps_left = rows, plan, ROOM_TOKENS
        self._kv_slots = self._snapshot(plan, pool_rows)
        # the slot of position p lies at append_base + p; the new token's position is the length - 1
        self._append_base = torch.from_numpy(plan.append_base).long() - 1
        if self.verify:
            self._check_slots(tree, pool_rows)
        self.stats.count_plan(plan, kept, (time.perf_counter() - started) * 1e6)
        self._packed = PackedReference(
            plan, token_bytes=self.shape.kv_heads * self.shape.head_dim * 4, room_tokens=ROOM_TOKENS
        )

    def _snapshot(self, plan: Plan, pool_rows: torch.Tensor) -> torch.Tensor:
        """[plan.kv_capacity] int64: the spans' slots; room is filled with the span's first slot, whose KV is finite."""
        row, start, length, offset = torch.from_numpy(plan.spans).long().unbind(1)
        ends = torch.cat([offset[1:], offset.new_tensor([plan.kv_capacity])])
        span = torch.repeat_interleave(torch.arange(len(row)), ends - offset)
        within = torch.arange(plan.kv_capacity) - offset[span]
        position = start[span] + torch.where(within < length[span], within, 0)
        return self.req_to_token[pool_rows.long()[row[span]], position].long()

    def _tree_by_slots(self, pool_rows: torch.Tensor, kv_lens: np.ndarray) -> PrefixTree:
        tables = [self.req_to_token[r, :n].numpy() for r, n in zip(pool_rows.tolist(), kv_lens.tolist())]
        indptr = np.concatenate([[0], np.cumsum(kv_lens)]).astype(np.int32)
        return PrefixTree.from_slots(indptr, np.concatenate(tables).astype(np.int32), 1, kv_lens)

    def _check_slots(self, tree: PrefixTree, pool_rows: torch.Tensor) -> None:
        table = self.req_to_token[pool_rows.long()[torch.from_numpy(tree.row_order).long()]]
        for i in range(tree.n_nodes):
            held = table[tree.row_lo[i] : tree.row_hi[i], tree.start[i] : tree.end[i]]
            if not bool((held == held[0]).all()):
                raise RuntimeError(
                    f"packinfer: requests grouped on tokens {tree.start[i]} to {tree.end[i]} hold different KV slots; "
                    "please report this with the SGLang version"
                )
