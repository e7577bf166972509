"""Paged attention on the CPU: plans for the reference kernels, and their slots."""

from __future__ import annotations

import math

import numpy as np
import torch

from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.planning.groups import AttentionShape, CostModel
from packinfer_sgl.planning.plan import Plan, TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.runners.cpu_extend import TILES, cost_of


class OnCpu:
    """Runs plans over page tables with the reference kernels; the same methods as ``OnCuda``."""

    graph = False

    def __init__(self) -> None:
        self._packed: PackedReference | None = None

    def check_layer(self, shape: AttentionShape, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Everything is supported."""

    def check_masks(self, **masks: torch.Tensor | None) -> None:
        """All are supported."""

    def check_batch(self, tables: tuple[Int32, ...], n_pages: int, baked: dict[str, object]) -> None:
        """Any batch will do."""

    def cost(self, shape: AttentionShape) -> CostModel:
        return cost_of(shape)

    def attempts(self, shape: AttentionShape, extend: bool) -> tuple[tuple[str, TilePolicy], ...]:
        """Grouping and tiles, in the order in which they are tried until a plan fits."""
        return (("multi", TILES),)

    def fits(self, plan: Plan, shape: AttentionShape) -> bool:
        return True

    def load(
        self,
        plan: Plan,
        tables: tuple[Int32, ...],
        page_size: int,
        shape: AttentionShape,
        windowed: bool,
        extend: bool,
    ) -> None:
        """Bind the work items to slots (``page * page_size + offset``)."""
        if not plan.kv_capacity:  # nobody has KV: there is no slot that even padding could read
            self._packed = None
            return
        indptr, indices, *_ = tables
        request, start, tokens, offset, _ = plan.spans.T
        span = np.repeat(np.arange(len(tokens)), tokens)
        position = np.arange(plan.kv_capacity) - offset[span] + start[span]
        page = indices[indptr[request[span]] + position // page_size].astype(np.int64)
        slots = page * page_size + position % page_size
        self._packed = PackedReference(plan, token_bytes=shape.kv_heads * shape.head_dim * 4)
        # the item of an empty request at the end of the batch points at the entry after the last
        self._packed.bind(torch.from_numpy(np.append(slots, slots[:1])))

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        mask: MaskRows | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attention into ``out``; returns lse2. See ``PackedReference.run``."""
        if self._packed is None:
            out.zero_()
            return torch.full(q.shape[:2], -math.inf)
        return self._packed.run(q, k, v, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, mask=mask, out=out)[1]
