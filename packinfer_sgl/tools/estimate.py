"""``packinfer-sgl estimate``: whether requests would gain from packinfer, before anything is installed on a server."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.profiles import PROFILES
from packinfer_sgl.runners.cpu import decode_planner as cpu_planner
from packinfer_sgl.tools.estimate_batches import Load, Sharing, Step, Timeline, in_steps, planned_steps
from packinfer_sgl.tools.estimate_requests import read_load
from packinfer_sgl.tools.estimate_server import NOTES, SAMPLE_S, info_of, planned_looks, watch
from packinfer_sgl.tools.estimate_times import Clock, Model, gpu_planner, read_model

CONCURRENCIES = (8, 32, 64, 128, 256)
MOST, USUAL = 256, 64  # requests at once, with times and without
SAMPLES = 200  # decode steps of a row
GAIN = 1.05  # speed-ups below are none
LEAST_SHARING = 1.05  # ceilings below are none
KNOWN = 0.9  # part of the prompts, below which little sharing proves nothing
FILE_FLAGS = ("tokenizer", "output_tokens", "concurrency", "pool_tokens", "ms_per_token")
PREFILL_SHARE = 0.5  # of the time, from which on it is named as the reason


class EstimateError(ValueError):
    """The text is the one line that the user reads."""


@dataclass(frozen=True)
class Row:
    """One way in which the requests run; KV tokens are those of a mean step in one layer, times are expected.

    Attributes:
        running: requests of a mean step.
        step_ms: how long a step was taken to be when requests arrive; None where the log or nothing says when they do.
        prefill_share: of the stock server's time.
        attention_share: of the stock server's decode step.
    """

    name: str
    running: float
    steps: int
    logical: float
    unique: float
    read: float
    step_ms: float | None = None
    stock_ms: float | None = None
    packed_ms: float | None = None
    attention_share: float | None = None
    prefill_share: float | None = None
    speedup: float | None = None

    @property
    def ceiling(self) -> float:
        return self.logical / self.unique

    @property
    def saving(self) -> float:
        return self.logical / self.read


class Device:
    """Plans of a model on a device, and their times, which nobody knows of a CPU."""

    def __init__(self, model: Model, gpu: str) -> None:
        self.clock = Clock(model, PROFILES[gpu.upper()]) if gpu != "cpu" else None
        self.planner: DecodePlanner = (
            gpu_planner(model.shape, self.clock.profile) if self.clock
            else cpu_planner(model.shape, grouping="multi", room_tokens=0)
        )  # fmt: skip

    @property
    def least_saving(self) -> float:
        return self.planner.cost.least_saving

    def row(self, name: str, planned: list[Step], steps: int, computed: int, step_s: float | None = None) -> Row:
        """The row of ``steps`` like those that were planned, and of prefills that compute so many prompt tokens."""
        means = np.array([(s.rows, s.logical, s.unique, s.read) for s in planned]).mean(axis=0).tolist()
        known = Row(name, means[0], steps, *means[1:], step_ms=None if step_s is None else step_s * 1e3)
        if self.clock is None:
            return known
        stock, packed, attention = self.clock.mean_step_us(planned)
        prefill = self.clock.prefill_us(computed) / steps
        times = {
            "stock_ms": stock / 1e3, "packed_ms": packed / 1e3, "attention_share": attention / stock,
            "prefill_share": prefill / (prefill + stock), "speedup": (prefill + stock) / (prefill + packed),
        }  # fmt: skip
        return Row(**{**asdict(known), **times})


class Estimate(Device):
    """Estimates of one load on one device."""

    def __init__(self, load: Load, model: Model, gpu: str, pool_tokens: int | None = None) -> None:
        super().__init__(model, gpu)
        self.load, self.pool_tokens = load, pool_tokens
        self.sharing = Sharing(load.requests)
        self.computed = self.sharing.computed()

    def at(
        self, name: str, concurrency: int, step_s: float | None = None, samples: int = SAMPLES, logged: bool = False
    ) -> Row:
        requests = in_steps(self.load.requests) if logged else self.load.requests
        timeline = Timeline(requests, self.sharing, concurrency, 1.0 if logged else step_s, self.pool_tokens)
        if not timeline.steps:
            raise EstimateError("no request has more than one answer token: nothing decodes, so nothing can be gained")
        planned = planned_steps(timeline, self.sharing, self.planner, samples)
        return self.row(name, planned, timeline.steps, self.computed, step_s)

    def step_s(self, concurrency: int) -> float:
        """How long a token is expected to take in the batches that it leads to."""
        if self.clock is None:
            raise EstimateError("the file has times of arrival; give the time of a token with --ms-per-token")
        step_s = 0.02
        for _ in range(3):
            row = self.at("", concurrency, step_s, SAMPLES // 5)
            assert row.stock_ms is not None and row.prefill_share is not None
            step_s = row.stock_ms / (1 - row.prefill_share) / 1e3
        return step_s

    def first(self, concurrency: int | None, ms_per_token: float | None = None) -> Row:
        """The load as it came; without times, at a usual concurrency."""
        if not self.load.timed:
            limit = min(concurrency or USUAL, len(self.load.requests))
            return self.at(str(limit), limit)
        limit = concurrency or MOST
        if ms_per_token is None and all(request.latency_s for request in self.load.requests):
            return self.at("as logged", limit, logged=True)
        return self.at("as logged", limit, ms_per_token / 1e3 if ms_per_token else self.step_s(limit))

    def rows(self, concurrency: int | None, ms_per_token: float | None) -> list[Row]:
        """The first, then others at which all requests wait, and so many run."""
        first, n = self.first(concurrency, ms_per_token), len(self.load.requests)
        others = [c for c in CONCURRENCIES if c <= n and str(c) != first.name]
        return [first, *(self.at(str(c), c) for c in others)]


def verdict(row: Row, least_saving: float, known: float = 1.0) -> str:
    """In one sentence, whether to expect a gain, and the reason where not; ``known``: see ``Load``."""
    if row.running < 1.5:
        return f"No gain to expect: requests hardly run together ({row.running:.1f} at a time in the mean)."
    if row.saving < LEAST_SHARING and known < KNOWN:
        return f"Not known: the file tells only {known:.0%} of what the prompts hold, and in that little is shared."
    if row.ceiling < LEAST_SHARING:
        return f"No gain to expect: requests that run together share next to nothing ({row.ceiling:.2f}x)."
    if row.saving < LEAST_SHARING:
        return (
            f"No gain to expect: sharing would save at most {row.ceiling:.2f}x of the KV reads, and below "
            f"{least_saving:g}x a GPU groups nothing."
        )
    reads = f"{row.saving:.1f} times fewer KV tokens are read"
    if row.speedup is None or row.attention_share is None or row.prefill_share is None:
        return f"A gain in attention is to be expected: {reads}."
    if row.speedup >= GAIN:
        return f"A gain is to be expected: {row.speedup:.2f} times the output tokens per second, as {reads}."
    if row.prefill_share > PREFILL_SHARE:
        return (
            f"Little gain to expect ({row.speedup:.2f}x): {reads}, but prefill takes {row.prefill_share:.0%} of the "
            "time: answers are short for their prompts."
        )
    return (
        f"Little gain to expect ({row.speedup:.2f}x): {reads}, but attention is only {row.attention_share:.0%} of a "
        "decode step."
    )


@dataclass(frozen=True)
class Found:
    """What is said of a file or a server.

    Attributes:
        head: a line about it.
        facts: the same, for JSON.
    """

    title: str
    head: str
    facts: dict[str, object]
    notes: list[str]
    rows: list[Row]
    said: str
    tp: int


def of_file(args: argparse.Namespace) -> Found:
    if args.api_key:
        raise EstimateError("--api-key goes with --server")
    tp = args.tp or 1
    model = read_model(args.model, tp, args.kv_cache_dtype or "auto")
    load = read_load(args.file, args.tokenizer, args.output_tokens)
    with Console(stderr=True).status("planning decode steps"):
        estimate = Estimate(load, model, args.gpu, args.pool_tokens)
        rows = estimate.rows(args.concurrency, args.ms_per_token)
    mean = [np.mean([getattr(r, x) for r in load.requests]) for x in ("input_tokens", "output_tokens")]
    n = len(load.requests)
    head = f"{n:,} requests ({load.kind}): {mean[0]:,.0f} prompt and {mean[1]:,.0f} answer tokens in the mean"
    said = verdict(rows[0], estimate.least_saving, load.known)
    return Found(args.file.name, head, {"requests": n, "kind": load.kind}, load.notes, rows, said, tp)


def of_server(args: argparse.Namespace) -> Found:
    if given := [flag for flag in FILE_FLAGS if getattr(args, flag) is not None]:
        raise EstimateError(f"--{given[0].replace('_', '-')} is for files: a server's requests are taken as they run")
    info = info_of(args.server, args.api_key)
    tp = args.tp or int(info["tp_size"])
    kv_cache_dtype = args.kv_cache_dtype or info.get("kv_cache_dtype") or "auto"
    device = Device(read_model(args.model, tp, kv_cache_dtype), args.gpu)
    with Console(stderr=True).status(f"looking at {args.server} for {SAMPLE_S:g} s"):
        seen = watch(args.server, args.api_key)
    # what is shared is known of each step, who shares it is not
    rows = [
        device.row(name, planned_looks(seen.looks, device.planner, most), seen.steps, seen.tokens["prefill_compute"])
        for name, most in (("one prefix", False), ("many prefixes", True))
    ]
    n = len(seen.looks)
    head = (
        f"{n:,} of {seen.steps:,} decode steps in {SAMPLE_S:g} s of {args.server}; {seen.cached:.0%} of the prompt "
        "tokens were in its radix cache"
    )
    notes = [*NOTES]
    if any((rank.get("packinfer") or {}).get("active") for rank in info["internal_states"]):
        notes.append(f"packinfer is active there: packinfer-sgl explain {args.server} has its own counts")
    facts = {"looks": n, "kind": "server", "cached": seen.cached}
    return Found(args.server, head, facts, notes, rows, verdict_on_server(rows, device.least_saving), tp)


def verdict_on_server(rows: list[Row], least_saving: float) -> str:
    """The sentence on the worse of ``of_server``'s rows, and on the other if that makes a difference."""
    worst, best = sorted(rows, key=lambda row: row.speedup or row.saving)
    said = verdict(worst, least_saving)
    if (best.speedup or best.saving) / (worst.speedup or worst.saving) < GAIN:
        return said
    return f"{said} At best ({best.name}): {verdict(best, least_saving)}"


def show(found: Found, about: str, console: Console) -> None:
    console.print(found.head)
    for note in found.notes:
        console.print(f"note: {note}")
    rows = found.rows
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("at once", no_wrap=True)
    timed = rows[0].stock_ms is not None
    for head in ("running", "KV tokens", "ceiling", "planned", *(("fa3 ms", "packed ms", "gain") * timed)):
        table.add_column(head, justify="right")
    for row in rows:
        times = (f"{row.stock_ms:.1f}", f"{row.packed_ms:.1f}", f"{row.speedup:.2f}x") if timed else ()
        held = f"{row.unique:,.0f}"
        table.add_row(row.name, f"{row.running:.1f}", held, f"{row.ceiling:.2f}x", f"{row.saving:.2f}x", *times)
    console.print(table)
    first = rows[0]
    console.print(
        f"ceiling: how many times fewer KV tokens a decode step can read; that saves {1 - 1 / first.ceiling:.1%} of "
        f"them. planned: how many times fewer packinfer reads. {about}"
    )
    console.print(found.said, style="bold")


def as_json(found: Found, about: str) -> str:
    rows = [{**asdict(row), "ceiling": row.ceiling, "saving": row.saving} for row in found.rows]
    return json.dumps(
        {**found.facts, "notes": found.notes, "about": about, "verdict": found.said, "rows": rows}, indent=1
    )


def plot(rows: list[Row], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    timed = rows[0].stock_ms is not None
    figure = Figure(figsize=(9 if timed else 5, 4), layout="constrained")
    bars: list[tuple[str, dict[str, list[float]]]] = [
        ("KV tokens of a decode step", {x: [getattr(r, x) for r in rows] for x in ("logical", "read", "unique")})
    ]
    if timed:
        times = {"fa3": [r.stock_ms or 0 for r in rows], "packinfer": [r.packed_ms or 0 for r in rows]}
        bars.append(("expected ms of a decode step", times))
    for axes, (label, series) in zip(figure.subplots(1, len(bars), squeeze=False)[0], bars):
        for i, (name, values) in enumerate(series.items()):
            axes.bar(
                np.arange(len(rows)) + 0.27 * i, values, 0.25, label=name, hatch=("", "//", "..")[i], edgecolor="w"
            )
        axes.set_xticks(np.arange(len(rows)) + 0.27, [row.name for row in rows])
        axes.set(ylabel=label, xlabel="requests at once", ylim=(0, None))
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path)


def run(args: argparse.Namespace) -> int:
    """The command ``packinfer-sgl estimate``; raises ValueError with a line for the user."""
    if args.ms_per_token is not None and not args.ms_per_token > 0:
        raise EstimateError("--ms-per-token must be positive")
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise EstimateError("--plot draws .png and .svg")
    found = of_server(args) if args.server else of_file(args)
    whose = f"{args.model}" if args.model else "Llama-3-8B's shape (--model for yours)"
    about = f"As planned for {whose} on {'an ' if args.gpu != 'cpu' else 'a '}{args.gpu.upper()}"
    about += f", {found.tp} ranks" if found.tp > 1 else ""
    about += "; times are estimates, prefill included in the gain." if args.gpu != "cpu" else "; no times are known."
    if args.json:
        print(as_json(found, about))
    else:
        show(found, about, Console())
    if args.plot:
        try:
            plot(found.rows, found.title, args.plot)
        except ModuleNotFoundError as e:
            if (e.name or "").partition(".")[0] != "matplotlib":
                raise
            raise EstimateError("no plot: matplotlib is missing (pip install 'packinfer-sgl[bench]')") from None
    return 0
