"""Models of which packinfer packs some layers, or none, and a KV cache that it does not read."""

from __future__ import annotations

from check.judge import Judge, account, packs
from check.scenarios import CHECK, DUMMY, EAGER, FA3, OURS, TRITON, WRAP, Check, Scenario

FP8 = {"kv_cache_dtype": "fp8_e4m3"}

SCENARIOS = {
    "fp8-fa3": Scenario("llama", {**FA3, **FP8}),
    "fp8-packinfer": Scenario("llama", {**OURS, **FP8}),
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
    if judge.started("fp8", "fp8-packinfer", stock=("fa3", "triton", "fp8-fa3")):
        judge.same("fp8", "fp8-packinfer", "fp8-fa3", packed=False)


CHECKS = {
    "wrap": Check(
        wrap,
        ("fa3", "triton", "gemma2-fa3", "gemma2-packinfer", "gemma3-fa3", "gemma3-packinfer", "llama4-wrap",
         "gpt_oss-wrap", "gemma4-wrap"),
        "`--packinfer-wrap`, and models with sliding windows",
    ),
    "fp8": Check(fp8, ("fa3", "triton", "fp8-fa3", "fp8-packinfer"), "FP8 KV cache: left to the stock backend"),
}  # fmt: skip
