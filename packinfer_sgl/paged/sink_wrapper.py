"""Attention with sinks by FlashInfer's own wrapper for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packinfer_sgl.paged.checks import Dtype, as_dtype, refuse
from packinfer_sgl.paged.prefill_wrapper import BatchPrefillWithPagedKVCacheWrapper


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """Prefill and decode attention with sinks: ``run(q, paged_kv_cache, sink, sm_scale)``.

    All else is as for :class:`BatchPrefillWithPagedKVCacheWrapper`, whose ``run`` takes ``sinks``, too.

    Parameters
    ----------
    q_data_type, kv_data_type : torch.dtype
        Must be those of each plan.
    head_dim_qk, head_dim_vo : int
        Equal, and those of each plan.
    window_left : int
        Negative if and only if that of each plan is.

    Examples
    --------
    >>> import torch
    >>> from packinfer_sgl import BatchAttentionWithAttentionSinkWrapper
    >>> wrapper = BatchAttentionWithAttentionSinkWrapper(torch.empty(0), head_dim_qk=64, head_dim_vo=64)
    >>> qo_indptr, indptr = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32)
    >>> indices, last_page_len = torch.tensor([0, 1, 0, 2], dtype=torch.int32), torch.tensor([3, 16], dtype=torch.int32)
    >>> wrapper.plan(qo_indptr, indptr, indices, last_page_len, 8, 1, 64, 16, causal=True, q_data_type="bfloat16")
    >>> q, kv_cache = torch.randn(2, 8, 64).bfloat16(), torch.randn(3, 2, 16, 1, 64).bfloat16()
    >>> wrapper.run(q, kv_cache, torch.zeros(8), 0.125).shape
    torch.Size([2, 8, 64])
    """

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None, paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None, paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None, mask_indptr_buf: Tensor | None = None, backend: str = "auto",
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype = torch.bfloat16, kv_data_type: torch.dtype = torch.bfloat16, head_dim_qk: int = 128,
        head_dim_vo: int = 128, window_left: int = -1,
    ) -> None:  # fmt: skip
        refuse(
            pos_encoding_mode=None if pos_encoding_mode == "NONE" else pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction,
            head_dim_vo=None if head_dim_vo == head_dim_qk else head_dim_vo,
        )  # fmt: skip
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf,
            paged_kv_indices_buf, paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip
        self._made_for = {
            "head_dim_qk": head_dim_qk, "q_data_type": as_dtype(q_data_type, "q_data_type"),
            "kv_data_type": as_dtype(kv_data_type, "kv_data_type"),
        }  # fmt: skip
        self._windowed = window_left >= 0

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
        refuse(logits_soft_cap=logits_soft_cap or None)  # FlashInfer's kernel for sinks has none
        super()._set_layer(qo_heads, kv_heads, head_dim, page_size, dtypes, sm_scale, logits_soft_cap)
        planned = {"head_dim_qk": head_dim, "q_data_type": self._q_dtype, "kv_data_type": self._kv_dtype}
        for name, value in planned.items():
            if value != self._made_for[name]:
                raise ValueError(f"{name}={value} is not what the wrapper was made for ({self._made_for[name]})")

    def _build(self, causal: bool, window_left: int, mask: torch.Tensor | None = None) -> None:
        if (window_left >= 0) != self._windowed:
            made_for = "a window" if self._windowed else "none"
            raise ValueError(f"window_left={window_left} is not what the wrapper was made for ({made_for})")
        super()._build(causal, window_left, mask)

    def _replan(self, causal: bool, window_left: int, logits_soft_cap: float | None, sm_scale: float | None) -> None:
        raise NotImplementedError("forward is not supported by packinfer-sgl with sinks: use run")

    def _sinks(self, args: tuple[Any, ...], sinks: Tensor | None) -> Tensor:
        """``args``: the sink, and the factor of the logits in place of what was planned."""
        refuse(sinks=sinks)
        if len(args) != 2 or not isinstance(args[0], Tensor):
            raise ValueError(f"run takes sink and sm_scale behind paged_kv_cache, {len(args)} arguments were given")
        self._set_logits(float(args[1]), None)
        sink: Tensor = args[0]
        return sink
