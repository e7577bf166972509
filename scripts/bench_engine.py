"""Whole engines on one GPU: packinfer against stock attention backends, all up at once, taking turns.

    python scripts/bench_engine.py --model DIR [--backends packinfer,fa3,flashinfer] [--loads shared-16000] [--out DIR]

Each load is 64 requests at once, 256 new tokens each, with a warm radix cache: what remains is decode. Weights may be
``--load-format dummy``: the time of a step does not depend on them, but its text does; outputs are not compared here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REQUESTS, NEW_TOKENS = 64, 256
LOADS = {"shared-16000": (16000, 64), "shared-2000": (2000, 64), "unrelated-2000": (0, 2000)}


def prompts(load: str) -> list[list[int]]:
    """The requests' token ids: one shared prefix and a suffix for each."""
    rng = random.Random(load)
    shared, own = LOADS[load]
    words = lambda n: [rng.randrange(1000, 30000) for _ in range(n)]  # noqa: E731
    prefix = words(shared)
    return [prefix + words(own) for _ in range(REQUESTS)]


def worker(backend: str, args: argparse.Namespace) -> None:
    """Serve lines of JSON {"load"} on standard input with {"s", "packinfer"} on standard output."""
    import sglang

    engine = sglang.Engine(
        model_path=args.model,
        load_format=args.load_format,
        attention_backend=backend,
        mem_fraction_static=0.93,
        max_total_tokens=args.pool_tokens,
        cuda_graph_max_bs_decode=REQUESTS,
        max_running_requests=REQUESTS,
        cuda_graph_backend_prefill="disabled",
        random_seed=0,
        log_level="warning",
        **json.loads(args.engine),
    )
    print("READY", flush=True)
    for line in sys.stdin:
        load = json.loads(line)["load"]
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        started = time.perf_counter()
        outs = engine.generate(input_ids=prompts(load), sampling_params=params)
        took = time.perf_counter() - started
        state = engine.get_server_info()["internal_states"][0].get("packinfer") or {}
        state = {k: state.get(k) for k in ("groups", "rows_grouped", "packed_steps", "plans", "plan_us_p50")}
        cached = sum(out["meta_info"]["cached_tokens"] for out in outs)
        print("DONE " + json.dumps({"s": took, "cached": cached, "packinfer": state}), flush=True)
    engine.shutdown()


class Arm:
    def __init__(self, backend: str, args: argparse.Namespace, log: Path) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", backend]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def read(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        sys.exit(f"an engine ended early; its last words are in {self.log.name}")

    def run(self, load: str) -> dict:
        self.process.stdin.write(json.dumps({"load": load}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.read("DONE "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--backends", default="packinfer,fa3,flashinfer")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-tokens", type=int, default=155000, help="KV pool of each engine, tokens")
    parser.add_argument("--engine", default="{}", help="more arguments of sglang.Engine, as JSON")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    args.out.mkdir(parents=True, exist_ok=True)
    arms = {}
    for backend in args.backends.split(","):  # one after the other: each takes its share of what memory is there
        arms[backend] = Arm(backend, args, args.out / f"{backend}.log")
        arms[backend].read("READY")
        print(f"{backend} is up", flush=True)
    results = []
    try:
        for load in args.loads.split(","):
            for arm in arms.values():
                for _ in range(2):  # fills the radix cache, then the first warm run
                    first = arm.run(load)
            speeds: dict[str, list[float]] = {backend: [] for backend in arms}
            for _ in range(args.rounds):
                for backend, arm in arms.items():
                    said = arm.run(load)
                    speeds[backend].append(REQUESTS * NEW_TOKENS / said["s"])
                    if backend == "packinfer":
                        first = said
            medians = {backend: statistics.median(v) for backend, v in speeds.items()}
            best = max((m for b, m in medians.items() if b != "packinfer"), default=float("nan"))
            text = ", ".join(f"{b} {medians[b]:.0f} ({min(v):.0f}-{max(v):.0f})" for b, v in speeds.items())
            ratio = medians.get("packinfer", float("nan")) / best
            print(f"{load}: output tokens/s {text}; packinfer / best {ratio:.2f} | {first}", flush=True)
            results.append({"load": load, "tokens_per_s": speeds, "last": first})
    finally:
        for arm in arms.values():
            arm.process.stdin.close()
        for arm in arms.values():
            try:
                arm.process.wait(30)
            except subprocess.TimeoutExpired:
                arm.process.kill()
    environment = {"sglang": version("sglang"), "model": os.path.basename(args.model), "requests": REQUESTS}
    (args.out / "engine.json").write_text(json.dumps({"environment": environment, "results": results}, indent=1))


if __name__ == "__main__":
    main()
