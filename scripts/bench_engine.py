"""Whole engines on one GPU: packinfer against stock attention backends, all up at once, taking turns.

    python scripts/bench_engine.py --model DIR [--backends packinfer,fa3,flashinfer] [--loads shared-16000] [--out DIR]

Each load is its requests at once with a warm radix cache: what remains is decode. Rollouts (``rl-...``: samples of
unseen prompts) begin with an empty one. Weights may be ``--load-format dummy``: the time of a step does not depend on
them, but its text does; outputs are not compared here. ``packinfer-wrap`` is packinfer over fa3 by ``wrap``, for
models that take a few backends by name only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lib.choices import names
from lib.engine_worker import EngineWorker, Orders
from lib.machine import machine
from lib.servers import ServerError, stop_all, undone_at_end


class Load(NamedTuple):
    """``prompts`` of ``shared`` tokens for all and ``own`` of their own, ``samples`` of each, ``new`` tokens each."""

    prompts: int
    shared: int
    own: int
    samples: int = 1
    new: int = 256
    cold: bool = False

    @property
    def requests(self) -> int:
        return self.prompts * self.samples


LOADS = {
    "shared-16000": Load(64, 16000, 64),
    "shared-2000": Load(64, 2000, 64),
    "unrelated-2000": Load(64, 0, 2000),
    "alone-500": Load(1, 0, 500),
    "alone-8000": Load(1, 0, 8000),
    "alone-32000": Load(1, 0, 32000),
    "four-8000": Load(4, 0, 8000),
    "sixteen-2000": Load(16, 0, 2000),
    "rl-8k": Load(8, 0, 8000, samples=8, new=128, cold=True),
    "rl-4k": Load(8, 0, 4000, samples=8, new=1024, cold=True),
}
OURS = "packinfer"
WRAPPED = "packinfer-wrap"
MOST_REQUESTS = max(load.requests for load in LOADS.values())


def prompts(name: str) -> list[list[int]]:
    """The prompts' token ids: one shared prefix and a suffix for each."""
    rng, load = random.Random(name), LOADS[name]
    words = lambda n: [rng.randrange(1000, 30000) for _ in range(n)]  # noqa: E731
    prefix = words(load.shared)
    return [prefix + words(load.own) for _ in range(load.prompts)]


def worker(backend: str, args: argparse.Namespace) -> None:
    """Obeys {"load", "new"} (tokens to generate) with {"s", "cached", "packinfer"}."""
    orders = Orders()
    if backend == WRAPPED:
        backend, os.environ["PACKINFER_CONFIG"] = "fa3", json.dumps({"wrap": True})
    import sglang

    engine = sglang.Engine(
        model_path=args.model,
        load_format=args.load_format,
        attention_backend=backend,
        mem_fraction_static=0.93,
        max_total_tokens=args.pool_tokens,
        cuda_graph_max_bs_decode=MOST_REQUESTS,
        max_running_requests=MOST_REQUESTS,
        cuda_graph_backend_prefill="disabled",
        random_seed=0,
        log_level="warning",
        **json.loads(args.engine),
    )
    for order in orders:
        load = LOADS[order["load"]]
        params = {"temperature": 0, "max_new_tokens": order["new"], "ignore_eos": True, "n": load.samples}
        if load.cold:
            engine.flush_cache()
        started = time.perf_counter()
        outs = engine.generate(input_ids=prompts(order["load"]), sampling_params=params)
        took = time.perf_counter() - started
        state = engine.get_server_info()["internal_states"][0].get("packinfer") or {}
        state = {k: state.get(k) for k in ("groups", "rows_grouped", "packed_steps", "plans", "plan_us_p50")}
        cached = sum(out["meta_info"]["cached_tokens"] for out in outs)
        orders.answer({"s": took, "cached": cached, "packinfer": state})
    engine.shutdown()


def measure(args: argparse.Namespace, undo: ExitStack) -> list[dict]:
    args.out.mkdir(parents=True, exist_ok=True)
    arms: dict[str, EngineWorker] = {}
    undo.callback(stop_all, arms.values())
    for backend in args.backends.split(","):  # one after the other: each takes its share of what memory is there
        arguments = [__file__, *sys.argv[1:], "--worker", backend]
        arms[backend] = EngineWorker(backend, arguments, args.out / f"{backend}.log")
        arms[backend].wait()
        print(f"{backend} is up", flush=True)
    results = []
    for name in args.loads:
        load = LOADS[name]
        order, only_first = {"load": name, "new": load.new}, {"load": name, "new": 1}
        for arm in arms.values():
            for _ in range(1 if load.cold else 2):  # fills the radix cache, then the first warm run
                first = arm.ask(order)
        speeds: dict[str, list[float]] = {backend: [] for backend in arms}
        steps: dict[str, list[float]] = {backend: [] for backend in arms}  # ms of each token but the first
        for _ in range(args.rounds):
            for backend, arm in arms.items():
                first_s = arm.ask(only_first)["s"]
                said = arm.ask(order)
                speeds[backend].append(load.requests * load.new / said["s"])
                steps[backend].append((said["s"] - first_s) / (load.new - 1) * 1e3)
                if backend in (OURS, WRAPPED):
                    first = said
        medians = {backend: statistics.median(v) for backend, v in speeds.items()}
        best = max((m for b, m in medians.items() if b not in (OURS, WRAPPED)), default=float("nan"))
        text = ", ".join(f"{b} {medians[b]:.0f} ({min(v):.0f}-{max(v):.0f})" for b, v in speeds.items())
        ratio = medians.get(OURS, medians.get(WRAPPED, float("nan"))) / best
        text += "; ms a step " + ", ".join(
            f"{b} {statistics.median(v):.3f} ({min(v):.3f}-{max(v):.3f})" for b, v in steps.items()
        )
        print(f"{name}: output tokens/s {text}; packinfer / best {ratio:.3f} | {first}", flush=True)
        results.append({"load": name, **load._asdict(), "tokens_per_s": speeds, "step_ms": steps, "last": first})
    return results


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--backends", default="packinfer,fa3,flashinfer")
    parser.add_argument(
        "--loads", type=names(LOADS), default="shared-16000,shared-2000,unrelated-2000", help=", ".join(LOADS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-tokens", type=int, default=155000, help="KV pool of each engine, tokens")
    parser.add_argument("--engine", default="{}", help="more arguments of sglang.Engine, as JSON")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    with undone_at_end() as undo:
        try:
            results = measure(args, undo)
        except (ServerError, OSError) as e:
            sys.exit(f"bench_engine: {e}")
        except KeyboardInterrupt:
            return 130
    environment = {**machine(args.model), "engine": json.loads(args.engine)}
    (args.out / "engine.json").write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
