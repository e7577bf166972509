"""Models of which packinfer packs some layers, or none, and a KV cache that it does not read."""

from __future__ import annotations

from check.compare import compare
from check.judge import Judge, account, packs
from check.scenarios import CHECK, DUMMY, EAGER, FA3, OURS, TRITON, WRAP, Check, Scenario

# what SGLang would choose needs a package that not every host has
EXPERTS = {"moe_runner_backend": "triton"}
FP8 = {"kv_cache_dtype": "fp8_e4m3"}

SCENARIOS = {
    "fp8-fa3": Scenario("llama", {**FA3, **FP8}),
    "fp8-triton": Scenario("llama", {**TRITON, **FP8}),
    "fp8-packinfer": Scenario("llama", {**OURS, **FP8}, {"extend": "on"}),
    "fp8-each": Scenario("llama", {**OURS, **FP8, **EAGER}, {"extend": "on", **CHECK}),
    "gemma2-fa3": Scenario("gemma2", FA3),
    "gemma2-packinfer": Scenario("gemma2", OURS),
    "gemma3-fa3": Scenario("gemma3", FA3),
    "gemma3-packinfer": Scenario("gemma3", OURS),
    "llama4-wrap": Scenario("llama4", {**FA3, **DUMMY, **EAGER}, {**WRAP, **CHECK}),
    "gpt_oss-fa3": Scenario("gpt_oss", {**FA3, **EXPERTS}),
    "gpt_oss-triton": Scenario("gpt_oss", {**TRITON, **EXPERTS}),
    "gpt_oss-wrap": Scenario("gpt_oss", {**FA3, **EXPERTS}, WRAP),
    "gpt_oss-triton-wrap": Scenario("gpt_oss", {**TRITON, **EXPERTS}, WRAP),
    "gpt_oss-eager-wrap": Scenario("gpt_oss", {**FA3, **EXPERTS, **EAGER}, {**WRAP, **CHECK}),
    # windows and full layers in one pool
    "gpt_oss-pool-wrap": Scenario("gpt_oss", {**FA3, **EXPERTS, "disable_hybrid_swa_memory": True}, WRAP),
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
    if judge.started("gemma4", "gemma4-wrap"):
        ran = judge.ran["gemma4-wrap"]
        ok = bool(ran.state.get("reason")) and not ran.state.get("active")
        judge.add("gemma4", ok, account(ran))


def sinks(judge: Judge) -> None:
    """Each against its own base: fa3's text of this model and triton's differ by more than near ties, from early on."""
    for name in ("gpt_oss-wrap", "gpt_oss-triton-wrap", "gpt_oss-eager-wrap", "gpt_oss-pool-wrap"):
        base = "gpt_oss-triton" if "triton" in name else "gpt_oss-fa3"
        if judge.started(name, name, stock=("fa3", "triton", base)):
            judge.same(name, name, base)
            state = judge.ran[name].state
            layers, error = state["fallback_layers"], state.get("check_error") or 0.0
            ok = layers == {"sliding_window": 2} and (error > 0) == ("eager" in name)
            judge.add(
                f"{name} layers", ok, f"2 of 4 have a window: {layers}; worst relative error of a row {error:.2g}"
            )


def fp8(judge: Judge) -> None:
    """No stock backend computes what packinfer does: fa3 and triton round queries and weights to FP8, flashinfer reads
    new tokens as they were before they were rounded. With this model the texts of fa3 and triton part at once and for
    good, so that ours may be as far from fa3's as theirs; how exact the kernels are, tests/kernels say."""
    stock = ("fp8-fa3", "fp8-triton")
    if judge.started("fp8", "fp8-packinfer", stock=stock):
        ours, theirs = (compare(judge.ran[name], judge.ran["fp8-fa3"]) for name in ("fp8-packinfer", "fp8-triton"))
        ok = packs(judge.ran["fp8-packinfer"]) and ours.of > 0 and ours.drift <= judge.limit("fp8-")
        note = f"against fp8-fa3: {ours}; fp8-triton: {theirs}; {account(judge.ran['fp8-packinfer'])}"
        judge.add("fp8", ok, note)
    if judge.started("fp8: each layer", "fp8-each", stock=stock):
        ran = judge.ran["fp8-each"]
        # fa3's queries and weights are off by up to 1/16 each
        ok = packs(ran) and 0 < ran.state["check_error"] < 2 / 16 and ran.state["packed_extends"] > 0
        error = f"worst relative error of a row {ran.state.get('check_error', 0):.2g}"
        judge.add("fp8: each layer", ok, f"{error}; {account(ran)}")


CHECKS = {
    "wrap": Check(
        wrap,
        ("fa3", "triton", "gemma2-fa3", "gemma2-packinfer", "gemma3-fa3", "gemma3-packinfer", "llama4-wrap",
         "gemma4-wrap"),
        "`--packinfer-wrap`, and models with sliding windows",
    ),
    "sinks": Check(
        sinks, ("fa3", "triton", *(name for name in SCENARIOS if name.startswith("gpt_oss"))),
        "attention sinks: a gpt-oss kind, its full-attention layers",
    ),
    "fp8": Check(
        fp8, ("fp8-fa3", "fp8-triton", "fp8-packinfer", "fp8-each"), "FP8 KV cache (e4m3)"
    ),
}  # fmt: skip
