"""What befalls a group in mid-generation, step by step on SGLang's scripted runtime (``group_scripts``)."""

from __future__ import annotations

from collections.abc import Iterator

import group_scripts
import pytest
from group_scripts import CHUNK, POOL
from lib.servers import START_LIMIT_S, free_port

pytestmark = pytest.mark.engine

SCRIPTS = {
    "retraction": (group_scripts.retraction,),
    "pause in place": (group_scripts.pause, "in_place"),
    "pause with retraction": (group_scripts.pause, "retract"),
    "abort": (group_scripts.abort,),
    "eviction": (group_scripts.eviction,),
    "late comer": (group_scripts.late_comer, False),
    "late comer, aborted": (group_scripts.late_comer, True),
}


@pytest.fixture(scope="module")
def server(wide_model) -> Iterator:
    from sglang.test.scripted_runtime import http_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "LISTENER_ACCEPT_TIMEOUT_S", START_LIMIT_S)  # on a busy machine
        patch.setattr(http_server, "SHUTDOWN_JOIN_TIMEOUT_S", 5)  # it does not end by itself
        patch.setenv("PACKINFER_CONFIG", '{"check": true}')
        # the runtime looks into the tree, into which the other core does not let it
        patch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "python")
        server = http_server.ScriptedHttpServer.start(
            port=free_port(), model_path=str(wide_model), attention_backend="packinfer", dtype="float32", random_seed=0,
            max_total_tokens=POOL, max_running_requests=16, chunked_prefill_size=CHUNK, log_level="warning",
            kv_canary="none", kv_canary_sweep_interval=0, kv_canary_real_data="none",  # which needs a GPU
        )  # fmt: skip
        try:
            yield server
        finally:
            server.shutdown()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(server, name: str) -> None:
    script, *args = SCRIPTS[name]
    server.execute_script(script, args=tuple(args))
