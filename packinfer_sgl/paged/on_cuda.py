"""Paged attention on CUDA: plans for the Triton kernels in buffers that a captured graph may read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.kernels.tiles import TILES, Tile, tile_policy, tiles_for
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.planning.profiles import H200

MAX_GROUP = 16  # query heads of a KV head: the rows of the smallest tile
PARTIAL_BYTES = 1 << 29  # most memory for partial results; a plan that needs more shares less
INT32 = 1 << 31  # tokens of a cache that plans can name


class OnCuda:
    """Runs plans over page tables with the Triton kernels; the same methods as ``OnCpu``.

    Without a graph the buffers grow as plans need them. With one they are allocated at the first plan and never move:
    their sizes follow from FlashInfer's buffers and from the first plan's number of queries.
    """

    def __init__(self, device: torch.device, buffers: dict[str, torch.Tensor | None] | None) -> None:
        """
        Args:
            buffers: FlashInfer's buffers for use with a CUDA graph: kv indptr, kv indices, kv last_page_len and, in
                prefill, qo_indptr, by the names of their arguments; None: no graph.
        """
        self.device = device
        self.graph = buffers is not None
        self._names, self._tables = list(buffers or {}), []
        for name, buffer in (buffers or {}).items():
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(f"{name} must be a tensor with use_cuda_graph, is {buffer!r}")
            if buffer.dim() != 1 or buffer.dtype != torch.int32 or not buffer.is_contiguous():
                raise ValueError(f"{name} must be int32, contiguous, with one dimension")
            if buffer.device != device:
                raise ValueError(f"{name} is on {buffer.device}, the wrapper on {device}")
            self._tables.append(buffer)
        for i in (0, 3) if self.graph else ():
            if i < len(self._tables) and len(self._tables[i]) != len(self._tables[2]) + 1:
                raise ValueError(f"{self._names[i]} must have one entry more than {self._names[2]}")
        self._packed: PackedCuda | None = None
        self._capacity: Capacity | None = None
        self._baked: dict[str, object] = {}
        self._most_pages = INT32

    def check_layer(self, shape: AttentionShape, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        """Raise NotImplementedError for what the kernels cannot do."""
        if q_dtype == torch.float32:
            raise NotImplementedError("q_data_type=float32 is not supported on CUDA: use float16 or bfloat16")
        if kv_dtype != q_dtype:
            raise NotImplementedError(f"kv_data_type={kv_dtype} is not supported on CUDA with q_data_type={q_dtype}")
        if shape.head_dim not in TILES:
            raise NotImplementedError(f"head_dim={shape.head_dim} is not supported on CUDA: use one of {sorted(TILES)}")
        if shape.group_size > MAX_GROUP:
            raise NotImplementedError(
                f"num_qo_heads={shape.qo_heads} for num_kv_heads={shape.kv_heads} is not supported on CUDA: "
                f"at most {MAX_GROUP} query heads may share a KV head"
            )

    def check_masks(self, **masks: torch.Tensor | None) -> None:
        for name, mask in masks.items():
            if mask is not None and self.graph:
                raise NotImplementedError(f"{name} is not supported with use_cuda_graph")

    def check_batch(self, tables: tuple[Int32, ...], n_pages: int, baked: dict[str, object]) -> None:
        """Raise ValueError for a batch that the buffers, or a graph that was captured over them, cannot take.

        Args:
            tables: kv indptr, kv indices, kv last_page_len, qo_indptr.
            n_pages: the highest page that is read, plus 1.
            baked: what a captured graph holds for good, by name; at least num_qo_heads, head_dim, page_size.
        """
        _, indices, last_page_len, qo_indptr = tables
        n_queries, page_size = int(qo_indptr[-1]), baked["page_size"]
        if n_pages * page_size >= INT32:
            raise ValueError(f"kv indices name page {n_pages - 1}: tokens past 2**31 are not supported on CUDA")
        if not self.graph:
            return
        sizes = [len(x) for x in self._tables]
        if len(last_page_len) != sizes[2]:
            raise ValueError(f"the batch has {len(last_page_len)} requests, {self._names[2]} was made for {sizes[2]}")
        if len(indices) > sizes[1]:
            raise ValueError(f"the batch has {len(indices)} kv indices, {self._names[1]} holds {sizes[1]}")
        if self._capacity is None:
            n, row_bytes = sizes[2], baked["num_qo_heads"] * (baked["head_dim"] + 1) * 4
            # Uncut and ungrouped, any batch fits: an item for each tile of queries, and each KV token once a request.
            self._capacity = Capacity(
                queries=n_queries,
                slots=8 * n_queries,
                items=8 * n + n_queries + 4096,
                spans=2 * n,
                partials=min(8 * n_queries + 65536 // baked["num_qo_heads"], PARTIAL_BYTES // row_bytes),
                kv_slots=sizes[1] * page_size,
            )
            self._baked, self._most_queries = baked, n_queries
        if n_queries > self._most_queries:
            raise ValueError(
                f"the batch has {n_queries} queries, but the first plan or a captured q had {self._most_queries}: "
                "begin with the largest"
            )
        for name, value in baked.items():
            if value != self._baked[name]:
                raise ValueError(f"{name}={value}, but CUDA graphs hold what was planned first: {self._baked[name]}")
        if n_pages > self._most_pages:
            raise ValueError(f"kv indices name page {n_pages - 1}, but a captured cache has {self._most_pages}")

    def cost(self, shape: AttentionShape) -> CostModel:
        return H200.decode_cost

    def attempts(self, shape: AttentionShape, extend: bool) -> tuple[tuple[str, TilePolicy], ...]:
        """Grouping and tiles, in the order in which they are tried until a plan fits; each smaller than the last.

        Args:
            extend: as for ``load``.
        """
        policy = tile_policy(shape, self.device, extend)
        uncut = replace(policy, max_split_tokens=1 << 30, timings=None)
        return ("multi", policy), ("multi", uncut), ("single", uncut), ("off", uncut)

    def fits(self, plan: Plan, shape: AttentionShape) -> bool:
        if self._capacity is not None:
            return self._capacity.holds(plan)
        return plan.n_partials * shape.qo_heads * (shape.head_dim + 1) * 4 <= PARTIAL_BYTES

    def load(
        self,
        plan: Plan,
        tables: tuple[Int32, ...],
        page_size: int,
        shape: AttentionShape,
        windowed: bool,
        extend: bool,
    ) -> None:
        """Upload the plan and the page tables on the current stream, and look up the slots there.

        Args:
            tables: as for ``check_batch``.
            windowed: whether queries may see part of a span.
            extend: whether so, and without a custom mask: the plan has tiles of the extend kernel.
        """
        self._page_size, self._windowed = page_size, windowed
        tiles = tiles_for(shape.head_dim, self.device, extend)
        with self._on_device():
            self._packed = packed = self._buffers(plan, shape, tiles)
            packed.load(plan)
            if self.graph:
                for buffer, values in zip(self._tables, tables):
                    buffer[: len(values)].copy_(self._pinned(values), non_blocking=True)
            else:
                self._tables = [self._pinned(x).to(self.device, non_blocking=True) for x in tables[:2]]
            packed.snapshot(self._tables[1], self._tables[0], page_size)

    def _buffers(self, plan: Plan, shape: AttentionShape, tiles: tuple[Tile, ...]) -> PackedCuda:
        """Those at hand if the plan fits, else new ones."""
        layer = (shape.qo_heads, shape.kv_heads, shape.head_dim, tiles)
        have = self._packed.capacity if self._packed is not None and layer == self._layer else None
        if have is not None and (self.graph or have.holds(plan)):
            return self._packed
        capacity = self._capacity
        if capacity is None:
            capacity = (have or Capacity.of(plan)).grown(plan)
        self._packed, self._layer = None, layer  # the old ones make room first
        heads = {"qo_heads": shape.qo_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        return PackedCuda(capacity, tiles, **heads, device=self.device, replayed=self.graph)

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
        """Attention into ``out``; returns lse2, of which rows past the plan's are undefined. May be captured."""
        if not sm_scale > 0:
            raise NotImplementedError(f"sm_scale * q_scale * k_scale = {sm_scale} is not supported on CUDA")
        for x, name in ((q, "q"), (k, "k cache"), (v, "v cache"), (out, "out")):
            check_strides(x, name)
        if strides(k) != strides(v):
            raise NotImplementedError(
                f"paged_kv_cache with different strides of K {k.stride()} and V {v.stride()} is not supported on CUDA"
            )
        if not len(q):
            return torch.empty(q.shape[:2], dtype=torch.float32, device=self.device)
        assert self._packed is not None, "plan first"
        with self._on_device():
            if self.graph and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._most_queries = min(self._most_queries, len(q))
                self._most_pages = min(self._most_pages, len(k), len(v))
            if self._page_size == 1:  # the dimension of size 1 has any stride
                k, v = k[:, 0], v[:, 0]
            nothing_grows = self._packed.kv_slots  # lengths of rows that grow while the plan lives: there are none
            flags = None if mask is None else (mask.mask, mask.row_start)
            return self._packed.run(
                q, k, v, nothing_grows, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
                page_size=self._page_size, windowed=self._windowed, mask=flags, out=out,
            )[1]  # fmt: skip

    def _pinned(self, values: Int32) -> torch.Tensor:
        """A copy in pinned memory, which torch keeps until the GPU has read it."""
        x = torch.from_numpy(values)
        return x.pin_memory() if self.device.type == "cuda" else x

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever the tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def strides(x: torch.Tensor) -> list[int]:
    """The strides that matter: a dimension of size 1 may have any."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride())]


def check_strides(x: torch.Tensor, name: str) -> None:
    if x.stride(-1) != 1:
        raise NotImplementedError(
            f"{name} with strides {x.stride()} is not supported on CUDA: the last dimension must be contiguous"
        )
