"""The kernels in engines: each layer against stock, whole outputs, and every step's slots."""

from __future__ import annotations

from check.judge import Judge, account, packs
from check.scenarios import CHAIN, CHECK, EAGER, FA3, OURS, TRITON, Check, Scenario

TURNS = {"cuda_graph_max_bs_decode": 96, "max_running_requests": 96}
TALK = ("turns", "turns")

SCENARIOS = {
    "fa3": Scenario("llama", FA3),
    "triton": Scenario("llama", TRITON),
    "packinfer": Scenario("llama", OURS, rounds=("tree", "tree", "samples")),
    "verify-bf16": Scenario("llama", {**OURS, **EAGER}, CHECK),
    "verify-fp16": Scenario("llama", {**OURS, **EAGER, "dtype": "float16"}, CHECK),
    # graphs are replayed, and each plan compared with SGLang's table before
    "audit": Scenario("llama", OURS, CHECK, rounds=("tree", "tree", "samples")),
    # heads with which Hopper GPUs decode in one launch (``tiles.decodes_in_one_launch``)
    "wide-fa3": Scenario("llama-wide", FA3),
    "wide-triton": Scenario("llama-wide", TRITON),
    "wide-packinfer": Scenario("llama-wide", OURS, rounds=("tree", "tree", "samples")),
    "wide-audit": Scenario("llama-wide", OURS, CHECK, rounds=("tree", "tree", "samples")),
    "wide-verify": Scenario("llama-wide", {**OURS, **EAGER}, CHECK),
    "turns-fa3": Scenario("llama128", {**FA3, **TURNS}, rounds=TALK),
    "turns-triton": Scenario("llama128", {**TRITON, **TURNS}, rounds=TALK),
    "turns-packinfer": Scenario("llama128", {**OURS, **TURNS}, rounds=TALK),
    "turns-audit": Scenario("llama128", {**OURS, **TURNS}, CHECK, rounds=TALK),
    "turns-chain": Scenario("llama128", {**OURS, **TURNS, **CHAIN}, CHECK, rounds=TALK, logprobs=False),
}


def verify(judge: Judge) -> None:
    for name in ("verify-bf16", "verify-fp16"):
        _each_layer(judge, name)


def _each_layer(judge: Judge, name: str) -> None:
    if judge.started(name, name):
        ran = judge.ran[name]
        error = ran.state.get("check_error", 0.0)
        judge.add(name, packs(ran) and error > 0, f"worst relative error of a row {error:.2g}; {account(ran)}")


def logits(judge: Judge) -> None:
    if judge.started("logits", "packinfer", stock=("fa3", "triton")):
        judge.same("logits", "packinfer", "fa3", control="triton")
        own = judge.ran["packinfer"].said["2-samples"]
        groups = [own[i : i + 4] for i in range(0, len(own), 4)]
        equal = sum(sample["ids"] == group[0]["ids"] for group in groups for sample in group)
        judge.add("samples", len(own) == 12, f"{equal}/12 greedy samples equal the first of their prompt")

    if judge.started("audit", "audit", stock=("fa3", "triton")):
        judge.same("audit", "audit", "fa3", control="triton")
        judge.audited("audit")


def _as_stock(judge: Judge, check: str, kind: str) -> None:
    """``kind``-packinfer and ``kind``-audit say what ``kind``-fa3 says, and each step of the second was audited."""
    names, reference, control = (f"{kind}-packinfer", f"{kind}-audit"), f"{kind}-fa3", f"{kind}-triton"
    if judge.started(check, *names, stock=(reference, control)):
        for name in names:
            judge.same(name, name, reference, control=control, stock=f"{kind}-")
        judge.audited(f"{kind}-audit")


def one_launch(judge: Judge) -> None:
    _as_stock(judge, "one-launch", "wide")
    _each_layer(judge, "wide-verify")


def turns(judge: Judge) -> None:
    _as_stock(judge, "turns", "turns")
    if judge.started("turns-chain", "turns-chain", stock=("turns-fa3", "turns-triton", "chain-fa3")):
        judge.same("turns-chain", "turns-chain", "turns-fa3", control="turns-triton", stock="turns-")
        judge.audited("turns-chain")


CHECKS = {
    "verify": Check(verify, ("verify-bf16", "verify-fp16"), "each layer against stock, bf16 and fp16"),
    "logits": Check(
        logits, ("fa3", "triton", "packinfer", "audit"), "16 requests in a tree of prefixes, n samples", gpus=0
    ),
    "one-launch": Check(
        one_launch,
        ("wide-fa3", "wide-triton", "wide-packinfer", "wide-audit", "wide-verify"),
        "decode in one launch: 8 query heads of each of two KV heads",
    ),
    "turns": Check(
        turns,
        ("turns-fa3", "turns-triton", "turns-packinfer", "turns-audit", "turns-chain", "chain-fa3"),
        "96 requests at all turns of a conversation",
    ),
}
