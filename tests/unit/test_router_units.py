"""The router in SGLang's deterministic mode: every decode step is packed, in units, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_router import SHAPE, TOLERANCE, Requests, Server, behind
from test_router import small as small  # noqa: PLC0414  # a fixture
from test_units import check as check_units

from packinfer_sgl.config import Config
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.serving import build
from packinfer_sgl.serving.batch_rows import running
from packinfer_sgl.serving.build import CudaPaths
from packinfer_sgl.serving.router import Router

UNIT = 128


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(build, "choose_unit", lambda *args, **sizes: UNIT)
    one = Server()
    paths = CudaPaths(SHAPE, Config(check=False), one.stats, one.table, 700, deterministic=True)
    gate = SimpleNamespace(reason=lambda layer, pool: None, scales=lambda layer: (1.0, 1.0))
    one.router.__init__(
        gate, one.stats, req_to_token=one.table, on_gpu=True, make_decode=paths.decode, extend=None, make_verify=None,
        check=False, make_any_rows=paths.decode_of_any_rows, unit_tokens=paths.unit_tokens,
    )  # fmt: skip
    return one


def loaded(router: Router) -> Plan:
    assert router.path is not None
    return router.path._loaded


def test_replays_in_units(server: Server) -> None:
    server.backend.init_cuda_graph_state(6, 6)
    server.capture(6)
    for held in (behind(260, 5, 9), behind(130, 2, 140), behind(3, 6, 60)):
        batch = server.replay(held, 6 - len(held), Requests(held))
        check_units(loaded(server.router), [len(row) for row in held], UNIT)
        assert server.attend(batch, held) < TOLERANCE
    assert server.stats.packed_steps == 3 and not server.stats.fallback_steps
    assert server.stats.kv_tokens_read < server.stats.kv_tokens_logical
    assert server.router.kinds() == ["decode"]


def test_more_rows_than_buffers_are_packed_too(server: Server) -> None:
    held = behind(256, 4, 3)
    server.router._decode = server.router._make_decode(2)
    for rows in (held, held[:2], held):
        batch = server.batch(rows)
        with running(Requests(rows)):
            server.backend.init_forward_metadata(batch)
        check_units(loaded(server.router), [len(row) for row in rows], UNIT)
        assert server.attend(batch, rows) < TOLERANCE
    assert server.stats.packed_steps == 3 and not server.stats.fallback_steps


def test_requests_that_are_not_known_are_packed_alone(server: Server) -> None:
    held = behind(130, 3, 3)
    batch = server.batch(held)
    server.backend.init_forward_metadata(batch)
    check_units(loaded(server.router), [133] * 3, UNIT)
    assert server.attend(batch, held) < TOLERANCE and server.stats.as_dict()["groups"] == 0


def test_a_failing_plan_is_made_without_groups(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock backend would give other bits."""
    plan = DecodePlanner.plan

    def fails(self, batch):
        if batch.requests is not None:
            raise RuntimeError("planted")
        return plan(self, batch)

    monkeypatch.setattr(DecodePlanner, "plan", fails)
    held = behind(130, 3, 3)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    check_units(loaded(server.router), [133] * 3, UNIT)
    assert server.attend(batch, held) < TOLERANCE and server.stats.fallback_steps == {"error": 1}
    monkeypatch.setattr(DecodePlanner, "plan", lambda self, batch: 1 / 0)
    with running(Requests(held)), pytest.raises(ZeroDivisionError):
        server.backend.init_forward_metadata(batch)


def test_prefill_and_verify_steps_are_the_stock_backends(server: Server) -> None:
    for mode, reason in (("EXTEND", "extend"), ("TARGET_VERIFY", "deterministic")):
        batch = server.batch(behind(10, 2, 5), mode, new=2)
        with running(Requests(behind(10, 2, 5))):
            server.backend.init_forward_metadata(batch)
        assert server.router.path is None and server.stats.fallback_steps.pop(reason) == 1
    server.backend.init_cuda_graph_state(4, 4)
    replayed = server.batch(behind(10, 2, 5), "TARGET_VERIFY", 2, 2)
    server.backend.init_forward_metadata_out_graph(replayed)
    assert server.router.path is None and server.stats.fallback_steps == {"deterministic": 1}
