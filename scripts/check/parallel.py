"""Several GPUs: tensor, pipeline and data parallelism; and prefill and decode apart."""

from __future__ import annotations

from check.judge import Judge, account
from check.scenarios import CHECK, DP2, DP4, EAGER, FA3, OURS, PP2, TP2, TP4, Check, Scenario

DP_ATTENTION = {**TP2, **DP2, "enable_dp_attention": True}
DP_ATTENTION4 = {**TP4, **DP4, "enable_dp_attention": True}
UNEVEN = ("tree", "tree", "three", "one")

SCENARIOS = {
    "tp2-fa3": Scenario("llama", {**FA3, **TP2}, gpus=2),
    "tp2-packinfer": Scenario("llama", {**OURS, **TP2}, gpus=2),
    "dp2-packinfer": Scenario("llama", {**OURS, **DP2}, gpus=2),
    # the last rounds leave a rank with less to do than the other, or with nothing
    "dpa-fa3": Scenario("qwen3", {**FA3, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-eager-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION, **EAGER}, CHECK, rounds=UNEVEN, gpus=2),
    "pp2-fa3": Scenario("llama", {**FA3, **PP2}, gpus=2),
    "pp2-packinfer": Scenario("llama", {**OURS, **PP2}, gpus=2),
    "pp2-eager-packinfer": Scenario("llama", {**OURS, **PP2, **EAGER}, CHECK, gpus=2),
    # one KV head a rank, and two
    "kv8-fa3": Scenario("llama-kv8", FA3),
    "tp4-fa3": Scenario("llama", {**FA3, **TP4}, gpus=4),
    "tp4-packinfer": Scenario("llama", {**OURS, **TP4}, gpus=4),
    "tp4-eager-packinfer": Scenario("llama", {**OURS, **TP4, **EAGER}, CHECK, gpus=4),
    "tp4-kv8-fa3": Scenario("llama-kv8", {**FA3, **TP4}, gpus=4),
    "tp4-kv8-packinfer": Scenario("llama-kv8", {**OURS, **TP4}, gpus=4),
    "pp2tp2-fa3": Scenario("llama", {**FA3, **PP2, **TP2}, gpus=4),
    "pp2tp2-packinfer": Scenario("llama", {**OURS, **PP2, **TP2}, gpus=4),
    "dpa4-fa3": Scenario("qwen3", {**FA3, **DP_ATTENTION4}, rounds=UNEVEN, gpus=4),
    "dpa4-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION4}, rounds=UNEVEN, gpus=4),
    "dpa4-eager-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION4, **EAGER}, CHECK, rounds=UNEVEN, gpus=4),
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


def together(judge: Judge, kind: str, ranks: int, *more: str, alone: str = "fa3") -> None:
    """Rows: engines whose ranks compute each step together say what the stock engine of that ``kind`` says, and what
    one GPU says; and all ranks pack the same steps. ``more``: other packinfer engines of it; ``alone``: on one GPU."""
    stock, ours = f"{kind}-fa3", (f"{kind}-packinfer", *more)
    if not judge.started(kind, *ours, stock=("fa3", "triton", *dict.fromkeys((alone, stock)))):
        return
    judge.same(f"{kind} against one GPU", ours[0], alone, control=stock)
    for name in ours:
        judge.same(name, name, stock)
        steps = judge.ran[name].ranks
        judge.add(f"{name} ranks", len(steps) == ranks and len(set(steps.values())) == 1, f"packed steps {steps}")


def tp(judge: Judge) -> None:
    together(judge, "tp2", 2)


def pp(judge: Judge) -> None:
    together(judge, "pp2", 2, "pp2-eager-packinfer")


def tp4(judge: Judge) -> None:
    together(judge, "tp4", 4, "tp4-eager-packinfer")
    together(judge, "tp4-kv8", 4, alone="kv8-fa3")


def pp_tp(judge: Judge) -> None:
    together(judge, "pp2tp2", 4)


def dp(judge: Judge) -> None:
    if judge.started("dp 2", "dp2-packinfer", stock=("fa3", "triton")):
        judge.same("dp 2", "dp2-packinfer", "fa3")
    dp_attention(judge, "dpa")


def dp4(judge: Judge) -> None:
    dp_attention(judge, "dpa4")


def dp_attention(judge: Judge, kind: str) -> None:
    for name in (f"{kind}-packinfer", f"{kind}-eager-packinfer"):
        if judge.started(name, name, stock=("fa3", "triton", f"{kind}-fa3")):
            judge.same(name, name, f"{kind}-fa3")


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
    "tp": Check(tp, ("fa3", "triton", "tp2-fa3", "tp2-packinfer"), "tensor parallelism 2", gpus=2),
    "pp": Check(
        pp, ("fa3", "triton", "pp2-fa3", "pp2-packinfer", "pp2-eager-packinfer"), "pipeline parallelism 2", gpus=2
    ),
    "dp": Check(
        dp,
        ("fa3", "triton", "dp2-packinfer", "dpa-fa3", "dpa-packinfer", "dpa-eager-packinfer"),
        "data parallelism 2, data-parallel attention over 2 ranks",
        gpus=2,
    ),
    "tp4": Check(
        tp4,
        ("fa3", "triton", "tp4-fa3", "tp4-packinfer", "tp4-eager-packinfer", "kv8-fa3", "tp4-kv8-fa3",
         "tp4-kv8-packinfer"),
        "tensor parallelism 4, 1 and 2 KV heads a rank",
        gpus=4,
    ),
    "pp-tp": Check(
        pp_tp, ("fa3", "triton", "pp2tp2-fa3", "pp2tp2-packinfer"), "pipeline x tensor parallelism 2 x 2", gpus=4
    ),
    "dp4": Check(
        dp4,
        ("fa3", "triton", "dpa4-fa3", "dpa4-packinfer", "dpa4-eager-packinfer"),
        "data-parallel attention over 4 ranks",
        gpus=4,
    ),
    "pd": Check(pd, ("pd-decode", "pd-prefill"), "prefill and decode apart, without a transfer"),
}  # fmt: skip
