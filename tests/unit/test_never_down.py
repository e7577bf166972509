"""What fails while a server serves leaves right answers behind; the router's part of that is in ``test_router``."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from on_table import OnTable, on_cuda
from test_extend import Batch, attend, behind
from test_planner import three_rows
from test_verify import DEVICE, DRAFTS, on_gpu

from packinfer_sgl.config import Config
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners import cpu
from packinfer_sgl.serving import metrics, packed_path
from packinfer_sgl.serving.build import CudaPaths
from packinfer_sgl.serving.metrics import Stats

SHAPE = AttentionShape(4, 2, 64, 2)


@pytest.mark.parametrize(("room", "fails_in"), [(cpu, "look_up"), (packed_path, "audit_reads")])
def test_a_plan_that_was_never_loaded_is_not_used(room, fails_in: str, monkeypatch) -> None:
    """A step that fails between its plan and its slots, as when memory is short; the next ones must be right."""
    engine = three_rows(check=True)
    for _ in range(3):
        engine.step()
        engine.join(4, like=next(iter(engine.rows)), shared=15)
        with monkeypatch.context() as patch:
            patch.setattr(room, fails_in, lambda *args, **more: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        engine.step()


class FakeArena:
    """Of the arena what a packed path calls."""

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
    requests = SimpleNamespace(prefix_tree=lambda: tree)
    table = Batch(rows, [1] * 8).table().to(DEVICE)
    for asked in (1, 0):
        arena = FakeArena()
        path = CudaPaths(SHAPE, Config(), Stats(), table, 910, arena).decode(8)  # type: ignore[arg-type]
        if not asked:  # the node has a span of its own, unless each token is listed once
            fits = path.planner.limits.overflow
            over = lambda plan, fits=fits: {"kv_slots": "many"} if len(plan.spans) > 8 else fits(plan)  # noqa: E731
            path.planner.limits = SimpleNamespace(slots=1 << 62, overflow=over)  # type: ignore[assignment]
        decode, pool_rows, lens = OnTable(path, table), torch.arange(8).flip(0), np.full(8, 901)
        decode.step(requests, pool_rows, lens)
        decode.step_alone(pool_rows, lens)
        assert arena.pointed == [asked]


def test_what_the_tree_does_not_show_is_found_in_the_slots() -> None:
    """A batch of which nothing is known, and which fits only because its rows share most of their slots."""
    batch, stats = behind(900, [DRAFTS] * 8), Stats()
    verify = on_gpu(batch, stats, pool_tokens=930)
    verify.step(None, torch.arange(8).flip(0), np.full(8, 900 + DRAFTS))
    assert attend(verify, batch, torch.float16, DEVICE) < 4e-3
    assert stats.kv_tokens_read == 900 + 8 * DRAFTS


def test_a_decode_batch_of_which_nothing_is_known_is_found_in_the_slots() -> None:
    rows = [[*range(1, 901), 1000 + i] for i in range(8)]
    table = Batch(rows, [1] * 8).table().to(DEVICE)
    decode = OnTable(on_cuda(SHAPE, table, stats := Stats(), 910).decode(8), table)
    decode.step(None, torch.arange(8).flip(0), np.full(8, 901))
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
