"""Thousands of random requests against an arena and a KV pool that are far too small, with every step audited.

    python scripts/soak.py [--requests 2000] [--seed 0]

A tiny model on the CPU: requests behind families of prompts that are many times the pool, so that eviction never
stops, with aborts, cache flushes, retractions, preemptions by requests of a higher priority, many of which generate
nothing, and siblings held back. Every request must be answered, as the stock backend answers it (up to near-ties),
SGLang's own leak check, which runs whenever the server is idle, must stay silent, and in each decode step the plan must
read just the slots that SGLang's table has, the arena's books must balance and each copy that is read must equal what
it was copied from. Exit code 0: all of that held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

NEAR_TIE = 1e-4  # log-probability: the order of float32 sums may decide between tokens as close as this
LONGEST = 60  # tokens of an answer
PROMPTS = 60
ENGINE = {"max_total_tokens": 3100, "max_running_requests": 6, "chunked_prefill_size": 512}
PRIORITIES = {"enable_priority_scheduling": True}
URGENT, WITHIN_S = 1000, 2.0  # a priority that preempts others, and when such requests come after the others
# SGLang's own setting for tests: some requests are retracted at every so many forward passes
PACKINFER = {
    "PACKINFER_CONFIG": '{"arena_tokens": 500, "hold_siblings": true}',
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "37",
}
MODEL = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}


def prompts(seed: int) -> list[list[int]]:
    """Families of three levels: 100 to 400 tokens for all of a family, less for each branch, some for each prompt."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(300, 1200) for _ in range(rng.randint(low, high))]

    made: list[list[int]] = []
    while len(made) < PROMPTS:
        root = words(100, 400)
        for _ in range(rng.randint(1, 3)):
            branch = root + words(1, 80)
            made += [branch + words(1, 40) for _ in range(rng.randint(1, 4))]
    return made[:PROMPTS]


def audit() -> None:
    """SGLang's entry into this file, in the server's processes: look at slots and arena after each decode step."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from packinfer_sgl.runners.arena import Arena
    from packinfer_sgl.runners.slots import audit_reads
    from packinfer_sgl.serving.metrics import STATS
    from packinfer_sgl.serving.packed_path import Kind, PackedPath

    seen: Counter[str] = Counter()
    count_step, step = Arena.count_step, PackedPath.step

    def read_right(self: PackedPath, batch: Any) -> bool:
        packed = step(self, batch)
        if self.kind is Kind.DECODE:
            audit_reads(self._loaded, self.runner.kv_slots, batch, newest_is_there=True)
            STATS.audited_steps += 1
        return packed

    def audited(self: Arena) -> None:
        held = [s for s in (*self._copies.values(), *self._waiting.values()) if s.slot >= 0]
        slots = [slot for span in held for slot in range(span.slot, span.slot + span.tokens)]
        assert len(slots) == len(set(slots)) == self.as_dict()["used_tokens"], "the arena's books do not balance"
        assert set(slots) <= set(self.slots), "a copy lies outside the arena"
        assert set(self._used) <= set(self._copies), "a copy was given up while a plan reads it"
        for span in self._used.values():
            self._check(span)
        seen["steps"] += 1
        STATS.details["soak"] = dict(seen)
        count_step(self)

    def retracted(result: Any, *args: Any, **kwargs: Any) -> None:
        seen["retractions"] += 1

    def preempted(result: bool, *args: Any, **kwargs: Any) -> None:
        seen["preemptions"] += bool(result)

    def flushed(result: Any, *args: Any, **kwargs: Any) -> None:
        seen["flushes"] += bool(result)

    Arena.count_step, PackedPath.step = audited, read_right
    HookRegistry.register("sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode", retracted, HookType.AFTER)
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule"
    HookRegistry.register(adder, preempted, HookType.AFTER)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.flush_cache", flushed, HookType.AFTER)


def greedy(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


def play(backend: str, model: str, requests: int, seed: int) -> dict[str, Any]:
    """In a process of its own: the stock backend answers each prompt once, packinfer everything."""
    import sglang

    engine = sglang.Engine(
        model_path=model,
        attention_backend=backend,
        dtype="float32",
        random_seed=0,
        log_level="error",
        **ENGINE,
        **(PRIORITIES if backend == "packinfer" else {}),
    )
    asked = prompts(seed)
    if backend != "packinfer":
        outs = engine.generate(
            input_ids=asked, sampling_params=greedy(LONGEST), return_logprob=True, top_logprobs_num=5
        )
        tops = [out["meta_info"]["output_top_logprobs"] for out in outs]
        said = [
            {"ids": out["output_ids"], "top": [{str(t): lp for lp, t, _ in position} for position in top]}
            for out, top in zip(outs, tops, strict=True)
        ]
        engine.shutdown()
        return {"said": said}

    rng = random.Random(seed + 1)
    said, aborted = [], 0

    async def one(i: int, prompt: int, tokens: int, abort_at: int | None) -> dict[str, Any]:
        nonlocal aborted
        if tokens < LONGEST:  # while others run
            await asyncio.sleep(WITHIN_S * (i % 10) / 10)
        rid = f"soak-{i}"
        stream = await engine.async_generate(
            input_ids=asked[prompt], sampling_params=greedy(tokens), rid=rid, stream=True,
            priority=URGENT if tokens < LONGEST else 0,
        )  # fmt: skip
        last, parts = None, 0
        async for part in stream:
            parts += 1
            # of a request that it aborts while it waits (retracted, say) SGLang's last part has the last token alone
            if last is None or len(part["output_ids"]) >= len(last["output_ids"]):
                last = part
            if parts == abort_at:
                engine.tokenizer_manager.abort_request(rid=rid)
                aborted += 1
        return {"prompt": prompt, "ids": last["output_ids"], "whole": abort_at is None, "tokens": tokens}

    async def wave(orders: list[tuple[int, int, int, int | None]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(one(*order) for order in orders))

    at = 0
    while at < requests:
        hot = rng.sample(range(PROMPTS), 15)
        orders = []
        for i in range(at, min(requests, at + rng.randint(20, 80))):
            tokens = rng.choice([0, 3, 20, LONGEST, LONGEST, LONGEST, LONGEST])
            abort_at = rng.randint(1, tokens - 1) if tokens and rng.random() < 0.1 else None
            orders.append((i, rng.choice(hot if rng.random() < 0.9 else range(PROMPTS)), tokens, abort_at))
        said += engine.loop.run_until_complete(wave(orders))
        at += len(orders)
        print(f"{at} of {requests} requests", file=sys.stderr, flush=True)
        if at == len(orders) or rng.random() < 0.2:  # at least once
            engine.flush_cache()
    state = engine.get_server_info()["internal_states"][0]["packinfer"]
    engine.flush_cache()
    after = engine.get_server_info()["internal_states"][0]["packinfer"]["arena"]
    engine.shutdown()
    return {"said": said, "aborted": aborted, "state": state, "after_flush": after}


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


def soak(requests: int, seed: int, folder: Path) -> list[str]:
    """Run it; what did not hold, and a line for each thing that did on standard output."""
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    model = write_tiny_model(folder / "model", **MODEL)
    info = folder / "packinfer_soak-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packinfer-soak\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\npackinfer_soak = soak:audit\n")
    path = os.pathsep.join(filter(None, [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    children = {}
    for backend, env in (("torch_native", {}), ("packinfer", PACKINFER)):
        command = [sys.executable, __file__, "--play", backend, str(model), str(requests), str(seed)]
        children[backend] = subprocess.Popen(
            # two engines at once: more threads would only wait for each other
            command,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
            stdout=subprocess.PIPE,
            text=True,
        )
    results = {}
    for backend, child in children.items():
        output, _ = child.communicate()
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if not lines:
            return [f"the {backend} engine died (exit {child.returncode}); its last words are above"]
        results[backend] = json.loads(lines[0].removeprefix("RESULT "))
    stock, ours = results["torch_native"]["said"], results["packinfer"]
    verdicts: Counter[str | None] = Counter()
    for i, answer in enumerate(ours["said"]):
        expected = stock[answer["prompt"]]
        verdicts[verdict := wrong(answer, expected)] += 1
        if verdict == "different":
            of = f"{len(answer['ids'])} of {answer['tokens']} tokens{'' if answer['whole'] else ', aborted'}"
            at = next((n for n, pair in enumerate(zip(answer["ids"], expected["ids"])) if pair[0] != pair[1]), None)
            at_token = f"token {at}: {answer['ids'][at]}, stock {expected['top'][at]}" if at is not None else "too few"
            print(f"answer {i} to prompt {answer['prompt']}, {of}; {at_token}")
    state, after = ours["state"], ours["after_flush"]
    none = {"retractions": 0, "preemptions": 0, "flushes": 0, "steps": 0}
    arena, seen = state["arena"], {**none, **state.get("soak", {})}
    print(f"{len(ours['said'])} answers: {verdicts[None]} equal, {verdicts['near-tie']} near-ties, "
          f"{verdicts['different']} different; {ours['aborted']} aborted")  # fmt: skip
    print(f"packed: {state['packed_steps']} decode steps, {state['packed_extends']} prefills and chunks")
    print(f"audited steps {seen['steps']}, slots of {state['audited_steps']}, retractions {seen['retractions']}, "
          f"preemptions {seen['preemptions']}, flushes {seen['flushes']}")  # fmt: skip
    print("arena: " + ", ".join(f"{name} {value:,}" for name, value in arena.items()))
    print("held: " + ", ".join(f"{name} {value:,}" for name, value in state["held"].items()))
    must = {
        f"{verdicts['different']} answers differ from the stock backend's": not verdicts["different"],
        "not every request was answered": len(ours["said"]) == requests,
        "a flush leaves copies in the arena": after["used_tokens"] == after["spans"] == 0,
        "nothing was copied and found": min(arena["copies"], arena["hits"]) > 0,
        "no request was held and found its prefix": min(state["held"].values()) > 0,
        "nothing was retracted, preempted, aborted or flushed": min(
            seen["retractions"], seen["preemptions"], seen["flushes"], ours["aborted"]
        )
        > 0,
        "a decode step was not audited": state["audited_steps"] == state["packed_steps"],
    }
    return [problem for problem, held in must.items() if not held]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--play", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        backend, model, requests, seed = args.play
        print("RESULT " + json.dumps(play(backend, model, int(requests), int(seed))), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        problems = soak(args.requests, args.seed, Path(folder))
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
