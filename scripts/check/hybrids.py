"""Hybrids: some layers are full attention and packed, the others keep a state instead of KV."""

from __future__ import annotations

from functools import partial

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


def hybrid(kind: str, stock: str, judge: Judge) -> None:
    for name in (f"{kind}-packinfer", f"{kind}-eager-packinfer"):
        if judge.started(name, name, stock=("fa3", "triton", f"{kind}-{stock}")):
            judge.same(name, name, f"{kind}-{stock}")
            layers = judge.ran[name].state["fallback_layers"]
            judge.add(f"{name} layers", layers == {"linear_attention": 2}, f"2 layers keep a state: {layers}")


def _check(kind: str, stock: str, feature: str) -> Check:
    return Check(
        partial(hybrid, kind, stock), ("fa3", "triton", *(name for name in SCENARIOS if name.startswith(kind))), feature
    )


CHECKS = {
    "qwen3-next": _check("qwen3_next", "triton", "hybrid: a Qwen3-Next kind, full attention at head dimension 256"),
    "nemotron-h": _check("nemotron_h", "fa3", "hybrid: a Nemotron-H kind, 32 query heads and 2 KV heads"),
}
