"""Prefill and decode servers behind SGLang's router: the command lines, and (nightly) a real pair on the CPU."""

from __future__ import annotations

import sys

import pytest
from check import pd
from check.areas import SCENARIOS
from check.compare import compare
from check.judge import packs
from check.models import write_model
from check.runs import run
from check_engine import for_device
from lib.answers import NEAR_TIE


def test_flags_are_those_of_the_command_line():
    flags = list(
        pd.flags_of({"mem_fraction_static": 0.8, "disable_cuda_graph": True, "attention_backend": "packinfer"})
    )
    assert flags == ["--mem-fraction-static", "0.8", "--disable-cuda-graph", "--attention-backend", "packinfer"]


def test_a_server_that_cannot_start_leaves_its_reason(tmp_path, monkeypatch):
    fail = "print('[2026-01-01] ImportError: Please install mooncake', flush=True); raise SystemExit(1)"
    monkeypatch.setattr(pd.Server, "command", (sys.executable, "-c", fail))
    ran = pd.run_pair("x", for_device(pd.SCENARIOS["pd-fa3"], 0), "mooncake", 0, tmp_path)
    assert set(ran) == {"x"}
    assert ran["x"].problem.startswith("while starting: the x-prefill server ended with code 1")
    assert ran["x"].problem.endswith("; [2026-01-01] ImportError: Please install mooncake")


def test_the_reason_has_what_the_library_said_and_what_python_made_of_it():
    log = "E1127 13:29:48.18 1735 ucx_utils.cpp:674] VRAM is detected as host\nx\n"
    log += "nixl.nixlBackendError: NIXL_ERR_BACKEND\n"
    assert pd.reason(log) == "VRAM is detected as host: nixl.nixlBackendError: NIXL_ERR_BACKEND"
    assert pd.reason("I1127 13:29:48.18 1735 x.cpp:1] all is well\n") == ""


@pytest.mark.nightly
def test_a_pair_says_what_one_engine_says(tmp_path):
    """KV is sent from the one's memory to the other's; what has come once is shared, and then read once."""
    for package in ("mooncake.engine", "sglang_router"):
        pytest.importorskip(package, reason=f"{package} is no dependency of the tests", exc_type=ImportError)
    write_model("llama", tmp_path / "models")
    alone = run("torch_native", for_device(SCENARIOS["fa3"], 0), 21_000, tmp_path)
    ran = pd.run_pair("pd", for_device(pd.SCENARIOS["pd-packinfer"], 0), "mooncake", 0, tmp_path)
    assert not alone.problem and not ran["pd"].problem
    diff = compare(ran["pd"], alone)
    assert diff.of == 32 and diff.drift <= NEAR_TIE and diff.gap <= NEAR_TIE, str(diff)
    assert packs(ran["pd"]) and ran["pd-prefill"].state["active"]
