"""One engine of ablate_radix.py: runs a workload for each order it gets (engine_worker.py).

python engine.py ARGUMENTS     # of sglang.Engine, as JSON

An order is ``{"turns": [...], "check": bool, "scatter": null or [tokens, [first, last]]}``: with ``scatter`` so many
tokens of that vocabulary go through the engine before. Its answer holds the figures of the run; with ``check`` the
answers of all requests and their log-probabilities instead; with ``error`` the one line that says why there is neither.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from ablate.workloads import least_prefill_tokens
from lib.counters import totals
from lib.engine_worker import Orders

FLUSH_LIMIT_S = 60


class Run:
    """One run of a workload."""

    def __init__(self, engine: Any, check: bool) -> None:
        self.engine, self.check = engine, check
        self.prompts: list[list[int]] = []
        self.ttft_ms: list[float] = []
        self.tpot_ms: list[float] = []
        self.said: dict[str, dict[str, Any]] = {}
        self.prompt_tokens = self.cached_tokens = self.output_tokens = self.generated = 0

    async def all_of(self, turns: list[dict[str, Any]], name: str = "", before: list[int] | None = None) -> None:
        await asyncio.gather(*(self.one(turn, f"{name}/{i}", before or []) for i, turn in enumerate(turns)))

    async def one(self, turn: dict[str, Any], name: str, before: list[int]) -> None:
        prompt = before + turn["own"]
        params = {
            "temperature": 0, "max_new_tokens": turn["new_tokens"], "ignore_eos": True, "n": turn["samples"],
        }  # fmt: skip
        self.prompts.append(prompt)
        if turn["samples"] > 1:
            self.prompt_tokens += len(prompt)  # SGLang first sends the prompt alone
        last = await (self.whole if self.check else self.streamed)(prompt, params)
        for i, out in enumerate(last):
            meta = out["meta_info"]
            if meta["finish_reason"]["type"] != "length" or len(out["output_ids"]) != turn["new_tokens"]:
                raise RuntimeError(f"request {name} ended early: {meta['finish_reason']}")
            self.prompt_tokens += meta["prompt_tokens"]
            self.cached_tokens += meta["cached_tokens"]
            self.output_tokens += meta["completion_tokens"]
            if self.check:
                self.said[f"{name}#{i}"] = {
                    key: meta[key] for key in ("output_token_logprobs", "output_top_logprobs")
                }  # fmt: skip
        if turn["then"]:
            self.generated += len(last[0]["output_ids"])
            await self.all_of(turn["then"], name, prompt + last[0]["output_ids"])

    async def whole(self, prompt: list[int], params: dict[str, Any]) -> list[dict[str, Any]]:
        out = await self.engine.async_generate(
            input_ids=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=5
        )
        return out if isinstance(out, list) else [out]

    async def streamed(self, prompt: list[int], params: dict[str, Any]) -> list[dict[str, Any]]:
        """The last part of each sample; takes the times at which tokens arrive."""
        sent = time.perf_counter()
        first: dict[int, tuple[float, int]] = {}
        last: dict[int, tuple[float, dict[str, Any]]] = {}
        async for part in await self.engine.async_generate(input_ids=prompt, sampling_params=params, stream=True):
            now, index = time.perf_counter(), part.get("index", 0)
            first.setdefault(index, (now, part["meta_info"]["completion_tokens"]))
            last[index] = now, part
        for index, (now, tokens) in sorted(first.items()):
            end, part = last[index]
            self.ttft_ms.append((now - sent) * 1e3)
            if more := part["meta_info"]["completion_tokens"] - tokens:
                self.tpot_ms.append((end - now) * 1e3 / more)
        return [part for _, (_, part) in sorted(last.items())]


async def scatter(engine: Any, tokens: int, vocabulary: list[int]) -> None:
    """Unrelated requests that fill the KV pool more than once: what is handed out afterwards are slots that others gave
    back, here and there."""
    rng, requests = random.Random(0), []
    params = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    while tokens > 0:
        length = rng.randint(8, 256)
        prompt = [rng.randrange(*vocabulary) for _ in range(length)]
        requests.append(engine.async_generate(input_ids=prompt, sampling_params=params))
        tokens -= length + 2
    await asyncio.gather(*requests)


def obey(engine: Any, order: dict[str, Any]) -> dict[str, Any]:
    flushed = engine.loop.run_until_complete(engine.tokenizer_manager.flush_cache(timeout_s=FLUSH_LIMIT_S))
    if not flushed.success:
        raise RuntimeError("the cache could not be emptied")
    if order["scatter"]:
        engine.loop.run_until_complete(scatter(engine, *order["scatter"]))
    run = Run(engine, order["check"])
    before = totals(state(engine))
    started = time.perf_counter()
    engine.loop.run_until_complete(run.all_of(order["turns"]))
    took = time.perf_counter() - started
    if order["check"]:
        return {"said": run.said}
    after = totals(state(engine))
    return {
        "s": took,
        "ttft_ms": run.ttft_ms,
        "tpot_ms": run.tpot_ms,
        "prompt_tokens": run.prompt_tokens,
        "cached_tokens": run.cached_tokens,
        "output_tokens": run.output_tokens,
        "least_prefill_tokens": least_prefill_tokens(run.prompts, run.generated),
        **{name: after[name] - before[name] for name in after},
    }


def state(engine: Any) -> dict[str, Any]:
    return engine.get_server_info()["internal_states"][0]["packinfer"]


def main() -> None:
    orders = Orders()
    import sglang

    engine = sglang.Engine(**json.loads(sys.argv[1]))
    for order in orders:
        try:
            answer = obey(engine, order)
        except Exception as e:  # the engine may well run other workloads
            answer = {"error": f"{type(e).__name__}: {e}".splitlines()[0]}
        orders.answer(answer)
    engine.shutdown()


if __name__ == "__main__":
    main()
