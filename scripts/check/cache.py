"""HiCache: a shared prefix that left the GPU for the host, and came back."""

from __future__ import annotations

import random

from check.judge import Judge
from check.rounds import Answers, Talk, answer
from check.scenarios import CHECK, FA3, OURS, Check, Scenario
from drive import FIRST, LAST, greedy, tree_prompts

POOL = 6000  # KV tokens on the GPU; what comes between is more
HICACHE = {"enable_hierarchical_cache": True, "hicache_ratio": 4.0, "max_total_tokens": POOL}
ROUNDS_OF_IT = ("tree", "returned")


def returned(talk: Talk) -> Answers:
    """The tree's requests once more, after unrelated ones that fill the pool; ``host``: tokens loaded back for each."""
    rng = random.Random(9)
    for _ in range(5):
        unrelated = [[rng.randrange(FIRST, LAST) for _ in range(900)] for _ in range(2)]
        talk.engine.generate(input_ids=unrelated, sampling_params=greedy(2))
    outs = talk.outs(tree_prompts(2))
    loaded = [(out["meta_info"].get("cached_tokens_details") or {}).get("host", 0) for out in outs]
    return [{**answer(out), "host": host} for out, host in zip(outs, loaded, strict=True)]


ROUNDS = {"returned": returned}

SCENARIOS = {
    "hicache-fa3": Scenario("llama", {**FA3, **HICACHE}, rounds=ROUNDS_OF_IT),
    "hicache-packinfer": Scenario("llama", {**OURS, **HICACHE}, rounds=ROUNDS_OF_IT),
    "hicache-audit": Scenario("llama", {**OURS, **HICACHE}, CHECK, rounds=ROUNDS_OF_IT),
}


def hicache(judge: Judge) -> None:
    if not judge.started("hicache", "hicache-packinfer", "hicache-audit", stock=("fa3", "triton", "hicache-fa3")):
        return
    for name in ("hicache-packinfer", "hicache-audit"):
        judge.same(name, name, "hicache-fa3")
        loaded = [sum(out["host"] for out in judge.ran[x].said["1-returned"]) for x in (name, "hicache-fa3")]
        judge.add(f"{name} loads", min(loaded) > 0, f"{loaded[0]} tokens loaded back from the host, stock {loaded[1]}")
    judge.audited("hicache-audit")


CHECKS = {"hicache": Check(hicache, ("fa3", "triton", *SCENARIOS), "HiCache: a prefix loaded back from the host")}
