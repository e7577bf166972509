"""Random batches over a paged KV cache, and attention over them by brute force in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

# float32: the bound; half precision: those of FlashInfer's own tests
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
LSE_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}  # by the type of the products

# a cost model by which every span is worth a read of its own
FREE: Any = SimpleNamespace(
    prices=lambda shape, most: np.zeros((most + 1, 3)), partials_us=lambda shape: 0.0, least_saving=0.0
)
Wrapper = BatchDecodeWithPagedKVCacheWrapper | BatchPrefillWithPagedKVCacheWrapper


@dataclass(frozen=True)
class Batch:
    """Page tables, query counts and what the queries see; ``mask``: per request [qo_len, kv_len] bool."""

    page_size: int
    tables: list[list[int]]
    last_page_len: list[int]
    q_lens: list[int]
    causal: bool = False
    window_left: int = -1
    mask: list[torch.Tensor] | None = None
    decode: bool = False

    @property
    def kv_lens(self) -> list[int]:
        return [
            (len(table) - 1) * self.page_size + last if table else 0
            for table, last in zip(self.tables, self.last_page_len, strict=True)
        ]

    def tokens(self, row: int) -> list[tuple[int, int]]:
        """Page and offset of each KV token of a request."""
        return [divmod_page(self.tables[row], p, self.page_size) for p in range(self.kv_lens[row])]

    def sees(self, row: int) -> torch.Tensor:
        """[qo_len, kv_len] bool, with the comparisons of FlashInfer's kernels."""
        q_len, kv_len = self.q_lens[row], self.kv_lens[row]
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        seen = torch.ones(q_len, kv_len, dtype=torch.bool)
        if self.mask is not None:
            seen &= self.mask[row]
        elif self.causal:
            seen &= ~(j + q_len > kv_len + i)
        if self.window_left >= 0:
            seen &= j + q_len + self.window_left >= kv_len + i
        return seen

    def read_once(self) -> int:
        """Distinct tokens that some query sees."""
        return len(
            {
                token
                for row in range(len(self.tables))
                for token, seen in zip(self.tokens(row), self.sees(row).any(0).tolist(), strict=True)
                if seen
            }
        )


def divmod_page(table: list[int], position: int, page_size: int) -> tuple[int, int]:
    return table[position // page_size], position % page_size


@dataclass(frozen=True)
class Layer:
    """Heads, types and the KV cache of one layer."""

    qo_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    layout: str = "NHD"
    combined: bool = True
    q_dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    o_dtype: torch.dtype | None = None
    sm_scale: float | None = None
    soft_cap: float | None = None
    run: dict[str, Any] = field(default_factory=dict)
    sinks: torch.dtype | None = None
    cuda: bool = False  # for the CUDA kernels, in the interpreter without a GPU; they need a contiguous last dimension

    @property
    def device(self) -> str:
        return "cuda" if self.cuda and torch.cuda.is_available() else "cpu"


def random_batch(rng: random.Random, *, decode: bool, page_size: int = 0) -> Batch:
    """Requests that share page prefixes at several levels, some equal, some empty, lengths at all page edges."""
    page_size = page_size or rng.choice([1, 1, 2, 3, 4, 8, 16, 32, 64])
    most = max(1, 48 // page_size)
    tables: list[list[int]] = []
    last_page_len: list[int] = []
    pages = iter(rng.sample(range(8 * most + 3), 8 * most))
    for _ in range(rng.randint(1, 8)):
        table: list[int] = []
        if tables and rng.random() < 0.75:
            table = rng.choice(tables)
            if rng.random() < 0.7:
                table = table[: rng.randint(0, len(table))]
        if not table or rng.random() < 0.8:
            table = [*table, *(next(pages) for _ in range(rng.randint(0, most)))]
        tables.append(list(table))
        last_page_len.append(rng.choice([1, page_size, rng.randint(1, page_size)]))
    q_lens = [rng.choice([1, 1, 1, 2, 3])] * len(tables) if decode else [rng.randint(0, 7) for _ in tables]
    batch = Batch(page_size, tables, last_page_len, q_lens, decode=decode)
    if decode:
        batch = replace(batch, causal=q_lens[0] > 1)
    elif rng.random() < 0.6:
        batch = replace(batch, causal=True)
    if rng.random() < 0.35:
        batch = replace(batch, window_left=rng.choice([0, 1, 5, 20, 1000]))
    if not decode and rng.random() < 0.3:
        batch = replace(batch, mask=[random_mask(rng, *size) for size in zip(q_lens, batch.kv_lens, strict=True)])
    return batch


def random_mask(rng: random.Random, q_len: int, kv_len: int) -> torch.Tensor:
    density = rng.choice([0.05, 0.5, 0.95])
    mask = torch.tensor([rng.random() < density for _ in range(q_len * kv_len)], dtype=torch.bool).view(q_len, kv_len)
    if q_len:
        mask[rng.randrange(q_len)] = rng.random() < 0.5  # one query that sees everything or nothing
    return mask


def random_layer(rng: random.Random) -> Layer:
    kv_heads = rng.choice([1, 2, 3])
    return Layer(
        qo_heads=kv_heads * rng.choice([1, 1, 2, 3, 7]),
        kv_heads=kv_heads,
        head_dim=rng.choice([8, 16, 40, 64]),
        layout=rng.choice(["NHD", "HND"]),
        combined=rng.random() < 0.5,
        sm_scale=rng.choice([None, None, 0.3]),
        soft_cap=rng.choice([None, None, 0.0, 2.5]),
        run=rng.choice([{}, {}, {"q_scale": 1.5, "k_scale": torch.tensor(0.5), "v_scale": 2.0}]),
        sinks=rng.choice([None, None, torch.float32, torch.bfloat16]),
    )


def make_kv(batch: Batch, layer: Layer, seed: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Keys and values as [pages, page_size, kv_heads, head_dim], NaN wherever no request has a token; and as a cache.

    The cache's pages are views with gaps between elements or heads (separate) or between K and V (combined).
    """
    g = torch.Generator().manual_seed(seed)
    n_pages = max((page for table in batch.tables for page in table), default=0) + 1
    used = torch.zeros(n_pages, batch.page_size, dtype=torch.bool)
    for row in range(len(batch.tables)):
        for page, offset in batch.tokens(row):
            used[page, offset] = True
    shape = (n_pages, batch.page_size, layer.kv_heads, layer.head_dim)
    k, v = (torch.full(shape, math.nan, dtype=layer.kv_dtype) for _ in "kv")
    for x in (k, v):
        x[used] = torch.randn(int(used.sum()), *shape[2:], generator=g).to(layer.kv_dtype)
    on_device = [x.to(layer.device) for x in (k, v)]
    cache: Any = [x if layer.layout == "NHD" else x.transpose(1, 2).contiguous() for x in on_device]
    if layer.combined:
        cache = torch.stack(cache, 1)
        if batch.page_size == 1:
            cache = cache.squeeze(2 if layer.layout == "NHD" else 3)
    else:
        gap = -2 if layer.cuda else -1
        cache = tuple(torch.stack([x, torch.full_like(x, math.nan)], gap).select(gap, 0) for x in cache)
    return k, v, cache


def brute_force(
    batch: Batch, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and base-2 log-sum-exp in float64, request by request and head by head."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    scale = layer.head_dim**-0.5 if layer.sm_scale is None else layer.sm_scale
    scale *= float(layer.run.get("q_scale", 1)) * float(layer.run.get("k_scale", 1))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    if sinks is not None:
        sinks = sinks.double().cpu()
        lse[:] = sinks / math.log(2)
    first = 0
    for row, q_len in enumerate(batch.q_lens):
        if batch.kv_lens[row]:
            page, offset = torch.tensor(batch.tokens(row)).unbind(1)
            hidden = ~batch.sees(row)
            for head in range(layer.qo_heads):
                kv_head = head * layer.kv_heads // layer.qo_heads
                logits = q[first : first + q_len, head] @ k[page, offset, kv_head].T * scale
                if layer.soft_cap:
                    logits = layer.soft_cap * torch.tanh(logits / layer.soft_cap)
                logits[hidden] = -math.inf
                values = v[page, offset, kv_head]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head].expand(q_len, 1)], 1)
                    values = torch.cat([values, torch.zeros(1, layer.head_dim)])
                weight = torch.softmax(logits, -1).nan_to_num(0)  # a query that sees nothing
                out[first : first + q_len, head] = weight @ values
                lse[first : first + q_len, head] = torch.logsumexp(logits, -1) / math.log(2)
        first += q_len
    return out * layer.run.get("v_scale", 1), lse


def int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def indptr(lens: list[int]) -> torch.Tensor:
    return int32([sum(lens[:i]) for i in range(len(lens) + 1)])


def make_wrapper(batch: Batch, layer: Layer, wrapper: Wrapper | None = None, *, packed: bool = False) -> Wrapper:
    """A wrapper that has planned the batch; ``packed``: the mask in bits."""
    kv = (
        indptr([len(t) for t in batch.tables]),
        int32([page for table in batch.tables for page in table]),
        int32(batch.last_page_len),
    )
    kv = tuple(x.to(layer.device) for x in kv)
    heads = (layer.qo_heads, layer.kv_heads, layer.head_dim, batch.page_size)
    options: dict[str, Any] = {
        "window_left": batch.window_left,
        "logits_soft_cap": layer.soft_cap,
        "sm_scale": layer.sm_scale,
        "q_data_type": layer.q_dtype,
        "kv_data_type": layer.kv_dtype,
        "o_data_type": layer.o_dtype,
    }
    workspace = torch.empty(16, dtype=torch.uint8, device=layer.device)
    if batch.decode:
        wrapper = wrapper or BatchDecodeWithPagedKVCacheWrapper(workspace, layer.layout)
        wrapper.plan(*kv, *heads, q_len_per_req=batch.q_lens[0], **options)
        return wrapper
    if batch.mask is not None:
        mask = torch.cat([m.flatten() for m in batch.mask])
        if packed:
            bits = torch.cat([mask, torch.zeros(-len(mask) % 8, dtype=torch.bool)]).view(-1, 8)
            options["packed_custom_mask"] = (bits * 2 ** torch.arange(8)).sum(1).to(layer.device, torch.uint8)
        else:
            options["custom_mask"] = mask.to(layer.device)
    wrapper = wrapper or BatchPrefillWithPagedKVCacheWrapper(workspace, layer.layout)
    wrapper.plan(indptr(batch.q_lens), *kv, *heads, causal=batch.causal, **options)
    return wrapper


def make_q(batch: Batch, layer: Layer, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(batch.q_lens), layer.qo_heads, layer.head_dim, generator=g).to(layer.device, layer.q_dtype)


def tree_batch(page_size: int = 16, q_len: int = 1, **options: Any) -> Batch:
    """Two groups of four requests: 512 tokens shared by all, 512 by each group, tails of 3 pages and a bit."""
    per_level, tables = 512 // page_size, []
    for row in range(8):
        tail = range((3 + row) * per_level, (3 + row) * per_level + 3)
        group = range((1 + row // 4) * per_level, (2 + row // 4) * per_level)
        tables.append([*range(per_level), *group, *tail])
    return Batch(page_size, tables, [1 + row % page_size for row in range(8)], [q_len] * 8, **options)


EDGES = {
    "no requests": Batch(4, [], [], []),
    "no KV at all": Batch(4, [[], []], [0, 4], [2, 1]),
    "no queries at all": Batch(4, [[1], [1, 2]], [3, 1], [0, 0]),
    "no KV at the end of the batch": Batch(4, [[1], []], [3, 4], [1, 2], causal=True),
    "fewer tokens than queries": Batch(4, [[1], [1]], [3, 2], [5, 70], causal=True),
    "last page of length 0": Batch(4, [[1, 2], [1, 3]], [0, 4], [1, 1]),
    "equal requests": Batch(4, [[5, 6]] * 3, [2] * 3, [2] * 3, causal=True),
    "one request ends inside the other's page": Batch(8, [[1, 2], [1, 2, 3]], [5, 1], [1, 1], decode=True),
    "a request is the other's prefix": Batch(2, [[1, 2], [1, 2, 3]], [2, 2], [1, 1], decode=True),
    "a window that ends before the shared pages": Batch(1, [[1, 2, 3, 4], [1, 2, 7, 8]], [1, 1], [1, 1], window_left=0),
    "masks that see nothing": Batch(
        4, [[1, 2], [1, 3]], [4, 1], [2, 3], mask=[torch.zeros(2, 8).bool(), torch.zeros(3, 5).bool()]
    ),
    "masks and a window": Batch(
        4, [[1, 2], [1, 3]], [4, 1], [2, 3], mask=[torch.ones(2, 8).bool(), torch.ones(3, 5).bool()], window_left=2
    ),
}


def check(batch: Batch, layer: Layer, seed: int, planned: Wrapper | None = None, packed: bool = False) -> None:
    q = make_q(batch, layer, seed)
    k, v, cache = make_kv(batch, layer, seed)
    planned = make_wrapper(batch, layer, planned, packed=packed)
    sinks = None
    if layer.sinks is not None:
        sinks = 2 + 2 * torch.randn(layer.qo_heads, generator=torch.Generator().manual_seed(seed))
        sinks = sinks.to(layer.device, layer.sinks)
    expected, expected_lse = brute_force(batch, layer, q, k, v, sinks)
    out, lse = planned.run(q, cache, return_lse=True, sinks=sinks, **layer.run)
    assert out.dtype == (layer.o_dtype or layer.q_dtype) and lse.dtype == torch.float32
    bound = TOLERANCES[out.dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=bound, atol=bound)
    bound = LSE_TOLERANCES[layer.q_dtype if layer.cuda else torch.float32]  # the reference multiplies in float32
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=bound, atol=bound)
    # counted independently; a token is its page and offset, and in these batches a page has one position in all tables
    asking = [row for row, q_len in enumerate(batch.q_lens) if q_len]
    assert planned.kv_tokens.logical == sum(batch.kv_lens[row] for row in asking)
    assert planned.kv_tokens.unique == len({token for row in asking for token in batch.tokens(row)})
    assert planned.kv_tokens.read >= batch.read_once()
