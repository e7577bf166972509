"""The planners and the runner of a wrapper, on the CPU or on CUDA: those of SGLang's batches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch

from packinfer_sgl.kernels.tiles import device_profile, is_hopper, multiprocessors, shape_tiles, unit_policy
from packinfer_sgl.paged.checks import check_cuda_call, check_cuda_layer
from packinfer_sgl.paged.graph_buffers import PARTIAL_BYTES, GraphBuffers, check_pages, pinned
from packinfer_sgl.planning.batch import SlotTable
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.fitting import UNLIMITED, Capacity
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import Planner
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.runners import cpu
from packinfer_sgl.runners.base import Runner

GROUPING = "multi"
# What of its row a query sees: of a part, by position (causal, a window), tails may ride with their prefix.
Sees = Literal["all", "part", "mask"]


class OnCpu:
    """The same methods as ``OnCuda``."""

    graph: GraphBuffers | None = None

    def on_device(self) -> AbstractContextManager[object]:
        return nullcontext()

    def check_layer(self, shape: AttentionShape, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Everything is supported."""

    def check_masks(self, **masks: torch.Tensor | None) -> None:
        """All are supported."""

    def check_units(self, shape: AttentionShape, unit_tokens: int) -> None:
        """Raise NotImplementedError: products of torch on a CPU may differ with the number of rows."""
        raise NotImplementedError("fixed_split_size and disable_split_kv are not supported on the CPU")

    def check_batch(self, tables: tuple[Int32, ...], n_pages: int, baked: dict[str, object]) -> None:
        """Any batch will do."""

    def planner(self, shape: AttentionShape, sees: Sees, unit_tokens: int) -> Planner:
        if sees == "part":
            return cpu.extend_planner(shape, grouping=GROUPING, always=True)
        policy = replace(CPU.extend_policy, max_inline_tail_tokens=0)  # many queries may see all of a row
        return cpu.decode_planner(shape, grouping=GROUPING, room_tokens=0, policy=policy)

    def load(
        self,
        plan: Plan,
        tables: tuple[Int32, ...],
        page_size: int,
        shape: AttentionShape,
        sees: Sees,
        unit_tokens: int,
    ) -> Runner:
        indptr, indices = (torch.from_numpy(x) for x in tables[:2])
        runner = cpu.CpuRunner(shape)
        runner.load(plan, SlotTable(indices, indptr, page_size))
        return runner

    def check_call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sm_scale: float) -> None:
        """Everything is supported."""


class OnCuda:
    """Without a graph the buffers grow as plans need them. With one they are allocated at the first plan and never
    move: their sizes follow from FlashInfer's buffers and from the first plan's number of queries."""

    def __init__(self, device: torch.device, buffers: dict[str, torch.Tensor | None] | None) -> None:
        """``buffers``: see ``GraphBuffers``; None: no graph."""
        from packinfer_sgl.runners import cuda  # Triton takes long to import

        self._cuda, self.device = cuda, device
        self.graph = None if buffers is None else GraphBuffers(device, buffers)
        self._runner: cuda.CudaRunner | None = None
        self._limits: Capacity | None = None

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever the tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def check_layer(self, shape: AttentionShape, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Raise NotImplementedError for what the kernels cannot do."""
        on_gpu = self.device.type == "cuda"  # where the tests run the kernels without one, all is converted
        capability = torch.cuda.get_device_capability(self.device) if on_gpu else (9, 0)
        check_cuda_layer(shape, q_dtype, kv_dtype, capability)

    def check_masks(self, **masks: torch.Tensor | None) -> None:
        for name, mask in masks.items():
            if mask is not None and self.graph is not None:
                raise NotImplementedError(f"{name} is not supported with use_cuda_graph")

    def check_units(self, shape: AttentionShape, unit_tokens: int) -> None:
        """Raise NotImplementedError where KV cannot be cut into units of so many tokens with the same bits for all."""
        if self.device.type == "cuda" and not is_hopper(self.device):
            raise NotImplementedError("fixed_split_size and disable_split_kv are supported on Hopper GPUs only")
        try:
            unit_policy(shape, unit_tokens)
        except ValueError as e:
            raise NotImplementedError(f"fixed_split_size of these pages is not supported: {e}") from None

    def check_batch(self, tables: tuple[Int32, ...], n_pages: int, baked: dict[str, object]) -> None:
        """Raise ValueError for a batch that the kernels, or a captured graph, cannot take. See ``GraphBuffers``."""
        check_pages(n_pages, int(str(baked["page_size"])))
        self._limits = None if self.graph is None else self.graph.check_batch(tables, n_pages, baked)

    def planner(self, shape: AttentionShape, sees: Sees, unit_tokens: int) -> Planner:
        """
        Args:
            unit_tokens: of ``planning.units``; 0 for splits that are chosen for speed.
        """
        row_bytes = shape.qo_heads * (shape.head_dim + 1) * 4
        most = UNLIMITED if unit_tokens else PARTIAL_BYTES // row_bytes  # units leave as many as they are
        limits = self._limits or Capacity.unlimited(partials=most)
        if sees != "part":
            return self._cuda.decode_planner(
                shape, self.device, grouping=GROUPING, limits=limits, room_tokens=0, unit_tokens=unit_tokens,
                masked=sees == "mask",
            )  # fmt: skip
        tiles, sms = shape_tiles(shape, self.device, True), multiprocessors(self.device)
        return self._cuda.extend_planner(
            shape, tiles, sms, grouping=GROUPING, always=True, profile=device_profile(self.device), limits=limits,
            must_fit=True,
        )  # fmt: skip

    def load(
        self,
        plan: Plan,
        tables: tuple[Int32, ...],
        page_size: int,
        shape: AttentionShape,
        sees: Sees,
        unit_tokens: int,
    ) -> Runner:
        """Upload the plan and the page tables on the current stream, and look up the slots there."""
        tiles = shape_tiles(shape, self.device, sees == "part", unit_tokens, masked=sees == "mask")
        if self._runner is None or (self._runner.shape, self._runner.tiles) != (shape, tiles):
            if self._runner is not None:
                self._runner.free()  # the old one makes room first
            self._runner = self._cuda.CudaRunner(
                shape, tiles, self.device, capacity=self._limits, replayed=self.graph is not None
            )
        with self.on_device():
            if self.graph is not None:
                table = self.graph.write(tables, page_size)
            else:
                indptr, indices = (pinned(x, self.device).to(self.device, non_blocking=True) for x in tables[:2])
                table = SlotTable(indices, indptr, page_size)
            self._runner.load(plan, table)
        return self._runner

    def check_call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, sm_scale: float) -> None:
        check_cuda_call(q, k, v, out, sm_scale)
        if self.graph is not None and len(q) and self.device.type == "cuda":
            with self.on_device():
                if torch.cuda.is_current_stream_capturing():
                    self.graph.capture(len(q), min(len(k), len(v)))


def kernels_on(device: torch.device, graph_buffers: dict[str, torch.Tensor | None] | None) -> OnCpu | OnCuda:
    """What plans and runs on ``device``; ``graph_buffers``: see ``GraphBuffers``."""
    if device.type == "cuda":
        return OnCuda(device, graph_buffers)
    if device.type != "cpu":
        raise NotImplementedError(f"float_workspace_buffer on {device} is not supported: use CPU or CUDA")
    if graph_buffers is not None:
        raise NotImplementedError("use_cuda_graph is not supported on the CPU")
    return OnCpu()
