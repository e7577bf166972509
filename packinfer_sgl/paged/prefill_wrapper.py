"""Prefill attention over a paged KV cache, with FlashInfer's constructor, ``plan`` and ``run``."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import numpy as np
from torch import Tensor

from packinfer_sgl.paged.batch import KVCache, PagedWrapper, Result
from packinfer_sgl.paged.checks import Dtype, Scale, as_flags, as_int32, check_at_most, check_equal, refuse


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Prefill (append) attention of a batch of requests over a paged KV cache that holds the new tokens already.

    Sharing, the arguments that are refused, devices, precision and CUDA graphs are as for
    :class:`BatchDecodeWithPagedKVCacheWrapper`, and so are the constructor's parameters. The buffers for CUDA graphs
    are named ``..._buf`` here; ``qo_indptr_buf``, ``[batch_size + 1]``, is required, too.

    Examples
    --------
    Two requests with pages of 16 tokens share 8 pages and append 3 tokens and 1 token.

    >>> import torch
    >>> from packinfer_sgl import BatchPrefillWithPagedKVCacheWrapper
    >>> wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(0), "HND")
    >>> qo_indptr = torch.tensor([0, 3, 4], dtype=torch.int32)
    >>> indices = torch.tensor([*range(8), 8, *range(8), 9], dtype=torch.int32)
    >>> indptr = torch.tensor([0, 9, 18], dtype=torch.int32)
    >>> last_page_len = torch.tensor([3, 16], dtype=torch.int32)
    >>> wrapper.plan(
    ...     qo_indptr, indptr, indices, last_page_len, 4, 4, 128, 16, causal=True, q_data_type=torch.bfloat16
    ... )
    >>> wrapper.kv_tokens
    KVTokens(logical=275, unique=147, read=147)
    >>> q, kv_cache = torch.randn(4, 4, 128).bfloat16(), torch.randn(10, 2, 4, 16, 128).bfloat16()
    >>> wrapper.run(q, kv_cache).shape
    torch.Size([4, 4, 128])
    """

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None, paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None, paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None, mask_indptr_buf: Tensor | None = None, backend: str = "auto",
        jit_args: list[Any] | None = None, jit_kwargs: dict[str, Any] | None = None, variant_owns_mask: bool = False,
    ) -> None:  # fmt: skip
        refuse(
            custom_mask_buf=custom_mask_buf, mask_indptr_buf=mask_indptr_buf, jit_args=jit_args,
            jit_kwargs=jit_kwargs, variant_owns_mask=variant_owns_mask,
        )  # fmt: skip
        buffers = {
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
            "qo_indptr_buf": qo_indptr_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, backend, use_cuda_graph, buffers)

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None, packed_custom_mask: Tensor | None = None, causal: bool = False,
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: float | None = None,
        window_left: int = -1, logits_soft_cap: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, q_data_type: Dtype = "float16", kv_data_type: Dtype | None = None,
        o_data_type: Dtype | None = None, non_blocking: bool = True, prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None, token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None, seq_lens: Tensor | None = None, seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None, max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None, fixed_split_size: int | None = None, disable_split_kv: bool = False,
    ) -> None:  # fmt: skip
        """Take in a batch: find what its requests share, and cut the work into items.

        Parameters
        ----------
        qo_indptr : torch.Tensor
            Range of each request's queries, its last tokens, in ``q``, shape ``[batch_size + 1]``, int32.
        paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len : torch.Tensor
            The page tables, as ``indptr``, ``indices`` and ``last_page_len`` of
            :meth:`BatchDecodeWithPagedKVCacheWrapper.plan`.
        head_dim_vo : Optional[int]
            ``head_dim_qk``, if given.
        custom_mask : Optional[torch.Tensor]
            Which tokens each query sees: for each request and query a flag for each KV token, flattened, shape
            ``[sum(qo_len * kv_len)]``, bool. ``causal`` is then without effect, ``window_left`` holds.
        packed_custom_mask : Optional[torch.Tensor]
            The whole ``custom_mask`` with 8 flags to a byte, the first in the lowest bit, uint8. Wins over it.
        causal : bool
            Whether query ``i`` of a request sees the first ``kv_len - qo_len + i + 1`` tokens only.
        seq_lens, seq_lens_q : Optional[torch.Tensor]
            KV and query tokens of each request; must say what the tables say.
        max_token_per_sequence, max_sequence_kv : Optional[int]
            Bounds of query and KV tokens of a request; must hold, without effect otherwise.

        The others, and the errors, are those of :meth:`BatchDecodeWithPagedKVCacheWrapper.plan`.
        """
        self._kernels.check_masks(custom_mask=custom_mask, packed_custom_mask=packed_custom_mask)
        refuse(
            head_dim_vo=None if head_dim_vo == head_dim_qk else head_dim_vo,
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction, rope_scale=rope_scale, rope_theta=rope_theta,
            prefix_len_ptr=prefix_len_ptr, token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len or None, max_item_len_ptr=max_item_len_ptr,
            block_tables=block_tables, fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
        )  # fmt: skip
        dtypes = (q_data_type, kv_data_type, o_data_type)
        self._set_layer(num_qo_heads, num_kv_heads, head_dim_qk, page_size, dtypes, sm_scale, logits_soft_cap)
        kv_lens = self._set_batch(
            as_int32(qo_indptr, "qo_indptr"), paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        )
        q_lens = self._q_lens
        check_equal(seq_lens, kv_lens, "seq_lens")
        check_equal(seq_lens_q, q_lens, "seq_lens_q")
        check_at_most(max_token_per_sequence, q_lens, "max_token_per_sequence")
        check_at_most(max_sequence_kv, kv_lens, "max_sequence_kv")
        cells = int((q_lens.astype(np.int64) * kv_lens).sum())
        self._build(causal, window_left, as_flags(custom_mask, packed_custom_mask, cells, self.device))

    begin_forward = plan

    def run(
        self, q: Tensor, paged_kv_cache: KVCache, *args: Any, q_scale: Scale | None = None,
        k_scale: Scale | None = None, v_scale: Scale | None = None, out: Tensor | None = None,
        lse: Tensor | None = None, return_lse: bool = False, lse_base: str = "log2", lse_layout: str = "NH",
        enable_pdl: bool | None = None, window_left: int | None = None, sinks: Tensor | None = None,
        kv_cache_sf: KVCache | None = None, skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None, uses_spcompress: bool | None = None,
    ) -> Result:  # fmt: skip
        """Attention of the planned batch in one layer.

        Parameters
        ----------
        q : torch.Tensor
            Shape ``[qo_indptr[-1], num_qo_heads, head_dim]``.
        lse_base : str
            Base of the log-sum-exp: ``log2`` for 2 or ``ln`` for e.
        lse_layout : str
            ``NH``: the log-sum-exp has shape ``[qo_indptr[-1], num_qo_heads]``; ``HN``: its transpose.

        The others, and what is returned, are those of :meth:`BatchDecodeWithPagedKVCacheWrapper.run`.
        """
        refuse(
            kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax, uses_spcompress=uses_spcompress,
        )  # fmt: skip
        self._check_window(window_left)
        if lse_base not in ("log2", "ln") or lse_layout not in ("NH", "HN"):
            raise ValueError(f"lse_base must be log2 or ln, lse_layout NH or HN: {lse_base!r}, {lse_layout!r}")
        scales, sinks = (q_scale, k_scale, v_scale), self._sinks(args, sinks)
        return self._attend(q, paged_kv_cache, scales, out, lse, return_lse, lse_base, lse_layout, sinks)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self, q: Tensor, paged_kv_cache: KVCache, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, k_scale: Scale | None = None, v_scale: Scale | None = None,
        window_left: int = -1, logits_soft_cap: float | None = None, sm_scale: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None, *, return_lse: bool = False,
    ) -> Result:  # fmt: skip
        """Deprecated in favour of :meth:`run`: these arguments, and their defaults, replace what was planned."""
        refuse(
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        self._replan(causal, window_left, logits_soft_cap, sm_scale)
        return self._attend(q, paged_kv_cache, (None, k_scale, v_scale), None, None, return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)
