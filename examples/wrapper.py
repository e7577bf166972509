"""Without SGLang: a wrapper with FlashInfer's `plan` and `run`, which finds shared prefixes in the page tables.

python examples/wrapper.py
"""

from __future__ import annotations

import torch

from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper

REQUESTS, SHARED_PAGES, PAGE_TOKENS = 3, 128, 16
QO_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def main() -> None:
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # each request has the shared pages first, then one of its own with 1, 9 or 16 tokens
    shared = torch.arange(SHARED_PAGES, dtype=torch.int32)
    own = torch.arange(SHARED_PAGES, SHARED_PAGES + REQUESTS, dtype=torch.int32)
    indices = torch.cat([torch.cat([shared, page[None]]) for page in own])
    indptr = torch.arange(REQUESTS + 1, dtype=torch.int32) * (SHARED_PAGES + 1)
    last_page_len = torch.tensor([1, 9, 16], dtype=torch.int32)

    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(0))
    wrapper.plan(indptr, indices, last_page_len, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, q_data_type=torch.bfloat16)
    q = torch.randn(REQUESTS, QO_HEADS, HEAD_DIM).bfloat16()
    kv_cache = torch.randn(SHARED_PAGES + REQUESTS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM).bfloat16()
    out = wrapper.run(q, kv_cache)
    print(tuple(out.shape), wrapper.kv_tokens)  # KVTokens(logical=6170, unique=2074, read=2074)


if __name__ == "__main__":
    main()
