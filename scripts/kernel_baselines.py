"""What SGLang users run today, as calls over the inputs of scripts/bench_kernels.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from kernel_workloads import HEAD_DIM, Inputs

Method = tuple[Callable[[int], object], list]  # call(copy), and the outputs of each copy


def i32(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32).cuda()


def fa3(x: Inputs, page_size: int) -> Method:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    table, lens, cu = x.table(page_size), i32(work.kv_lens), i32(np.arange(len(x.rows) + 1))
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        outs[i] = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=lens, page_table=table, cu_seqlens_q=cu, max_seqlen_q=1,
            softmax_scale=x.sm_scale, causal=True, num_splits=0,
        )  # fmt: skip

    return call, outs


def fa3_twice(x: Inputs, page_size: int) -> Method:
    """A cascade by hand over the first level: FA3 on the prefix, FA3 on the rest, merge_state_v2."""
    from sgl_kernel import merge_state_v2
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    n_nodes, n = len(work.node_tokens), len(x.rows)
    roots = list(dict.fromkeys(path[0] for path in work.paths))
    rest = [[*(x.spans[i] for i in path[1:]), x.spans[n_nodes + r]] for r, path in enumerate(work.paths)]
    under = [sum(path[0] == root for path in work.paths) for root in roots]
    top_table, rest_table = x.table(page_size, [[x.spans[i]] for i in roots]), x.table(page_size, rest)
    top_lens, rest_lens = i32([work.node_tokens[i] for i in roots]), i32([sum(map(len, row)) for row in rest])
    top_cu, rest_cu = i32(np.cumsum([0, *under])), i32(np.arange(n + 1))
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        common = {"softmax_scale": x.sm_scale, "num_splits": 0, "return_softmax_lse": True}
        a, lse_a, *_ = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=top_lens, page_table=top_table, cu_seqlens_q=top_cu,
            max_seqlen_q=max(under), causal=False, **common,
        )  # fmt: skip
        b, lse_b, *_ = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=rest_lens, page_table=rest_table, cu_seqlens_q=rest_cu,
            max_seqlen_q=1, causal=True, **common,
        )  # fmt: skip
        outs[i] = merge_state_v2(a, lse_a.T.contiguous(), b, lse_b.T.contiguous())[0]

    return call, outs


def workspace() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def flashinfer_decode(x: Inputs, page_size: int) -> Method:
    import flashinfer

    work = x.work
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=True)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(*x.paged(page_size), work.qo_heads, work.kv_heads, HEAD_DIM, page_size, sm_scale=x.sm_scale, **dtypes)
    outs = [torch.empty_like(q) for q in x.q]
    return (lambda i: wrapper.run(x.q[i], x.caches(i, page_size), out=outs[i])), outs


def flashinfer_cascade(x: Inputs, page_size: int, backend: str) -> Method:
    import flashinfer

    work = x.work
    n_nodes, depth = len(work.node_tokens), len(work.paths[0])
    levels = []  # of each level: (queries under each node, its spans)
    for level in range(depth):
        nodes = list(dict.fromkeys(path[level] for path in work.paths))
        levels.append(([sum(p[level] == i for p in work.paths) for i in nodes], [[x.spans[i]] for i in nodes]))
    levels.append(([1] * len(x.rows), [[x.spans[n_nodes + r]] for r in range(len(x.rows))]))
    tables = [x.paged(page_size, spans) for _, spans in levels]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(depth + 1, workspace(), "NHD")
    for level_wrapper in wrapper._batch_prefill_wrappers:
        level_wrapper._backend = backend
    wrapper.plan(
        [i32(np.cumsum([0, *under])) for under, _ in levels], *(list(t) for t in zip(*tables)),
        work.qo_heads, work.kv_heads, HEAD_DIM, page_size,
        causal=True, sm_scale=x.sm_scale, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
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
    logits = torch.empty(n, work.qo_heads, splits, HEAD_DIM, dtype=torch.float32, device="cuda")
    lse = torch.empty(n, work.qo_heads, splits, dtype=torch.float32, device="cuda")
    kv_splits = torch.full((n,), splits, dtype=torch.int32, device="cuda")

    def call(i: int) -> None:
        decode_attention_fwd(
            x.q[i], x.k[i], x.v[i], outs[i], indptr, indices, logits, lse, kv_splits, splits, x.sm_scale, 1.0, 1.0
        )

    return call, outs


def baselines(x: Inputs, families: set[str]) -> dict[str, Callable[[], Method]]:
    shared = bool(x.work.node_tokens)
    even = x.contiguous and all(t % 64 == 0 for t in x.work.node_tokens)
    methods: dict[str, Callable[[], Method]] = {}
    if "fa3" in families:
        for page_size in (1, 64) if even else (1,):
            methods[f"fa3 page {page_size}"] = lambda p=page_size: fa3(x, p)
            if shared:
                methods[f"fa3 twice page {page_size}"] = lambda p=page_size: fa3_twice(x, p)
    for page_size in (1, 16) if even else (1,):
        if "fi" in families:
            methods[f"flashinfer page {page_size}"] = lambda p=page_size: flashinfer_decode(x, p)
        if "cascade" in families and shared:
            for backend in ("fa2", "fa3"):
                name = f"cascade {backend} page {page_size}"
                methods[name] = lambda p=page_size, b=backend: flashinfer_cascade(x, p, b)
    if "triton" in families:
        methods["sglang triton"] = lambda: sglang_triton(x, 1)
    return methods
