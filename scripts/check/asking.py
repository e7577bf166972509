"""What a request can ask for: a grammar, log-probabilities of its prompt, samples, beams, a cache key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from check.compare import compare
from check.copies import COPIES, FIELDS, KEYED, apart
from check.judge import Judge, account
from check.rounds import Answers, Talk, answer
from check.scenarios import CHECK, FA3, OURS, RECENT, TRITON, Check, Scenario
from drive import tree_prompts

SAMPLES = 4
COLORS, ANIMALS = (" red", " green", " blue"), (" bird", " dog", " horse")
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": COLORS}, "animal": {"enum": ANIMALS}},
    "required": ["color", "animal"],
    "additionalProperties": False,
}
REGEX = f"(({')|('.join((*COLORS, *ANIMALS))})){{12}}"
START = 200  # in the tokens that all prompts share
SAMPLED = 32
ASKED = ("tree", "grammar", "free", "spans", "sampled", *KEYED, *(("beams",) if "cache_salt" in FIELDS else ()))
PACKED = {**CHECK, "extend": "on"}
SHORT = {"constrained_json_disable_any_whitespace": True}
SCENARIOS = {
    "asked": Scenario("llama", {**OURS, **SHORT}, PACKED, rounds=ASKED),
    "asked-fa3": Scenario("llama", {**FA3, **SHORT}, rounds=ASKED),
    "asked-triton": Scenario("llama", {**TRITON, **SHORT}, rounds=ASKED),
}


def grammar(talk: Talk, temperature: float = 0.0) -> Answers:
    """Samples that a schema allows, and samples that an expression allows."""
    outs = []
    for rule in ({"json_schema": json.dumps(SCHEMA)}, {"regex": REGEX}):
        params = {"n": SAMPLES, "ignore_eos": False, "temperature": temperature, **rule}
        outs += talk.outs(tree_prompts(2)[:3], params)
    return [{**answer(out), "text": out["text"]} for out in outs]


def free(talk: Talk) -> Answers:
    return grammar(talk, 1.0)


def spans(talk: Talk) -> Answers:
    """The log-probabilities of each prompt from START on, once all of it is cached."""
    prompts = tree_prompts(8)
    talk.ask(prompts, {"max_new_tokens": 1})
    outs = talk.outs(prompts, return_logprob=True, logprob_start_len=START)
    return [{**answer(out), "input": _logprobs(out["meta_info"]["input_token_logprobs"][1:])} for out in outs]


def sampled(talk: Talk) -> Answers:
    """Samples, and the same tokens scored as a prompt."""
    prompts = tree_prompts(9)
    outs = talk.outs(prompts, {"temperature": 1, "max_new_tokens": SAMPLED}, return_logprob=True)
    again = talk.outs(
        [[*prompt, *out["output_ids"]] for prompt, out in zip(prompts, outs, strict=True)],
        {"max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=[len(prompt) - 1 for prompt in prompts],
    )
    return [
        {
            **answer(out),
            "decoded": _logprobs(out["meta_info"]["output_token_logprobs"]),
            "scored": _logprobs(scored["meta_info"]["input_token_logprobs"][-SAMPLED:]),
        }
        for out, scored in zip(outs, again, strict=True)
    ]


def _logprobs(positions: list[tuple[float, int, str | None]]) -> list[float]:
    return [logprob for logprob, *_ in positions]


def beams(talk: Talk) -> Answers:
    outs = talk.engine.generate(
        input_ids=tree_prompts(5)[:2],
        sampling_params={"temperature": 0, "max_new_tokens": 24, "ignore_eos": True, "beam_width": 4, "n": 2},
    )
    return [{"ids": out["output_ids"], "top": [], "score": out["meta_info"]["sequence_score"]} for out in outs]


ROUNDS: dict[str, Callable[[Talk], Any]] = {f.__name__: f for f in (grammar, free, spans, sampled, beams)}

GPUS = 0 if RECENT else 1  # the older release pins the memory of grammars
ENGINES = ("asked-fa3", "asked-triton", "asked")


def started(judge: Judge, what: str) -> bool:
    return judge.started(what, "asked", stock=ENGINES[:2])


def same(judge: Judge, what: str, *rounds: str) -> None:
    judge.same(what, "asked", "asked-fa3", stock="asked-", rounds=rounds)


def structured(judge: Judge) -> None:
    if not started(judge, "structured"):
        return
    same(judge, "structured", "grammar")
    for name in ("grammar", "free"):
        texts = [out["text"] for out in judge.ran["asked"].answers(name)]
        half = len(texts) // 2
        valid = sum(valid_json(text) for text in texts[:half]), sum(bool(re.fullmatch(REGEX, t)) for t in texts[half:])
        note = f"valid by schema {valid[0]}/{half}, by expression {valid[1]}/{half}; {len(set(texts))} different"
        judge.add(f"structured: {name}", valid == (half, half) == (3 * SAMPLES,) * 2, note)


def valid_json(text: str) -> bool:
    try:
        said = json.loads(text)
    except ValueError:
        return False
    return said.keys() == {"color", "animal"} and said["color"] in COLORS and said["animal"] in ANIMALS


def prompt_logprobs(judge: Judge) -> None:
    if not started(judge, "prompt logprobs"):
        return
    same(judge, "prompt logprobs: answers", "spans")
    ours, fa3, triton = (judge.ran[name].answers("spans") for name in ("asked", "asked-fa3", "asked-triton"))
    limit = max(2 * apart_by(triton, fa3, "input", "input"), judge.near_tie)
    drift, n = apart_by(ours, fa3, "input", "input"), sum(len(out["input"]) for out in ours)
    cached = {out["cached"] for out in ours}
    ok = drift <= limit and n > 0 and all(0 < c <= START for c in cached)
    note = f"{n} of asked against asked-fa3 within {drift:.3g} (limit {limit:.3g}); cached {sorted(cached)}"
    ran = judge.ran["asked"]
    read, logical = (ran.counted("spans", f"kv_tokens_{kind}") for kind in ("read", "logical"))
    judge.add("prompt logprobs", ok and read < 0.7 * logical, f"{note}; KV tokens read {read} of {logical}")


def samples(judge: Judge) -> None:
    """The distribution that a token was drawn from is the one by which its prompt is scored."""
    if not started(judge, "sampled"):
        return
    drifts = {name: apart_by(said := judge.ran[name].answers("sampled"), said, "decoded", "scored") for name in ENGINES}
    limit = max(2 * drifts["asked-fa3"], 2 * drifts["asked-triton"], judge.near_tie)
    n = len({tuple(out["ids"]) for out in judge.ran["asked"].answers("sampled")})
    note = f"log-probabilities of samples and of the same tokens as a prompt differ by {drifts} (limit {limit:.3g})"
    judge.add("sampled", n == 16 and drifts["asked"] <= limit, f"{note}; {n} different samples")


def apart_by(these: Answers, others: Answers, key: str, other: str) -> float:
    return max(abs(x - y) for a, b in zip(these, others, strict=True) for x, y in zip(a[key], b[other], strict=True))


def cache_keys(judge: Judge) -> None:
    if started(judge, "cache keys"):
        same(judge, "cache keys", *KEYED)
        for name, n in KEYED.items():
            apart(judge, "asked", name, n, COPIES)


def beam(judge: Judge) -> None:
    if not started(judge, "beams"):
        return
    ours, theirs = (judge.ran[name] for name in ("asked", "asked-fa3"))
    diff = compare(ours, theirs, ("beams",))
    limit = judge.limit("asked-")
    scores = [abs(a["score"] - b["score"]) for a, b in zip(ours.answers("beams"), theirs.answers("beams"), strict=True)]
    read, logical = (ours.counted("beams", f"kv_tokens_{kind}") for kind in ("read", "logical"))
    state = ours.after["beams"]
    ok = max(scores) <= limit and state["rows"] == state["rows_grouped"] > 0 and read < 0.5 * logical
    note = f"{diff.equal}/{diff.of} beams equal, scores within {max(scores):.3g} (limit {limit:.3g})"
    note += f"; {state['rows_grouped']}/{state['rows']} rows grouped, KV tokens read {read} of {logical}"
    judge.add("beams", ok, f"{note}; {account(ours)}")


CHECKS = {
    "structured": Check(structured, ENGINES, "structured output, n samples", gpus=GPUS),
    "prompt-logprobs": Check(prompt_logprobs, ENGINES, "log-probabilities of the prompt", gpus=GPUS),
    "sampled": Check(samples, ENGINES, "sampling, rescored", gpus=GPUS),
    "cache-keys": Check(cache_keys, ENGINES, "cache keys and salts", gpus=GPUS),
    "beams": Check(beam, ENGINES, "beam search", gpus=GPUS, since="0.5.23"),
}
