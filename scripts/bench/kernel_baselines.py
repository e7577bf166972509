"""What SGLang users run today, as calls over the inputs of scripts/bench_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from bench.kernel_inputs import Inputs

# call(copy), and the output of each copy: a tensor, or several that follow each other
Method = tuple[Callable[[int], object], list]


def dtypes(x: Inputs) -> dict[str, torch.dtype]:
    return {"q_data_type": torch.bfloat16, "kv_data_type": x.k[0].dtype}


def fa3_arguments(x: Inputs, rows: int, sinks: bool = True) -> dict[str, object]:
    """As SGLang gives them: with FP8 KV queries are rounded to FP8, too (``fa3_query``), and scales go with them."""
    more: dict[str, object] = {"sinks": x.sinks} if sinks and x.sinks is not None else {}
    if x.work.soft_cap:
        more["softcap"] = x.work.soft_cap
    if x.work.fp8:
        ones = torch.ones(rows, x.work.kv_heads, device=x.device)
        more |= {"k_descale": ones, "v_descale": ones}
    return more


def fa3_query(x: Inputs, q: torch.Tensor) -> torch.Tensor:
    return q.to(x.k[0].dtype) if x.work.fp8 else q


def fa3_schedule(
    x: Inputs, table: torch.Tensor, lens: torch.Tensor, cu: torch.Tensor, page_size: int, queries: int, causal: bool,
    splits: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """FA3's schedule of a decode batch, which SGLang computes once for all layers; it does not for other batches.

    Args:
        table, lens, cu: what the call gets as page table, ``cache_seqlens`` and ``cu_seqlens_q``.
        queries: most of a row of ``table``.
    """
    from sgl_kernel.flash_attn import get_scheduler_metadata

    if x.work.kind != "decode":
        return {}
    schedule = get_scheduler_metadata(
        batch_size=len(lens), max_seqlen_q=queries, max_seqlen_k=table.shape[1] * page_size,
        num_heads=x.work.qo_heads, num_heads_k=x.work.kv_heads, headdim=x.work.head_dim, cache_seqlens=lens,
        qkv_dtype=x.k[0].dtype, cu_seqlens_q=cu, page_size=page_size, causal=causal, num_splits=splits,
    )  # fmt: skip
    return {"scheduler_metadata": schedule}


def fa3(x: Inputs, page_size: int, splits: int = 0) -> Method:
    """``splits``: of KV; 0 for as many as FA3 chooses."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    table, lens, cu = x.table(page_size), x.i32(work.kv_lens), x.i32(work.qo_indptr)
    outs: list = [None] * x.copies
    more = fa3_arguments(x, len(work.new))
    more |= fa3_schedule(x, table, lens, cu, page_size, max(work.new), True, splits)

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        outs[i] = flash_attn_with_kvcache(
            fa3_query(x, x.q[i]), k, v, cache_seqlens=lens, page_table=table, cu_seqlens_q=cu,
            max_seqlen_q=max(work.new), softmax_scale=x.sm_scale, causal=True, num_splits=splits, **more,
        )  # fmt: skip

    return call, outs


def fa3_twice(x: Inputs, page_size: int) -> Method:
    """A cascade by hand over the first level: FA3 on the prefix, FA3 on the rest, merge_state_v2."""
    from sgl_kernel import merge_state_v2
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    n_nodes = len(work.node_tokens)
    sharers = [r for r, path in enumerate(work.paths) if path]
    assert sharers == list(range(sharers[0], sharers[-1] + 1)), "those with a prefix must be neighbours"
    begin, end = work.qo_indptr[[sharers[0], sharers[-1] + 1]].tolist()
    roots = list(dict.fromkeys(work.paths[r][0] for r in sharers))
    rest = [[*(x.spans[i] for i in path[1:]), x.spans[n_nodes + r]] for r, path in enumerate(work.paths)]
    under = [sum(work.new[r] for r in sharers if work.paths[r][0] == root) for root in roots]
    top_table, rest_table = x.table(page_size, [[x.spans[i]] for i in roots]), x.table(page_size, rest)
    top_lens, rest_lens = x.i32([work.node_tokens[i] for i in roots]), x.i32([sum(map(len, row)) for row in rest])
    top_cu, rest_cu = x.i32(np.cumsum([0, *under])), x.i32(work.qo_indptr)
    outs: list = [None] * x.copies
    top_more, rest_more = fa3_arguments(x, len(roots), sinks=False), fa3_arguments(x, len(work.new))
    top_more |= fa3_schedule(x, top_table, top_lens, top_cu, page_size, max(under), False, 0)
    rest_more |= fa3_schedule(x, rest_table, rest_lens, rest_cu, page_size, max(work.new), True, 0)

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        q = fa3_query(x, x.q[i])
        common = {"softmax_scale": x.sm_scale, "num_splits": 0, "return_softmax_lse": True}
        a, lse_a, *_ = flash_attn_with_kvcache(
            q[begin:end], k, v, cache_seqlens=top_lens, page_table=top_table, cu_seqlens_q=top_cu,
            max_seqlen_q=max(under), causal=False, **common, **top_more,
        )  # fmt: skip
        b, lse_b, *_ = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=rest_lens, page_table=rest_table, cu_seqlens_q=rest_cu,
            max_seqlen_q=max(work.new), causal=True, **common, **rest_more,
        )  # fmt: skip
        both, _ = merge_state_v2(a, lse_a.T.contiguous(), b[begin:end], lse_b[:, begin:end].T.contiguous())
        outs[i] = b[:begin], both, b[end:]

    return call, outs


def workspace(x: Inputs) -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device=x.device)


def flashinfer_decode(x: Inputs, page_size: int, split_tokens: int = 0) -> Method:
    """``split_tokens``: of a KV split; 0 for as FlashInfer chooses."""
    import flashinfer

    work = x.work
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(x), "NHD", use_tensor_cores=True)
    wrapper.plan(
        *x.paged(page_size), work.qo_heads, work.kv_heads, work.head_dim, page_size, sm_scale=x.sm_scale,
        fixed_split_size=split_tokens // page_size or None, **dtypes(x),
    )  # fmt: skip
    outs = [torch.empty_like(q) for q in x.q]
    return (lambda i: wrapper.run(x.q[i], x.caches(i, page_size), out=outs[i])), outs


def flashinfer_prefill(x: Inputs, page_size: int, backend: str) -> Method:
    import flashinfer

    work = x.work
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(x), "NHD", backend=backend)
    wrapper.plan(
        x.i32(work.qo_indptr), *x.paged(page_size), work.qo_heads, work.kv_heads, work.head_dim, page_size,
        causal=True, sm_scale=x.sm_scale, **dtypes(x),
    )  # fmt: skip
    outs = [torch.empty_like(q) for q in x.q]
    return (lambda i: wrapper.run(x.q[i], x.caches(i, page_size), out=outs[i])), outs


def flashinfer_batch_attention(x: Inputs, page_size: int) -> Method:
    """All requests in one persistent launch."""
    import flashinfer

    work = x.work
    indptr, indices, _ = x.paged(page_size)
    wrapper = flashinfer.BatchAttention("NHD", x.device)
    wrapper.plan(
        x.i32(work.qo_indptr), indptr, indices, x.i32(work.kv_lens), work.qo_heads, work.kv_heads, work.head_dim,
        work.head_dim, page_size, causal=True, sm_scale=x.sm_scale, **dtypes(x),
    )  # fmt: skip
    outs = [torch.empty_like(q) for q in x.q]
    lse = torch.empty(x.q[0].shape[:2], dtype=torch.float32, device=x.device)
    return (lambda i: wrapper.run(x.q[i], x.caches(i, page_size), out=outs[i], lse=lse)), outs


def flashinfer_pod(x: Inputs, page_size: int) -> Method:
    """Prompts and decodes side by side on each multiprocessor."""
    import flashinfer

    work = x.work
    n = len(work.new) - work.new.count(1)
    assert set(work.new[n:]) == {1}, "decodes must come last"
    cut, rows = int(work.qo_indptr[n]), [[row] for row in x.rows]
    wrapper = flashinfer.BatchPODWithPagedKVCacheWrapper(workspace(x), "NHD")
    wrapper.plan(
        x.i32(work.qo_indptr[: n + 1]), *x.paged(page_size, rows[:n]),
        x.i32(work.qo_indptr[n:] - cut), *x.paged(page_size, rows[n:]),
        work.qo_heads, work.kv_heads, work.head_dim, page_size, sm_scale=x.sm_scale, **dtypes(x),
    )  # fmt: skip
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        kv = x.caches(i, page_size)
        outs[i] = wrapper.run(x.q[i][:cut], kv, x.q[i][cut:], kv, causal_p=True)

    return call, outs


def flashinfer_cascade(x: Inputs, page_size: int, backend: str) -> Method:
    import flashinfer

    work = x.work
    n_nodes, depth = len(work.node_tokens), len(work.paths[0])
    levels: list[tuple[list[int], list]] = []  # of each level: (queries under each node, its spans)
    for level in range(depth):
        under: dict[int, int] = {}
        for path, new in zip(work.paths, work.new):
            under[path[level]] = under.get(path[level], 0) + new
        levels.append((list(under.values()), [[x.spans[i]] for i in under]))
    levels.append((work.new, [[x.spans[n_nodes + r]] for r in range(len(x.rows))]))
    tables = [x.paged(page_size, spans) for _, spans in levels]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(depth + 1, workspace(x), "NHD")
    for level_wrapper in wrapper._batch_prefill_wrappers:
        level_wrapper._backend = backend
    wrapper.plan(
        [x.i32(np.cumsum([0, *queries])) for queries, _ in levels], *(list(t) for t in zip(*tables)),
        work.qo_heads, work.kv_heads, work.head_dim, page_size,
        causal=True, sm_scale=x.sm_scale, **dtypes(x),
    )  # fmt: skip
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        outs[i] = wrapper.run(x.q[i], x.caches(i, page_size))

    return call, outs


def sglang_triton(x: Inputs, page_size: int) -> Method:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    work, n, splits = x.work, len(x.rows), 8
    indptr, indices, _ = x.paged(1)
    outs = [torch.empty_like(q) for q in x.q]
    logits = torch.empty(n, work.qo_heads, splits, work.head_dim, dtype=torch.float32, device=x.device)
    lse = torch.empty(n, work.qo_heads, splits, dtype=torch.float32, device=x.device)
    kv_splits = torch.full((n,), splits, dtype=torch.int32, device=x.device)

    def call(i: int) -> None:
        decode_attention_fwd(
            x.q[i], x.k[i], x.v[i], outs[i], indptr, indices, logits, lse, kv_splits, splits, x.sm_scale, 1.0, 1.0
        )

    return call, outs


def in_whole_pages(x: Inputs) -> bool:
    """Whether what is shared lies in whole pages of up to 64 tokens."""
    return x.contiguous and all(tokens % 64 == 0 for tokens in x.work.node_tokens)


def in_fixed_splits(x: Inputs, families: set[str], unit_tokens: int) -> dict[str, Callable[[], Method]]:
    """Decode whose bits do not depend on the batch: FA3 as SGLang's deterministic mode runs it, and FlashInfer with
    splits of ``unit_tokens``."""
    methods: dict[str, Callable[[], Method]] = {}
    for page_size in (1, 64) if in_whole_pages(x) else (1,):
        if "fa3" in families:
            methods[f"fa3 page {page_size}, one split"] = lambda p=page_size: fa3(x, p, splits=1)
        if "fi" in families and not x.work.sinks:
            name = f"flashinfer page {page_size}, splits of {unit_tokens}"
            methods[name] = lambda p=page_size: flashinfer_decode(x, p, unit_tokens)
    return methods


def baselines(x: Inputs, families: set[str]) -> dict[str, Callable[[], Method]]:
    work = x.work
    shared, decode = bool(work.node_tokens), work.kind == "decode"
    levels = {len(path) for path in work.paths}
    even = in_whole_pages(x)
    methods: dict[str, Callable[[], Method]] = {}
    if work.sinks:
        families = families & {"fa3"}  # the others' wrappers know no sinks
    if "fa3" in families:
        for page_size in (1, 64) if even else (1,):
            methods[f"fa3 page {page_size}"] = lambda p=page_size: fa3(x, p)
            if shared:
                methods[f"fa3 twice page {page_size}"] = lambda p=page_size: fa3_twice(x, p)
    for page_size in (1, 16) if even else (1,):
        if "fi" in families and decode:
            methods[f"flashinfer page {page_size}"] = lambda p=page_size: flashinfer_decode(x, p)
        for backend in ("fa2", "fa3"):
            if "fi" in families and not decode:
                name = f"prefill {backend} page {page_size}"
                methods[name] = lambda p=page_size, b=backend: flashinfer_prefill(x, p, b)
            if "cascade" in families and shared and len(levels) == 1:
                name = f"cascade {backend} page {page_size}"
                methods[name] = lambda p=page_size, b=backend: flashinfer_cascade(x, p, b)
        if "batch" in families and not decode:
            methods[f"batch attention page {page_size}"] = lambda p=page_size: flashinfer_batch_attention(x, p)
        if "pod" in families and work.kind == "mixed":
            methods[f"pod page {page_size}"] = lambda p=page_size: flashinfer_pod(x, p)
    if "triton" in families and decode:
        methods["sglang triton"] = lambda: sglang_triton(x, 1)
    return methods
