"""Hybrids: some layers are full attention and packed, the others keep a state instead of KV."""

from __future__ import annotations

from check.judge import Judge
from check.scenarios import CHECK, EAGER, FA3, OURS, TRITON, Check, Scenario

# SGLang's default, FlashInfer's, needs a package that not every host has
DELTA = {"linear_attn_backend": "triton"}
BASE = {"base_backend": "triton"}
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
}


def hybrids(judge: Judge) -> None:
    for kind, stock in (("qwen3_next", "triton"), ("nemotron_h", "fa3")):
        for name in (f"{kind}-packinfer", f"{kind}-eager-packinfer"):
            if judge.started(name, name, stock=("fa3", "triton", f"{kind}-{stock}")):
                judge.same(name, name, f"{kind}-{stock}")
                layers = judge.ran[name].state["fallback_layers"]
                judge.add(f"{name} layers", layers == {"linear_attention": 2}, f"2 layers keep a state: {layers}")


CHECKS = {"hybrids": Check(hybrids, ("fa3", "triton", *SCENARIOS), "hybrids: Qwen3-Next and Nemotron-H kinds")}
