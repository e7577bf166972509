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
    if judge.started("eagle chain", "chain-packinfer", "chain-eager", stock=("fa3-128", "chain-fa3")):
        chains(judge, "eagle chain", "chain-packinfer", "chain-eager", "fa3-128", "chain-fa3")


def chains(judge: Judge, what: str, graphs: str, eager: str, reference: str, control: str) -> None:
    """Rows: two engines that verify chains of drafts, ``eager`` with each layer checked, pack all those steps and say
    what ``reference`` says without drafts, or are as far from it as ``control`` is, stock with drafts."""
    for name in (graphs, eager):
        judge.same(what, name, reference, control=control)
        counted = judge.ran[name].state["fallback_steps"].get("speculative", 0)
        judge.add(f"{what} packed", counted == 0, f"{name}: {counted} verify steps on the base backend")
    error = judge.ran[eager].state["check_error"]
    judge.add(f"{what} verified", error > 0, f"worst relative error of a row {error:.2g}")


CHECKS = {
    "eagle": Check(
        eagle,
        ("fa3", "triton", "eagle-fa3", "eagle-packinfer", "fa3-128", "chain-fa3", "chain-packinfer", "chain-eager"),
        "EAGLE: chains of drafts packed, trees left to the stock backend",
    ),
}
