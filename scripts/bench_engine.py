"""Whole engines on one GPU: packinfer against stock attention backends, all up at once, taking turns.

    python scripts/bench_engine.py --model DIR [--backends packinfer,fa3,flashinfer] [--loads shared-16000] [--out DIR]

Each load is its requests at once, 256 new tokens each, with a warm radix cache: what remains is decode. Weights may be
``--load-format dummy``: the time of a step does not depend on them, but its text does; outputs are not compared here.
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
from importlib.metadata import version
from pathlib import Path

from lib.engine_worker import EngineWorker, Orders
from lib.servers import ServerError, stop_all, undone_at_end

NEW_TOKENS = 256
# requests, tokens that they share, tokens of each of them
LOADS = {
    "shared-16000": (64, 16000, 64),
    "shared-2000": (64, 2000, 64),
    "unrelated-2000": (64, 0, 2000),
    "alone-500": (1, 0, 500),
    "alone-8000": (1, 0, 8000),
    "alone-32000": (1, 0, 32000),
    "four-8000": (4, 0, 8000),
    "sixteen-2000": (16, 0, 2000),
}
MOST_REQUESTS = max(requests for requests, *_ in LOADS.values())


def prompts(load: str) -> list[list[int]]:
    """The requests' token ids: one shared prefix and a suffix for each."""
    rng = random.Random(load)
    requests, shared, own = LOADS[load]
    words = lambda n: [rng.randrange(1000, 30000) for _ in range(n)]  # noqa: E731
    prefix = words(shared)
    return [prefix + words(own) for _ in range(requests)]


def worker(backend: str, args: argparse.Namespace) -> None:
    """Obeys {"load", "new"} (tokens to generate) with {"s", "cached", "packinfer"}."""
    orders = Orders()
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
        params = {"temperature": 0, "max_new_tokens": order["new"], "ignore_eos": True}
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
    for load in args.loads.split(","):
        order, only_first = {"load": load, "new": NEW_TOKENS}, {"load": load, "new": 1}
        for arm in arms.values():
            for _ in range(2):  # fills the radix cache, then the first warm run
                first = arm.ask(order)
        speeds: dict[str, list[float]] = {backend: [] for backend in arms}
        steps: dict[str, list[float]] = {backend: [] for backend in arms}  # ms of each token but the first
        for _ in range(args.rounds):
            for backend, arm in arms.items():
                first_s = arm.ask(only_first)["s"]
                said = arm.ask(order)
                speeds[backend].append(LOADS[load][0] * NEW_TOKENS / said["s"])
                steps[backend].append((said["s"] - first_s) / (NEW_TOKENS - 1) * 1e3)
                if backend == "packinfer":
                    first = said
        medians = {backend: statistics.median(v) for backend, v in speeds.items()}
        best = max((m for b, m in medians.items() if b != "packinfer"), default=float("nan"))
        text = ", ".join(f"{b} {medians[b]:.0f} ({min(v):.0f}-{max(v):.0f})" for b, v in speeds.items())
        ratio = medians.get("packinfer", float("nan")) / best
        text += "; ms a step " + ", ".join(f"{b} {statistics.median(v):.3f}" for b, v in steps.items())
        print(f"{load}: output tokens/s {text}; packinfer / best {ratio:.2f} | {first}", flush=True)
        results.append({"load": load, "tokens_per_s": speeds, "step_ms": steps, "last": first})
    return results


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--backends", default="packinfer,fa3,flashinfer")
    parser.add_argument("--loads", default="shared-16000,shared-2000,unrelated-2000", help=", ".join(LOADS))
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
    environment = {"sglang": version("sglang"), "model": os.path.basename(args.model), "new_tokens": NEW_TOKENS}
    (args.out / "engine.json").write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
