"""Greedy outputs of packinfer are those of the stock backend, token for token, on real engines.

An engine for each set of flags; what it counted is looked at after each round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import faults
import pytest
from compare import check, differences
from engines import POOL, SGLANG, run_engine

pytestmark = pytest.mark.engine

ALL = ["tree", "cold", "samples", "abort", "flush", "tree"]
BEAMS = ["beams"] if SGLANG != "0.5.17" else []


class Case(NamedTuple):
    flags: dict[str, Any]
    config: dict[str, Any] = {}
    rounds: list[str] = ALL
    faults: tuple[str, ...] = ()
    env: dict[str, str] = {}
    contract: bool = False  # also on the oldest release


CASES = {
    "default": Case({}, rounds=["tree", "cold", "samples", *BEAMS, "abort", "flush", "tree"], contract=True),
    # memory and places are short; held requests find their prefix one pass earlier than with overlap
    "no-overlap": Case(
        {"disable_overlap_schedule": True, "max_total_tokens": 2600, "max_running_requests": 4,
         "schedule_policy": "lpm"},
        {"extend": "off"},
        ["busy", "family", "tree", "cold", "samples", "abort", "flush", "tree"],
    ),
    "mixed-chunk": Case({"chunked_prefill_size": 128, "enable_mixed_chunk": True}, {"extend": "on"}, contract=True),
    "no-radix-cache": Case({"disable_radix_cache": True}, {"extend": "on"}, contract=True),
    # slots are freed and used again all the time, and NaN while they belong to no request
    "retraction": Case(
        {"max_total_tokens": 2600}, rounds=["busy", "cold", "flush", "tree", "abort"], faults=("poison",),
        env={"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "25"}, contract=True,
    ),
}  # fmt: skip
if SGLANG != "0.5.17":  # its paged allocator needs a GPU
    CASES["page-16"] = Case({"page_size": 16}, {"extend": "on"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.contract] if case.contract else []) for name, case in CASES.items()]
)
def test_outputs_equal_stock(name, model, stock, tmp_path):
    case = CASES[name]
    engine = {"model_path": model, "attention_backend": "packinfer", **POOL, **case.flags}
    env = faults.install(tmp_path, *case.faults) if case.faults else {}
    ran = run_engine({"engine": engine, "rounds": case.rounds}, {"check": True, **case.config}, {**env, **case.env})
    check(ran.said, stock)
    state = ran.state
    assert state["active"] and state["packed_steps"] > 30
    extend = case.config.get("extend", "auto")
    if extend == "on":
        assert state["fallback_steps"] == {} and state["packed_extends"] > 10
    else:
        assert state["fallback_steps"].keys() == {"extend"} and (state["packed_extends"] > 0) == (extend == "auto")
    if name == "no-radix-cache":
        assert state["kv_tokens_read"] == state["kv_tokens_logical"]
    else:
        assert state["kv_tokens_unique"] <= state["kv_tokens_read"] < 0.6 * state["kv_tokens_logical"]
    if name == "retraction":
        assert any(out["retracted"] for out in ran.said["0-busy"])
    held = state["held"]
    if name == "no-radix-cache":
        assert held["reason"] == "there is no radix cache" and held["requests"] == 0
    else:
        assert held["reason"] is None
    if name in ("default", "no-overlap"):  # seven of the eight of `cold`, and of `family`
        assert held["requests"] >= 7 and held["prefix_tokens"] >= 7 * 450
    if name == "default":
        samples_and_beams_are_grouped(ran)


def samples_and_beams_are_grouped(ran) -> None:
    """4 rows behind each prompt: of three prompts, or of two, of which no beam ever enters the tree."""
    for name, rows in (("2-samples", 12), *([("3-beams", 8)] if BEAMS else [])):
        assert ran.states[name]["rows"] == ran.states[name]["rows_grouped"] == rows
        unique, read, logical = (ran.counted(name, f"kv_tokens_{kind}") for kind in ("unique", "read", "logical"))
        assert unique <= read < 0.4 * logical


@pytest.mark.contract
def test_the_stock_server_does_not_notice_broken_hooks(stock_engine):
    assert stock_engine.state["active"] is False and stock_engine.state["reason"]


@pytest.mark.contract
def test_fp8_kv_equals_stock(model):
    """Layer by layer. Texts may differ: a last bit of float32 decides how a key of the next layer is rounded to FP8."""
    engine = {"model_path": model, "attention_backend": "packinfer", **POOL, "kv_cache_dtype": "fp8_e4m3"}
    rounds = ["tree", "cold", "flush", "tree"]
    config = {"check": True, "extend": "on", "arena_tokens": 600, "hold_siblings": False}
    state = run_engine({"engine": engine, "rounds": rounds}, config).state
    assert state["held"] is None
    assert state["active"] and state["packed_steps"] > 30 and state["packed_extends"] > 3
    assert state["fallback_layers"] == {} and state["arena"]["copies"] > 0 and 0 < state["check_error"] < 1e-5


def test_one_missing_token_shows(model, stock, tmp_path):
    """The tests above can see a bug as small as one prefix token that one group does not read."""
    engine = {"model_path": model, "attention_backend": "packinfer", **POOL}
    env = faults.install(tmp_path, "drop-token")
    wrong, _ = differences(run_engine({"engine": engine, "rounds": ["tree"]}, env=env).said["0-tree"], stock["tree"])
    assert len(wrong) >= 8


@pytest.mark.contract
def test_sinks(model, stock, tmp_path):
    """Layers that SGLang calls with sinks, in decode and extend steps, each against stock (``check``)."""
    env = faults.install(tmp_path, "sinks")
    engines = {name: {"model_path": model, "attention_backend": name, **POOL} for name in ("torch_native", "packinfer")}
    scenario = {"engine": engines["torch_native"], "rounds": ["tree"], "logprobs": True}
    with_sinks = run_engine(scenario, env=env).said["0-tree"]
    assert len(differences(with_sinks, stock["tree"])[0]) >= 8, "sinks do not matter here"
    ran = run_engine({"engine": engines["packinfer"], "rounds": ["tree", "tree"]}, {"check": True, "extend": "on"}, env)
    check(ran.said, {"tree": with_sinks})
    state = ran.state
    assert state["packed_steps"] > 10 and state["packed_extends"] > 1 and 0 < state["check_error"] < 1e-5
    assert state["fallback_steps"] == state["fallback_layers"] == {}
    assert state["kv_tokens_read"] < 0.6 * state["kv_tokens_logical"]
