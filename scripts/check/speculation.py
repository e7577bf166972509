"""EAGLE: trees of drafts, whose verify steps stay with the stock backend, and chains, whose steps are packed."""

from __future__ import annotations

from check.judge import Judge
from check.scenarios import CHAIN, CHECK, EAGER, EAGLE, FA3, OURS, Check, Scenario

# verify steps are grouped where it pays: with a tiny model, behind a long prefix
DEEP = ("deep", "deep")

SCENARIOS = {
    "eagle-fa3": Scenario("llama", {**FA3, **EAGLE}, logprobs=False),
    "eagle-packinfer": Scenario("llama", {**OURS, **EAGLE}, logprobs=False),
    "fa3-128": Scenario("llama128", FA3, rounds=DEEP),
    "chain-fa3": Scenario("llama128", {**FA3, **CHAIN}, rounds=DEEP, logprobs=False),
    "chain-packinfer": Scenario("llama128", {**OURS, **CHAIN}, rounds=(*DEEP, "three", "one"), logprobs=False),
    "chain-eager": Scenario(
        "llama128", {**OURS, **CHAIN, **EAGER}, CHECK, rounds=(*DEEP, "three", "one"), logprobs=False
    ),
}


def eagle(judge: Judge) -> None:
    if not judge.started("eagle", "eagle-packinfer", stock=("fa3", "triton", "eagle-fa3")):
        return
    judge.same("eagle", "eagle-packinfer", "fa3", packed=False, control="eagle-fa3")
    state = judge.ran["eagle-packinfer"].state
    counted = state.get("fallback_steps", {}).get("speculative", 0)
    accepted = {name: judge.ran[name].state.get("accept_length") for name in ("eagle-packinfer", "eagle-fa3")}
    judge.add("eagle counted", bool(state.get("active")) and counted > 0, f"{counted} verify steps; {accepted}")
    if not judge.started("eagle chain", "chain-packinfer", "chain-eager", stock=("fa3-128", "chain-fa3")):
        return
    for name in ("chain-packinfer", "chain-eager"):
        judge.same("eagle chain", name, "fa3-128", control="chain-fa3")
        counted = judge.ran[name].state["fallback_steps"].get("speculative", 0)
        judge.add("eagle chain packed", counted == 0, f"{name}: {counted} verify steps on the base backend")
    error = judge.ran["chain-eager"].state["check_error"]
    judge.add("eagle chain verified", error > 0, f"worst relative error of a row {error:.2g}")


CHECKS = {
    "eagle": Check(
        eagle,
        ("fa3", "triton", "eagle-fa3", "eagle-packinfer", "fa3-128", "chain-fa3", "chain-packinfer", "chain-eager"),
        "EAGLE: chains of drafts packed, trees left to the stock backend",
    ),
}
