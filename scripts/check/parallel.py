"""Several GPUs, and prefill and decode apart."""

from __future__ import annotations

from check.judge import Judge, account
from check.scenarios import CHECK, DP2, EAGER, FA3, OURS, TP2, Check, Scenario

DP_ATTENTION = {**TP2, **DP2, "enable_dp_attention": True}
UNEVEN = ("tree", "tree", "three", "one")

SCENARIOS = {
    "tp2-fa3": Scenario("llama", {**FA3, **TP2}, gpus=2),
    "tp2-packinfer": Scenario("llama", {**OURS, **TP2}, gpus=2),
    "dp2-packinfer": Scenario("llama", {**OURS, **DP2}, gpus=2),
    # the last rounds leave a rank with less to do than the other, or with nothing
    "dpa-fa3": Scenario("qwen3", {**FA3, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-eager-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION, **EAGER}, CHECK, rounds=UNEVEN, gpus=2),
    "pd-decode": Scenario(
        "llama",
        {**OURS, "disaggregation_mode": "decode", "disaggregation_transfer_backend": "fake"},
        rounds=("tree",),
        logprobs=False,
    ),
    "pd-prefill": Scenario(
        "llama",
        {**OURS, "disaggregation_mode": "prefill", "disaggregation_transfer_backend": "mooncake_tcp"},
        rounds=(),
    ),
}


def tp(judge: Judge) -> None:
    if judge.started("tp", "tp2-packinfer", stock=("fa3", "triton", "tp2-fa3")):
        judge.same("tp 2 against 1", "tp2-packinfer", "fa3", control="tp2-fa3")
        judge.same("tp 2", "tp2-packinfer", "tp2-fa3")
        judge.add("tp ranks", len(judge.ran["tp2-packinfer"].ranks) == 2, str(judge.ran["tp2-packinfer"].ranks))


def dp(judge: Judge) -> None:
    if judge.started("dp 2", "dp2-packinfer", stock=("fa3", "triton")):
        judge.same("dp 2", "dp2-packinfer", "fa3")
    for name in ("dpa-packinfer", "dpa-eager-packinfer"):
        if judge.started(name, name, stock=("dpa-fa3",)):
            judge.same(name, name, "dpa-fa3")


def pd(judge: Judge) -> None:
    if judge.started("pd decode", "pd-decode"):
        ran = judge.ran["pd-decode"]  # its prompts' KV is never written: nothing to compare, nothing in the tree
        lengths = {len(out["ids"]) for out in ran.said["0-tree"]}
        state = ran.state
        ok = bool(state.get("active")) and state["packed_steps"] > 0 and min(lengths) > 1
        judge.add("pd decode", ok, f"answers of {sorted(lengths)} tokens (fake transfer); {account(ran)}")
    problem = judge.ran["pd-prefill"].problem
    verdict = "REFUSED" if problem.startswith("while starting") else "FAIL" if problem else "PASS"
    judge.row("pd prefill", verdict, problem or f"started; {account(judge.ran['pd-prefill'])}")


CHECKS = {
    "tp": Check(tp, ("fa3", "triton", "tp2-fa3", "tp2-packinfer"), gpus=2),
    "dp": Check(dp, ("fa3", "triton", "dp2-packinfer", "dpa-fa3", "dpa-packinfer", "dpa-eager-packinfer"), gpus=2),
    "pd": Check(pd, ("pd-decode", "pd-prefill")),
}
