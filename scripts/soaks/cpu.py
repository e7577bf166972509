"""The soak on a CPU, with an arena and held siblings: every answer is that of the stock backend."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lib.answers import NEAR_TIE
from soaks.load import Load
from soaks.player import Play, played

from packinfer_sgl.tools.tiny_model import write_tiny_model

MODEL = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
ENGINE = {
    "dtype": "float32",
    "random_seed": 0,
    "log_level": "error",
    "max_total_tokens": 3100,
    "max_running_requests": 6,
    "chunked_prefill_size": 512,
}
# SGLang's own setting for tests: some requests are retracted at every so many forward passes
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "37"}
PACKINFER = {"PACKINFER_CONFIG": '{"arena_tokens": 500, "hold_siblings": true}', **RETRACT}


def soak(requests: int, seed: int, folder: Path) -> list[str]:
    """Run it; what did not hold, and a line for each thing that did on standard output."""
    load = Load(requests, seed, urgent=True)
    engine = {**ENGINE, "model_path": str(write_tiny_model(folder / "model", **MODEL))}
    ours = {**engine, "attention_backend": "packinfer", "enable_priority_scheduling": True}
    plays = {
        "torch_native": Play({**engine, "attention_backend": "torch_native"}, load, ("together",)),
        "packinfer": Play(ours, load, ("soak",), PACKINFER),
    }
    results, problems = played(plays, folder)
    return problems or judge(results["torch_native"]["said"]["together"], results["packinfer"], requests)


def judge(stock: list[dict[str, Any]], ours: dict[str, Any], requests: int) -> list[str]:
    answers, verdicts = ours["said"]["soak"], Counter[str | None]()
    for i, answer in enumerate(answers):
        expected = stock[answer["prompt"]]
        verdicts[verdict := wrong(answer, expected)] += 1
        if verdict == "different":
            of = f"{len(answer['ids'])} of {answer['tokens']} tokens{'' if answer['whole'] else ', aborted'}"
            at = next((n for n, pair in enumerate(zip(answer["ids"], expected["ids"])) if pair[0] != pair[1]), None)
            at_token = f"token {at}: {answer['ids'][at]}, stock {expected['top'][at]}" if at is not None else "too few"
            print(f"answer {i} to prompt {answer['prompt']}, {of}; {at_token}")
    state, after = ours["state"], ours["after_flush"]["arena"]
    arena, seen = state["arena"], Counter(state.get("soak", {}))
    print(f"{len(answers)} answers: {verdicts[None]} equal, {verdicts['near-tie']} near-ties, "
          f"{verdicts['different']} different; {ours['aborted']} aborted")  # fmt: skip
    print(f"packed: {state['packed_steps']} decode steps, {state['packed_extends']} prefills and chunks")
    print(f"audited steps {seen['arena_steps']}, slots of {state['audited_steps']}, retractions {seen['retractions']}, "
          f"preemptions {seen['preemptions']}, flushes {seen['flushes']}")  # fmt: skip
    print("arena: " + ", ".join(f"{name} {value:,}" for name, value in arena.items()))
    held = {name: state["held"][name] for name in ("requests", "passes", "prefix_tokens")}
    print("held: " + ", ".join(f"{name} {value:,}" for name, value in held.items()))
    must = {
        f"{verdicts['different']} answers differ from the stock backend's": not verdicts["different"],
        "not every request was answered": len(answers) == requests,
        "a flush leaves copies in the arena": after["used_tokens"] == after["spans"] == 0,
        "nothing was copied and found": min(arena["copies"], arena["hits"]) > 0,
        "no request was held and found its prefix": min(held.values()) > 0,
        "nothing was retracted, preempted, aborted or flushed": min(
            seen["retractions"], seen["preemptions"], seen["flushes"], ours["aborted"]
        )
        > 0,
        "a decode step was not audited": state["audited_steps"] == state["packed_steps"],
    }
    return [problem for problem, kept in must.items() if not kept]


def wrong(answer: dict[str, Any], stock: dict[str, Any]) -> str | None:
    """``different``, ``near-tie`` or None."""
    if answer["whole"] and len(answer["ids"]) != answer["tokens"]:
        return "different"
    for at, token in enumerate(answer["ids"]):
        best = stock["ids"][at]
        if token != best:
            top = stock["top"][at]
            return "near-tie" if top[str(best)] - top.get(str(token), -1e9) <= NEAR_TIE else "different"
    return None
