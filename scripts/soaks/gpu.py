"""The soak on a GPU: CUDA graphs, overlap, mixed chunks, EAGLE chains; every answer is that of the request alone.

Three engines side by side are asked the same load: stock SGLang, packinfer, and packinfer with speculative decoding.
Each is first asked every prompt alone, and once more at the end. What batches change in the stock engine's answers, in
half precision, is the measure of what they may change in the others'.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from check.compare import Diff, Ran, compare
from check.models import write_model
from check.scenarios import CHAIN
from lib.answers import NEAR_TIE
from soaks.cpu import RETRACT
from soaks.load import Load
from soaks.player import Play, played

CONFIG = "PACKINFER_CONFIG"
PACKED_CONFIG = '{"check": true, "extend": "on"}'
STOCK = "stock"
LIMIT_S = 480
ROUNDS = ("alone", "soak", "again")
# groups of a verify step are worth it behind some hundred tokens
LOAD = Load(2000, 0, root=(300, 900), lengths=(1, 3, 20, 40, 40, 40, 40), within_s=0.5, samples=3, logprobs=0.4)
PART = 0.3  # of the requests: those of all engines but the one without speculation
ENGINE = {
    "dtype": "bfloat16",
    "mem_fraction_static": 0.8,
    "max_total_tokens": 5000,
    "max_running_requests": 16,
    "chunked_prefill_size": 256,
    "cuda_graph_max_bs_decode": 16,
    "cuda_graph_backend_prefill": "disabled",
    "random_seed": 0,
    "log_level": "info",
}
MIXED = {"enable_mixed_chunk": True}
# SGLang's own check of its slots: that they hold what was written for the tokens that a pass reads
CANARY = {"kv_canary": "raise", "kv_canary_real_data": "partial"}
ALWAYS = ("retractions", "flushes", "overlapped_flushes", "evictions")
PACKED = ("extend_steps", "decode_steps", "grouped_decode_steps", "mixed_batches")


@dataclass(frozen=True)
class Run:
    """An engine of the soak.

    Attributes:
        config: the plugin's settings; None: stock SGLang.
        part: of the load's requests.
        must: counts of ``hooks`` and of the player that may not be zero.
    """

    engine: dict[str, Any]
    config: str | None
    part: float = 1.0
    must: tuple[str, ...] = ALWAYS


def runs(folder: Path, *, canary: bool) -> dict[str, Run]:
    """Those of a GPU; their models are written below ``folder``."""
    more = {**ENGINE, **(CANARY if canary else {}), "model_path": str(write_model("llama128", folder))}
    draft = {"speculative_draft_model_path": str(write_model("eagle", folder))}
    ours = {**more, "attention_backend": "packinfer"}
    verify = ("verify_steps", "grouped_verify_steps", "replays")
    return {
        STOCK: Run({**more, **MIXED, "attention_backend": "fa3", "port": 21_000}, None, PART),
        "packinfer": Run({**ours, **MIXED, "port": 24_000}, PACKED_CONFIG, 1.0, (*ALWAYS, *PACKED, "replays")),
        "chain": Run({**ours, **CHAIN, **draft, "port": 27_000}, '{"check": true}', PART, (*ALWAYS, *verify)),
    }


def soak(of: dict[str, Run], load: Load, folder: Path) -> list[str]:
    """Run it; what did not hold, and a line for each thing that did on standard output."""
    plays = {
        name: Play(
            run.engine,
            replace(load, requests=max(1, round(load.requests * run.part))),
            ROUNDS,
            {**RETRACT, **({CONFIG: run.config} if run.config is not None else {})},
        )
        for name, run in of.items()
    }
    results, problems = played(plays, folder, LIMIT_S)
    if STOCK not in results:
        return problems
    stock = by_itself(results[STOCK])
    limits = Limits.of(stock)
    for name, told in results.items():
        print(f"{name}: {summary(name, told)}")
        problems += [f"{name}: {problem}" for problem in judge(told, of[name], limits, plays[name].load.requests)]
        if "kv_canary" in of[name].engine:
            lines = [line for line in (folder / f"{name}.log").read_text().splitlines() if "[canary] step=" in line]
            print(*lines[-1:], sep="\n")
            problems += [] if lines else [f"{name}: SGLang's KV canary did not run"]
    print(f"limits, by what stock answers change in batches: {limits}")
    if stock.gap == float("inf"):
        problems.append("stock answers change by more than a near-tie: there is no limit")
    return problems


@dataclass(frozen=True)
class Limits:
    """Largest drift and gap (``check.compare.Diff``) of answers that count as the same."""

    drift: float
    gap: float

    @staticmethod
    def of(stock: Diff) -> Limits:
        drift = max(2 * stock.drift, NEAR_TIE)
        return Limits(drift, max(2 * stock.gap, 2 * drift))  # each of two tokens may have moved by the drift

    def __str__(self) -> str:
        return f"log-probabilities within {self.drift:.3g}, gap at a first difference {self.gap:.3g}"


def by_itself(told: dict[str, Any], rounds: tuple[str, ...] = ("soak", "again")) -> Diff:
    """How an engine's answers differ from those that it gave to each prompt alone, as far as they go."""
    alone = told["said"]["alone"]
    ours = {"soak": told["said"]["soak"], "again": told["said"]["again"]}
    asked = {"soak": [answer["prompt"] for answer in ours["soak"]], "again": list(range(len(alone)))}
    theirs = {
        name: [
            {key: alone[prompt][key][: len(answer["ids"])] for key in ("ids", "top")}
            for answer, prompt in zip(ours[name], asked[name], strict=True)
        ]
        for name in rounds
    }
    return compare(Ran(said=ours), Ran(said=theirs))


def counts(told: dict[str, Any]) -> Counter[str]:
    answers = told["said"]["soak"]
    several = sum(answer["samples"] > 1 for answer in answers)
    return Counter({**told["state"].get("soak", {}), "aborts": told["aborted"], "answers_of_several": several})


def summary(name: str, told: dict[str, Any]) -> str:
    state, again = told["state"], by_itself(told, ("again",))
    lines = [f"{by_itself(told)}; of those asked again {again.equal}/{again.of}"]
    lines.append(", ".join(f"{what} {n:,}" for what, n in sorted(counts(told).items())))
    if state.get("active"):
        lines.append(
            f"KV tokens read {state['kv_tokens_read']:,} of {state['kv_tokens_logical']:,}, audited steps "
            f"{state['audited_steps']:,} of {state['packed_steps']:,}, worst relative error of an eager row "
            f"{state['check_error']:.2g}, fallback_steps {state['fallback_steps']}, "
            f"accept length {state['accept_length']}"
        )
    return f"\n{' ' * (len(name) + 2)}".join(lines)


def judge(told: dict[str, Any], run: Run, limits: Limits, requests: int) -> list[str]:
    answers, state, diff, seen = told["said"]["soak"], told["state"], by_itself(told), counts(told)
    short = sum(answer["whole"] and len(answer["ids"]) != answer["tokens"] for answer in answers)
    asked = len({answer["nth"] for answer in answers})
    must = {
        f"{short} answers are cut short": not short,
        f"{asked} of {requests} requests were answered": asked == requests,
        "some prompts alone have no log-probabilities": all(answer["top"] for answer in told["said"]["alone"]),
    }
    for what in (*run.must, "aborts", "answers_of_several"):
        must[f"{what} did not happen"] = seen[what] > 0
    if run.config is not None:
        worse = sum(gap > limits.gap for gap in diff.gaps)
        must |= {
            f"{worse} answers differ from those to the same requests alone": not worse,
            f"log-probabilities are {diff.drift:.3g} off those of the same requests alone": diff.drift <= limits.drift,
            f"it is inactive: {state.get('reason')}": bool(state.get("active")),
            "a decode or verify step was not audited": state.get("audited_steps") == state.get("packed_steps"),
            "a planning error": "error" not in state.get("fallback_steps", {}),
            "verify steps ran on the stock backend": "speculative" not in state.get("fallback_steps", {}),
        }
    return [problem for problem, held in must.items() if not held]
