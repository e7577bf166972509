"""Decode attention over a paged KV cache, with FlashInfer's constructor, ``plan`` and ``run``."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import numpy as np
from torch import Tensor

from packinfer_sgl.paged.batch import KVCache, PagedWrapper, Result, check_sees_all
from packinfer_sgl.paged.checks import Dtype, Scale, check_equal, refuse
from packinfer_sgl.planning.fitting import UNCUT_TOKENS


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Decode attention of a batch of requests over a paged KV cache.

    Plan once per step, run once per layer. Requests whose page tables begin with the same pages share their KV
    there: :meth:`plan` finds that by itself, at any number of levels, and where it pays such a span is read once for
    all of them. :attr:`kv_tokens` tells how much is saved.

    The interface is that of FlashInfer 0.6.15 to 0.7.2. What is not supported raises ``NotImplementedError`` with the
    argument's name: position encoding, JIT variants, e5m2 and FP4, block tables, control of the KV split but where
    :meth:`plan` says so.

    On the CPU products, softmax and merging are float32. On CUDA Triton kernels run, for float16 or bfloat16 queries
    and KV of the same type or float8_e4m3fn, ``head_dim`` 64 or 128 with up to 32 query heads per KV head or 256 with
    16; queries, output, K and V need a contiguous last dimension, and K and V equal strides; custom masks with
    ``use_cuda_graph``, logits factors (``sm_scale`` with the scales) that are not above 0 and scales in GPU memory are
    refused. All tensors are on the wrapper's device, except that page tables may lie on any: :meth:`plan` reads them on
    the host, and uploads on the current stream. :meth:`run` never waits for the GPU.

    With ``use_cuda_graph`` a graph that captured :meth:`run` (after a first run, which compiles the kernels) replays
    whatever :meth:`plan` took in last. The batch size and the number of pages are bounded by the buffers, the number
    of queries by the first plan and the captured ``q``: plan the largest batch first. What a graph holds for good
    (heads, types, page size, factors, whether queries see all of their KV) must stay as in the first plan. Rows of
    ``q`` past the plan's queries come out as 0; their log-sum-exp is undefined.

    Parameters
    ----------
    float_workspace_buffer : torch.Tensor
        Tells the device, CPU or CUDA, nothing else; any size.
    kv_layout : str
        Order of dimensions in a page: ``NHD`` (page_size, num_kv_heads, head_dim) or ``HND`` (num_kv_heads,
        page_size, head_dim).
    use_cuda_graph : bool
        Whether plans must fit into buffers that stay where they are, so that a captured graph may read them; CUDA
        only. The first :meth:`plan` allocates them.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : Optional[torch.Tensor]
        With ``use_cuda_graph`` only, and then required: int32, contiguous, on the device, ``[batch_size + 1]``,
        ``[max_num_pages]`` and ``[batch_size]``. Each plan writes its page tables there.
    use_tensor_cores : bool
        Without effect: there is one implementation.
    backend : str
        ``auto``, ``fa2`` or ``fa3``; without effect, likewise.

    Examples
    --------
    Three requests and pages of 4 tokens; the first 128 pages are the same for all.

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
    >>> kv_cache = torch.randn(132, 2, 4, 2, 64)
    >>> out, lse = wrapper.run(torch.randn(3, 8, 64), kv_cache, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([3, 8, 64]), torch.Size([3, 8]))
    """

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None, paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto", jit_args: list[Any] | None = None,
    ) -> None:  # fmt: skip
        refuse(jit_args=jit_args)
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, backend, use_cuda_graph, buffers)
        self._use_tensor_cores = use_tensor_cores

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    @property
    def resolved_backend(self) -> str:
        """Not supported: FlashInfer's backends are its own."""
        raise NotImplementedError("resolved_backend is not supported by packinfer-sgl: it has one implementation")

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, pos_encoding_mode: str = "NONE", window_left: int = -1,
        logits_soft_cap: float | None = None, q_data_type: Dtype | None = "float16",
        kv_data_type: Dtype | None = None, o_data_type: Dtype | None = None, data_type: Dtype | None = None,
        sm_scale: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
        non_blocking: bool = True, block_tables: Tensor | None = None, seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None, disable_split_kv: bool = False, q_len_per_req: int = 1, *,
        window_right: int = 0, is_causal: bool | None = None,
    ) -> None:  # fmt: skip
        """Take in a batch: find what its requests share, and cut the work into items.

        Parameters
        ----------
        indptr : torch.Tensor
            Range of each request in ``indices``, shape ``[batch_size + 1]``, int32. This and the other tensors may be
            overwritten after the call.
        indices : torch.Tensor
            Page ids in position order, shape ``[indptr[-1]]`` or longer, int32.
        last_page_len : torch.Tensor
            Tokens in the last page of each request, 0 to ``page_size``, shape ``[batch_size]``, int32. A request
            without pages has no KV.
        num_qo_heads, num_kv_heads, head_dim : int
            The first is a multiple of the second; keys and values have the same ``head_dim``.
        page_size : int
            Tokens of a page.
        window_left : int
            A query sees this many tokens before its own, and its own; all tokens if negative.
        logits_soft_cap : Optional[float]
            Cap ``c`` in ``c * tanh(logits / c)``; None or 0 for none.
        q_data_type, kv_data_type, o_data_type, data_type : Optional[Union[str, torch.dtype]]
            float32 (on CUDA for the output only), float16 or bfloat16; those of KV and of the output default to the
            query's. The deprecated ``data_type`` stands for those of query and KV that are None.
        sm_scale : Optional[float]
            Factor of the logits, ``1 / sqrt(head_dim)`` if None.
        non_blocking : bool
            Without effect.
        seq_lens : Optional[torch.Tensor]
            KV tokens of each request; must say what the page tables say.
        fixed_split_size : Optional[int]
            Pages. The KV of each request is then cut at multiples of so many pages and summed in the order of
            positions, whatever else is in the batch: output and log-sum-exp of a query have the same bits alone, beside
            others, and in a group (read once up to a block's border), with and without ``use_cuda_graph``. They
            are other bits at another ``fixed_split_size`` or ``page_size``, and than FlashInfer's. On Hopper GPUs; of
            whole blocks of the kernel, 64 tokens (128 at ``head_dim`` 64; 32 for FP8 at 256); where each query sees
            all KV of its request. None, or not above 0: for speed.
        disable_split_kv : bool
            Likewise, with each request's KV in one piece, of which requests may still share the beginning.
        q_len_per_req : int
            Queries of each request: its last tokens.
        is_causal : Optional[bool]
            Whether a query does not see later ones; if None, when there are later ones.

        Raises
        ------
        NotImplementedError
            For an argument that is not supported, by name.
        ValueError
            For tables, sizes or lengths that contradict each other, and with ``use_cuda_graph`` for what does not fit
            the buffers or the first plan.
        """
        refuse(
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode, rope_scale=rope_scale,
            rope_theta=rope_theta, block_tables=block_tables, window_right=window_right or None,
        )  # fmt: skip
        if q_len_per_req < 1:
            raise ValueError(f"q_len_per_req must be at least 1, is {q_len_per_req}")
        dtypes = (q_data_type or data_type or "float16", kv_data_type or data_type, o_data_type)
        causal = q_len_per_req > 1 if is_causal is None else is_causal
        unit = UNCUT_TOKENS if disable_split_kv else min(max(fixed_split_size or 0, 0) * page_size, UNCUT_TOKENS)
        check_sees_all(not causal and window_left < 0, unit)
        self._set_layer(num_qo_heads, num_kv_heads, head_dim, page_size, dtypes, sm_scale, logits_soft_cap, unit)
        qo_indptr = np.arange(len(last_page_len) + 1, dtype=np.int32) * np.int32(q_len_per_req)
        check_equal(seq_lens, self._set_batch(qo_indptr, indptr, indices, last_page_len), "seq_lens")
        self._q_len_per_req = q_len_per_req
        self._build(causal, window_left)

    begin_forward = plan

    def run(
        self, q: Tensor, paged_kv_cache: KVCache, *args: Any, q_scale: Scale | None = None,
        k_scale: Scale | None = None, v_scale: Scale | None = None, out: Tensor | None = None,
        lse: Tensor | None = None, return_lse: bool = False, enable_pdl: bool | None = None,
        window_left: int | None = None, sinks: Tensor | None = None, q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None, kv_cache_sf: KVCache | None = None,
    ) -> Result:  # fmt: skip
        """Attention of the planned batch in one layer.

        Parameters
        ----------
        q : torch.Tensor
            Shape ``[batch_size * q_len_per_req, num_qo_heads, head_dim]``, a request's queries in order.
        paged_kv_cache : Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
            Keys and values, each ``[max_num_pages, page_size, num_kv_heads, head_dim]`` (``NHD``) or
            ``[max_num_pages, num_kv_heads, page_size, head_dim]`` (``HND``), or both in one tensor with an additional
            dimension 1 of size 2. Any strides; only the tokens that the page tables name are read.
        q_scale, k_scale, v_scale : Optional[Union[float, torch.Tensor]]
            One number each, not in GPU memory: the first two multiply the logits, the last the output. Of KV in
            float8_e4m3fn the last two are what it was divided by.
        out : Optional[torch.Tensor]
            Where to write the output: q's shape, ``o_data_type``.
        lse : Optional[torch.Tensor]
            Where to write the log-sum-exp: shape ``[q.shape[0], num_qo_heads]``, float32.
        return_lse : bool
            Whether to return the log-sum-exp, too.
        enable_pdl : Optional[bool]
            Without effect: kernels overlap with those before them where the GPU can.
        window_left, q_len_per_req : Optional[int]
            None, or what was planned.
        sinks : Optional[torch.Tensor]
            A logit of each query head, shape ``[num_qo_heads]``, float32, float16 or bfloat16: that of one more token,
            without a value, which every query sees. No scale and no cap applies to it; the log-sum-exp counts it.

        Returns
        -------
        Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
            The output; with ``return_lse`` also the log-sum-exp of the logits, in base 2. A query that sees no token
            has output 0 and log-sum-exp ``-inf``, or its sink.
        """
        refuse(
            args=args or None, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )  # fmt: skip
        self._check_window(window_left)
        if q_len_per_req not in (None, self._q_len_per_req):
            raise NotImplementedError(f"q_len_per_req={q_len_per_req} is not what was planned ({self._q_len_per_req})")
        planned = int(self._qo_indptr[-1])
        if q.dim() == 3 and (len(q) < planned or (len(q) > planned and not self.is_cuda_graph_enabled)):
            raise ValueError(
                f"q must be the {planned} queries that were planned, {len(self._q_lens)} requests with "
                f"q_len_per_req={self._q_len_per_req}, is {tuple(q.shape)}"
            )
        return self._attend(q, paged_kv_cache, (q_scale, k_scale, v_scale), out, lse, return_lse, sinks=sinks)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self, q: Tensor, paged_kv_cache: KVCache, pos_encoding_mode: str = "NONE", q_scale: Scale | None = None,
        k_scale: Scale | None = None, v_scale: Scale | None = None, window_left: int = -1,
        logits_soft_cap: float | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, *, return_lse: bool = False,
    ) -> Result:  # fmt: skip
        """Deprecated in favour of :meth:`run`: these arguments, and their defaults, replace what was planned."""
        refuse(
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode,
            rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        self._replan(self._causal, window_left, logits_soft_cap, sm_scale)
        return self._attend(q, paged_kv_cache, (q_scale, k_scale, v_scale), None, None, return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)
