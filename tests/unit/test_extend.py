"""Extend batches: who runs them, and what comes out, over a table of slots like SGLang's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_table import OnTable, extend_on_cpu, on_cuda
from strategies import Rows, attention64, kv_pool, pool_size, radix_rows, shared_spans, tree_of

from packinfer_sgl.kernels import device_plan
from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.reasons import BatchReason
from packinfer_sgl.runners import cuda
from packinfer_sgl.serving.batch_reasons import extend_reason
from packinfer_sgl.serving.batch_rows import BatchRows
from packinfer_sgl.serving.metrics import Stats

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
        return self, torch.arange(len(self.rows)).flip(0), kv_lens, np.array(self.q_lens, np.int32)

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


def attend(extend: OnTable, batch: Batch, dtype: torch.dtype, device: str = "cpu") -> float:
    """Largest error against brute force; two rows of q pad the batch, and come out as 0."""
    used = sorted({slot for row in batch.rows for slot in row})
    k, v = (x.to(dtype) for x in kv_pool(used[-1] + 9, used, SHAPE.kv_heads, SHAPE.head_dim, 0))
    n = sum(batch.q_lens)
    q = torch.randn(n + 2, SHAPE.qo_heads, SHAPE.head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    kv_lens = torch.tensor([len(row) for row in batch.rows])
    there = (x.to(device) for x in (q, k, v, kv_lens))
    out = extend.run(*there, sm_scale=0.2, logits_soft_cap=0.0).cpu()
    assert not out[n:].any()
    return float((out[:n] - attention64(q[:n], k, v, batch.seen(), 0.2)[0]).abs().max())


def on_cpu(batch: Batch, stats: Stats, always: bool = True) -> OnTable:
    return extend_on_cpu(SHAPE, batch.table(), stats, always)


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


@settings(max_examples=12)
@given(st.lists(batches(max_own=90), min_size=2, max_size=3))
def test_equals_brute_force_on_the_triton_kernels(several: list[Batch]) -> None:
    """Batches of any size one after the other, over the same buffers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extend = None
    for batch in several:
        table = batch.table().to(device)
        extend = extend or OnTable(on_cuda(SHAPE, table, Stats()).extend(always=True), table)
        extend.table = table
        assert extend.step(*batch.arguments())
        assert attend(extend, batch, torch.float16, device) < 4e-3  # two roundings to 11 bits of values below 4


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
    extend.table[3, 77] = 1
    with pytest.raises(RuntimeError, match="tokens 0 to 500 hold different KV slots"):
        extend.step(*batch.arguments())


def test_a_batch_that_does_not_fit_shares_less() -> None:
    batch, stats = behind(2000, [16] * 12), Stats()
    extend = on_cpu(batch, stats)
    together = lambda plan: int(plan.items[:, Col.Q_CNT].max()) > 16  # noqa: E731  # queries of several requests
    limits = lambda overflow: SimpleNamespace(slots=1 << 62, overflow=overflow)  # noqa: E731
    extend.path.planner.limits = limits(lambda plan: {"slots": "many"} if together(plan) else {})
    assert extend.step(*batch.arguments()) and stats.extend_kv_tokens_read == stats.extend_kv_tokens_logical
    assert attend(extend, batch, torch.float32) < 1e-5
    assert stats.fitted_plans == {"slots": 1}
    extend.path.planner.limits = limits(lambda plan: {"partials": "any"})
    assert not extend.step(*batch.arguments()) and stats.packed_extends == 1


@pytest.mark.parametrize("has_sinks", [False, True])
def test_warm_up_runs_every_kernel(monkeypatch: pytest.MonkeyPatch, has_sinks: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    k, v = (torch.full((4, SHAPE.kv_heads, SHAPE.head_dim), math.nan, dtype=torch.float16, device=device) for _ in "kv")
    k[0] = v[0] = 1
    run, merge, ran, heads, told = PackedCuda.run, device_plan.merge_listed_kernel, [], [], []
    compared: list[Plan] = []

    class Merge:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **more: (heads.append(more["HEADS"]), merge[grid](*args, **more))

    def checked(self: PackedCuda, *args: object, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse2 = run(self, *args, **more)  # type: ignore[arg-type]
        ran.append(
            (heads[-1], self._view["header"][: len(self.tiles) + 1].diff().all().item(), self._n_merged == len(out))
        )
        told.append(more["sinks"])
        assert has_sinks or (out == 1).all()
        return out, lse2

    monkeypatch.setattr(PackedCuda, "run", checked)
    monkeypatch.setattr(device_plan, "merge_listed_kernel", Merge())
    path = on_cuda(SHAPE, torch.zeros(1, 8, dtype=torch.int32, device=device), Stats()).extend(always=True)
    forms = [torch.zeros(SHAPE.qo_heads, device=device)] if has_sinks else [None]
    monkeypatch.setattr(path.planner, "packed_us", compared.append)
    cuda.warm_up(path.planner, path.runner, k, v, torch.float16, 0.0, forms)  # type: ignore[arg-type]
    # programs of few queries merge one head each, of many all four; the interpreter's two multiprocessors are soon full
    assert ran == [(heads, True, True) for heads in ((1, 1, 4) if torch.cuda.is_available() else (4, 4, 4))]
    assert told == forms * 3
    assert len(compared) == 1, "what compares ways is compiled, though two rows that share nothing have one way"


def test_what_fits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, stats = behind(500, [40] * 8), Stats()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = batch.table().to(device)
    for buffer_bytes, packed in ((820 * 4, True), (820 * 4 - 1, False)):  # the slots of 820 tokens
        monkeypatch.setattr(cuda, "BUFFER_BYTES", buffer_bytes)
        assert OnTable(on_cuda(SHAPE, table, stats).extend(always=True), table).step(*batch.arguments()) is packed
    assert stats.packed_extends == 1


def extend_batch(**changed: object) -> SimpleNamespace:
    """Of SGLang's ForwardBatch what is looked at: 3 and 1 new tokens behind 4 and 6."""
    usual = {
        "batch_size": 2, "spec_info": None, "encoder_lens": None, "multi_item_delimiter_indices": None,
        "extend_seq_lens_cpu": [3, 1], "extend_prefix_lens_cpu": [4, 6], "seq_lens_cpu": torch.tensor([7, 7]),
    }  # fmt: skip
    return SimpleNamespace(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"seq_lens_cpu": None}, None),
        ({"spec_info": object()}, BatchReason.SPECULATIVE),
        ({"encoder_lens": [1, 1]}, BatchReason.ENCODER_DECODER),
        ({"multi_item_delimiter_indices": []}, BatchReason.MULTI_ITEM),
        ({"batch_size": 3}, BatchReason.NO_BATCH),
        ({"extend_seq_lens_cpu": [3, 1, 1]}, BatchReason.NO_BATCH),
        ({"extend_prefix_lens_cpu": [4, 7]}, BatchReason.OTHER_LENGTHS),
        ({"seq_lens_cpu": torch.tensor([7, 8])}, BatchReason.OTHER_LENGTHS),
    ],
)
def test_what_an_extend_batch_must_be(changed: dict, reason: BatchReason | None) -> None:
    rows = BatchRows([object(), object()], [], None, {})
    assert extend_reason(extend_batch(**changed), rows) is reason
    assert extend_reason(extend_batch(**changed), None) is (
        reason if reason not in (None, BatchReason.OTHER_LENGTHS) else BatchReason.NO_BATCH
    )
