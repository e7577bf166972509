"""What fails while a server serves is a counted fallback: an exception in its scheduler would end it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_extend import Batch, attend, behind
from test_planner import three_rows
from test_verify import DEVICE, DRAFTS, Stock, on_gpu, verify_batch

from packinfer_sgl.planning.fitting import DoesNotFit
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners import cpu_decode, metrics
from packinfer_sgl.runners.cuda_decode import CudaDecode
from packinfer_sgl.runners.metrics import STATS, Stats
from packinfer_sgl.serving import backend as backend_module
from packinfer_sgl.serving.backend import PackInferMixin


class Broken:
    """A batch of which SGLang's tree cannot be read."""

    def __eq__(self, other: object) -> bool:
        return False

    def prefix_tree(self) -> PrefixTree:
        raise KeyError("no such node")


class EagerStock(Stock):
    def init_forward_metadata(self, forward_batch: object) -> None:
        pass


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> PackInferMixin:
    monkeypatch.setattr(STATS, "_errors", set())
    made = backend_module.packed_class(EagerStock)()
    made._packinfer_debug = False
    return made


def errors() -> int:
    return STATS.fallback_steps["error"]


def test_an_eager_batch_goes_to_the_stock_backend(backend, monkeypatch, caplog) -> None:
    sizes, forgotten = iter(range(9)), []

    def fails(self: object, batch: object) -> None:
        raise torch.OutOfMemoryError(f"none left for {next(sizes)}")

    monkeypatch.setattr(PackInferMixin, "_packinfer_plan", fails)
    backend._packinfer_decode = SimpleNamespace(forget=lambda: forgotten.append(True))
    before = errors()
    for _ in range(3):
        backend.init_forward_metadata(None)
        assert backend._packinfer_step is None
    assert errors() == before + 3 == before + len(forgotten)
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1 and "planning failed, the stock backend runs this batch" in logged[0].getMessage()
    assert "none left for 0" in str(logged[0].exc_info[1])
    backend._packinfer_debug = True  # who debugs wants to see it
    with pytest.raises(torch.OutOfMemoryError):
        backend.init_forward_metadata(None)


@pytest.mark.parametrize("fails_in", ["snapshot_slots", "audit_reads"])
def test_a_plan_that_was_never_loaded_is_not_used(fails_in: str, monkeypatch) -> None:
    """A step that fails between its plan and its slots, as when memory is short; the next ones must be right."""
    engine = three_rows(check=True)
    for _ in range(3):
        engine.step()
        engine.join(4, like=next(iter(engine.rows)), shared=15)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_decode, fails_in, lambda *args, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.planner.forget()  # as the backend does
        engine.step()


class Arena:
    """Of ``Regroup`` what a planner calls."""

    def __init__(self) -> None:
        self.pointed: list[int] = []

    def point(self, plan: Plan, kept: PrefixTree, rows: object) -> Plan:
        self.pointed.append(kept.n_nodes)
        return plan

    def work(self) -> bool:
        return False

    def count_step(self) -> None: ...


def test_the_arena_is_not_asked_for_spans_that_are_not_in_the_list() -> None:
    rows = [[*range(1, 901), 1000 + i] for i in range(8)]
    tree = PrefixTree.from_neighbours(range(8), [900] * 7)
    batch = SimpleNamespace(prefix_tree=lambda: tree)
    table = Batch(rows, [1] * 8).table().to(DEVICE)
    for asked in (1, 0):
        decode = CudaDecode(
            backend_module.AttentionShape(4, 2, 64, 2), grouping="multi", check=False, req_to_token=table,
            pool_tokens=910, max_rows=8, stats=Stats(), regroup=(arena := Arena()),
        )  # fmt: skip
        if not asked:  # the node has a span of its own, unless each token is listed once
            fits = decode._packed.capacity.overflow
            decode._planner.overflow = lambda plan, fits=fits: (
                {"kv_slots": "many"} if len(plan.spans) > 8 else fits(plan)
            )
        decode.step(batch, torch.arange(8).flip(0).to(DEVICE), np.full(8, 901, np.int64))
        decode.step_alone(torch.arange(8).flip(0).to(DEVICE), np.full(8, 901, np.int64))
        assert arena.pointed == [asked] and decode._planner.regroup is arena


def replayed(backend: PackInferMixin, step: object, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"req_pool_indices": torch.arange(3), "seq_lens_cpu": torch.tensor([5, 6, 1]), "batch_size": 3}
    backend._packinfer_decode = object.__new__(CudaDecode)
    backend._packinfer_make_drafts = lambda n, max_rows: step
    monkeypatch.setattr(backend_module, "chain_drafts", lambda spec_info: spec_info)
    backend.init_forward_metadata_out_graph(verify_batch(DRAFTS, num_padding=1, **batch))


def test_a_graph_is_replayed_without_groups(backend, monkeypatch, caplog) -> None:
    calls: list[object] = []

    def fails(rows: object, pool_rows: object, lens: object) -> None:
        raise DoesNotFit("too large")

    alone = lambda pool_rows, lens: calls.append((pool_rows.tolist(), lens.tolist()))  # noqa: E731
    step = SimpleNamespace(drafts=DRAFTS, step=fails, step_alone=alone)
    before = errors()
    replayed(backend, step, monkeypatch)
    assert calls == [([0, 1], [5, 6])] and errors() == before + 1
    assert "this batch is run without groups" in caplog.text
    backend._packinfer_debug = True
    with pytest.raises(DoesNotFit):
        replayed(backend, step, monkeypatch)


def test_a_tree_that_cannot_be_read_leaves_right_outputs() -> None:
    batch, stats = behind(60, [DRAFTS] * 3), Stats()
    verify = on_gpu(batch, stats)
    pool_rows, lens = torch.arange(3).flip(0).to(DEVICE), np.full(3, 60, np.int64)
    with pytest.raises(KeyError):
        verify.step(Broken(), pool_rows, lens)  # type: ignore[arg-type]
    verify.step_alone(pool_rows, lens)
    assert attend(verify, batch, torch.float16, DEVICE) < 4e-3
    assert stats.kv_tokens_read == stats.kv_tokens_logical == 3 * (60 + DRAFTS)


def test_what_the_tree_does_not_show_is_found_in_the_slots() -> None:
    """A batch of which nothing is known, and which fits only because its rows share most of their slots."""
    batch, stats = behind(900, [DRAFTS] * 8), Stats()
    verify = on_gpu(batch, stats, pool_tokens=930)
    pool_rows, lens = torch.arange(8).flip(0).to(DEVICE), np.full(8, 900, np.int64)
    verify.step(None, pool_rows, lens)
    assert attend(verify, batch, torch.float16, DEVICE) < 4e-3
    assert stats.kv_tokens_read == 900 + 8 * DRAFTS


def test_a_decode_batch_of_which_nothing_is_known_is_found_in_the_slots() -> None:
    rows = [[*range(1, 901), 1000 + i] for i in range(8)]
    table = Batch(rows, [1] * 8).table().to(DEVICE)
    decode = CudaDecode(
        backend_module.AttentionShape(4, 2, 64, 2), grouping="multi", check=True, req_to_token=table,
        pool_tokens=910, max_rows=8, stats=(stats := Stats()),
    )  # fmt: skip
    decode.step(None, torch.arange(8).flip(0).to(DEVICE), np.full(8, 901, np.int64))
    assert stats.kv_tokens_read == 900 + 8 and stats.audited_steps == 1


def test_a_batch_that_cannot_be_read_has_no_rows(monkeypatch, caplog) -> None:
    from packinfer_sgl.patches import batch_rows

    monkeypatch.setattr(batch_rows, "rows_wanted", lambda: True)
    batch_rows._log_once.cache_clear()
    forward_batch = SimpleNamespace()
    for _ in range(2):
        batch_rows.read_rows(forward_batch, None, SimpleNamespace(reqs=[object()]))
    assert not vars(forward_batch) and caplog.text.count("a batch could not be read and is not grouped") == 1


def test_metrics_that_cannot_be_written_stop(monkeypatch, caplog) -> None:
    def fails(stats: Stats) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(metrics, "export", fails)
    monkeypatch.setattr(metrics, "_prometheus", {"labels": {}})
    Stats().count_fallback(metrics.BatchReason.EXTEND)
    assert metrics._prometheus is None and "stay as they are" in caplog.text
