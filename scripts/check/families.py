"""Models of which packinfer packs some layers, or none, and a KV cache that it does not read."""

from __future__ import annotations

from check.judge import Judge, account, packs
from check.scenarios import CHECK, DUMMY, EAGER, FA3, OURS, TRITON, WRAP, Check, Scenario

FP8 = {"kv_cache_dtype": "fp8_e4m3"}

SCENARIOS = {
    "fp8-fa3": Scenario("llama", {**FA3, **FP8}),
    "fp8-triton": Scenario("llama", {**TRITON, **FP8}),
    "fp8-flashinfer": Scenario("llama", {"attention_backend": "flashinfer", **FP8}),
    "fp8-packinfer": Scenario("llama", {**OURS, **FP8}, {"extend": "on"}),
    "fp8-each": Scenario("llama", {**OURS, **FP8, **EAGER}, {"extend": "on", **CHECK}),
    "gemma2-fa3": Scenario("gemma2", FA3),
    "gemma2-packinfer": Scenario("gemma2", OURS),
    "gemma3-fa3": Scenario("gemma3", FA3),
    "gemma3-packinfer": Scenario("gemma3", OURS),
    "llama4-wrap": Scenario("llama4", {**FA3, **DUMMY, **EAGER}, {**WRAP, **CHECK}),
    "gpt_oss-wrap": Scenario("gpt_oss", {**FA3, **DUMMY}, WRAP),
    "gemma4-wrap": Scenario("gemma4", {**TRITON, **DUMMY}, WRAP),
}


def wrap(judge: Judge) -> None:
    for kind in ("gemma2", "gemma3"):
        if judge.started(kind, f"{kind}-packinfer", stock=("fa3", "triton", f"{kind}-fa3")):
            judge.same(kind, f"{kind}-packinfer", f"{kind}-fa3")
            layers = judge.ran[f"{kind}-packinfer"].state["fallback_layers"]
            judge.add(f"{kind} layers", layers == {"sliding_window": 2}, f"2 of 4 have a window: {layers}")
    if judge.started("llama4", "llama4-wrap"):
        ran = judge.ran["llama4-wrap"]
        ok = packs(ran) and ran.state["fallback_layers"] == {"sliding_window": 3} and ran.state["check_error"] > 0
        judge.add("llama4", ok, f"worst relative error of a row {ran.state.get('check_error', 0):.2g}; {account(ran)}")
    for kind in ("gpt_oss", "gemma4"):
        if judge.started(kind, f"{kind}-wrap"):
            ran = judge.ran[f"{kind}-wrap"]
            ok = bool(ran.state.get("reason")) and not ran.state.get("active")
            judge.add(kind, ok, account(ran))


def fp8(judge: Judge) -> None:
    """fa3 and triton round queries and weights to FP8, too; flashinfer, like packinfer, does not: how far it is from
    fa3 is allowed."""
    stock = ("fp8-fa3", "fp8-triton", "fp8-flashinfer")
    if judge.started("fp8", "fp8-packinfer", stock=stock):
        judge.same("fp8", "fp8-packinfer", "fp8-fa3", control="fp8-flashinfer", stock="fp8-")
    if judge.started("fp8: each layer", "fp8-each", stock=stock):
        ran = judge.ran["fp8-each"]
        ok = packs(ran) and 0 < ran.state["check_error"] and ran.state["packed_extends"] > 0
        error = f"worst relative error of a row {ran.state.get('check_error', 0):.2g}"
        judge.add("fp8: each layer", ok, f"{error}; {account(ran)}")


CHECKS = {
    "wrap": Check(
        wrap,
        ("fa3", "triton", "gemma2-fa3", "gemma2-packinfer", "gemma3-fa3", "gemma3-packinfer", "llama4-wrap",
         "gpt_oss-wrap", "gemma4-wrap"),
        "`--packinfer-wrap`, and models with sliding windows",
    ),
    "fp8": Check(
        fp8, ("fp8-fa3", "fp8-triton", "fp8-flashinfer", "fp8-packinfer", "fp8-each"), "FP8 KV cache (e4m3)"
    ),
}  # fmt: skip
