"""Decode speed on the CPU: the stock backend, packinfer, and packinfer with grouping off, interleaved in one run.

    python scripts/bench_decode.py [--rounds 3]

A tiny Llama (4 layers, 16 query heads, 4 KV heads, head_dim 64, float32), 16 requests of 2,080 tokens: behind one
prefix of 2,048, and unrelated. One engine per arm, all up at once, only one of them busy. A round times the same warm
batch with few and with many new tokens; the difference is decode alone. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

REQUESTS, PREFIX_TOKENS, SUFFIX_TOKENS = 16, 2048, 32
FEW, MANY = 8, 40
ARMS = {
    "stock torch_native": ("torch_native", {}),
    "packinfer": ("packinfer", {}),
    "packinfer, grouping off": ("packinfer", {"grouping": "off"}),
}


def loads() -> dict[str, list[list[int]]]:
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(300, 1200) for _ in range(n)]

    prefix = words(PREFIX_TOKENS)
    return {
        "shared prefix": [prefix + words(SUFFIX_TOKENS) for _ in range(REQUESTS)],
        "unrelated": [words(PREFIX_TOKENS + SUFFIX_TOKENS) for _ in range(REQUESTS)],
    }


def worker(backend: str, model: str) -> None:
    """Serve lines of JSON {"load", "tokens"} on standard input with {"s", "ids"} on standard output."""
    import sglang

    engine = sglang.Engine(
        model_path=model,
        attention_backend=backend,
        dtype="float32",
        max_total_tokens=80000,
        random_seed=0,
        sleep_on_idle=True,
        log_level="error",
    )
    prompts = loads()
    print("READY", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        params = {"temperature": 0, "max_new_tokens": order["tokens"], "ignore_eos": True}
        started = time.perf_counter()
        outs = engine.generate(input_ids=prompts[order["load"]], sampling_params=params)
        took = time.perf_counter() - started
        print("DONE " + json.dumps({"s": took, "ids": [out["output_ids"] for out in outs]}), flush=True)
    engine.shutdown()


class Arm:
    def __init__(self, backend: str, config: dict[str, str], model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", backend, str(model)],
            env={**os.environ, "PACKINFER_CONFIG": json.dumps(config)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read("READY")

    def _read(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        sys.exit("an engine ended early; its last words stand above")

    def run(self, load: str, tokens: int) -> dict:
        self.process.stdin.write(json.dumps({"load": load, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read("DONE "))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    from packinfer_sgl.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "tiny")
        arms = {name: Arm(backend, config, model) for name, (backend, config) in ARMS.items()}
        speeds: dict[tuple[str, str], list[float]] = {}
        for load in loads():
            said = [arm.run(load, MANY)["ids"] for arm in arms.values()]  # also fills the radix caches
            equal = [sum(a == b for a, b in zip(said[0], other, strict=True)) for other in said[1:]]
            print(f"{load}: outputs equal to stock, of {REQUESTS}: {equal}", flush=True)
            for _ in range(args.rounds):
                for name, arm in arms.items():
                    seconds = arm.run(load, MANY)["s"] - arm.run(load, FEW)["s"]
                    speeds.setdefault((load, name), []).append(REQUESTS * (MANY - FEW) / seconds)
        for arm in arms.values():
            arm.close()
    table = Table("load", "backend", "decode tokens/s", "spread", "packinfer is faster by")
    for (load, name), values in speeds.items():
        ours, median = statistics.median(speeds[load, "packinfer"]), statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        table.add_row(load, name, f"{median:.0f}", spread, f"{ours / median:.2f}x")
    cpus = f"{os.cpu_count()} cores, {platform.machine()}"
    table.title = f"SGLang {version('sglang')}, torch {torch.__version__}, {cpus}; medians of {args.rounds} rounds"
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
