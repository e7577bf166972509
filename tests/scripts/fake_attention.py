"""FlashInfer's wrappers and sgl_kernel's FA3 in plain torch, for as far as the kernel benchmark calls them.

What a wrapper is given is bound to the signature of the installed FlashInfer, so that arguments which it does not
have fail here, too.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import torch


def attend(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], qo_indptr: torch.Tensor, pages: list[torch.Tensor],
    kv_lens: list[int], causal: bool, sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """[n, heads, dim] and the log-sum-exp [n, heads] in base e; the last query sees all of its request's KV."""
    outs, lses = [], []
    page_size, group = kv[0].shape[1], q.shape[1] // kv[0].shape[2]
    assert len(q) == qo_indptr[-1] and len(qo_indptr) == len(pages) + 1
    for (begin, end), ids, tokens in zip(pairwise(qo_indptr.tolist()), pages, kv_lens, strict=True):
        assert len(ids) == -(-tokens // page_size)
        slots = (ids.long()[:, None] * page_size + torch.arange(page_size)).flatten()[:tokens]
        keys, values = (x.flatten(0, 1)[slots].float().repeat_interleave(group, 1) for x in kv)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * sm_scale
        if causal:
            n = end - begin
            scores.masked_fill_(torch.arange(tokens) > torch.arange(n)[:, None] + tokens - n, -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def merge(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    assert all(x.is_contiguous() for x in (a, lse_a, b, lse_b)) and lse_a.shape == a.shape[:2] == lse_b.shape
    lse = torch.logaddexp(lse_a, lse_b)
    return a * (lse_a - lse).exp()[..., None] + b * (lse_b - lse).exp()[..., None], lse


def flash_attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, cache_seqlens: torch.Tensor,
    page_table: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool,
    num_splits: int, return_softmax_lse: bool = False, scheduler_metadata: dict[str, Any] | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    assert max_seqlen_q == cu_seqlens_q.diff().max() and num_splits in (0, 1)
    lens = cache_seqlens.tolist()
    if scheduler_metadata is not None:  # made for this call
        assert scheduler_metadata == {
            "batch_size": len(lens), "max_seqlen_q": max_seqlen_q, "num_heads": q.shape[1],
            "max_seqlen_k": page_table.shape[1] * k_cache.shape[1], "num_heads_k": k_cache.shape[2],
            "headdim": q.shape[2], "cache_seqlens": lens, "qkv_dtype": k_cache.dtype, "causal": causal,
            "cu_seqlens_q": cu_seqlens_q.tolist(), "page_size": k_cache.shape[1], "num_splits": num_splits,
        }  # fmt: skip
    pages = [row[: -(-n // k_cache.shape[1])] for row, n in zip(page_table, lens, strict=True)]
    out, lse = attend(q, (k_cache, v_cache), cu_seqlens_q, pages, lens, causal, softmax_scale)
    return (out, lse.T) if return_softmax_lse else out


def get_scheduler_metadata(**arguments: Any) -> dict[str, Any]:
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


class Wrapper:
    name: ClassVar[str]
    flashinfer: ClassVar[Any]  # the real one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made = self.bind("__init__", args, kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.planned = self.bind("plan", args, kwargs)

    def bind(self, method: str, args: tuple, kwargs: dict) -> dict[str, Any]:
        signature = inspect.signature(getattr(getattr(self.flashinfer, self.name), method))
        given = signature.bind(self, *args, **kwargs).arguments
        return {**given, **given.pop("kwargs", {})}

    def attend(self, q: torch.Tensor, kv: Any, names: str, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``names``: what the plan calls its query and page arrays."""
        qo_indptr, indptr, indices, last = (self.planned[name] for name in names.split())
        assert self.planned["q_data_type"] == self.planned["kv_data_type"] == q.dtype
        assert self.planned["page_size"] == kv[0].shape[1] and self.planned["num_qo_heads"] == q.shape[1]
        assert self.planned["num_kv_heads"] == kv[0].shape[2]
        counts = indptr.diff().tolist()
        if "last" in names:
            last = (torch.tensor(counts) - 1) * self.planned["page_size"] + last
        return attend(
            q, kv, qo_indptr, list(indices.split(counts)), last.tolist(), causal, self.planned["sm_scale"]
        )  # fmt: skip


class Decode(Wrapper):
    name = "BatchDecodeWithPagedKVCacheWrapper"

    def run(self, *args: Any, **kwargs: Any) -> None:
        run = self.bind("run", args, kwargs)
        self.planned["qo_indptr"] = torch.arange(len(run["q"]) + 1)
        names = "qo_indptr indptr indices last_page_len"
        run["out"].copy_(self.attend(run["q"], run["paged_kv_cache"], names, causal=True)[0])


class Prefill(Wrapper):
    name = "BatchPrefillWithPagedKVCacheWrapper"
    names = "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len"

    def run(self, *args: Any, **kwargs: Any) -> None:
        run = self.bind("run", args, kwargs)
        out, _ = self.attend(run["q"], run["paged_kv_cache"], self.names, self.planned["causal"])
        run["out"].copy_(out)


class Cascade(Wrapper):
    name = "MultiLevelCascadeAttentionWrapper"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batch_prefill_wrappers = [SimpleNamespace(_backend="auto") for _ in range(self.made["num_levels"])]

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        run, plan, results = self.bind("run", args, kwargs), self.planned, []
        assert len({level._backend for level in self._batch_prefill_wrappers} - {"auto"}) == 1
        levels = zip(*(plan[f"{name}_arr"] for name in Prefill.names.split()[:3]), plan["paged_kv_last_page_len"])
        for i, level in enumerate(levels):
            self.planned = {**plan, **dict(zip(Prefill.names.split(), level))}
            is_last = i == self.made["num_levels"] - 1
            results.append(
                self.attend(run["q"], run["paged_kv_cache"], Prefill.names, is_last and plan["causal"])
            )  # fmt: skip
        self.planned = plan
        out, lse = results.pop()
        for result in results:
            out, lse = merge(out, lse.contiguous(), result[0], result[1].contiguous())
        return out


class BatchAttention(Wrapper):
    name = "BatchAttention"

    def run(self, *args: Any, **kwargs: Any) -> None:
        run = self.bind("run", args, kwargs)
        names = "qo_indptr kv_indptr kv_indices kv_len_arr"
        out, lse = self.attend(run["q"], run["kv_cache"], names, self.planned["causal"])
        run["out"].copy_(out)
        run["lse"].copy_(lse)


class BatchPOD(Wrapper):
    name = "BatchPODWithPagedKVCacheWrapper"

    def run(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        run = self.bind("run", args, kwargs)
        names = "qo_indptr_{0} kv_indptr_{0} kv_indices_{0} last_page_len_{0}"
        return tuple(
            self.attend(run[f"q_{part}"], run[f"paged_kv_cache_{part}"], names.format(part), causal)[0]
            for part, causal in (("p", run["causal_p"]), ("d", False))
        )


WRAPPERS = (Decode, Prefill, Cascade, BatchAttention, BatchPOD)
