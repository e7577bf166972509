"""The router between SGLang's methods and the packed paths: eager passes, and graphs as a GPU captures and replays
them. The kernels run (in Triton's interpreter where there is no GPU); of SGLang's batch there is what the router reads.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from on_table import on_cuda
from strategies import attention64, kv_pool, tree_of
from test_planner import EAGER

from packinfer_sgl.config import Config
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners import cuda
from packinfer_sgl.serving import router as router_module
from packinfer_sgl.serving.backend import wrap
from packinfer_sgl.serving.batch_rows import BatchRows, running
from packinfer_sgl.serving.build import CpuPaths
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import PackedPath
from packinfer_sgl.serving.router import Router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = AttentionShape(qo_heads=4, kv_heads=2, head_dim=64, kv_bytes=2)
DRAFTS = 3
STOCK = torch.tensor(-7.0)
TOLERANCE = 4e-3  # two roundings to 11 bits of values below 4


class Stock:
    """A stock backend: it answers ``STOCK``, and its methods are those that SGLang calls."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.token_to_kv_pool = SimpleNamespace(
            get_key_buffer=lambda layer: k, get_value_buffer=lambda layer: v, dtype=k.dtype
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...
    def init_forward_metadata(self, batch: Any) -> None: ...
    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None: ...
    def init_forward_metadata_in_graph(self, batch: Any) -> None: ...

    def forward_decode(self, q: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        return STOCK.expand(len(q), SHAPE.qo_heads * SHAPE.head_dim)

    forward_extend = forward_decode


class Mode:
    def __init__(self, name: str) -> None:
        self.name = name

    def is_decode(self) -> bool:
        return self.name == "DECODE"

    def is_idle(self) -> bool:
        return self.name == "IDLE"

    def is_target_verify(self) -> bool:
        return self.name == "TARGET_VERIFY"


class Requests(SimpleNamespace):
    """Requests that hold ``held`` slots, of which the tree owns all but the last ``new``."""

    def __init__(self, held: list[list[int]], new: int = 1) -> None:
        super().__init__(reqs=held, new=new)

    def prefix_tree(self) -> PrefixTree:
        return tree_of(self.reqs, [len(row) - self.new for row in self.reqs])


class Server:
    """A table, a pool, and the backend that packinfer makes of ``Stock``."""

    def __init__(self, *, check: bool = False, verify: bool = True, pool_tokens: int = 700) -> None:
        self.table = torch.zeros(12, 400, dtype=torch.int32, device=DEVICE)
        k, v = kv_pool(pool_tokens, list(range(pool_tokens)), SHAPE.kv_heads, SHAPE.head_dim, 0)
        self.k, self.v = (x.half().to(DEVICE) for x in (k, v))
        self.stats = Stats()
        paths = on_cuda(SHAPE, self.table, self.stats, pool_tokens)
        gate = SimpleNamespace(reason=lambda layer, pool: None, scales=lambda layer: (1.0, 1.0))
        self.router = Router(
            gate, self.stats, req_to_token=self.table, on_gpu=True, make_decode=paths.decode,
            extend=paths.extend(always=True), make_verify=paths.verify if verify else None, check=check,
        )  # fmt: skip
        self.backend: Any = wrap(Stock(self.k, self.v), self.router)
        self.layer = SimpleNamespace(
            layer_id=0, tp_q_head_num=SHAPE.qo_heads, head_dim=SHAPE.head_dim, scaling=0.2, logit_cap=0.0
        )

    def batch(self, held: list[list[int]], mode: str = "DECODE", padding: int | None = None, new: int = 1) -> Any:
        """A ForwardBatch of rows that hold these slots; ``padding``: a replay with so many rows more."""
        rows = torch.arange(1, len(held) + 1)
        for row, slots in zip(rows.tolist(), held):
            self.table[row] = 0
            self.table[row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        pad = padding or 0
        # SGLang counts drafts once they are accepted
        lens = torch.tensor([len(row) - (new if mode == "TARGET_VERIFY" else 0) for row in held] + [1] * pad)
        batch = SimpleNamespace(
            forward_mode=Mode(mode), actual_forward_mode=Mode(mode if held else "IDLE"), spec_info=None,
            encoder_lens=None, batch_size=len(held) + pad, _original_batch_size=None,
            req_pool_indices=torch.cat([rows, torch.zeros(pad, dtype=rows.dtype)]).to(DEVICE),
            seq_lens=lens.to(DEVICE), seq_lens_cpu=lens,
            out_cache_loc=torch.tensor([row[-1] for row in held] + [0] * pad, dtype=torch.int64, device=DEVICE),
        )  # fmt: skip
        if mode == "TARGET_VERIFY" and held:
            batch.spec_info = new
        if padding is not None:
            batch.num_padding = padding
        return batch

    def attend(
        self, batch: Any, held: list[list[int]], new: int = 1, sinks: torch.Tensor | None = None, **said: Any
    ) -> torch.Tensor:
        """Run a layer; the largest error against brute force, and that padding comes out finite. ``said``: what the
        backend is told instead of ``sinks``."""
        n = batch.batch_size * new
        q = torch.randn(n, SHAPE.qo_heads * SHAPE.head_dim, generator=torch.Generator().manual_seed(1)).half()
        k = v = torch.zeros(1)
        told = said.get("said", sinks)
        out = self.backend.forward_decode(q.to(DEVICE), k, v, self.layer, batch, save_kv_cache=False, sinks=told)
        out = out.float().cpu()
        seen = [row[: len(row) - new + 1 + i] for row in held for i in range(new)]
        assert bool(out.isfinite().all())
        if not held:
            return torch.zeros(1)
        rows = q.view(n, SHAPE.qo_heads, SHAPE.head_dim)[: len(seen)]
        sinks = None if sinks is None else sinks.cpu()
        expected = attention64(rows, self.k.cpu(), self.v.cpu(), seen, 0.2, sinks=sinks)[0]
        return (out.view(n, SHAPE.qo_heads, SHAPE.head_dim)[: len(seen)] - expected).abs().max()

    def replay(self, held: list[list[int]], padding: int, requests: Any = None, new: int = 1) -> Any:
        """What a graph runner does before it replays, and what the graph then runs."""
        batch = self.batch(held, "TARGET_VERIFY" if new > 1 else "DECODE", padding, new)
        with running(requests):
            self.backend.init_forward_metadata_out_graph(batch)
        path = self.router._verify if new > 1 else self.router._decode
        assert path is not None and self.router.path is None, "the graph knows what it runs"
        if new == 1:
            path.runner.append(batch.seq_lens, batch.out_cache_loc)  # captured with the graph
        self.router.path = path
        return batch

    def capture(self, rows: int, new: int = 1) -> None:
        batch = self.batch([[1] * new] * rows, "TARGET_VERIFY" if new > 1 else "DECODE", None, new)
        self.backend.init_forward_metadata_out_graph(batch, in_capture=True)
        self.backend.init_forward_metadata_in_graph(batch)
        assert bool(self.backend.forward_decode(
            torch.zeros(rows * new, 256).half().to(DEVICE), torch.zeros(1), torch.zeros(1), self.layer, batch, False
        ).isfinite().all())  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short spans are grouped, too; numbers of drafts stand for the spec infos of chains."""
    monkeypatch.setattr(cuda, "device_profile", lambda device: SimpleNamespace(decode_cost=EAGER))
    monkeypatch.setattr(router_module, "chain_drafts", lambda spec_info: spec_info)


def behind(prefix: int, rows: int, own: int, first: int = 1) -> list[list[int]]:
    """Slots of rows with one prefix in common."""
    begin = first + prefix
    return [[*range(first, begin), *range(begin + own * i, begin + own * (i + 1))] for i in range(rows)]


@pytest.mark.parametrize("new", [1, DRAFTS], ids=["decode", "verify"])
def test_a_captured_graph_replays_any_plan(new: int) -> None:
    """Padding, a plan that changes between replays, requests that are not known, and an idle rank."""
    server = Server()
    server.backend.init_cuda_graph_state(6, 6)
    server.capture(6, new)
    assert server.stats.packed_steps == 0 and server.stats.plans == 0, "a capture is no step"
    held = behind(60 if new == 1 else 300, 5, 9)  # short spans do not pay for drafts
    for rows, padding in ((held, 1), (held[:2], 4), (behind(3, 6, 12, first=100), 0), (held[1:4], 0)):
        batch = server.replay(rows, padding, Requests(rows, new), new)
        assert server.attend(batch, rows, new) < TOLERANCE
    assert server.stats.packed_steps == server.stats.plans == 4 and not server.stats.fallback_steps
    assert server.stats.kv_tokens_read < server.stats.kv_tokens_logical
    batch = server.replay(held, 1, None, new)
    assert server.attend(batch, held, new) < TOLERANCE
    server.attend(server.replay([], 6, None, new), [], new)  # of data-parallel attention


def test_a_plan_holds_between_replays() -> None:
    server = Server()
    server.backend.init_cuda_graph_state(4, 4)
    server.capture(4)
    held = behind(40, 3, 5)
    requests = Requests(held)
    for step in range(3):
        held = [[*row, 200 + 3 * step + i] for i, row in enumerate(held)] if step else held
        batch = server.replay(held, 1, requests)
        assert server.attend(batch, held) < TOLERANCE
    assert server.stats.plans == 1 and server.stats.packed_steps == 3


def test_an_eager_batch_is_packed() -> None:
    server, held = Server(), behind(60, 4, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    assert server.attend(batch, held) < TOLERANCE
    assert server.stats.as_dict()["rows_grouped"] == 4
    drafted = server.batch(held, "TARGET_VERIFY", None, DRAFTS)
    with running(Requests(held, DRAFTS)):
        server.backend.init_forward_metadata(drafted)
    assert server.attend(drafted, held, DRAFTS) < TOLERANCE and server.stats.packed_steps == 2


@pytest.mark.parametrize("on_gpu", [True, False])
def test_an_eager_batch_may_be_padded(on_gpu: bool) -> None:
    """Data-parallel attention pads the batches of its ranks to one size."""
    server, held = Server(), behind(60, 3, 5)
    if not on_gpu:
        cpu = CpuPaths(SHAPE, Config(check=True), server.stats).decode()
        server.router._on_gpu, server.router._make_decode = False, lambda max_rows: cpu
    batch = server.batch(held, padding=2)
    del batch.num_padding
    batch._original_batch_size = 3
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    assert server.attend(batch, held) < TOLERANCE
    assert server.stats.packed_steps == 1 and not server.stats.fallback_steps


@pytest.mark.parametrize(
    ("mode", "known", "reason"),
    [("DECODE", False, "no_batch"), ("TARGET_VERIFY", True, "speculative"), ("EXTEND", True, "extend")],
)
def test_what_is_not_packed_is_the_stock_backends(mode: str, known: bool, reason: str) -> None:
    server, held = Server(verify=False), behind(10, 2, 3)
    server.router.extend = None
    batch = server.batch(held, mode, None, DRAFTS if mode == "TARGET_VERIFY" else 1)
    with running(Requests(held) if known else None):
        server.backend.init_forward_metadata(batch)
    out = server.backend.forward_extend(torch.zeros(2, 256), None, None, server.layer, batch)
    assert (out == STOCK).all() and server.stats.fallback_steps == {reason: 1}


def test_too_many_rows_are_the_stock_backends() -> None:
    server, held = Server(), behind(4, 3, 2)
    server.router._decode = server.router._make_decode(2)
    with running(Requests(held)):
        server.backend.init_forward_metadata(server.batch(held))
    assert server.router.path is None and server.stats.fallback_steps == {"too_many_rows": 1}


def test_an_idle_rank_counts_nothing() -> None:
    server = Server()
    server.backend.init_forward_metadata(server.batch([], "IDLE"))
    server.backend.init_cuda_graph_state(2, 2)
    batch = server.batch([], "EXTEND", 2)
    server.backend.init_forward_metadata_out_graph(batch)
    assert server.router.path is None and not server.stats.fallback_steps


def test_only_chains_of_one_length_are_packed() -> None:
    server = Server()
    server.backend.init_cuda_graph_state(7, 7)
    chain = lambda spec: server.router._verify_path(  # noqa: E731
        SimpleNamespace(forward_mode=Mode("TARGET_VERIFY"), spec_info=spec)
    )
    assert chain(0) is None and chain(None) is None  # a tree; an idle rank before any graph
    made = chain(4)
    assert isinstance(made, PackedPath) and (made.row_tokens, made.max_rows) == (4, 7)
    assert chain(4) is made and chain(None) is made, "an idle rank replays what was captured"
    assert chain(6) is None and chain(0) is None
    assert server.router.kinds() == ["decode", "extend", "verify"]
    server.router._make_verify = None
    assert chain(4) is None and server.router.kinds() == ["decode", "extend"]


def test_a_graph_of_chains_is_not_replayed_for_trees() -> None:
    server = Server()
    server.backend.init_cuda_graph_state(3, 3)
    tree = server.batch(behind(9, 2, 4), "TARGET_VERIFY", 1, DRAFTS)
    tree.spec_info = 0
    server.backend.init_forward_metadata_out_graph(tree)  # captured as a tree: the stock backend's
    assert server.stats.fallback_steps == {"speculative": 1}
    server.capture(3, DRAFTS)
    with pytest.raises(RuntimeError, match="replayed with int, not with the chain of drafts"):
        server.backend.init_forward_metadata_out_graph(tree)


class Broken(Requests):
    """Requests of which SGLang's tree cannot be read."""

    def prefix_tree(self) -> PrefixTree:
        raise KeyError("no such node")


@pytest.mark.parametrize("new", [1, DRAFTS], ids=["decode", "verify"])
def test_a_graph_is_replayed_without_groups(new: int, caplog: pytest.LogCaptureFixture) -> None:
    """An exception would end the server; the graph needs a plan, and has a right one."""
    server, held = Server(), behind(60, 3, 5)
    server.backend.init_cuda_graph_state(4, 4)
    server.capture(4, new)
    for _ in range(2):
        batch = server.replay(held, 1, Broken(held, new), new)
        assert server.attend(batch, held, new) < TOLERANCE
    assert server.stats.fallback_steps == {"error": 2} and server.stats.kv_tokens_read == server.stats.kv_tokens_logical
    assert caplog.text.count("this batch is run without groups") == 1
    server.router.check = True  # who debugs wants to see it
    with pytest.raises(KeyError):
        server.replay(held, 1, Broken(held, new), new)


def test_an_eager_batch_that_fails_is_the_stock_backends(caplog: pytest.LogCaptureFixture) -> None:
    server, held = Server(), behind(60, 3, 5)
    batch = server.batch(held)
    for _ in range(3):
        with running(Broken(held)):
            server.backend.init_forward_metadata(batch)
        assert server.router.path is None
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert server.stats.fallback_steps == {"error": 3} and len(logged) == 1
    assert "planning failed, the stock backend runs this batch" in logged[0].getMessage()
    assert "no such node" in str(logged[0].exc_info[1])
    server.router.check = True
    with running(Broken(held)), pytest.raises(KeyError):
        server.backend.init_forward_metadata(batch)


@pytest.mark.parametrize("what", [{"score_mod": torch.zeros(4)}, {}], ids=["an argument", "no keys"])
def test_a_call_that_the_kernels_do_not_take_is_the_stock_backends(what: dict[str, torch.Tensor]) -> None:
    server, held = Server(), behind(60, 2, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    k = torch.zeros(1) if what else None
    out = server.backend.forward_decode(torch.zeros(2, 256).half(), k, k, server.layer, batch, False, **what)
    assert (out == STOCK).all() and server.stats.fallback_layers == {0: "extra_arguments"}


def test_an_argument_that_is_none_is_no_argument() -> None:
    server, held = Server(), behind(60, 2, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    q, k = torch.ones(2, 256).half(), torch.zeros(1)
    out = server.backend.forward_decode(q, k, k, server.layer, batch, False, sinks=None)
    assert (out != STOCK).all() and server.stats.fallback_layers == {}


def test_a_mask_of_the_stock_backend_is_respected() -> None:
    server, held = Server(), behind(60, 2, 5)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    server.backend.forward_metadata = SimpleNamespace(custom_mask=torch.ones(1))
    out = server.backend.forward_decode(torch.zeros(2, 256).half(), torch.zeros(1), None, server.layer, batch, False)
    assert (out == STOCK).all() and server.stats.fallback_layers == {0: "custom_mask"}


def test_rows_of_another_batch_are_not_taken_for_this_one() -> None:
    """A forward pass that SGLang did not build from its scheduler's batch, inside of one that it did."""
    server, held = Server(), behind(60, 3, 5)
    server.backend.init_cuda_graph_state(4, 4)
    server.capture(4)
    batch = server.replay(held, 1, Broken(held[:2]))
    assert server.attend(batch, held) < TOLERANCE and not server.stats.fallback_steps
    assert np.isclose(server.stats.kv_tokens_read, server.stats.kv_tokens_logical)


def test_batch_rows_compare_by_what_they_hold() -> None:
    one = BatchRows([1], [(3, 7, 20, 0)], None, {})
    assert one == BatchRows([1], [(3, 7, 20, 0)], None, {}) and one != BatchRows([1], [(3, 7, 20, 1)], None, {})
