"""Whole engines on CUDA: is packinfer right, and does it start with what else SGLang can do?

    python scripts/check_engine.py [--only verify,logits,turns,tp,dp,pd,eagle,wrap,fp8] [--out DIR]

Writes tiny models with random weights, runs every engine in processes of its own, several at once on one GPU, and
prints one line for each check: PASS, FAIL, or REFUSED with the line that says why. Exit code 0 unless one FAILs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from check.models import write_model
from check.runs import Ran, Scenario, compare, run

ENGINE = {
    "dtype": "bfloat16",
    "mem_fraction_static": 0.8,
    "max_total_tokens": 40000,
    "cuda_graph_max_bs_decode": 32,
    "cuda_graph_backend_prefill": "disabled",
    "random_seed": 0,
    "log_level": "info",
}


@dataclass
class Row:
    check: str
    verdict: str
    note: str


FA3 = {"attention_backend": "fa3"}
OURS = {"attention_backend": "packinfer"}
EAGER = {"disable_cuda_graph": True}
CHECK = {"check": True}
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_path": "eagle",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 4,
    "speculative_num_draft_tokens": 8,
}
CHAIN = {**EAGLE, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
# SGLang's own all-reduce may use NVLink multicast, which not every host allows
TP2, DP2 = {"tp_size": 2, "disable_custom_all_reduce": True}, {"dp_size": 2}
DP_ATTENTION = {**TP2, **DP2, "enable_dp_attention": True}
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
TRITON = {"attention_backend": "triton"}
WRAP = {"wrap": True}
DUMMY = {"load_format": "dummy"}
STOCK = "-unwrapped"  # a wrapped engine that failed, once more without packinfer
UNEVEN = ("tree", "tree", "three", "one")
# verify steps are grouped where it pays: with a tiny model, behind a long prefix
DEEP = ("deep", "deep")
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
    "turns-fa3": Scenario("llama128", {**FA3, **TURNS}, rounds=TALK),
    "turns-triton": Scenario("llama128", {**TRITON, **TURNS}, rounds=TALK),
    "turns-packinfer": Scenario("llama128", {**OURS, **TURNS}, rounds=TALK),
    "turns-audit": Scenario("llama128", {**OURS, **TURNS}, CHECK, rounds=TALK),
    "turns-chain": Scenario("llama128", {**OURS, **TURNS, **CHAIN}, CHECK, rounds=TALK, logprobs=False),
    "eagle-fa3": Scenario("llama", {**FA3, **EAGLE}, logprobs=False),
    "eagle-packinfer": Scenario("llama", {**OURS, **EAGLE}, logprobs=False),
    "fa3-128": Scenario("llama128", FA3, rounds=DEEP),
    "chain-fa3": Scenario("llama128", {**FA3, **CHAIN}, rounds=DEEP, logprobs=False),
    "chain-packinfer": Scenario("llama128", {**OURS, **CHAIN}, rounds=(*DEEP, "three", "one"), logprobs=False),
    "chain-eager": Scenario(
        "llama128", {**OURS, **CHAIN, **EAGER}, CHECK, rounds=(*DEEP, "three", "one"), logprobs=False
    ),
    "fp8-fa3": Scenario("llama", {**FA3, **FP8}),
    "fp8-packinfer": Scenario("llama", {**OURS, **FP8}),
    "gemma2-fa3": Scenario("gemma2", FA3),
    "gemma2-packinfer": Scenario("gemma2", OURS),
    "gemma3-fa3": Scenario("gemma3", FA3),
    "gemma3-packinfer": Scenario("gemma3", OURS),
    "llama4-wrap": Scenario("llama4", {**FA3, **DUMMY, **EAGER}, {**WRAP, **CHECK}),
    "gpt_oss-wrap": Scenario("gpt_oss", {**FA3, **DUMMY}, WRAP),
    "gemma4-wrap": Scenario("gemma4", {**TRITON, **DUMMY}, WRAP),
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
    "tp2-fa3": Scenario("llama", {**FA3, **TP2}, gpus=2),
    "tp2-packinfer": Scenario("llama", {**OURS, **TP2}, gpus=2),
    "dp2-packinfer": Scenario("llama", {**OURS, **DP2}, gpus=2),
    # the last rounds leave a rank with less to do than the other, or with nothing
    "dpa-fa3": Scenario("qwen3", {**FA3, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION}, rounds=UNEVEN, gpus=2),
    "dpa-eager-packinfer": Scenario("qwen3", {**OURS, **DP_ATTENTION, **EAGER}, CHECK, rounds=UNEVEN, gpus=2),
}
CHECKS = {
    "verify": ("verify-bf16", "verify-fp16"),
    "logits": ("fa3", "triton", "packinfer", "audit"),
    "turns": ("turns-fa3", "turns-triton", "turns-packinfer", "turns-audit", "turns-chain", "chain-fa3"),
    "tp": ("fa3", "triton", "tp2-fa3", "tp2-packinfer"),
    "dp": ("fa3", "triton", "dp2-packinfer", "dpa-fa3", "dpa-packinfer", "dpa-eager-packinfer"),
    "pd": ("pd-decode", "pd-prefill"),
    "eagle": (
        "fa3", "triton", "eagle-fa3", "eagle-packinfer", "fa3-128", "chain-fa3", "chain-packinfer", "chain-eager",
    ),
    "wrap": (
        "fa3", "triton", "gemma2-fa3", "gemma2-packinfer", "gemma3-fa3", "gemma3-packinfer", "llama4-wrap",
        "gpt_oss-wrap", "gemma4-wrap",
    ),
    "fp8": ("fa3", "triton", "fp8-fa3", "fp8-packinfer"),
}  # fmt: skip


def account(ran: Ran) -> str:
    """The plugin's own account of an engine, in a few words."""
    parts = []
    for state in ran.states:
        if not state.get("active"):
            parts.append(f"inactive: {state.get('reason')}")
            continue
        text = f"{state['packed_steps']} packed steps over {state['base_backend']}"
        text += f", KV tokens read {state['kv_tokens_read']} of {state['kv_tokens_logical']}"
        for kind in ("fallback_steps", "fallback_layers", "fitted_plans", "audited_steps"):
            if state.get(kind):
                text += f", {kind} {state[kind]}"
        parts.append(text)
    ranks = f"; packed steps by rank {ran.ranks}" if len(ran.ranks) > 1 else ""
    return "; ".join(parts) + ranks


def packs(ran: Ran) -> bool:
    """Every rank that can be seen decoded on the packed kernels, and reads shared tokens once."""
    states = [s for s in ran.states if s.get("active")]
    return (
        bool(states)
        and len(states) == len(ran.states)
        and all(s["packed_steps"] > 0 and s["kv_tokens_read"] < s["kv_tokens_logical"] for s in states)
        and all(steps > 0 for steps in ran.ranks.values())
    )


class Judge:
    def __init__(self, ran: dict[str, Ran]) -> None:
        self.ran, self.rows = ran, []

    def add(self, check: str, ok: bool, note: str) -> None:
        self.rows.append(Row(check, "PASS" if ok else "FAIL", note))

    def started(self, check: str, *names: str, stock: Iterable[str] = ()) -> bool:
        """Whether all engines gave a result. If not, a row: REFUSED if it is a stock engine, or one that fails without
        packinfer, too, or if a line of packinfer's own says why it does not start."""
        for name in [*stock, *names]:
            problem = self.ran[name].problem
            if problem:
                refused = name in stock or (problem.startswith("while starting") and "packinfer:" in problem)
                if name + STOCK in self.ran and (other := self.ran[name + STOCK].problem):
                    refused, problem = True, f"fails without packinfer, too: {other}"
                self.rows.append(Row(check, "REFUSED" if refused else "FAIL", f"{name} {problem}"))
                return False
        return True

    def same(
        self, check: str, name: str, reference: str, *, packed: bool = True, control: str = "", stock: str = ""
    ) -> None:
        """A row: ``name`` says what ``reference`` says, but for near ties. ``control`` is a stock engine that differs
        from ``reference`` in more than its kernels; then what it deviates is allowed, too.

        Log-probabilities of two correct kernels may be twice as far apart as those of two stock backends, the engines
        ``stock`` + "triton" and ``stock`` + "fa3".
        """
        ours, diff = self.ran[name], compare(self.ran[name], self.ran[reference])
        drift = 2 * compare(self.ran[f"{stock}triton"], self.ran[f"{stock}fa3"]).drift
        gap = 2 * drift  # each of two tokens may have moved by the limit
        if control:
            other = compare(self.ran[control], self.ran[reference])
            drift, gap = max(drift, 2 * other.drift), max(gap, other.gap if other.gap < float("inf") else 0.0)
            self.add(f"{check}: stock", True, f"{control} against {reference}: {other}")
        ok = diff.of > 0 and diff.drift <= drift and diff.gap <= gap and (not packed or packs(ours))
        note = f"{name} against {reference}: {diff} (limits {drift:.3g}, {gap:.3g}); {account(ours)}"
        self.add(check, ok, note)

    def verify(self) -> None:
        for name in CHECKS["verify"]:
            if self.started(name, name):
                ran = self.ran[name]
                error = ran.state.get("check_error", 0.0)
                self.add(name, packs(ran) and error > 0, f"worst relative error of a row {error:.2g}; {account(ran)}")

    def logits(self) -> None:
        if self.started("logits", "packinfer", stock=("fa3", "triton")):
            self.same("logits", "packinfer", "fa3", control="triton")
            own = self.ran["packinfer"].said["2-samples"]
            groups = [own[i : i + 4] for i in range(0, len(own), 4)]
            equal = sum(sample["ids"] == group[0]["ids"] for group in groups for sample in group)
            self.add("samples", len(own) == 12, f"{equal}/12 greedy samples equal the first of their prompt")

        if self.started("audit", "audit", stock=("fa3", "triton")):
            self.same("audit", "audit", "fa3", control="triton")
            self.audited("audit")

    def audited(self, name: str) -> None:
        """A row: each step's slots were compared with SGLang's table."""
        state = self.ran[name].state
        self.add(f"{name} steps", state["audited_steps"] == state["packed_steps"] > 0, account(self.ran[name]))

    def turns(self) -> None:
        names = ("turns-packinfer", "turns-audit")
        if self.started("turns", *names, stock=("turns-fa3", "turns-triton")):
            for name in names:
                self.same(name, name, "turns-fa3", control="turns-triton", stock="turns-")
            self.audited("turns-audit")
        if self.started("turns-chain", "turns-chain", stock=("turns-fa3", "turns-triton", "chain-fa3")):
            self.same("turns-chain", "turns-chain", "turns-fa3", control="turns-triton", stock="turns-")
            self.audited("turns-chain")

    def tp(self) -> None:
        if self.started("tp", "tp2-packinfer", stock=("fa3", "triton", "tp2-fa3")):
            self.same("tp 2 against 1", "tp2-packinfer", "fa3", control="tp2-fa3")
            self.same("tp 2", "tp2-packinfer", "tp2-fa3")
            self.add("tp ranks", len(self.ran["tp2-packinfer"].ranks) == 2, str(self.ran["tp2-packinfer"].ranks))

    def dp(self) -> None:
        if self.started("dp 2", "dp2-packinfer", stock=("fa3", "triton")):
            self.same("dp 2", "dp2-packinfer", "fa3")
        for name in ("dpa-packinfer", "dpa-eager-packinfer"):
            if self.started(name, name, stock=("dpa-fa3",)):
                self.same(name, name, "dpa-fa3")

    def pd(self) -> None:
        if self.started("pd decode", "pd-decode"):
            ran = self.ran["pd-decode"]  # its prompts' KV is never written: nothing to compare, nothing in the tree
            lengths = {len(out["ids"]) for out in ran.said["0-tree"]}
            state = ran.state
            ok = bool(state.get("active")) and state["packed_steps"] > 0 and min(lengths) > 1
            self.add("pd decode", ok, f"answers of {sorted(lengths)} tokens (fake transfer); {account(ran)}")
        problem = self.ran["pd-prefill"].problem
        verdict = "REFUSED" if problem.startswith("while starting") else "FAIL" if problem else "PASS"
        self.rows.append(Row("pd prefill", verdict, problem or f"started; {account(self.ran['pd-prefill'])}"))

    def eagle(self) -> None:
        if not self.started("eagle", "eagle-packinfer", stock=("fa3", "triton", "eagle-fa3")):
            return
        self.same("eagle", "eagle-packinfer", "fa3", packed=False, control="eagle-fa3")
        state = self.ran["eagle-packinfer"].state
        counted = state.get("fallback_steps", {}).get("speculative", 0)
        accepted = {name: self.ran[name].state.get("accept_length") for name in ("eagle-packinfer", "eagle-fa3")}
        self.add("eagle counted", bool(state.get("active")) and counted > 0, f"{counted} verify steps; {accepted}")
        if not self.started("eagle chain", "chain-packinfer", "chain-eager", stock=("fa3-128", "chain-fa3")):
            return
        for name in ("chain-packinfer", "chain-eager"):
            self.same("eagle chain", name, "fa3-128", control="chain-fa3")
            counted = self.ran[name].state["fallback_steps"].get("speculative", 0)
            self.add("eagle chain packed", counted == 0, f"{name}: {counted} verify steps on the base backend")
        error = self.ran["chain-eager"].state["check_error"]
        self.add("eagle chain verified", error > 0, f"worst relative error of a row {error:.2g}")

    def wrap(self) -> None:
        for kind in ("gemma2", "gemma3"):
            if self.started(kind, f"{kind}-packinfer", stock=("fa3", "triton", f"{kind}-fa3")):
                self.same(kind, f"{kind}-packinfer", f"{kind}-fa3")
                layers = self.ran[f"{kind}-packinfer"].state["fallback_layers"]
                self.add(f"{kind} layers", layers == {"sliding_window": 2}, f"2 of 4 have a window: {layers}")
        if self.started("llama4", "llama4-wrap"):
            ran = self.ran["llama4-wrap"]
            ok = packs(ran) and ran.state["fallback_layers"] == {"sliding_window": 3} and ran.state["check_error"] > 0
            self.add(
                "llama4", ok, f"worst relative error of a row {ran.state.get('check_error', 0):.2g}; {account(ran)}"
            )
        for kind in ("gpt_oss", "gemma4"):
            if self.started(kind, f"{kind}-wrap"):
                ran = self.ran[f"{kind}-wrap"]
                ok = bool(ran.state.get("reason")) and not ran.state.get("active")
                self.add(kind, ok, account(ran))

    def fp8(self) -> None:
        if self.started("fp8", "fp8-packinfer", stock=("fa3", "triton", "fp8-fa3")):
            self.same("fp8", "fp8-packinfer", "fp8-fa3", packed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, comma-separated")
    parser.add_argument("--at-once", type=int, default=4, help="engines at once")
    parser.add_argument("--out", type=Path, default=Path("."), help="models, logs and check_engine.json")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(CHECKS):
        sys.exit(f"unknown check {sorted(unknown)[0]!r}; known: {', '.join(CHECKS)}")
    rows: list[Row] = []
    gpus = torch.cuda.device_count()
    if not gpus:
        sys.exit("check_engine.py needs a CUDA GPU")
    for name in [name for name in ("tp", "dp") if name in wanted and gpus < 2]:
        wanted.remove(name)
        rows.append(Row(name, "REFUSED", f"needs 2 GPUs, {gpus} is there"))
    names = list(dict.fromkeys(name for check in wanted for name in CHECKS[check]))
    out = args.out.resolve()
    (out / "models").mkdir(parents=True, exist_ok=True)
    drafts = {SCENARIOS[name].engine.get("speculative_draft_model_path") for name in names} - {None}
    for model in sorted({SCENARIOS[name].model for name in names} | drafts):
        write_model(model, out / "models")
    step = 44_000 // len(SCENARIOS)  # SGLang takes some above each
    ports = {name: 21_000 + step * i for i, name in enumerate(SCENARIOS)}
    ran: dict[str, Ran] = {}
    for many in (False, True):  # engines on two GPUs apart: SGLang wants their memory balanced
        todo = [name for name in names if (SCENARIOS[name].gpus > 1) == many]
        with ThreadPoolExecutor(args.at_once) as pool:
            started = {n: pool.submit(run, n, SCENARIOS[n], ENGINE, ports[n], out) for n in todo}
            for name, future in started.items():
                ran[name] = future.result()
                print(f"{name}: {ran[name].problem or 'served'}", flush=True)
    for name in [name for name in names if ran[name].problem and SCENARIOS[name].config.get("wrap")]:
        unwrapped = dataclasses.replace(SCENARIOS[name], config={})
        ran[name + STOCK] = run(name + STOCK, unwrapped, ENGINE, ports[name], out)
    judge = Judge(ran)
    for check in wanted:
        getattr(judge, check)()
    rows += judge.rows
    width = max(len(row.check) for row in rows)
    print()
    for row in rows:
        print(f"{row.verdict:8}{row.check:{width}}  {row.note}")
    environment = {
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "gpus": gpus,
    }
    result = {"environment": environment, "rows": [vars(row) for row in rows]}
    (out / "check_engine.json").write_text(json.dumps(result, indent=1))
    sys.exit(any(row.verdict == "FAIL" for row in rows))


if __name__ == "__main__":
    main()
