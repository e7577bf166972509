"""Extend batches: who runs them, and what comes out, over a table of slots like SGLang's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Rows, attention64, kv_pool, pool_size, radix_rows, shared_spans, tree_of

from packinfer_sgl.cpu_extend import CpuExtend
from packinfer_sgl.cuda_extend import CudaExtend
from packinfer_sgl.groups import AttentionShape
from packinfer_sgl.metrics import Stats
from packinfer_sgl.prefix_tree import PrefixTree

SHAPE = AttentionShape(qo_heads=4, kv_heads=2, head_dim=64, kv_bytes=4)


@dataclass
class Batch:
    """Rows of slots, of which the last ``q_lens`` are new; the radix tree owns all others."""

    rows: Rows
    q_lens: list[int]
    caches_paths: bool = True

    @property
    def cached(self) -> list[int]:
        return [len(row) - n for row, n in zip(self.rows, self.q_lens, strict=True)]

    def prefix_tree(self) -> PrefixTree | None:
        return tree_of(self.rows, self.cached) if self.caches_paths else None

    def arguments(self) -> tuple:
        """Of ``step``; each request's row lies elsewhere in the table than in the batch."""
        kv_lens = np.array([len(row) for row in self.rows], np.int32)
        return self, torch.arange(len(self.rows)).flip(0), np.array(self.q_lens, np.int32), kv_lens

    def table(self) -> torch.Tensor:
        table = torch.full((len(self.rows), max(map(len, self.rows))), -1, dtype=torch.int32)
        for line, row in zip(table, reversed(self.rows), strict=True):
            line[: len(row)] = torch.tensor(row)
        return table

    def seen(self) -> list[list[int]]:
        """Slots that each new token sees."""
        return [
            row[: end + 1] for row, first in zip(self.rows, self.cached, strict=True) for end in range(first, len(row))
        ]


@st.composite
def batches(draw: st.DrawFn, max_own: int = 40) -> Batch:
    rows = draw(radix_rows(max_rows=6, max_own=max_own))
    rows = [[*row, pool_size(rows) + i] for i, row in enumerate(rows)]  # SGLang computes at least one token
    most = [len(row) for row in rows]
    for members, _, end in shared_spans(rows):  # what is shared is cached
        for r in members:
            most[r] = min(most[r], len(rows[r]) - end)
    return Batch(rows, [draw(st.integers(1, n)) for n in most], draw(st.booleans()))


def attend(extend: CpuExtend | CudaExtend, batch: Batch, dtype: torch.dtype) -> float:
    """Largest error against brute force."""
    used = sorted({slot for row in batch.rows for slot in row})
    k, v = (x.to(dtype) for x in kv_pool(used[-1] + 9, used, SHAPE.kv_heads, SHAPE.head_dim, 0))
    q = torch.randn(sum(batch.q_lens), SHAPE.qo_heads, SHAPE.head_dim, generator=torch.Generator().manual_seed(1))
    q = q.to(dtype)
    kv_lens = torch.tensor([len(row) for row in batch.rows])
    out = extend.run(q, k, v, kv_lens, sm_scale=0.2, logits_soft_cap=0.0)
    return float((out - attention64(q, k, v, batch.seen(), 0.2)[0]).abs().max())


def on_cpu(batch: Batch, stats: Stats, **more: bool) -> CpuExtend:
    settings_ = {"grouping": "multi", "verify": True, "always": True, **more}
    return CpuExtend(SHAPE, req_to_token=batch.table(), stats=stats, **settings_)


@settings(max_examples=200)
@given(batches())
def test_equals_brute_force(batch: Batch) -> None:
    stats = Stats()
    extend = on_cpu(batch, stats)
    assert extend.step(*batch.arguments()) and stats.packed_extends == 1
    assert attend(extend, batch, torch.float32) < 1e-5
    assert stats.extend_kv_tokens_logical == sum(map(len, batch.rows))
    least = tree_of(batch.rows, batch.cached) if batch.caches_paths else tree_of(batch.rows, [0] * len(batch.rows))
    assert stats.extend_kv_tokens_unique == least.unique_tokens(np.array([len(row) for row in batch.rows], np.int32))


@settings(max_examples=15)
@given(batches(max_own=90))
def test_equals_brute_force_on_the_triton_kernels(batch: Batch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = batch.table().to(device)
    extend = CudaExtend(SHAPE, grouping="multi", verify=True, req_to_token=table, stats=Stats())
    rows, pool_rows, *lens = batch.arguments()
    for _ in range(2):  # the second time over the buffers of the first
        assert extend.step(rows, pool_rows.to(device), *lens)
        if device == "cpu":
            assert attend(extend, batch, torch.float16) < 4e-3  # two roundings to 11 bits of values below 4


def behind(prefix: int, q_lens: list[int]) -> Batch:
    """Requests with one cached prefix in common."""
    rows, used = [], prefix
    for n in q_lens:
        rows.append([*range(prefix), *range(used, used + n)])
        used += n
    return Batch(rows, q_lens)


@pytest.mark.parametrize(
    ("batch", "packed"),
    [
        (behind(2000, [16] * 12), True),
        (behind(1024, [128] + [1] * 12), True),  # a chunk and decodes
        (behind(0, [400] * 6), False),  # prompts of which nothing is cached
    ],
    ids=["shared", "mixed", "cold"],
)
def test_each_batch_goes_where_it_is_expected_to_be_faster(batch: Batch, packed: bool) -> None:
    stats = Stats()
    assert on_cpu(batch, stats, always=False).step(*batch.arguments()) is packed
    assert stats.packed_extends == packed
    assert on_cpu(batch, stats, always=True).step(*batch.arguments())


def test_a_prefix_is_read_once_for_each_query_tile() -> None:
    batch, stats = behind(2000, [16] * 12), Stats()
    assert on_cpu(batch, stats).step(*batch.arguments())
    tiles = 12 * 16 // 64
    assert stats.extend_kv_tokens_read == tiles * 2000 + 12 * 16
    assert stats.extend_kv_tokens_unique == 2000 + 12 * 16 and stats.extend_kv_tokens_logical == 12 * 2016


def test_other_slots_are_refused() -> None:
    batch = behind(500, [4] * 8)
    extend = on_cpu(batch, Stats())
    extend.req_to_token[3, 77] = 1
    with pytest.raises(RuntimeError, match="tokens 0 to 500 hold different KV slots"):
        extend.step(*batch.arguments())


def test_a_batch_too_large_for_the_partial_results_is_left_to_the_stock_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, stats = behind(500, [40] * 8), Stats()
    extend = CudaExtend(SHAPE, grouping="multi", verify=False, req_to_token=batch.table(), stats=stats)
    monkeypatch.setattr("packinfer_sgl.cuda_extend.PARTIAL_BYTES", 1000)
    assert not extend.step(*batch.arguments()) and stats.packed_extends == 0
