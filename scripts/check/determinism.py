"""SGLang's deterministic mode: a prompt gets the same ids and log-probabilities, to the last bit, in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from check.judge import Judge, account, packs
from check.rounds import Answers, Talk, answer
from check.scenarios import CHAIN, EAGER, FA3, OURS, TP2, WRAP, Check, Scenario
from drive import FIRST, LAST, greedy, tree_prompts

DETERMINISTIC = {"enable_deterministic_inference": True}
PAGE = 64  # tokens, at most
SHARED, TOKENS = 1300, 90  # rows of 1,451 to 1,480 tokens, which begin a new unit of KV on the way
CHOSEN = (0, 1, 5, 10)  # of 16 prompts in a tree: two siblings, a cousin, and one that shares SHARED tokens with them
SAMPLED = {"temperature": 0.8, "sampling_seed": 7}
SMALL = {"max_total_tokens": 12000}  # of 41 requests that hold 30,000 at the end
RETRACT = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
ROUNDS_OF_ALL = ("companies",)

SCENARIOS = {
    "deterministic": Scenario("llama", {**OURS, **DETERMINISTIC}, rounds=ROUNDS_OF_ALL),
    "deterministic-fa3": Scenario("llama", {**FA3, **DETERMINISTIC}, rounds=ROUNDS_OF_ALL),
    "deterministic-page64": Scenario("llama", {**OURS, **DETERMINISTIC, "page_size": 64}, rounds=ROUNDS_OF_ALL),
    "deterministic-eager": Scenario("llama", {**OURS, **DETERMINISTIC, **EAGER}, rounds=ROUNDS_OF_ALL),
    "deterministic-wrapped": Scenario("llama", {**FA3, **DETERMINISTIC}, WRAP, rounds=ROUNDS_OF_ALL),
    "deterministic-retracted": Scenario(
        "llama", {**OURS, **DETERMINISTIC, **SMALL}, rounds=ROUNDS_OF_ALL, env=RETRACT
    ),
    "deterministic-tp2": Scenario("llama", {**OURS, **DETERMINISTIC, **TP2}, rounds=ROUNDS_OF_ALL, gpus=2),
    "deterministic-verify-fa3": Scenario("llama", {**FA3, **DETERMINISTIC, **CHAIN}, rounds=("tree",)),
    "deterministic-verify": Scenario("llama", {**OURS, **DETERMINISTIC, **CHAIN}, rounds=("tree",)),
}  # fmt: skip


def companies(talk: Talk) -> Answers:
    """The CHOSEN prompts in each company, from a cold cache and from a warm one; ``prompt`` says which, ``company`` in
    which."""
    prompts, rng = tree_prompts(2, SHARED), random.Random(1)
    chosen = [prompts[i] for i in CHOSEN]
    siblings = [[*prompts[i % 16][:1450], *_words(rng, 5 + i)] for i in range(60)]
    strangers = [_words(rng, rng.randrange(1, 1200)) for _ in range(28)]
    found: Answers = []

    def ask(company: str, others: list[list[int]], cold: bool, params: dict[str, Any], among: int) -> None:
        if cold:
            assert talk.engine.flush_cache().success
        batch, own = [*others], [*greedy_of(params, len(chosen))]
        # the batch shrinks step by step; all are sampled or none, as SGLang samples mixed batches in another way
        theirs = [{**greedy(1 + (7 * i) % TOKENS), **params} for i in range(len(others))]
        for i, prompt in enumerate(chosen):
            batch.insert(among * i, prompt)
            theirs.insert(among * i, own[i])
        outs = talk.engine.generate(input_ids=batch, sampling_params=theirs, return_logprob=True, top_logprobs_num=5)
        for i in range(len(chosen)):
            found.append({**answer(outs[among * i]), "prompt": CHOSEN[i], "company": company})

    def alone(kind: str, params: dict[str, Any]) -> None:
        for i, prompt in zip(CHOSEN, chosen):
            assert talk.engine.flush_cache().success
            for company in (f"{kind}alone, cold", f"{kind}alone, warm"):
                (own,) = greedy_of(params, 1)
                out = talk.engine.generate(
                    input_ids=[prompt], sampling_params=own, return_logprob=True, top_logprobs_num=5
                )
                found.append({**answer(out[0]), "prompt": i, "company": company})

    for kind, params in (("", {}), ("sampled ", SAMPLED)):
        alone(kind, params)
        ask(f"{kind}among siblings, warm", siblings, False, params, 9)
        ask(f"{kind}among siblings, cold", siblings, True, params, 3)
        ask(f"{kind}among strangers, cold", strangers, True, params, 5)
        ask(f"{kind}among both, warm", [*siblings[:20], *strangers], False, params, 2)
        ask(f"{kind}the four, cold", [], True, params, 1)
        alone(f"{kind}at last ", params)
    return found


def greedy_of(params: dict[str, Any], n: int) -> list[dict[str, Any]]:
    return [{**greedy(TOKENS), **params} for _ in range(n)]


def _words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST, LAST) for _ in range(n)]


ROUNDS: dict[str, Callable[[Talk], Answers]] = {"companies": companies}


def others_than_first(said: Answers, kind: str) -> tuple[dict[str, int], int]:
    """Which prompts in which companies were not answered as the first time, and from which token on; and how many
    answers were compared: ids and log-probabilities, to the last bit. What was retracted is left out: its tokens were
    computed anew as a prompt."""
    first: dict[int, dict[str, Any]] = {}
    wrong, compared = {}, 0
    for one in said:
        if one["company"].startswith("sampled") == bool(kind) and not one["retracted"]:
            right = first.setdefault(one["prompt"], one)
            compared += right is not one
            if (one["ids"], one["top"]) != (right["ids"], right["top"]):
                at = next((i for i, (a, b) in enumerate(zip(one["top"], right["top"])) if a != b), TOKENS)
                wrong[f"{one['prompt']} {one['company']}"] = at
    return wrong, compared


def rows(judge: Judge, name: str) -> None:
    """What fa3 itself says with other bits, as it does not compute every prompt alike cold and warm, is no fault."""
    if not judge.started(name, name, stock=("deterministic-fa3",)):
        return
    ran, stock = judge.ran[name], judge.ran["deterministic-fa3"].answers("companies")
    said = ran.answers("companies")
    for kind, what in (("", "greedy"), ("sampled", "sampled with a seed")):
        wrong, compared = others_than_first(said, kind)
        stock_wrong, _ = others_than_first(stock, kind)
        ours = [f"{who} from token {at}" for who, at in wrong.items() if at < stock_wrong.get(who, TOKENS + 1)]
        note = f"{compared - len(wrong)}/{compared} answers have the bits of the first"
        note += f"; not: {'; '.join(ours[:4])}" if ours else ""
        note += f"; on fa3 {len(stock_wrong)} do not: {'; '.join(stock_wrong)}" if stock_wrong else ""
        judge.add(f"{name}: {what}", not ours and compared > 2 * len(wrong), note)
    warm = [one["cached"] for one in said if one["company"] == "alone, warm"]
    cold = [one["cached"] for one in said if one["company"] == "alone, cold"]
    judge.add(f"{name}: cache", min(warm) > SHARED - PAGE and max(cold) == 0, f"cached tokens {warm}, cold {cold}")
    unit = (ran.state.get("deterministic") or {}).get("unit_tokens")
    steps = {key: n for key, n in ran.state.get("fallback_steps", {}).items() if key not in ("extend", "no_batch")}
    judge.add(f"{name}: packed", packs(ran) and bool(unit) and not steps, f"unit {unit}; {account(ran)}")


def deterministic(judge: Judge) -> None:
    for name in ("deterministic", "deterministic-page64", "deterministic-eager", "deterministic-wrapped"):
        rows(judge, name)
    names = ("deterministic-eager", "deterministic-wrapped")
    if any(judge.ran[name].problem for name in ("deterministic", *names)):
        return
    right = judge.ran["deterministic"].answers("companies")
    for name in names:
        equal = sum(
            (a["ids"], a["top"]) == (b["ids"], b["top"])
            for a, b in zip(judge.ran[name].answers("companies"), right, strict=True)
        )
        judge.add(f"{name}: as with graphs", equal == len(right), f"{equal}/{len(right)} answers have the same bits")


def retracted(judge: Judge) -> None:
    name = "deterministic-retracted"
    rows(judge, name)
    if not judge.ran[name].problem:
        counts = [one["retracted"] for one in judge.ran[name].answers("companies")]
        judge.add(f"{name}: retractions", sum(counts) > 0, f"{sum(map(bool, counts))}/{len(counts)} came through one")


def parallel(judge: Judge) -> None:
    rows(judge, "deterministic-tp2")


def verify(judge: Judge) -> None:
    name = "deterministic-verify"
    if judge.started(name, name, stock=("deterministic-verify-fa3",)):
        state = judge.ran[name].state
        steps = state["fallback_steps"].get("deterministic", 0)
        judge.add(f"{name}: on fa3, counted", steps > 0 and state["packed_steps"] == 0, account(judge.ran[name]))


CHECKS = {
    "deterministic": Check(
        deterministic,
        ("deterministic-fa3", "deterministic", "deterministic-page64", "deterministic-eager", "deterministic-wrapped"),
        "deterministic mode: the same bits in any company",
    ),
    "deterministic-retracted": Check(
        retracted, ("deterministic-fa3", "deterministic-retracted"), "deterministic mode, retractions between"
    ),
    "deterministic-verify": Check(
        verify, ("deterministic-verify-fa3", "deterministic-verify"), "deterministic mode, EAGLE (on the base)"
    ),
    "deterministic-tp2": Check(
        parallel, ("deterministic-fa3", "deterministic-tp2"), "deterministic mode, tensor parallelism", gpus=2
    ),
}
