"""Verify steps of speculative decoding: which are packed, and what comes out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_extend import SHAPE, Batch, attend, batches, behind

from packinfer_sgl.runners.cuda_decode import CudaDecode
from packinfer_sgl.runners.cuda_verify import CudaVerify
from packinfer_sgl.runners.metrics import Stats
from packinfer_sgl.serving import backend as backend_module
from packinfer_sgl.serving.backend import PackInferMixin

DRAFTS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def drafted(draw: st.DrawFn) -> Batch:
    """Batches whose rows have DRAFTS new tokens each, in slots of their own."""
    batch = draw(batches())
    free = 1 + max(slot for row in batch.rows for slot in row)
    rows = [[*row, *range(free + DRAFTS * i, free + DRAFTS * (i + 1))] for i, row in enumerate(batch.rows)]
    return Batch(rows, [DRAFTS] * len(rows), batch.caches_paths)


def on_gpu(batch: Batch, stats: Stats, **more: int) -> CudaVerify:
    return CudaVerify(
        SHAPE, DRAFTS, grouping="multi", check=True, req_to_token=batch.table().to(DEVICE), stats=stats,
        **{"max_rows": 8, "pool_tokens": 4096, **more},
    )  # fmt: skip


def step(verify: CudaVerify, batch: Batch, known: bool = True) -> None:
    _, pool_rows, _, kv_lens = batch.arguments()
    lens = kv_lens.astype(np.int64) - DRAFTS
    verify.step(batch if known else None, pool_rows.to(verify.req_to_token.device), lens)  # type: ignore[arg-type]


@settings(max_examples=12)
@given(st.lists(st.tuples(drafted(), st.booleans()), min_size=2, max_size=3))
def test_equals_brute_force(several: list[tuple[Batch, bool]]) -> None:
    """One batch after the other over the same buffers, its rows known or not."""
    stats = Stats()
    verify = on_gpu(several[0][0], stats)
    for batch, known in several:
        verify.req_to_token = batch.table().to(DEVICE)
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
    verify.req_to_token[3, 77] = 1
    with pytest.raises(RuntimeError, match="tokens 0 to 500 hold different KV slots"):
        step(verify, batch)


def test_a_captured_plan_and_an_empty_one_run() -> None:
    verify = on_gpu(batch := behind(40, [DRAFTS] * 2), Stats())
    verify.step_for_capture(torch.arange(2, device=DEVICE))
    only_drafts = Batch([row[:DRAFTS] for row in batch.table().tolist()][::-1], [DRAFTS] * 2)
    assert attend(verify, only_drafts, torch.float16, DEVICE) < 4e-3
    verify.step(None, torch.arange(0, device=DEVICE), np.zeros(0, np.int64))
    q = torch.ones(4, SHAPE.qo_heads, SHAPE.head_dim, dtype=torch.float16, device=DEVICE)
    k = torch.ones(9, SHAPE.kv_heads, SHAPE.head_dim, dtype=torch.float16, device=DEVICE)
    assert not verify.run(q, k, k, torch.zeros(0, device=DEVICE), sm_scale=1.0, logits_soft_cap=0.0).any()


def test_a_batch_that_fits_grouped_only_is_grouped_whole() -> None:
    """Room for two partial results of each query, but for each KV token only once."""
    stats = Stats()
    batch = behind(900, [DRAFTS] * 6)
    batch.rows[0][900:900] = [*range(2000, 2200)]  # a tail that is cut where that is allowed
    verify = on_gpu(batch, stats, pool_tokens=300)
    verify._packed.capacity = dataclasses.replace(verify._packed.capacity, partials=2 * 6 * DRAFTS)
    verify._planner.overflow = verify._packed.capacity.overflow
    step(verify, batch)
    assert attend(verify, batch, torch.float16, DEVICE) < 4e-3
    assert stats.kv_tokens_read < 1400


def test_a_batch_beyond_the_buffers_is_an_error() -> None:
    verify = on_gpu(batch := behind(40, [DRAFTS] * 2), Stats(), max_rows=1)
    with pytest.raises(RuntimeError, match="does not fit the buffers"):
        step(verify, batch)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> PackInferMixin:
    """For which spec infos are the numbers of drafts in a chain."""
    monkeypatch.setattr(backend_module, "chain_drafts", lambda spec_info: spec_info)
    made = object.__new__(PackInferMixin)
    made._packinfer_make_drafts = lambda drafts, max_rows: SimpleNamespace(drafts=drafts, max_rows=max_rows)  # type: ignore[assignment,return-value]
    made._packinfer_max_rows, made._packinfer_extend = 7, None
    return made


def verify_batch(spec_info: object, verifies: bool = True, **more: object) -> SimpleNamespace:
    mode = SimpleNamespace(is_target_verify=lambda: verifies, is_decode=lambda: False, is_idle=lambda: False)
    return SimpleNamespace(spec_info=spec_info, forward_mode=mode, actual_forward_mode=mode, **more)


def test_only_chains_of_one_length_are_packed(backend: PackInferMixin) -> None:
    chain = backend._packinfer_chain
    assert chain(verify_batch(0)) is None  # type: ignore[arg-type]  # a tree
    assert chain(verify_batch(None)) is None and chain(verify_batch(4, verifies=False)) is None  # type: ignore[arg-type]
    made = chain(verify_batch(4))  # type: ignore[arg-type]
    assert made is not None and (made.drafts, made.max_rows) == (4, 7)
    assert chain(verify_batch(4)) is made  # type: ignore[arg-type]
    assert chain(verify_batch(None)) is made  # type: ignore[arg-type]  # an idle rank replays what was captured
    assert chain(verify_batch(6)) is None and chain(verify_batch(0)) is None  # type: ignore[arg-type]
    assert backend.packinfer_packs() == ["decode", "verify"]
    backend._packinfer_make_drafts = None
    assert backend.packinfer_packs() == ["decode"]
    assert chain(verify_batch(4)) is None  # type: ignore[arg-type]


class Stock:
    """A stock backend that does nothing."""

    def init_forward_metadata_out_graph(self, forward_batch: object, in_capture: bool = False) -> None:
        pass


def test_a_graph_is_not_replayed_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spec infos stand for the numbers of drafts in a chain."""
    monkeypatch.setattr(backend_module, "chain_drafts", lambda spec_info: spec_info)
    calls: list[object] = []
    monkeypatch.setattr(CudaVerify, "step_for_capture", lambda self, pool_rows: calls.append("capture"))
    monkeypatch.setattr(CudaVerify, "step", lambda self, rows, pool_rows, lens: calls.append(lens.tolist()))
    drafts = object.__new__(CudaVerify)
    drafts.drafts = DRAFTS
    made = backend_module.packed_class(Stock)()
    made._packinfer_decode, made._packinfer_make_drafts = object.__new__(CudaDecode), lambda n, max_rows: drafts
    pool_rows = torch.arange(3)
    batch = {"req_pool_indices": pool_rows, "seq_lens_cpu": torch.tensor([5, 6, 1]), "batch_size": 3}

    fallbacks = backend_module.STATS.fallback_steps["speculative"]
    made.init_forward_metadata_out_graph(verify_batch(0, num_padding=0, **batch))  # captured as a tree: the stock's
    assert backend_module.STATS.fallback_steps["speculative"] == fallbacks + 1 and not calls
    made.init_forward_metadata_out_graph(verify_batch(DRAFTS, **batch), in_capture=True)
    made.init_forward_metadata_out_graph(verify_batch(DRAFTS, num_padding=1, **batch))
    assert calls == ["capture", [5, 6]]
    with pytest.raises(RuntimeError, match="replayed with int, not with the chain of drafts"):
        made.init_forward_metadata_out_graph(verify_batch(0, num_padding=0, **batch))
