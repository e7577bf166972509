"""Attention over a paged KV cache with FlashInfer's constructor, ``plan`` and ``run``; pages shared by several requests
are found in the page table and read once."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partialmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from packinfer_sgl.groups import CPU, AttentionShape, prune
from packinfer_sgl.kernels.reference import MaskRows, PackedReference
from packinfer_sgl.plan import TilePolicy, make_plan
from packinfer_sgl.prefix_tree import Int32, PrefixTree

KVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype
Scale = float | torch.Tensor
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "fa2", "fa3")  # FlashInfer's names for kernels of the same function
# Tiles of more queries spill the logits out of the CPU's cache.
TILES = TilePolicy(large_queries=64, small_queries=1, chunk_tokens=1024)
# The reference copies keys and values before it multiplies: what sharing saves is the copy, however many the products.
COST = replace(CPU, flops_per_us=math.inf)


class KVTokens(NamedTuple):
    """KV tokens of a planned batch; requests without queries do not count.

    Attributes:
        logical: the lengths of all requests, summed: what a kernel reads that knows nothing of sharing.
        unique: distinct tokens among them.
        read: what the plan reads; less than ``unique`` only where a window hides tokens from everybody.
    """

    logical: int
    unique: int
    read: int


class _PagedWrapper:
    """What decode and prefill have in common: a batch is page tables and query ranges, decode one query a request."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, backend: str, **refused: Any) -> None:
        _refuse(**refused)
        if backend not in BACKENDS:
            raise NotImplementedError(f"backend {backend!r} is not supported: use one of {', '.join(BACKENDS)}")
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout must be NHD or HND, is {kv_layout!r}")
        _on_cpu(float_workspace_buffer=float_workspace_buffer)
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._packed: PackedReference | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    @property
    def kv_tokens(self) -> KVTokens:
        """What the planned batch holds and reads, see :class:`KVTokens`; an addition to FlashInfer's interface."""
        plan = self._planned().plan
        return KVTokens(plan.kv_tokens_logical, plan.kv_tokens_unique, plan.kv_tokens_read)

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Accepted for compatibility: on the CPU no workspace is used."""
        _on_cpu(float_workspace_buffer=float_workspace_buffer, int_workspace_buffer=int_workspace_buffer)

    def end_forward(self) -> None:
        """Does nothing, as in FlashInfer."""

    def _planned(self) -> PackedReference:
        if self._packed is None:
            raise RuntimeError(f"call {type(self).__name__}.plan() first")
        return self._packed

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
        q_data_type, kv_data_type, o_data_type = dtypes
        self._q_dtype = _dtype(q_data_type, "q_data_type")
        self._kv_dtype = self._q_dtype if kv_data_type is None else _dtype(kv_data_type, "kv_data_type")
        self._o_dtype = self._q_dtype if o_data_type is None else _dtype(o_data_type, "o_data_type")
        if min(qo_heads, kv_heads, head_dim, page_size) < 1 or qo_heads % kv_heads:
            raise ValueError(
                "num_qo_heads must be a multiple of num_kv_heads and all sizes at least 1: "
                f"num_qo_heads={qo_heads}, num_kv_heads={kv_heads}, head_dim={head_dim}, page_size={page_size}"
            )
        self._shape = AttentionShape(qo_heads, kv_heads, head_dim, self._kv_dtype.itemsize)
        self._page_size, self._sm_scale, self._soft_cap = page_size, sm_scale, logits_soft_cap

    def _set_batch(
        self,
        qo_indptr: Int32,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        seq_lens: torch.Tensor | None,
    ) -> None:
        self._packed = None  # a plan that fails leaves none behind
        self._qo_indptr = qo_indptr
        self._indptr, self._indices = _int32(indptr, "kv indptr"), _int32(indices, "kv indices")
        last = _int32(last_page_len, "kv last_page_len")
        _check_indptr(self._indptr, len(last), "kv indptr")
        _check_indptr(qo_indptr, len(last), "qo_indptr")
        if qo_indptr[0] != 0:
            raise ValueError(f"qo_indptr must begin at 0, begins at {qo_indptr[0]}")
        if len(self._indices) < self._indptr[-1]:
            raise ValueError(f"kv indptr ends at {self._indptr[-1]}, but there are {len(self._indices)} kv indices")
        self._indices = self._indices[: self._indptr[-1]]
        if (self._indices < 0).any():
            raise ValueError("kv indices must not be negative")
        if (last < 0).any() or (last > self._page_size).any():
            raise ValueError(f"kv last_page_len must be 0 to page_size ({self._page_size})")
        pages = np.diff(self._indptr)
        kv_lens = np.where(pages > 0, (pages - 1) * self._page_size + last, 0).astype(np.int32)
        _check_lens(seq_lens, kv_lens, "seq_lens")
        self._q_lens = np.diff(qo_indptr)
        # nobody reads the KV of a request without queries
        self._kv_lens = np.where(self._q_lens > 0, kv_lens, 0).astype(np.int32)

    def _build(self, causal: bool, window_left: int, mask: torch.Tensor | None = None) -> None:
        """Group the requests by equal pages and cut the batch into work items."""
        q_lens, kv_lens = self._q_lens, self._kv_lens
        row = np.repeat(np.arange(len(q_lens)), q_lens)
        nth = np.arange(len(row)) - self._qo_indptr[row]
        kv_len = kv_lens[row]
        self._causal, self._window_left, self._mask = causal, max(window_left, -1), None
        if mask is not None:
            cells = q_lens.astype(np.int64) * kv_lens
            if mask.numel() != cells.sum():
                raise ValueError(f"custom_mask has {mask.numel()} entries, the sum of qo_len * kv_len is {cells.sum()}")
            row_start = (np.cumsum(cells) - cells)[row] + nth * kv_len.astype(np.int64)
            self._mask, causal = MaskRows(mask, torch.from_numpy(row_start)), False
        limit, visible = kv_lens, None
        if causal or window_left >= 0:
            position = kv_len - q_lens[row] + nth  # of the query itself: the last query is the last token
            first = np.clip(position - window_left, 0, kv_len) if window_left >= 0 else np.zeros_like(kv_len)
            visible = (first, np.clip(position + 1, 0, kv_len) if causal else kv_len)
            limit = np.clip(kv_lens - q_lens + 1, 0, kv_lens) if causal else kv_lens

        shape = self._shape
        tree = PrefixTree.from_slots(self._indptr, self._indices, self._page_size, limit)
        # the queries of a request see the same KV, so the cost model may take them for heads of one
        mean_queries = max(1, -(-len(row) // max(np.count_nonzero(kv_lens), 1)))
        kept = prune(
            tree,
            replace(shape, qo_heads=shape.qo_heads * mean_queries),
            replace(COST, large_rows=TILES.large_queries * shape.group_size),
        )
        plan = make_plan(
            kept,
            kv_lens,
            TILES,
            kv_tokens_unique=tree.unique_tokens(kv_lens),
            qo_indptr=self._qo_indptr,
            visible=visible,
        )
        request, start, tokens, offset = plan.spans.T
        span = np.repeat(np.arange(len(tokens)), tokens)
        position = np.arange(plan.kv_capacity) - offset[span] + start[span]
        page = self._indices[self._indptr[request[span]] + position // self._page_size].astype(np.int64)
        slots = page * self._page_size + position % self._page_size
        self._pages_needed = int(page.max(initial=-1)) + 1
        self._packed = PackedReference(plan, token_bytes=shape.kv_heads * shape.head_dim * 4)
        # an item of an empty request at the end of the list points one entry beyond it
        self._packed.bind(torch.from_numpy(np.append(slots, slots[:1])))

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
        packed, shape = self._planned(), self._shape
        n_queries = int(self._qo_indptr[-1])
        _check_tensor(q, (n_queries, shape.qo_heads, shape.head_dim), self._q_dtype, "q")
        k, v = self._pages(paged_kv_cache)
        if lse_base not in ("log2", "ln") or lse_layout not in ("NH", "HN"):
            raise ValueError(f"lse_base must be log2 or ln, lse_layout NH or HN: {lse_base!r}, {lse_layout!r}")
        if out is None:
            out = torch.empty(q.shape, dtype=self._o_dtype)
        _check_tensor(out, tuple(q.shape), self._o_dtype, "out")
        if lse is not None:
            size = (n_queries, shape.qo_heads)
            _check_tensor(lse, size if lse_layout == "NH" else size[::-1], torch.float32, "lse")
        q_scale, k_scale, v_scale = (_number(s, f"{n}_scale") for n, s in zip("qkv", scales))
        if packed.plan.kv_capacity:
            sm_scale = 1 / math.sqrt(shape.head_dim) if self._sm_scale is None else self._sm_scale
            _, lse2 = packed.run(
                q,
                k,
                v,
                sm_scale=sm_scale * q_scale * k_scale,
                logits_soft_cap=self._soft_cap or 0.0,
                mask=self._mask,
                out=out,
            )
        else:  # not one token to read: no slot, not even for padding
            out.zero_()
            lse2 = torch.full((n_queries, shape.qo_heads), -math.inf)
        if v_scale != 1.0:
            out *= v_scale
        if lse is None and not return_lse:
            return out
        result = lse2 * math.log(2) if lse_base == "ln" else lse2
        if lse_layout == "HN":
            result = result.t().contiguous()
        if lse is not None:
            result = lse.copy_(result)
        return (out, result) if return_lse else out

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
            _check_tensor(x, size, self._kv_dtype, name)
            if x.shape[0] < self._pages_needed:
                raise ValueError(f"kv indices name page {self._pages_needed - 1}, the {name} has {x.shape[0]} pages")
        return k, v

    def _tokens_first(self, x: torch.Tensor, dims: int) -> torch.Tensor:
        if x.dim() == dims - 1:  # page size 1 without its dimension
            return x.unsqueeze(-3)
        if x.dim() != dims:
            raise ValueError(f"paged_kv_cache must have {dims} dimensions ({dims - 1} at page size 1), has {x.dim()}")
        return x if self._kv_layout == "NHD" else x.transpose(-3, -2)

    def _rebuild(self, causal: bool, window_left: int) -> None:
        """What FlashInfer's deprecated ``forward`` says wins over ``plan``."""
        self._planned()
        if (causal, max(window_left, -1)) != (self._causal, self._window_left):
            self._build(causal, window_left, self._mask.mask if self._mask else None)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """Decode attention of a batch of requests over a paged KV cache.

    Plan once per step, run once per layer. Requests whose page tables begin with the same pages share the KV there:
    :meth:`plan` finds that by itself, at any number of levels, and such a span is read once for all of them.

    The interface is FlashInfer's (0.6.15 to 0.7.2). An argument that is not supported raises ``NotImplementedError``
    naming it: position encoding, CUDA graphs and their buffers, JIT variants, sinks, FP8 and FP4, split control,
    block tables. Tensors are on the CPU; CUDA tensors come later and raise ``NotImplementedError`` until then. Page
    tables may lie on any device. Products, softmax and merging are float32.

    Parameters
    ----------
    float_workspace_buffer : torch.Tensor
        Tells the device; not written to.
    kv_layout : str
        Order of the dimensions of a page: ``NHD`` (page_size, num_kv_heads, head_dim) or ``HND``
        (num_kv_heads, page_size, head_dim).
    use_tensor_cores : bool
        Without effect: there is one implementation.
    backend : str
        ``auto``, ``fa2`` or ``fa3``, without effect.

    Examples
    --------
    Three requests with pages of 4 tokens; the first 128 pages are the same for all.

    >>> import torch
    >>> from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper
    >>> wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(0), "NHD")
    >>> prefix = list(range(128))
    >>> indices = torch.tensor(prefix + [128] + prefix + [129] + prefix + [130, 131], dtype=torch.int32)
    >>> indptr = torch.tensor([0, 129, 258, 388], dtype=torch.int32)
    >>> last_page_len = torch.tensor([1, 4, 2], dtype=torch.int32)
    >>> wrapper.plan(indptr, indices, last_page_len, 8, 2, 64, 4, q_data_type=torch.float32)
    >>> wrapper.kv_tokens
    KVTokens(logical=1547, unique=523, read=523)
    >>> q = torch.randn(3, 8, 64)
    >>> kv_cache = torch.randn(132, 2, 4, 2, 64)
    >>> out, lse = wrapper.run(q, kv_cache, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([3, 8, 64]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer,
            kv_layout,
            backend,
            use_cuda_graph=use_cuda_graph,
            paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            jit_args=jit_args,
        )
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Dtype | None = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype | None = None,
        data_type: Dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
    ) -> None:
        """Take in a batch: find what its requests share and cut the work into items.

        Parameters
        ----------
        indptr : torch.Tensor
            Range of each request in ``indices``, shape ``[batch_size + 1]``, int32. May be overwritten after the
            call, as may the other tensors.
        indices : torch.Tensor
            Page ids in position order, shape ``[indptr[-1]]`` or longer, int32.
        last_page_len : torch.Tensor
            Tokens in each request's last page, ``0`` to ``page_size``, shape ``[batch_size]``, int32. A request
            without pages has no KV: its output is 0 and its LSE ``-inf``.
        num_qo_heads, num_kv_heads, head_dim : int
            ``num_qo_heads`` is a multiple of ``num_kv_heads``; keys and values have the same ``head_dim``.
        page_size : int
            Tokens per page.
        window_left : int
            Each query sees the ``window_left`` tokens before its own, and its own; all if negative.
        logits_soft_cap : Optional[float]
            Cap ``c`` in ``c * tanh(logits / c)``; None or 0 for none.
        q_data_type, kv_data_type, o_data_type, data_type : str or torch.dtype
            float32, float16 or bfloat16. ``kv_data_type`` and ``o_data_type`` default to ``q_data_type``; the
            deprecated ``data_type`` stands for those of the first two that are None.
        sm_scale : Optional[float]
            Factor of the logits; None for ``1 / sqrt(head_dim)``.
        non_blocking : bool
            Without effect.
        seq_lens : Optional[torch.Tensor]
            KV tokens of each request, if given equal to what the page table says.
        q_len_per_req : int
            Queries per request: its last tokens.
        is_causal : Optional[bool]
            Whether a query sees no later token; None for ``q_len_per_req > 1``.

        Raises
        ------
        NotImplementedError
            An argument that is not supported, by name.
        ValueError
            Page tables, sizes or lengths that contradict each other.
        """
        _refuse(
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            block_tables=block_tables,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
            window_right=window_right or None,
        )
        dtypes = (q_data_type or data_type, kv_data_type or data_type, o_data_type)
        self._set_layer(num_qo_heads, num_kv_heads, head_dim, page_size, dtypes, sm_scale, logits_soft_cap)
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be at least 1, is {q_len_per_req}")
        qo_indptr = np.arange(len(last_page_len) + 1, dtype=np.int32) * np.int32(q_len_per_req)
        self._set_batch(qo_indptr, indptr, indices, last_page_len, seq_lens)
        self._q_len_per_req = q_len_per_req
        self._build(q_len_per_req > 1 if is_causal is None else is_causal, window_left)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: KVCache,
        *args: Any,
        q_scale: Scale | None = None,
        k_scale: Scale | None = None,
        v_scale: Scale | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: KVCache | None = None,
    ) -> Result:
        """Attention of the planned batch in one layer.

        Parameters
        ----------
        q : torch.Tensor
            Shape ``[batch_size * q_len_per_req, num_qo_heads, head_dim]``, of ``q_data_type``.
        paged_kv_cache : Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
            Keys and values, each ``[max_num_pages, page_size, num_kv_heads, head_dim]`` (``NHD``) or
            ``[max_num_pages, num_kv_heads, page_size, head_dim]`` (``HND``), or one tensor that holds both in an
            additional dimension 1. Any strides; never copied as a whole. Pages that no request names are not read.
        q_scale, k_scale, v_scale : Optional[Union[float, torch.Tensor]]
            One number each; the first two multiply the logits, the last one the output.
        out : Optional[torch.Tensor]
            Where to write the output, of q's shape and ``o_data_type``.
        lse : Optional[torch.Tensor]
            Where to write the log-sum-exp, shape ``[q.shape[0], num_qo_heads]``, float32.
        return_lse : bool
            Whether to return the log-sum-exp too.
        window_left, q_len_per_req : Optional[int]
            If given, as planned.

        Returns
        -------
        Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
            The output; with ``return_lse`` also the log-sum-exp of the logits in base 2. A query that sees no token
            has output 0 and log-sum-exp ``-inf``.
        """
        _refuse_run(
            args,
            enable_pdl=enable_pdl,
            sinks=sinks,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )
        self._check_as_planned(window_left)
        if q_len_per_req not in (None, self._q_len_per_req):
            raise ValueError(f"q_len_per_req is {q_len_per_req}, planned was {self._q_len_per_req}: plan again")
        return self._attend(q, paged_kv_cache, (q_scale, k_scale, v_scale), out, lse, return_lse)

    run_return_lse = partialmethod(run, return_lse=True)
