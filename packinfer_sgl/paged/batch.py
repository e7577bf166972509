"""A batch of page tables: which pages its requests share, and attention over them. What the two wrappers stand on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.paged.on_cpu import OnCpu
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree

if TYPE_CHECKING:
    from packinfer_sgl.paged.on_cuda import OnCuda

KVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype
Scale = float | torch.Tensor
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
        """``buffers``: FlashInfer's for CUDA graphs, by argument (see ``paged_cuda.OnCuda``)."""
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
        self._causal, self._window_left = False, -1

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._kernels.graph

    @property
    def kv_tokens(self) -> KVTokens:
        """What the planned batch holds and what is read of it (:class:`KVTokens`); FlashInfer has no such thing."""
        plan = self._planned()
        return KVTokens(plan.kv_tokens_logical, plan.kv_tokens_unique, plan.kv_tokens_read)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Nothing to reset: the workspaces are not used."""
        check_device(float_workspace_buffer, self.device, "float_workspace_buffer")
        check_device(int_workspace_buffer, self.device, "int_workspace_buffer")

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
    ) -> None:
        """``dtypes`` are those of q, KV and the output; the last two default to the first."""
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
        self._plan = None  # if the new one fails, the old one must not run with half of it
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
        self._causal, self._window_left = causal, max(window_left, -1)
        windowed = (causal and mask is None) or self._window_left >= 0  # whether a query may see part of its KV
        shape, tables = self._shape, (self._indptr, self._indices, self._last_page_len, self._qo_indptr)
        self._pages_needed = pages_needed(self._indptr, self._indices, -(-self._kv_lens // self._page_size))
        baked = {
            "num_qo_heads": shape.qo_heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "page_size": self._page_size, "q_data_type": self._q_dtype, "kv_data_type": self._kv_dtype,
            "o_data_type": self._o_dtype, "sm_scale": self._sm_scale, "logits_soft_cap": self._soft_cap,
            "causal or window_left": windowed,
        }  # fmt: skip
        self._kernels.check_batch(tables, self._pages_needed, baked)
        row = np.repeat(np.arange(len(self._q_lens)), self._q_lens)
        nth = np.arange(len(row)) - self._qo_indptr[row]
        self._mask = None
        if mask is not None:
            cells = self._q_lens.astype(np.int64) * self._kv_lens
            row_start = (np.cumsum(cells) - cells)[row] + nth * self._kv_lens[row].astype(np.int64)
            self._mask = MaskRows(mask, torch.from_numpy(row_start).to(self.device))
        plan = self._make_plan(row, nth, causal and mask is None)
        self._kernels.load(plan, tables, self._page_size, shape, windowed, windowed and mask is None)
        self._plan = plan

    def _make_plan(self, row: np.ndarray, nth: np.ndarray, causal: bool) -> Plan:
        """``row`` and ``nth``: [n_queries] request of each query, and which of its queries."""
        q_lens, kv_lens, shape = self._q_lens, self._kv_lens, self._shape
        limit, visible = kv_lens, None
        if causal or self._window_left >= 0:
            kv_len = kv_lens[row]
            position = kv_len - q_lens[row] + nth  # of the query itself: the queries are the last tokens
            first, last = np.zeros_like(kv_len), kv_len
            if self._window_left >= 0:
                first = np.clip(position - self._window_left, 0, kv_len)
            if causal:
                last = np.clip(position + 1, 0, kv_len)
                limit = np.clip(kv_lens - q_lens + 1, 0, kv_lens)
            visible = (first, last)
        tree = PrefixTree.from_slots(self._indptr, self._indices, self._page_size, limit)
        unique = tree.unique_tokens(kv_lens)
        if (limit < kv_lens).any():  # what only some queries see may be shared, too
            unique = PrefixTree.from_slots(self._indptr, self._indices, self._page_size, kv_lens).unique_tokens(kv_lens)
        cost = self._kernels.cost(shape)
        for grouping, policy in self._kernels.attempts(shape, visible is not None and self._mask is None):
            if self._mask is not None:  # it is looked up by KV position, of which riding tails have no run
                policy = replace(policy, max_inline_tail_tokens=0)
            kept = prune(tree, shape, cost, grouping, q_lens, kv_lens if (q_lens == 1).all() else None)
            plan = make_plan(kept, kv_lens, policy, kv_tokens_unique=unique, qo_indptr=self._qo_indptr, visible=visible)
            if self._kernels.fits(plan, shape):
                break
        return plan

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
        q_scale, k_scale, v_scale = (as_number(s, f"{name}_scale") for s, name in zip(scales, "qkv", strict=True))
        sm_scale = self._sm_scale * q_scale * k_scale
        lse2 = self._kernels.run(q, k, v, sm_scale=sm_scale, logits_soft_cap=self._soft_cap, mask=self._mask, out=out)
        if v_scale != 1:
            out *= v_scale
        result = lse2 * math.log(2) if lse_base == "ln" else lse2
        if lse_layout == "HN":
            result = result.t().contiguous()
        if lse is not None:
            result = lse.copy_(result)
        return (out, result) if return_lse else out

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


def kernels_on(device: torch.device, graph_buffers: dict[str, torch.Tensor | None] | None) -> OnCpu | OnCuda:
    """What plans and runs on ``device``; ``graph_buffers``: as for ``OnCuda``."""
    if device.type == "cuda":
        from packinfer_sgl.paged.on_cuda import OnCuda  # Triton takes long to import

        return OnCuda(device, graph_buffers)
    if device.type != "cpu":
        raise NotImplementedError(f"float_workspace_buffer on {device} is not supported: use CPU or CUDA")
    if graph_buffers is not None:
        raise NotImplementedError("use_cuda_graph is not supported on the CPU")
    return OnCpu()


def pages_needed(indptr: Int32, indices: Int32, pages: Int32) -> int:
    """The highest of the first ``pages[i]`` pages of the tables, plus 1 ([n_requests])."""
    first = indptr[:-1][pages > 0]
    # reduceat needs indices below the length
    bounds = np.stack([first, first + pages[pages > 0]], 1).ravel()
    return int(np.maximum.reduceat(np.append(indices, 0), bounds)[::2].max(initial=-1)) + 1


def refuse(**arguments: Any) -> None:
    """Raise for the first argument that is not None or False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by packinfer-sgl: leave it at its default")


def check_device(x: torch.Tensor, device: torch.device, name: str) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the wrapper on {device}")


def check_tensor(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape} as planned, is {x.dtype} {tuple(x.shape)}")


def check_indptr(indptr: Int32, n: int, name: str) -> None:
    if len(indptr) != n + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{name} must be {n + 1} numbers for {n} requests, ascending from 0")


def check_equal(given: torch.Tensor | None, derived: Int32, name: str) -> None:
    """Lengths that FlashInfer takes besides the page tables must say the same."""
    if given is not None and not np.array_equal(given.cpu().numpy().ravel(), derived):
        raise ValueError(f"{name} contradicts the indptr and last_page_len: {given.tolist()} is not {derived.tolist()}")


def check_at_most(bound: int | None, lens: Int32, name: str) -> None:
    if bound is not None and bound < lens.max(initial=0):
        raise ValueError(f"{name}={bound} is less than the longest request has: {lens.max()}")


def as_int32(x: torch.Tensor, name: str) -> Int32:
    """A copy, so that the caller may overwrite its tensor."""
    if x.dim() != 1 or x.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 with one dimension, is {x.dtype} {tuple(x.shape)}")
    return x.cpu().numpy().copy()


def as_dtype(dtype: Dtype, name: str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise NotImplementedError(f"{name}={dtype} is not supported: use float32, float16 or bfloat16")
    return found


def as_number(scale: Scale | None, name: str) -> float:
    if isinstance(scale, torch.Tensor) and scale.device.type != "cpu":
        raise NotImplementedError(f"{name} on {scale.device} is not supported: reading it would wait for the GPU")
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise NotImplementedError(f"{name} with {scale.numel()} elements is not supported: give one number")
    return 1.0 if scale is None else float(scale)


def as_flags(
    mask: torch.Tensor | None, packed: torch.Tensor | None, n: int, device: torch.device
) -> torch.Tensor | None:
    """A copy of FlashInfer's custom mask, [n] bool, from whichever of its two forms is given."""
    if packed is not None:
        check_device(packed, device, "packed_custom_mask")
        check_tensor(packed, (-(-n // 8),), torch.uint8, "packed_custom_mask")
        bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)
        return (bits & 1).bool().view(-1)[:n]
    if mask is None:
        return None
    mask = mask.reshape(-1)
    check_device(mask, device, "custom_mask")
    check_tensor(mask, (n,), torch.bool, "custom_mask")
    return mask.clone()
