"""Attention sinks between SGLang's call of a layer and the packed paths: see ``test_router`` for the server."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_router import DEVICE, DRAFTS, SHAPE, STOCK, TOLERANCE, Requests, Server, behind, small

from packinfer_sgl.serving.batch_rows import running

__all__ = ["small"]  # a fixture of all tests here, too


def some_sinks(seed: int = 0) -> torch.Tensor:
    """Of about the size of a row's largest logits."""
    return torch.randn(SHAPE.qo_heads, generator=torch.Generator().manual_seed(seed)).add(5).half().to(DEVICE)


def test_sinks_of_an_eager_batch() -> None:
    """Of decode, of drafts, and of a layer that has none after one that has."""
    server, held = Server(), behind(60, 4, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    for sinks in (some_sinks(), None, some_sinks(1).float()):
        assert server.attend(batch, held, sinks=sinks) < TOLERANCE
    assert server.attend(batch, held, sinks=some_sinks(), said=None) > 10 * TOLERANCE, "sinks do not matter here"
    drafted = server.batch(held, "TARGET_VERIFY", None, DRAFTS)
    with running(Requests(held, DRAFTS)):
        server.backend.init_forward_metadata(drafted)
    assert server.attend(drafted, held, DRAFTS, sinks=some_sinks()) < TOLERANCE and not server.stats.fallback_layers


@pytest.mark.parametrize("new", [1, DRAFTS], ids=["decode", "verify"])
def test_sinks_of_a_captured_graph(new: int) -> None:
    server = Server()
    server.backend.init_cuda_graph_state(6, 6)
    server.capture(6, new)
    held = behind(300, 5, 9)
    batch = server.replay(held, 1, Requests(held, new), new)
    assert server.attend(batch, held, new, some_sinks()) < TOLERANCE


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, dtype=torch.float64)], ids=str)
def test_sinks_of_another_shape_are_the_stock_backends(sinks: torch.Tensor) -> None:
    server, held = Server(), behind(60, 2, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    q, k = torch.zeros(2, 256).half(), torch.zeros(1)
    out = server.backend.forward_decode(q, k, k, server.layer, batch, False, sinks=sinks)
    assert (out == STOCK).all() and server.stats.fallback_layers == {0: "sinks"}


def test_the_stock_backend_of_the_check_is_told_of_sinks() -> None:
    server, held, told = Server(check=True), behind(60, 2, 5), []
    Answer = type("Answer", (Exception,), {})

    def stock(*args: Any, **more: Any) -> torch.Tensor:
        told.append(more)
        raise Answer

    batch, sinks = server.batch(held), some_sinks()
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    q, k = torch.zeros(2, 256).half().to(DEVICE), torch.zeros(1)
    with pytest.raises(Answer):
        server.router.attend(stock, server.backend, q, k, k, server.layer, batch, False, sinks=sinks)
    assert told == [{"sinks": sinks}]
