"""Servers under load: packinfer against stock attention backends, measured with SGLang's own sglang.bench_serving.

    python scripts/bench_serving.py --model DIR --workload gsp-8k,gsp-2k --out DIR [--load-format dummy] [-- MORE]

MORE goes to sglang.bench_serving, which makes the requests, sends them and takes the times; with ``--trace FILE`` the
prompts are token ids made from a request trace (token_traces.py). The servers take turns in every round, each with an
empty cache. All are up at once and have KV pools of the same size; with ``--in-turn`` each is started anew for its turn
and has the GPU for itself. Everything is written to ``--out`` (of several workloads each to a folder there):
results.json (a flat record per run), results.md, plots, logs. A failed request or server ends the benchmark with exit
code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch
from bench.serving_load import Load
from bench.serving_report import show, write
from lib.choices import names
from lib.machine import machine, nvidia_smi
from lib.servers import Server, ServerError, stop_all, undone_at_end
from lib.token_traces import TraceError
from rich.console import Console
from rich.text import Text

from packinfer_sgl.config import Config
from packinfer_sgl.plugin import base_backend

ON_GPU = torch.cuda.is_available()
ARMS = ("packinfer", "fa3", "flashinfer", "triton", "torch_native")
MEM_FRACTION = 0.85
CPU_POOL_TOKENS = 65536
GSP = "--dataset-name generated-shared-prefix --gsp-num-groups {} --gsp-prompts-per-group {} --gsp-system-prompt-len {}"
WORKLOADS = {  # requests that may run at once, arguments of sglang.bench_serving
    "gsp-8k": (256, GSP.format(4, 64, 8192) + " --gsp-question-len 64 --gsp-output-len 256"),
    "gsp-2k": (256, GSP.format(64, 16, 2048) + " --gsp-question-len 128 --gsp-output-len 256"),
    "random": (
        256,
        "--dataset-name random-ids --tokenize-prompt --num-prompts 256 --random-input-len 2048 "
        "--random-output-len 512 --random-range-ratio 0.1",
    ),
    "gsp-cpu": (16, GSP.format(2, 8, 512) + " --gsp-question-len 16 --gsp-output-len 32"),
    "random-cpu": (
        16,
        "--dataset-name random-ids --tokenize-prompt --num-prompts 16 --random-input-len 256 "
        "--random-output-len 32 --random-range-ratio 0.1",
    ),
}

console = Console(highlight=False)


class Fleet:
    """The servers of the arms, with the same flags but for the attention backend."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pool_tokens = args.pool_tokens
        self.up: dict[str, Server] = {}
        self.notes: dict[str, dict[str, Any]] = {}

    def flags(self, arm: str) -> list[str]:
        args, running = self.args, str(self.args.running)
        flags = ["--attention-backend", arm, "--max-running-requests", running, "--load-format", args.load_format]
        # an idle scheduler would take a core from the server whose turn it is
        flags += ["--random-seed", "0", "--sleep-on-idle"]
        if ON_GPU:
            # the first server takes its share of the whole memory, the others get as many tokens out of what is left
            share = 1 if args.in_turn or self.pool_tokens else len(args.arms)
            flags += ["--mem-fraction-static", f"{MEM_FRACTION / share:.3f}"]
            flags += ["--cuda-graph-max-bs-decode", running, "--cuda-graph-backend-prefill", "disabled"]
        else:
            flags += ["--dtype", "float32"]
        flags += ["--max-total-tokens", str(self.pool_tokens)] if self.pool_tokens else []
        return flags + shlex.split(args.server_args)

    def start(self, arms: list[str]) -> None:
        flags = {arm: self.flags(arm) for arm in arms}
        for arm in arms:
            command = ["--model-path", self.args.model, *flags[arm]]
            self.up[arm] = Server(arm, command, self.args.out / f"{arm}.log")
        for arm in arms:
            self.up[arm].wait(console)
            pool = requests.get(f"{self.up[arm].url}/server_info", timeout=60).json()["max_total_num_tokens"]
            self.notes[arm] = {"flags": shlex.join(flags[arm]), "pool_tokens": pool}
            self.pool_tokens = self.pool_tokens or pool
            if pool < 0.99 * self.pool_tokens:
                what = (
                    f"has room for {pool:,} KV tokens, not for {self.pool_tokens:,}; --in-turn or --pool-tokens helps"
                )
                raise ServerError(self.up[arm], what)

    def start_all(self) -> None:
        # where the first server on a GPU chooses the size of the pools, the others come when it has
        for arms in [[arm] for arm in self.args.arms] if ON_GPU and not self.pool_tokens else [self.args.arms]:
            self.start(arms)

    def warm_up(self, arm: str, load: Load) -> None:
        with console.status(f"{arm}: warming up"):
            load.warm_up(self.up[arm])

    @contextlib.contextmanager
    def turn(self, arm: str, load: Load) -> Iterator[Server]:
        if self.args.in_turn:
            self.start([arm])
            self.warm_up(arm, load)
        yield self.up[arm]
        if self.args.in_turn:
            self.up.pop(arm).stop()

    def stop(self) -> None:
        stop_all(self.up.values())


def measure(args: argparse.Namespace, load: Load, fleet: Fleet) -> list[dict[str, Any]]:
    runs = []
    for arm in fleet.up:
        fleet.warm_up(arm, load)
    for i in range(args.rounds):
        for arm in args.arms[i % len(args.arms) :] + args.arms[: i % len(args.arms)]:
            with fleet.turn(arm, load) as server:
                for rate in args.request_rate:
                    with console.status(f"round {i + 1} of {args.rounds}, {arm}, request rate {rate}"):
                        run = load.run(server, rate)
                    runs.append({"arm": arm, "rate": rate, "round": i, **run, "gpu_after": nvidia_smi("clocks.sm")})
                    console.print(
                        f"round {i + 1} of {args.rounds}, rate {rate}, {arm}: {run['completed']} requests in "
                        f"{run['duration']:.1f} s, {run['output_tokens_per_s']:,.0f} output tokens/s"
                    )
    return runs


def environment(args: argparse.Namespace) -> dict[str, Any]:
    servers = "started anew for each turn" if args.in_turn else "all up at once"
    return {**machine(args.model), "rounds": args.rounds, "servers": servers}


def rates(text: str) -> list[str]:
    texts = list(dict.fromkeys(text.split(",")))
    if not all(float(rate) > 0 for rate in texts):
        raise argparse.ArgumentTypeError("must be positive numbers or inf")
    return texts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, plots and logs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workload", type=names(WORKLOADS), help=f"by comma, of {', '.join(WORKLOADS)}")
    what.add_argument("--trace", type=Path, help="request trace of Mooncake (.jsonl) or Azure (.csv)")
    stock = base_backend(Config(), "cuda" if ON_GPU else "cpu")
    parser.add_argument("--arms", type=names(ARMS), default=f"packinfer,{stock}",
                        help=f"by comma, of {', '.join(ARMS)} (default %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, choices=range(1, 100), default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--request-rate", type=rates, default="inf", help="requests/s, by comma; inf: all at once (default)"
    )
    parser.add_argument("--running", type=int, help="requests that may run at once (default: the workloads', or 256)")
    parser.add_argument("--pool-tokens", type=int, default=0 if ON_GPU else CPU_POOL_TOKENS,
                        help="KV pool of each server (default: what fits on the GPU, 65536 without one)")  # fmt: skip
    parser.add_argument("--in-turn", action="store_true", help="one server at a time, started anew for each turn")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for a folder without any")
    parser.add_argument("--server-args", default="", help="more flags for all servers, in one string")
    parser.add_argument("more", nargs="*", help="after --: more arguments of sglang.bench_serving")
    args = parser.parse_args()
    args.running = args.running or max((WORKLOADS[name][0] for name in args.workload or ()), default=256)
    return args


def benchmark(args: argparse.Namespace, undo: contextlib.ExitStack) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    presets = {name: WORKLOADS[name][1].split() for name in args.workload or ()} or {args.trace.stem: []}
    loads = {name: Load(args.model, [*preset, *args.more], args.trace, args.out) for name, preset in presets.items()}
    fleet = Fleet(args)
    undo.callback(fleet.stop)
    if not args.in_turn:
        fleet.start_all()
    for name, load in loads.items():
        runs = measure(args, load, fleet)
        sent = [*presets[name], *args.more] + (["--trace", args.trace.name] if args.trace else [])
        results = {
            "workload": name,
            "environment": environment(args),
            "servers": fleet.notes,
            "load": shlex.join([*sent, "--flush-cache", "--seed", str(load.args.seed)]),
            "requests": len(load.rows),
            "requests_left_out": load.left_out,
            "runs": runs,
        }
        show(results, console)
        if load.left_out:
            console.print(
                f"{load.left_out} requests of the trace were left out: longer than {load.limit_tokens} tokens"
            )
        out = args.out / name if len(loads) > 1 else args.out
        out.mkdir(exist_ok=True)
        write(results, out, console)


def main() -> int:
    args = arguments()
    with undone_at_end() as undo:
        try:
            benchmark(args, undo)
        except ServerError as e:
            logs = f"{e.server.log} and {args.out / 'bench_serving.log'}"
            console.print(Text(f"bench_serving: {e}; see {logs}"), soft_wrap=True)
            return 1
        except (TraceError, requests.RequestException, OSError) as e:
            console.print(Text(f"bench_serving: {e}"), soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("bench_serving: interrupted")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
