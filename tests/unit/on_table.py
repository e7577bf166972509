"""A packed path over a table of slots: what the router does with one of SGLang's batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from packinfer_sgl.config import Config
from packinfer_sgl.planning.batch import SlotTable, StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.serving.build import CpuPaths, CudaPaths
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import Kind, PackedPath


@dataclass
class OnTable:
    """``table``: [pool rows, max context] int32, as SGLang's."""

    path: PackedPath
    table: torch.Tensor

    def batch(self, requests: Any, pool_rows: torch.Tensor, kv_lens: np.ndarray, q_lens: Any = None) -> StepBatch:
        """``q_lens``: default: as many new tokens in each row as the path has."""
        lens = np.asarray(kv_lens).astype(np.int32)
        new = np.full(len(lens), self.path.row_tokens, np.int32) if q_lens is None else q_lens
        visible = None if self.path.kind is Kind.DECODE else causal(new, lens)
        return StepBatch(new, lens, requests, SlotTable(self.table, pool_rows.to(self.table.device)), visible=visible)

    def step(self, *batch: Any) -> bool:
        return self.path.step(self.batch(*batch))

    def step_alone(self, *batch: Any) -> None:
        self.path.step_alone(self.batch(None, *batch))

    def run(self, *args: Any, **more: Any) -> torch.Tensor:
        return self.path.run(*args, **more)


def extend_on_cpu(shape: AttentionShape, table: torch.Tensor, stats: Stats, always: bool = True) -> OnTable:
    return OnTable(CpuPaths(shape, Config(check=True), stats).extend(always=always), table)


def on_cuda(shape: AttentionShape, table: torch.Tensor, stats: Stats, pool_tokens: int = 4096) -> CudaPaths:
    return CudaPaths(shape, Config(check=True), stats, table, pool_tokens)
