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
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch
from lib.engine_worker import EngineWorker, Orders
from lib.servers import ServerError, stop_all, undone_at_end
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
    """Obeys {"load", "tokens"} with {"s", "ids"}."""
    orders = Orders()
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
    for order in orders:
        params = {"temperature": 0, "max_new_tokens": order["tokens"], "ignore_eos": True}
        started = time.perf_counter()
        outs = engine.generate(input_ids=prompts[order["load"]], sampling_params=params)
        took = time.perf_counter() - started
        orders.answer({"s": took, "ids": [out["output_ids"] for out in outs]})
    engine.shutdown()


def measure(rounds: int, folder: Path, speeds: dict[tuple[str, str], list[float]], undo: ExitStack) -> None:
    """Appends decode tokens/s by load and arm."""
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    model = write_tiny_model(folder / "tiny")
    arms: dict[str, EngineWorker] = {}
    undo.callback(stop_all, arms.values())
    for name, (backend, config) in ARMS.items():
        arguments = [__file__, "--worker", backend, str(model)]
        arms[name] = EngineWorker(name, arguments, folder / f"{name}.log", {"PACKINFER_CONFIG": json.dumps(config)})
    for arm in arms.values():
        arm.wait()
    for load in loads():
        said = [arm.ask({"load": load, "tokens": MANY})["ids"] for arm in arms.values()]  # also fills the radix caches
        equal = [sum(a == b for a, b in zip(said[0], other, strict=True)) for other in said[1:]]
        print(f"{load}: outputs equal to stock, of {REQUESTS}: {equal}", flush=True)
        for _ in range(rounds):
            for name, arm in arms.items():
                many, few = (arm.ask({"load": load, "tokens": tokens})["s"] for tokens in (MANY, FEW))
                speeds.setdefault((load, name), []).append(REQUESTS * (MANY - FEW) / (many - few))


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    speeds: dict[tuple[str, str], list[float]] = {}
    with undone_at_end() as undo:
        try:
            measure(args.rounds, Path(undo.enter_context(tempfile.TemporaryDirectory())), speeds, undo)
        except ServerError as e:
            sys.exit(f"bench_decode: {e}")
        except KeyboardInterrupt:
            return 130
    table = Table("load", "backend", "decode tokens/s", "spread", "packinfer is faster by")
    for (load, name), values in speeds.items():
        ours, median = statistics.median(speeds[load, "packinfer"]), statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        table.add_row(load, name, f"{median:.0f}", spread, f"{ours / median:.2f}x")
    cpus = f"{os.cpu_count()} cores, {platform.machine()}"
    table.title = f"SGLang {version('sglang')}, torch {torch.__version__}, {cpus}; medians of {args.rounds} rounds"
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
