"""A batch of page tables: which pages its requests share, and attention over them. What the two wrappers stand on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from packinfer_sgl.groups import CPU, AttentionShape, prune
from packinfer_sgl.kernels.reference import MaskRows, PackedReference
from packinfer_sgl.plan import Plan, TilePolicy, make_plan
from packinfer_sgl.prefix_tree import Int32, PrefixTree

KVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype
Scale = float | torch.Tensor
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "fa2", "fa3")  # FlashInfer's names for kernels that compute the same
# With more queries to a tile the logits leave the CPU's cache: 64 measured best from 8 to 64 queries a request.
TILES = TilePolicy(tile_queries=(64, 1), chunk_tokens=1024)
# The reference copies keys and values before it multiplies: what sharing saves is the copy, whatever the products.
COST = replace(CPU, flops_per_us=math.inf)


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

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, backend: str) -> None:
        if backend not in BACKENDS:
            raise NotImplementedError(f"backend={backend!r} is not supported: use one of {', '.join(BACKENDS)}")
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout must be NHD or HND, is {kv_layout!r}")
        check_on_cpu(float_workspace_buffer, "float_workspace_buffer")
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._plan: Plan | None = None
        self._causal, self._window_left = False, -1

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    @property
    def kv_tokens(self) -> KVTokens:
        """What the planned batch holds and what is read of it (:class:`KVTokens`); FlashInfer has no such thing."""
        plan = self._planned()
        return KVTokens(plan.kv_tokens_logical, plan.kv_tokens_unique, plan.kv_tokens_read)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Nothing to reset: on the CPU no workspace is used."""
        check_on_cpu(float_workspace_buffer, "float_workspace_buffer")
        check_on_cpu(int_workspace_buffer, "int_workspace_buffer")

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
        self._plan = None  # if the new one fails, the old one must not run with half of it
        self._q_dtype, self._kv_dtype, self._o_dtype = q_dtype, kv_dtype, o_dtype
        self._shape = AttentionShape(qo_heads, kv_heads, head_dim, kv_dtype.itemsize)
        self._page_size, self._sm_scale, self._soft_cap = page_size, sm_scale, logits_soft_cap

    def _set_batch(
        self, qo_indptr: Int32, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor
    ) -> Int32:
        """Take in the page tables; returns [n_requests] int32 KV tokens of each request."""
        self._qo_indptr = qo_indptr
        self._indptr, self._indices = as_int32(indptr, "kv indptr"), as_int32(indices, "kv indices")
        last = as_int32(last_page_len, "kv last_page_len")
        check_indptr(self._indptr, len(last), "kv indptr")
        check_indptr(qo_indptr, len(last), "qo_indptr")
        if len(self._indices) < self._indptr[-1]:
            raise ValueError(f"kv indptr ends at {self._indptr[-1]}, but there are {len(self._indices)} kv indices")
        self._indices = self._indices[: self._indptr[-1]]
        if (self._indices < 0).any():
            raise ValueError("kv indices must not be negative")
        if ((last < 0) | (last > self._page_size)).any():
            raise ValueError(f"kv last_page_len must lie between 0 and page_size ({self._page_size})")
        pages = np.diff(self._indptr)
        kv_lens = np.where(pages > 0, (pages - 1) * self._page_size + last, 0).astype(np.int32)
        self._q_lens = np.diff(qo_indptr)
        self._kv_lens = np.where(self._q_lens > 0, kv_lens, 0).astype(np.int32)  # without queries nobody reads
        return kv_lens

    def _build(self, causal: bool, window_left: int, mask: torch.Tensor | None = None) -> None:
        """Group the requests by equal pages, and bind the work items to slots (``page * page_size + offset``).

        Args:
            mask: [sum of qo_len * kv_len] bool, which tokens each query sees; replaces ``causal``.
        """
        self._causal, self._window_left = causal, max(window_left, -1)
        row = np.repeat(np.arange(len(self._q_lens)), self._q_lens)
        nth = np.arange(len(row)) - self._qo_indptr[row]
        self._mask = None
        if mask is not None:
            cells = self._q_lens.astype(np.int64) * self._kv_lens
            row_start = (np.cumsum(cells) - cells)[row] + nth * self._kv_lens[row].astype(np.int64)
            self._mask = MaskRows(mask, torch.from_numpy(row_start))
        self._plan = plan = self._make_plan(row, nth, causal and mask is None)
        if not plan.kv_capacity:  # nobody has KV: there is no slot that even padding could read
            self._packed, self._pages_needed = None, 0
            return
        request, start, tokens, offset = plan.spans.T
        span = np.repeat(np.arange(len(tokens)), tokens)
        position = np.arange(plan.kv_capacity) - offset[span] + start[span]
        page = self._indices[self._indptr[request[span]] + position // self._page_size].astype(np.int64)
        slots = page * self._page_size + position % self._page_size
        self._pages_needed = int(page.max()) + 1
        self._packed = PackedReference(plan, token_bytes=self._shape.kv_heads * self._shape.head_dim * 4)
        # the item of an empty request at the end of the batch points at the entry after the last
        self._packed.bind(torch.from_numpy(np.append(slots, slots[:1])))

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
        # to the cost model the queries of a request are more heads over the same KV
        queries = max(1, -(-len(row) // max(int(np.count_nonzero(kv_lens)), 1)))
        kept = prune(
            tree,
            replace(shape, qo_heads=shape.qo_heads * queries),
            replace(COST, large_rows=TILES.tile_queries[0] * shape.group_size),
        )
        return make_plan(kept, kv_lens, TILES, kv_tokens_unique=unique, qo_indptr=self._qo_indptr, visible=visible)

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
        check_tensor(q, (n_queries, shape.qo_heads, shape.head_dim), self._q_dtype, "q")
        k, v = self._pages(paged_kv_cache)
        out = torch.empty(q.shape, dtype=self._o_dtype) if out is None else out
        check_tensor(out, tuple(q.shape), self._o_dtype, "out")
        if lse is not None:
            size = (n_queries, shape.qo_heads)
            check_tensor(lse, size if lse_layout == "NH" else size[::-1], torch.float32, "lse")
        q_scale, k_scale, v_scale = (as_number(s, f"{name}_scale") for s, name in zip(scales, "qkv", strict=True))
        if self._packed is None:
            out.zero_()
            lse2 = torch.full((n_queries, shape.qo_heads), -math.inf)
        else:
            sm_scale = 1 / math.sqrt(shape.head_dim) if self._sm_scale is None else self._sm_scale
            sm_scale *= q_scale * k_scale
            soft_cap = self._soft_cap or 0.0
            _, lse2 = self._packed.run(q, k, v, sm_scale=sm_scale, logits_soft_cap=soft_cap, mask=self._mask, out=out)
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
        self._sm_scale, self._soft_cap = sm_scale, logits_soft_cap
        if (causal, max(window_left, -1)) != (self._causal, self._window_left):
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


def refuse(**arguments: Any) -> None:
    """Raise for the first argument that is not None or False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by packinfer-sgl: leave it at its default")


def check_on_cpu(x: torch.Tensor, name: str) -> None:
    if x.device.type != "cpu":
        raise NotImplementedError(f"{name} is on {x.device}: only CPU tensors are supported so far, CUDA comes later")


def check_tensor(x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    check_on_cpu(x, name)
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
    if isinstance(scale, torch.Tensor) and scale.numel() != 1:
        raise NotImplementedError(f"{name} with {scale.numel()} elements is not supported: give one number")
    return 1.0 if scale is None else float(scale)


def as_flags(mask: torch.Tensor | None, packed: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """A copy of FlashInfer's custom mask, [n] bool, from whichever of its two forms is given."""
    if packed is not None:
        check_tensor(packed, (-(-n // 8),), torch.uint8, "packed_custom_mask")
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little").astype(bool))
    if mask is None:
        return None
    mask = mask.reshape(-1)
    check_tensor(mask, (n,), torch.bool, "custom_mask")
    return mask.clone()
