"""packinfer-sgl estimate against a server: what it expects of a request log, and what the server counted.

    python scripts/check_estimate.py --out DIR [--trace mooncake.jsonl,azure.csv]

Starts a server on a tiny model without a GPU, sends it loads of different kinds, and estimates each from the server's
own request log; so from traces (those of their first requests that are short enough for a CPU). Exit code 1 if
an estimate of the KV tokens read is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from lib.counters import totals
from lib.servers import Server, undone_at_end
from lib.token_traces import choose, token_ids
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from packinfer_sgl.tools.estimate import Estimate
from packinfer_sgl.tools.estimate_requests import read_load
from packinfer_sgl.tools.estimate_times import read_model
from packinfer_sgl.tools.tiny_model import WORDS, write_tiny_model

AT_ONCE = 24  # more than come at once: SGLang 0.5.17 may keep the last one of a full batch waiting
TRACE_REQUESTS, TRACE_TOKENS = 16, 3000
MOST_OFF = 0.1
FLAGS = (
    "--attention-backend packinfer --dtype float32 --max-total-tokens 49152 --random-seed 0 --sleep-on-idle "
    f"--max-running-requests {AT_ONCE} --log-requests --log-requests-level 3 --log-requests-format json"
)
FIRST, LAST = 300, 1200  # ids of words in the tiny model's vocabulary
Body = dict[str, Any]
console = Console(highlight=False)


def ask(ids: list[int], tokens: int, **more: Any) -> tuple[str, Body]:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more}
    return "/generate", {"input_ids": ids, "sampling_params": sampling}


def tree(rng: random.Random) -> Iterator[tuple[str, Body]]:
    """Three levels of prefixes."""
    root = words(rng, 300)
    for _ in range(4):
        middle = root + words(rng, 100)
        for _ in range(4):
            yield ask(middle + words(rng, rng.randint(1, 60)), 40)


def samples(rng: random.Random) -> Iterator[tuple[str, Body]]:
    """Four samples of each of four prompts."""
    for _ in range(4):
        yield ask(words(rng, 300), 48, n=4)


def unrelated(rng: random.Random) -> Iterator[tuple[str, Body]]:
    for _ in range(16):
        yield ask(words(rng, rng.randint(100, 500)), rng.randint(24, 48))


def chats(rng: random.Random) -> Iterator[tuple[str, Body]]:
    """Behind one system prompt, one after the other."""
    system = " ".join(rng.choices(WORDS, k=500))
    for _ in range(32):
        turn = {"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))}
        messages = [{"role": "system", "content": system}, turn]
        body = {"model": "tiny", "messages": messages, "max_tokens": rng.randint(24, 64), "ignore_eos": True}
        yield "/v1/chat/completions", body


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST, LAST) for _ in range(count)]


def of_trace(path: Path) -> Callable[[random.Random], Iterator[tuple[str, Body]]]:
    def load(rng: random.Random) -> Iterator[tuple[str, Body]]:
        for request in choose(path, TRACE_REQUESTS, TRACE_TOKENS)[0]:
            yield ask(token_ids(request, range(FIRST, LAST)), request.output_tokens)

    return load


LOADS = {"tree": tree, "samples": samples, "unrelated": unrelated, "chats": chats}
SPACED_S = {"chats": 0.25}  # between two requests; the others come at once


def send(server: Server, name: str, bodies: list[tuple[str, Body]]) -> None:
    def post(path: str, body: Body) -> None:
        requests.post(server.url + path, json=body, timeout=600).raise_for_status()

    with ThreadPoolExecutor(len(bodies)) as pool:
        sent = []
        for path, body in bodies:
            sent.append(pool.submit(post, path, body))
            time.sleep(SPACED_S.get(name, 0.0))
        for one in sent:
            one.result()


def counted(server: Server) -> dict[str, int]:
    return totals(requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]["packinfer"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=lambda text: [Path(name) for name in text.split(",")], default=[])
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = str(write_tiny_model(args.out / "model"))
    loads = {**LOADS, **{path.stem: of_trace(path) for path in args.trace}}
    table = Table(
        "load", "n", "steps", "KV tokens", "read", "off", title="expected / counted", box=SIMPLE_HEAD, padding=0
    )
    worst = 0.0
    with undone_at_end() as undo:
        logs = args.out / "requests"
        flags = [*FLAGS.split(), "--log-requests-target", str(logs), "--model-path", model]
        server = Server("packinfer", flags, args.out / "server.log")
        undo.callback(server.stop)
        server.wait(console)
        (log,) = logs.iterdir()
        for name, load in loads.items():
            before, logged = counted(server), len(log.read_text().splitlines())
            send(server, name, list(load(random.Random(name))))
            after = counted(server)
            part = args.out / f"{name}.log"
            part.write_text("\n".join(log.read_text().splitlines()[logged:]))
            found = read_load(part)
            estimate = Estimate(found, read_model(Path(model), 1), "cpu")
            row = estimate.first(AT_ONCE)
            expected = row.logical * row.steps, row.read * row.steps
            was = [after[f"kv_tokens_{what}"] - before[f"kv_tokens_{what}"] for what in ("logical", "read")]
            off = expected[1] / was[1] - 1
            worst = max(worst, abs(off))
            steps = after["packed_steps"] - before["packed_steps"]
            numbers = [f"{said:,.0f} / {truth:,}" for said, truth in zip((row.steps, *expected), (steps, *was))]
            table.add_row(name[:12], f"{len(found.requests)}", *numbers, f"{off:+.1%}")
    console.print(table)
    return int(worst > MOST_OFF)


if __name__ == "__main__":
    sys.exit(main())
