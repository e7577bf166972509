"""Verify steps of speculative decoding: which are packed, and what comes out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_table import OnTable, on_cuda
from test_extend import SHAPE, Batch, attend, batches, behind

from packinfer_sgl.serving.metrics import Stats

DRAFTS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def drafted(draw: st.DrawFn) -> Batch:
    """Batches whose rows have DRAFTS new tokens each, in slots of their own."""
    batch = draw(batches())
    free = 1 + max(slot for row in batch.rows for slot in row)
    rows = [[*row, *range(free + DRAFTS * i, free + DRAFTS * (i + 1))] for i, row in enumerate(batch.rows)]
    return Batch(rows, [DRAFTS] * len(rows), batch.caches_paths)


def on_gpu(batch: Batch, stats: Stats, max_rows: int = 8, pool_tokens: int = 4096) -> OnTable:
    table = batch.table().to(DEVICE)
    return OnTable(on_cuda(SHAPE, table, stats, pool_tokens).verify(DRAFTS, max_rows), table)


def step(verify: OnTable, batch: Batch, known: bool = True) -> None:
    _, pool_rows, kv_lens, _ = batch.arguments()
    assert verify.step(batch if known else None, pool_rows, kv_lens)


@settings(max_examples=12)
@given(st.lists(st.tuples(drafted(), st.booleans()), min_size=2, max_size=3))
def test_equals_brute_force(several: list[tuple[Batch, bool]]) -> None:
    """One batch after the other over the same buffers, its rows known or not."""
    stats = Stats()
    verify = on_gpu(several[0][0], stats)
    for batch, known in several:
        verify.table = batch.table().to(DEVICE)
        step(verify, batch, known)
        assert attend(verify, batch, torch.float16, DEVICE) < 4e-3  # two roundings to 11 bits of values below 4
    assert stats.packed_steps == stats.plans == len(several) and stats.packed_extends == 0


def test_a_shared_prefix_is_read_once() -> None:
    stats = Stats()
    step(on_gpu(batch := behind(900, [DRAFTS] * 6), stats), batch)
    assert stats.kv_tokens_logical == 6 * (900 + DRAFTS)
    assert stats.kv_tokens_read == stats.kv_tokens_unique == 900 + 6 * DRAFTS
    assert stats.as_dict()["groups"] == 1 and stats.as_dict()["rows_grouped"] == 6


def test_other_slots_are_refused() -> None:
    verify = on_gpu(batch := behind(500, [DRAFTS] * 8), Stats())
    verify.table[3, 77] = 1
    with pytest.raises(RuntimeError, match="tokens 0 to 500 hold different KV slots"):
        step(verify, batch)


def test_a_captured_plan_and_an_empty_one_run() -> None:
    verify = on_gpu(batch := behind(40, [DRAFTS] * 2), Stats())
    verify.path.capture(verify.batch(None, torch.arange(2), np.full(2, DRAFTS)))
    only_drafts = Batch([row[:DRAFTS] for row in batch.table().tolist()][::-1], [DRAFTS] * 2)
    assert attend(verify, only_drafts, torch.float16, DEVICE) < 4e-3
    verify.step(None, torch.arange(0), np.zeros(0, np.int64))
    q = torch.ones(4, SHAPE.qo_heads, SHAPE.head_dim, dtype=torch.float16, device=DEVICE)
    k = torch.ones(9, SHAPE.kv_heads, SHAPE.head_dim, dtype=torch.float16, device=DEVICE)
    assert not verify.run(q, k, k, torch.zeros(0, device=DEVICE), sm_scale=1.0, logits_soft_cap=0.0).any()


def test_a_batch_that_fits_grouped_only_is_grouped_whole() -> None:
    """Room for two partial results of each query, but for each KV token only once."""
    stats = Stats()
    batch = behind(900, [DRAFTS] * 6)
    batch.rows[0][900:900] = [*range(2000, 2200)]  # a tail that is cut where that is allowed
    verify = on_gpu(batch, stats, pool_tokens=300)
    verify.path.planner.limits = dataclasses.replace(verify.path.planner.limits, partials=2 * 6 * DRAFTS)
    step(verify, batch)
    assert attend(verify, batch, torch.float16, DEVICE) < 4e-3
    assert stats.kv_tokens_read < 1400


def test_a_batch_beyond_the_buffers_is_an_error() -> None:
    verify = on_gpu(batch := behind(40, [DRAFTS] * 2), Stats(), max_rows=1)
    with pytest.raises(RuntimeError, match="does not fit the buffers"):
        step(verify, batch)
