"""SGLang's own test of its deterministic mode (``sglang.test.test_deterministic``), on packinfer, on a GPU.

Not its mode ``p_vs_d``: that prefill and decode of a token have the same bits is not promised (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import Packed
from lib.servers import Server
from rich.console import Console
from test_server_kits import Ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the mode is for Hopper"
    ),
]
FLAGS = (
    "--enable-deterministic-inference --dtype bfloat16 --random-seed 0 --log-level warning --max-total-tokens 200000 "
    "--allow-auto-truncate --mem-fraction-static 0.5"
).split()
SERVERS = {
    "packinfer": ["--attention-backend", "packinfer"],
    "packinfer, pages of 64": ["--attention-backend", "packinfer", "--page-size", "64"],
    "wrapped fa3": ["--attention-backend", "fa3", "--packinfer-wrap"],
}


@pytest.fixture(scope="module", params=SERVERS)
def packed(request, wide_model, tmp_path_factory) -> Iterator[Packed]:
    flags = ["--model-path", wide_model, *FLAGS, *SERVERS[request.param]]
    server = Server("deterministic", flags, tmp_path_factory.mktemp("deterministic") / "log")
    try:
        server.wait(Console(quiet=True))
        yield Packed(server, wide_model)
    finally:
        server.stop()
        print("\n".join(server.tail(40)))


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("single", {"n_start": 10, "n_trials": 20}),
        ("single", {"n_start": 10, "n_trials": 20, "temperature": 0.5}),
        ("prefix", {"n_start": 10, "n_trials": 10, "temperature": 0.5, "return_logprob": True}),
        ("prefix", {"n_start": 30, "n_trials": 10, "return_logprob": True}),
        ("radix_cache", {}),
    ],
    ids=lambda x: str(x),
)
def test_mode(packed: Packed, mode: str, more: dict, monkeypatch) -> None:
    from sglang.test import test_deterministic as theirs

    # its ids, but in the tiny model's vocabulary
    monkeypatch.setattr(theirs, "random", Ids(0))
    host, port = packed.url.removeprefix("http://").split(":")
    args = theirs.BenchArgs(host=host, port=int(port), test_mode=mode, **more)
    before = packed.counted()
    results = theirs.test_deterministic(args)
    after = packed.counted()
    assert results and all(result == 1 for result in results), results
    assert after["packed_steps"] > before["packed_steps"] and after["deterministic"]["unit_tokens"] >= 512
    assert set(after["fallback_steps"]) <= {"extend", "no_batch"}
