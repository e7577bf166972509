"""One kind of batch on the packed kernels: its planner, its runner, and what each step counts and checks."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch

from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.fitting import UNLIMITED
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import Planned, Planner
from packinfer_sgl.runners.arena import Arena
from packinfer_sgl.runners.base import Runner
from packinfer_sgl.runners.slots import audit_reads, check_shared_slots
from packinfer_sgl.serving.metrics import Stats


class Kind(str, Enum):
    """Of batches."""

    DECODE = "decode"  # one new token a row
    EXTEND = "extend"  # prefill, chunked prefill, or decodes among them
    VERIFY = "verify"  # of speculative decoding: a chain of drafts a row


class PackedPath:
    """Turns batches of one kind into work for a runner."""

    def __init__(
        self,
        kind: Kind,
        planner: Planner,
        runner: Runner,
        stats: Stats,
        *,
        check: bool,
        max_rows: int = UNLIMITED,
        row_tokens: int = 1,
        arena: Arena | None = None,
    ) -> None:
        """
        Args:
            check: see ``config.Config``.
            max_rows: most rows of a batch.
            row_tokens: new tokens of each row, where all have as many.
            arena: where shared spans may have contiguous copies.
        """
        self.kind, self.planner, self.runner, self.stats = kind, planner, runner, stats
        self.check, self.max_rows, self.row_tokens, self.arena = check, max_rows, row_tokens, arena
        self._loaded: Plan

    def step(self, batch: StepBatch) -> bool:
        """Prepare the runner for this batch; False if the stock backend runs it."""
        return self._step(batch, self.arena)

    def step_alone(self, batch: StepBatch) -> None:
        """The same of a batch of whose requests nothing is known, and without the arena: when ``step`` failed."""
        self._step(replace(batch, requests=None), None)

    def capture(self, batch: StepBatch) -> None:
        """Prepare the runner for the batch with which a graph is captured; nothing is counted."""
        planned = self.planner.plan(batch)
        assert planned is not None
        self.planner.forget()
        self._load(planned.plan, batch)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        v_scale: float = 1.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, as q. See ``Runner.run``."""
        out, _ = self.runner.run(
            q, k, v, kv_lens, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale, sinks=sinks
        )  # fmt: skip
        return out

    def _step(self, batch: StepBatch, arena: Arena | None) -> bool:
        try:
            planned = self.planner.plan(batch)
            if planned is None:
                return False
            self._prepare(planned, batch, arena)
        except Exception:
            self.planner.forget()  # its plan may be one that was never loaded
            raise
        if self.kind is Kind.EXTEND:
            self.stats.count_extend(planned)
        else:
            self.stats.count_decode(planned, int(batch.kv_lens.sum()) - planned.plan.kv_tokens_logical)
        return True

    def _prepare(self, planned: Planned, batch: StepBatch, arena: Arena | None) -> None:
        if planned.is_new:
            if self.check:
                assert batch.table is not None
                check_shared_slots(planned.tree, batch.table)
            plan = planned.plan
            if arena is not None:
                plan = arena.point(plan, planned.fitted.listed, batch.requests)
            self._load(plan, batch)
        if batch.out_slots is not None:
            assert batch.kv_lens_device is not None
            self.runner.append(batch.kv_lens_device, batch.out_slots)
        if self.check and self.kind is not Kind.EXTEND:
            # a captured graph enters the newest token of a decode step when it is replayed
            newest_is_there = self.kind is Kind.VERIFY or batch.out_slots is not None
            audit_reads(self._loaded, self.runner.kv_slots, batch, newest_is_there=newest_is_there)
            self.stats.audited_steps += 1
        if arena is not None:
            if arena.work():
                self.planner.forget()  # the next step reads the new copies
            arena.count_step()

    def _load(self, plan: Plan, batch: StepBatch) -> None:
        assert batch.table is not None
        self.runner.load(plan, batch.table)
        self._loaded = plan
