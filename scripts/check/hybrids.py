"""Hybrids: some layers are full attention and packed, the others keep a state instead of KV."""

from __future__ import annotations

from functools import partial

from check.judge import Judge
from check.scenarios import CHAIN, CHECK, EAGER, FA3, OURS, TRITON, Check, Scenario
from check.speculation import chains

# SGLang's default, FlashInfer's, needs a package that not every host has
DELTA = {"linear_attn_backend": "triton"}
BASE = {"base_backend": "triton"}
# the draft is part of the checkpoint
MTP = {**DELTA, **CHAIN, "speculative_algorithm": "NEXTN", "speculative_draft_model_path": "qwen3_next"}
ROUNDS_OF_IT = ("deep", "deep")  # what is shared is cut at checkpoints of the state

SCENARIOS = {
    "qwen3_next-triton": Scenario("qwen3_next", {**TRITON, **DELTA}, rounds=ROUNDS_OF_IT),
    "qwen3_next-packinfer": Scenario("qwen3_next", {**OURS, **DELTA}, BASE, rounds=ROUNDS_OF_IT),
    "qwen3_next-eager-packinfer": Scenario(
        "qwen3_next", {**OURS, **DELTA, **EAGER}, {**BASE, **CHECK}, rounds=ROUNDS_OF_IT
    ),
    "nemotron_h-fa3": Scenario("nemotron_h", FA3, rounds=ROUNDS_OF_IT),
    "nemotron_h-packinfer": Scenario("nemotron_h", OURS, rounds=ROUNDS_OF_IT),
    "nemotron_h-eager-packinfer": Scenario("nemotron_h", {**OURS, **EAGER}, CHECK, rounds=ROUNDS_OF_IT),
    "qwen3_next-fa3": Scenario("qwen3_next", {**FA3, **DELTA}, rounds=ROUNDS_OF_IT),
    "mtp-fa3": Scenario("qwen3_next", {**FA3, **MTP}, rounds=ROUNDS_OF_IT, logprobs=False),
    "mtp-packinfer": Scenario("qwen3_next", {**OURS, **MTP}, rounds=ROUNDS_OF_IT, logprobs=False),
    "mtp-eager-packinfer": Scenario("qwen3_next", {**OURS, **MTP, **EAGER}, CHECK, rounds=ROUNDS_OF_IT, logprobs=False),
}


def hybrid(kind: str, stock: str, judge: Judge) -> None:
    for name in (f"{kind}-packinfer", f"{kind}-eager-packinfer"):
        if judge.started(name, name, stock=("fa3", "triton", f"{kind}-{stock}")):
            judge.same(name, name, f"{kind}-{stock}")
            layers = judge.ran[name].state["fallback_layers"]
            judge.add(f"{name} layers", layers == {"linear_attention": 2}, f"2 layers keep a state: {layers}")


def mtp(judge: Judge) -> None:
    names = ("mtp-packinfer", "mtp-eager-packinfer")
    if judge.started("mtp", *names, stock=("fa3", "triton", "qwen3_next-fa3", "mtp-fa3")):
        chains(judge, "mtp", *names, "qwen3_next-fa3", "mtp-fa3")


def _check(kind: str, stock: str, feature: str) -> Check:
    engines = (f"{kind}-{stock}", f"{kind}-packinfer", f"{kind}-eager-packinfer")
    return Check(partial(hybrid, kind, stock), ("fa3", "triton", *engines), feature)


CHECKS = {
    "qwen3-next": _check("qwen3_next", "triton", "hybrid: a Qwen3-Next kind, full attention at head dimension 256"),
    "nemotron-h": _check("nemotron_h", "fa3", "hybrid: a Nemotron-H kind, 32 query heads and 2 KV heads"),
    "mtp": Check(
        mtp,
        ("fa3", "triton", "qwen3_next-fa3", "mtp-fa3", "mtp-packinfer", "mtp-eager-packinfer"),
        "hybrid with its own drafts (MTP): a Qwen3-Next kind, chains packed",
        since="0.5.23",
    ),
}
