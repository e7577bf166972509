"""SGLang's own serving benchmark, called in this process with the same requests for every server."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import requests
from lib.counters import totals
from lib.servers import Server, ServerError
from lib.token_traces import choose, token_ids

from packinfer_sgl.tools.asking import CommandError, active_states

WARM_UP_REQUESTS, WARM_UP_TOKENS = 64, 8
RUN_LIMIT_S = 900  # and twice the time in which all requests arrive
# name here: name in SGLang's result
METRICS = {
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "e2e_p50_ms": "median_e2e_latency_ms",
    "e2e_p99_ms": "p99_e2e_latency_ms",
}
FACTS = ("completed", "duration", "total_input_tokens", "total_output_tokens", "max_concurrent_requests")


class OutOfTime(KeyboardInterrupt):
    """Like an interrupt nothing in a request may swallow it."""


class Load:
    """The requests of one benchmark; ``arguments`` are sglang.bench_serving's, ``trace`` replaces its dataset."""

    def __init__(self, model: str, arguments: list[str], trace: Path | None, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantizations that this machine has no kernels for
            from sglang.benchmark import datasets, serving  # takes seconds
        self.serving, self.trace = serving, trace
        self._make_rows = self._trace_rows if trace else datasets.get_dataset
        self.log = out / "bench_serving.log"
        self.args = parse([*arguments, "--model", model])
        self.args.output_file = str(out / "bench_serving.jsonl")
        self.args.flush_cache = self.args.disable_tqdm = True
        self.args.warmup_requests = 0  # `warm_up` does more, and packinfer's counters begin after it
        if trace:
            self.args.dataset_name = trace.name
        self.rows: list[Any] = []
        self.left_out = 0
        self.limit_tokens = 0

    def _dataset(self, args: Any, tokenizer: Any, model_id: str | None = None) -> list[Any]:
        """Stands in for bench_serving's own function, so that every run has the same requests and arrivals."""
        if not self.rows:
            # SGLang keeps generated prompts in ~/.cache under a name that does not tell tokenizers apart
            with tempfile.TemporaryDirectory() as home, patch.dict(os.environ, HOME=home):
                self.rows = self._make_rows(args, tokenizer, model_id)
        random.seed(args.seed)
        np.random.seed(args.seed)
        if not args.warm_up:
            return list(self.rows)
        rows = [copy.copy(row) for row in self.rows[:WARM_UP_REQUESTS]]
        for row in rows:
            row.output_len = min(row.output_len, WARM_UP_TOKENS)
        return rows

    def _trace_rows(self, args: Any, tokenizer: Any, model_id: str | None) -> list[Any]:
        chosen, self.left_out = choose(self.trace, args.num_prompts, self.limit_tokens)
        vocabulary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        return [
            self.serving.DatasetRow(
                prompt=token_ids(request, vocabulary), prompt_len=request.input_tokens, output_len=request.output_tokens
            )
            for request in chosen
        ]

    def warm_up(self, server: Server) -> None:
        """Some of the requests at once, a few tokens each: kernels are compiled, memory is touched."""
        info = requests.get(f"{server.url}/server_info", timeout=60).json()
        self.limit_tokens = self.limit_tokens or info["max_req_input_len"]
        self._call(server, "inf", warm_up=True)

    def run(self, server: Server, rate: str) -> dict[str, Any]:
        """The figures of one run; raises ServerError if a request failed."""
        before = packed_counts(server)
        result = self._call(server, rate, warm_up=False)
        after = packed_counts(server)
        if fault := failed_requests(result, None if self.args.disable_ignore_eos else self.rows):
            raise ServerError(server, fault)
        counts = {name: after[name] - before[name] for name in after}
        return {fact: result[fact] for fact in FACTS} | {n: result[key] for n, key in METRICS.items()} | counts

    def _call(self, server: Server, rate: str, warm_up: bool) -> dict[str, Any]:
        args = copy.copy(self.args)
        args.base_url, args.request_rate, args.warm_up, args.tag = server.url, float(rate), warm_up, server.name
        self.serving.get_dataset = self._dataset
        limit_s = RUN_LIMIT_S + int(2 * (len(self.rows) or args.num_prompts) / args.request_rate)
        try:
            with self.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                with deadline(limit_s):
                    return self.serving.run_benchmark(args)
        except OutOfTime:
            raise ServerError(server, f"did not finish the load within {limit_s} s") from None
        except (requests.RequestException, ValueError, SystemExit) as e:
            code = server.process.poll()
            what = f"could not be measured ({type(e).__name__}: {e})" if code is None else f"ended with code {code}"
            raise ServerError(server, what) from None


def parse(arguments: list[str]) -> Any:
    """The arguments as bench_serving's own command line reads them; it exits on a mistake."""
    from sglang.benchmark import serving

    taken: list[Any] = []
    run, argv = serving.run_benchmark, sys.argv
    serving.run_benchmark, sys.argv = taken.append, ["bench_serving", *arguments]
    try:
        serving.cli_main()
    finally:
        serving.run_benchmark, sys.argv = run, argv
    return taken[0]


def failed_requests(result: dict[str, Any], rows: list[Any] | None) -> str | None:
    """What is wrong with a result of bench_serving; ``rows`` if every answer must have the length that was asked."""
    sent = len(result["ttfts"])
    if result["completed"] < sent:
        error = next((e for e in result["errors"] if e), "no reason given").strip().splitlines()[-1]
        return f"completed {result['completed']} of {sent} requests ({error})"
    # bench_serving takes a stream that holds nothing but an error message for a success
    if silent := sum(ttft == 0 for ttft in result["ttfts"]):
        return f"gave no text for {silent} of {sent} requests"
    asked = sum(row.output_len for row in rows or ())
    if rows and sent == len(rows) and result["total_output_tokens"] != asked:
        return f"gave {result['total_output_tokens']} tokens instead of {asked}"
    return None


def packed_counts(server: Server) -> Counter[str]:
    """What packinfer counted since the server started, all ranks together; nothing for another backend."""
    counts: Counter[str] = Counter()
    if server.name != "packinfer":
        return counts
    try:
        states = active_states(server.url)
    except CommandError as e:
        raise ServerError(server, f"does not tell its state ({e})") from None
    for state in states:
        counts.update(totals(state))
    return counts


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
