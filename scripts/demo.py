"""Stock SGLang and SGLang with packinfer on the same tiny model and prompts; see demo.sh."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests
import torch
from lib.answers import NEAR_TIE, verdict
from lib.servers import Server, ServerError, undone_at_end
from rich.console import Console
from rich.table import Table
from rich.text import Text

from packinfer_sgl.cli import CommandError, active_states
from packinfer_sgl.tools.inspect_view import group_tree, totals
from packinfer_sgl.tools.tiny_model import build_tokenizer, write_tiny_model

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()
REQUESTS, PREFIX_TOKENS, SUFFIX_TOKENS = 16, 2048, 32
ANSWER_TOKENS, STREAM_INTERVAL, ROUNDS = 73, 8, 3
NEEDED_DISK_MIB = 300

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the text is what the user reads."""


def start(name: str, backend: str | None, model: Path) -> Server:
    flags = ["--model-path", str(model), "--random-seed", "0", "--max-total-tokens", "65536"]
    flags += ["--dtype", "bfloat16", "--mem-fraction-static", "0.3"] if ON_GPU else ["--dtype", "float32"]
    flags += ["--sleep-on-idle"]  # an idle scheduler would take a core from the other server
    flags += ["--attention-backend", backend] if backend else []
    return Server(name, flags, model.parent / f"{name}.log", {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"})


def generate(server: Server, prompts: list[list[int]], tokens: int, **more: Any) -> requests.Response:
    """Greedy answers of exactly ``tokens`` tokens; ``more`` goes into the request."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "stream_interval": STREAM_INTERVAL}
    request = {"input_ids": prompts, "sampling_params": sampling, **more}
    try:
        answer = requests.post(f"{server.url}/generate", json=request, stream=True, timeout=600)
        answer.raise_for_status()
    except requests.RequestException as e:
        raise ServerError(server, f"did not answer ({type(e).__name__})") from None
    return answer


class Snapshots(threading.Thread):
    """Keeps the state of the packinfer server in which most requests were grouped."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.done, self.best = server, threading.Event(), None

    def run(self) -> None:
        while not self.done.wait(0.2):
            try:
                state = active_states(self.server.url)[0]
            except CommandError:
                continue  # whether the server is well is for others to say
            if self.best is None or _grouped(state) >= _grouped(self.best):
                self.best = state

    def __enter__(self) -> Snapshots:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.done.set()
        self.join()


def _grouped(state: dict[str, Any]) -> tuple[int, int]:
    return state["rows_grouped"], state["groups"]


def frontend(server: Server) -> dict[str, Any]:
    """Runs the frontend program; what it printed is under ``printed``."""
    path = server.log.with_suffix(".json")
    with console.status(f"{server.name}: running frontend_fork.py"):
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(HERE / "frontend_fork.py"),
            "--url",
            server.url,
            "--json",
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ServerError(server, f"did not answer the frontend program ({done.stderr.strip().splitlines()[-1]})")
    return {**json.loads(path.read_text()), "printed": done.stdout}


def decode_speed(server: Server, prompts: list[list[int]]) -> float:
    """Decode tokens/s, from the moment all requests have some tokens, so that no prefill is in it."""
    reached, last = {}, 0.0
    for line in generate(server, prompts, ANSWER_TOKENS, stream=True).iter_lines():
        if line.startswith(b"data: {"):
            answer, last = json.loads(line[6:]), time.perf_counter()
            if answer["meta_info"]["completion_tokens"] > STREAM_INTERVAL:
                reached.setdefault(answer["index"], last)
    if len(reached) < len(prompts):
        raise ServerError(server, "broke off its answers")
    return len(prompts) * (ANSWER_TOKENS - STREAM_INTERVAL - 1) / (last - max(reached.values()))


def select_verdict(stock: dict[str, Any], packed: dict[str, Any]) -> str:
    if stock["text"] == packed["text"]:
        return "equal"
    first, second = sorted(stock["normalized_prompt_logprobs"])[:-3:-1]
    return "near-tie" if first - second <= NEAR_TIE else "different"


def run_frontend(stock: Server, packed: Server) -> tuple[Counter[str], dict[str, Any]]:
    """How the answers of the two servers compare, and the most grouped state of the packinfer server meanwhile."""
    first = frontend(stock)
    with Snapshots(packed) as snapshots:
        second = frontend(packed)
    console.print(f"\n[bold]scripts/frontend_fork.py against {packed.name}[/bold]")
    for line in second["printed"].splitlines():
        console.print(Text(line), no_wrap=True, overflow="ellipsis")
    counts = Counter(verdict(answer, second["answers"][question]) for question, answer in first["answers"].items())
    counts[select_verdict(first["select"], second["select"])] += 1
    if snapshots.best is None:
        raise ServerError(packed, "never told its state")
    return counts, snapshots.best


def run_batch(stock: Server, packed: Server) -> tuple[Counter[str], dict[str, list[float]]]:
    """One batch behind one prefix: how the answers compare, and decode tokens/s of each server in each round."""
    rng, words = random.Random(0), build_tokenizer()[1]
    prefix = rng.choices(words, k=PREFIX_TOKENS)
    prompts = [prefix + rng.choices(words, k=SUFFIX_TOKENS) for _ in range(REQUESTS)]
    servers, answers = (stock, packed), []
    for server in servers:
        with console.status(f"{server.name}: answering {REQUESTS} prompts"):
            generate(server, prompts[:1], 1).json()  # the prefix is in the tree before the others ask for it
            answers.append(generate(server, prompts, ANSWER_TOKENS, return_logprob=True, top_logprobs_num=5).json())
    counts = Counter(verdict(a["meta_info"], b["meta_info"]) for a, b in zip(*answers, strict=True))
    speeds: dict[str, list[float]] = {server.name: [] for server in servers}
    for i in range(ROUNDS):
        for server in servers:  # in turn, so that a change of the machine's speed meets both
            with console.status(f"{server.name}: measuring decode, round {i + 1} of {ROUNDS}"):
                speeds[server.name].append(decode_speed(server, prompts))
    return counts, speeds


def report(counts: Counter[str], best: dict, last: dict, speeds: dict[str, list[float]]) -> bool:
    console.print("\n[bold]groups while the frontend program ran[/bold]", group_tree(best), "", totals(last), "")
    console.print(f"[bold]decode of {REQUESTS} requests behind {PREFIX_TOKENS:,} shared tokens[/bold]")
    table = Table("", "tokens/s", f"in {ROUNDS} rounds", show_edge=False)
    speeds["packinfer / stock"] = [packed / stock for stock, packed in zip(*speeds.values(), strict=True)]
    for name, values in speeds.items():
        median, low, high = (
            f"{v:,.0f}" if v >= 10 else f"{v:.2f}" for v in (statistics.median(values), min(values), max(values))
        )
        table.add_row(name, median, f"{low} .. {high}")
    console.print(table, "")

    checks: list[tuple[bool, str]] = [
        (ON_GPU or not counts["different"], f"greedy outputs: {counts['equal']} equal, {counts['near-tie']} near-ties "
         f"(log-probabilities within {NEAR_TIE:g}), {counts['different']} different"),
        (best["rows_grouped"] > 0, f"{best['rows_grouped']} of {best['rows']} requests shared reads of their prefix"),
        (last["kv_tokens_read"] < last["kv_tokens_logical"],
         f"KV tokens read: {last['kv_tokens_read']:,} instead of {last['kv_tokens_logical']:,}"),
    ]  # fmt: skip
    for ok, text in checks:
        console.print(f"{'[green]ok    ' if ok else '[red]failed'}[/]  {text}")
    return all(ok for ok, _ in checks)


def demo(keep: bool, undo: ExitStack) -> bool:
    """The demo; what must be undone at the end goes to ``undo``."""
    home = Path(tempfile.mkdtemp(prefix="packinfer-demo-"))
    undo.callback(shutil.rmtree, home)
    if shutil.disk_usage(home).free < NEEDED_DISK_MIB << 20:
        raise DemoError(f"{home.parent} has less than {NEEDED_DISK_MIB} MiB free; TMPDIR chooses another place")
    model = write_tiny_model(home / "model")
    console.print(f"a tiny random Llama is in {model}")
    servers = []
    for name, backend in (("stock", None if ON_GPU else "torch_native"), ("packinfer", "packinfer")):
        servers.append(start(name, backend, model))
        undo.callback(servers[-1].stop)
    for server in servers:
        server.wait(console)
    stock, packed = servers

    program_counts, best = run_frontend(stock, packed)
    batch_counts, speeds = run_batch(stock, packed)
    passed = report(program_counts + batch_counts, best, active_states(packed.url)[0], speeds)
    if keep:
        stock.stop()
        undo.pop_all()
        console.print(
            f"\nThe packinfer server goes on at {packed.url}; log: {packed.log}\n"
            f"  curl {packed.url}/generate -H 'Content-Type: application/json' "
            """-d '{"text": "the river is", "sampling_params": {"max_new_tokens": 16}}'\n"""
            f"  {sys.executable} {HERE / 'frontend_fork.py'} --url {packed.url}\n"
            f"  {Path(sys.executable).parent / 'packinfer-sgl'} inspect {packed.url}\n"
            f"stop it with\n  kill {packed.process.pid}; rm -r {home}",
            soft_wrap=True,
            markup=False,
        )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the packinfer server up and say how to talk to it")
    args = parser.parse_args()
    with undone_at_end() as undo:
        try:
            passed = demo(args.keep, undo)
        except ServerError as e:
            console.print(Text("\n".join(e.server.tail(20))), soft_wrap=True)  # the log goes away with the demo
            console.print(Text(f"demo: {e}; the end of its log is above"), soft_wrap=True)
            passed = False
        except (DemoError, CommandError, OSError) as e:
            console.print(Text(f"demo: {e}"), soft_wrap=True)
            passed = False
        except KeyboardInterrupt:
            console.print("demo: interrupted")
            return 130
    console.print("[bold green]PASS[/]" if passed else "[bold red]FAIL[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
