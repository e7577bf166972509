"""A batch of page tables: which pages its requests share, and attention over them. What the two wrappers stand on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.paged.checks import (
    Dtype,
    Scale,
    as_dtype,
    as_int32,
    as_number,
    check_device,
    check_indptr,
    check_tensor,
    pages_needed,
    refuse,
)
from packinfer_sgl.paged.kernels import Sees, kernels_on
from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.runners.base import Runner

KVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

BACKENDS = ("auto", "fa2", "fa3")  # FlashInfer's names for kernels that compute the same


class KVTokens(NamedTuple):
    """KV tokens of a planned batch; requests without queries do not count.

    Attributes
    ----------
    logical : int
        The lengths of all requests, summed: what a kernel reads that knows nothing of sharing.
    unique : int
        The same when equal beginnings of page tables count once: the least that has to be read.
    read : int
        What is read: ``unique`` if every shared span is worth reading apart; more where one is not, or where a request
        has more queries than fit a tile; less where a window hides tokens from every query.
    """

    logical: int
    unique: int
    read: int


class EqualPages(NamedTuple):
    """Requests that share what their page tables say, up to ``limit`` ([n] int32 tokens); a batch's ``Requests``."""

    indptr: Int32
    indices: Int32
    page_size: int
    limit: Int32

    def __eq__(self, other: object) -> bool:
        return self is other  # a batch that is planned is new

    def prefix_tree(self) -> PrefixTree:
        return PrefixTree.from_slots(self.indptr, self.indices, self.page_size, self.limit)


def check_sees_all(sees_all: bool, unit_tokens: int) -> None:
    """Raise NotImplementedError if KV is to be cut into units and queries do not see all KV of their requests."""
    if unit_tokens and not sees_all:
        raise NotImplementedError(
            "fixed_split_size and disable_split_kv are not supported where a query sees a part of its request's KV "
            "(is_causal, window_left)"
        )


class PagedWrapper:
    """What the decode and the prefill wrapper have in common; decode is prefill with equal query lengths."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        backend: str,
        use_cuda_graph: bool,
        buffers: dict[str, torch.Tensor | None],
    ) -> None:
        """``buffers``: FlashInfer's for CUDA graphs, by argument (see ``GraphBuffers``)."""
        if backend not in BACKENDS:
            raise NotImplementedError(f"backend={backend!r} is not supported: use one of {', '.join(BACKENDS)}")
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout must be NHD or HND, is {kv_layout!r}")
        for name, buffer in () if use_cuda_graph else buffers.items():
            if buffer is not None:
                raise NotImplementedError(f"{name} is not supported without use_cuda_graph")
        self.device = float_workspace_buffer.device
        self._kernels = kernels_on(self.device, buffers if use_cuda_graph else None)
        self._kv_layout = kv_layout
        self._plan: Plan | None = None
        self._runner: Runner
        self._causal, self._window_left = False, -1
        self._unit_tokens = 0  # of ``planning.units``, if the bits of a request must not depend on the batch

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._kernels.graph is not None

    @property
    def kv_tokens(self) -> KVTokens:
        """What the planned batch holds and what is read of it (:class:`KVTokens`); FlashInfer has no such thing."""
        plan = self._planned()
        return KVTokens(plan.kv_tokens_logical, plan.kv_tokens_unique, plan.kv_tokens_read)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Nothing to reset: the workspaces are not used."""
        check_device(float_workspace_buffer, self.device, "float_workspace_buffer")
        check_device(int_workspace_buffer, self.device, "int_workspace_buffer")

    def workspace_size(self, *args: Any, **more: Any) -> int:
        """Not supported, and not needed: any workspace is large enough."""
        raise NotImplementedError("workspace_size is not supported by packinfer-sgl: workspaces of any size will do")

    def prewarm_paged_kv_stride_variant(self, *args: Any, **more: Any) -> None:
        """Not supported: K and V must have equal strides on CUDA."""
        raise NotImplementedError("prewarm_paged_kv_stride_variant is not supported by packinfer-sgl: leave it out")

    def end_forward(self) -> None:
        """Does nothing, as in FlashInfer."""

    def _planned(self) -> Plan:
        if self._plan is None:
            raise RuntimeError(f"{type(self).__name__}: call plan() first")
        return self._plan

    def _set_layer(
        self,
        qo_heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtypes: tuple[Dtype, Dtype | None, Dtype | None],
        sm_scale: float | None,
        logits_soft_cap: float | None,
        unit_tokens: int = 0,
    ) -> None:
        """``dtypes`` are those of q, KV and the output; the last two default to the first. ``unit_tokens``: see
        ``planning.units``; 0 where KV is split for speed."""
        if min(qo_heads, kv_heads, head_dim, page_size) < 1 or qo_heads % kv_heads:
            raise ValueError(
                "num_qo_heads must be a multiple of num_kv_heads and all sizes at least 1: "
                f"num_qo_heads={qo_heads}, num_kv_heads={kv_heads}, head_dim={head_dim}, page_size={page_size}"
            )
        q_dtype, kv_dtype, o_dtype = (
            as_dtype(dtype or dtypes[0], name)
            for dtype, name in zip(dtypes, ("q_data_type", "kv_data_type", "o_data_type"), strict=True)
        )
        shape = AttentionShape(qo_heads, kv_heads, head_dim, kv_dtype.itemsize)
        self._kernels.check_layer(shape, q_dtype, kv_dtype)
        if unit_tokens:
            self._kernels.check_units(shape, unit_tokens)
        self._plan = None  # if the new one fails, the old one must not run with half of it
        self._unit_tokens = unit_tokens
        self._q_dtype, self._kv_dtype, self._o_dtype, self._shape = q_dtype, kv_dtype, o_dtype, shape
        self._page_size = page_size
        self._set_logits(sm_scale, logits_soft_cap)

    def _set_logits(self, sm_scale: float | None, logits_soft_cap: float | None) -> None:
        self._sm_scale = 1 / math.sqrt(self._shape.head_dim) if sm_scale is None else sm_scale
        self._soft_cap = logits_soft_cap or 0.0

    def _set_batch(
        self, qo_indptr: Int32, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor
    ) -> Int32:
        """Take in the page tables; returns [n_requests] int32 KV tokens of each request."""
        tables, pages_of = as_int32(indptr, "kv indptr"), as_int32(indices, "kv indices")
        last = as_int32(last_page_len, "kv last_page_len")
        check_indptr(tables, len(last), "kv indptr")
        check_indptr(qo_indptr, len(last), "qo_indptr")
        if len(pages_of) < tables[-1]:
            raise ValueError(f"kv indptr ends at {tables[-1]}, but there are {len(pages_of)} kv indices")
        pages_of = pages_of[: tables[-1]]
        if (pages_of < 0).any():
            raise ValueError("kv indices must not be negative")
        if ((last < 0) | (last > self._page_size)).any():
            raise ValueError(f"kv last_page_len must lie between 0 and page_size ({self._page_size})")
        pages = np.diff(tables)
        kv_lens = np.where(pages > 0, (pages - 1) * self._page_size + last, 0).astype(np.int32)
        self._q_lens = np.diff(qo_indptr)
        self._kv_lens = np.where(self._q_lens > 0, kv_lens, 0).astype(np.int32)  # without queries nobody reads
        self._indptr, self._indices, self._last_page_len, self._qo_indptr = tables, pages_of, last, qo_indptr
        return kv_lens

    def _build(self, causal: bool, window_left: int, mask: torch.Tensor | None = None) -> None:
        """Group the requests by equal pages, and give the work items to the kernels.

        Args:
            mask: [sum of qo_len * kv_len] bool, which tokens each query sees; replaces ``causal``.
        """
        windowed = (causal and mask is None) or window_left >= 0  # whether a query may see part of its KV
        check_sees_all(not windowed, self._unit_tokens)
        self._plan = None  # if this fails, nothing of it must run
        self._causal, self._window_left = causal, max(window_left, -1)
        shape, tables = self._shape, (self._indptr, self._indices, self._last_page_len, self._qo_indptr)
        self._pages_needed = pages_needed(self._indptr, self._indices, -(-self._kv_lens // self._page_size))
        baked = {
            "num_qo_heads": shape.qo_heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "page_size": self._page_size, "q_data_type": self._q_dtype, "kv_data_type": self._kv_dtype,
            "o_data_type": self._o_dtype, "sm_scale": self._sm_scale, "logits_soft_cap": self._soft_cap,
            "causal or window_left": windowed, "fixed_split_size": self._unit_tokens // self._page_size,
        }  # fmt: skip
        self._kernels.check_batch(tables, self._pages_needed, baked)
        row = np.repeat(np.arange(len(self._q_lens)), self._q_lens)
        nth = np.arange(len(row)) - self._qo_indptr[row]
        self._mask = None
        if mask is not None:
            cells = self._q_lens.astype(np.int64) * self._kv_lens
            row_start = (np.cumsum(cells) - cells)[row] + nth * self._kv_lens[row].astype(np.int64)
            self._mask = MaskRows(mask, torch.from_numpy(row_start).to(self.device))
        sees: Sees = "mask" if mask is not None else "part" if windowed else "all"
        planner = self._kernels.planner(shape, sees, self._unit_tokens)
        planned = planner.plan(self._step_batch(row, nth, causal and mask is None))
        assert planned is not None  # without a stock backend every batch is packed
        self._runner = self._kernels.load(planned.plan, tables, self._page_size, shape, sees, self._unit_tokens)
        self._plan = planned.plan

    def _step_batch(self, row: np.ndarray, nth: np.ndarray, causal: bool) -> StepBatch:
        """``row`` and ``nth``: [n_queries] request of each query, and which of its queries."""
        q_lens, kv_lens = self._q_lens, self._kv_lens
        limit, visible, unique = kv_lens, None, None
        if causal or self._window_left >= 0:
            kv_len = kv_lens[row]
            position = kv_len - q_lens[row] + nth  # of the query itself: the queries are the last tokens
            first, last = np.zeros_like(kv_len), kv_len
            if self._window_left >= 0:
                first = np.clip(position - self._window_left, 0, kv_len)
            if causal:
                last = np.clip(position + 1, 0, kv_len)
                limit = np.clip(kv_lens - q_lens + 1, 0, kv_lens)
            visible = (first.astype(np.int32), last.astype(np.int32))
        pages = EqualPages(self._indptr, self._indices, self._page_size, limit)
        if (limit < kv_lens).any():  # what only some queries see may be shared, too
            unique = pages._replace(limit=kv_lens).prefix_tree().unique_tokens(kv_lens)
        return StepBatch(q_lens, kv_lens, pages, visible=visible, unique_tokens=unique)

    def _attend(
        self,
        q: torch.Tensor,
        paged_kv_cache: KVCache,
        scales: tuple[Scale | None, Scale | None, Scale | None],
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        return_lse: bool,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        sinks: torch.Tensor | None = None,
    ) -> Result:
        self._planned()
        shape = self._shape
        n_queries = int(self._qo_indptr[-1])
        if self.is_cuda_graph_enabled and q.dim():
            n_queries = max(n_queries, len(q))  # rows past the plan's are padding
        check_device(q, self.device, "q")
        check_tensor(q, (n_queries, shape.qo_heads, shape.head_dim), self._q_dtype, "q")
        k, v = self._pages(paged_kv_cache)
        out = torch.empty(q.shape, dtype=self._o_dtype, device=self.device) if out is None else out
        check_device(out, self.device, "out")
        check_tensor(out, tuple(q.shape), self._o_dtype, "out")
        if lse is not None:
            size = (n_queries, shape.qo_heads)
            check_device(lse, self.device, "lse")
            check_tensor(lse, size if lse_layout == "NH" else size[::-1], torch.float32, "lse")
        if sinks is not None:
            check_device(sinks, self.device, "sinks")
        q_scale, k_scale, v_scale = (as_number(s, f"{name}_scale") for s, name in zip(scales, "qkv", strict=True))
        sm_scale = self._sm_scale * q_scale * k_scale
        self._kernels.check_call(q, k, v, out, sm_scale)
        if self._page_size == 1:  # the dimension of size 1 has any stride
            k, v = k[:, 0], v[:, 0]
        if len(q):
            with self._kernels.on_device():
                lse2 = self._runner.run(
                    q, k, v, sm_scale=sm_scale, logits_soft_cap=self._soft_cap, v_scale=v_scale, mask=self._mask,
                    sinks=sinks, out=out,
                )[1]  # fmt: skip
        else:
            lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=self.device)
        result = lse2 * math.log(2) if lse_base == "ln" else lse2
        if lse_layout == "HN":
            result = result.t().contiguous()
        if lse is not None:
            result = lse.copy_(result)
        return (out, result) if return_lse else out

    def _sinks(self, args: tuple[Any, ...], sinks: torch.Tensor | None) -> torch.Tensor | None:
        """Those of a call of ``run``; ``args``: what was given by position behind the cache."""
        refuse(args=args or None)
        return sinks

    def _replan(self, causal: bool, window_left: int, logits_soft_cap: float | None, sm_scale: float | None) -> None:
        """What FlashInfer's deprecated ``forward`` is told wins over what ``plan`` was told."""
        self._planned()
        self._set_logits(sm_scale, logits_soft_cap)
        if (causal, max(window_left, -1)) != (self._causal, self._window_left):
            if self.is_cuda_graph_enabled:
                raise NotImplementedError(f"causal={causal}, window_left={window_left} is not what was planned")
            self._build(causal, window_left, self._mask.mask if self._mask else None)

    def _check_window(self, window_left: int | None) -> None:
        self._planned()
        if window_left is not None and max(window_left, -1) != self._window_left:
            raise NotImplementedError(f"window_left={window_left} is not what was planned ({self._window_left})")

    def _pages(self, paged_kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [pages, page_size, kv_heads, head_dim] of keys and values."""
        if isinstance(paged_kv_cache, torch.Tensor):
            both = self._tokens_first(paged_kv_cache, 5)
            if both.shape[1] != 2:
                raise ValueError(f"paged_kv_cache must hold K and V in dimension 1, its shape is {tuple(both.shape)}")
            k, v = both.unbind(1)
        else:
            k, v = (self._tokens_first(x, 4) for x in paged_kv_cache)
        for x, name in ((k, "k cache"), (v, "v cache")):
            size = (x.shape[0], self._page_size, self._shape.kv_heads, self._shape.head_dim)
            check_device(x, self.device, name)
            check_tensor(x, size, self._kv_dtype, name)
            if x.shape[0] < self._pages_needed:
                raise ValueError(f"kv indices name page {self._pages_needed - 1}, but the {name} has {x.shape[0]}")
        return k, v

    def _tokens_first(self, x: torch.Tensor, dims: int) -> torch.Tensor:
        if x.dim() == dims - 1:  # page size 1 may leave its dimension out
            return x.unsqueeze(-3)
        if x.dim() != dims:
            raise ValueError(f"paged_kv_cache must have {dims} dimensions ({dims - 1} at page size 1), has {x.dim()}")
        return x if self._kv_layout == "NHD" else x.transpose(-3, -2)
