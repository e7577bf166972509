"""What the radix cache gives, and what packinfer's grouping adds: real engines over a matrix of settings and workloads.

    python scripts/ablate_radix.py                       # a tiny model where there is no GPU: under ten minutes
    python scripts/ablate_radix.py --model DIR --load-format dummy --trace FILE          # on a GPU

One setting at a time is changed from the first value of each axis (``--full``: all products). Each configuration is one
engine that runs every workload, its cache emptied before each run: once to warm up and to compare the answers, then
``--rounds`` times, in turn with the other engines that are up. Everything is written to ``--out``: results.md,
results.json, cells.csv, plots, logs. What is finished there is not run again by the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from ablate.cells import Cells, Records, engine_defaults
from ablate.matrix import AXES, Config, engine_arguments, label
from ablate.report import show, write
from ablate.workloads import MAKERS, SIZES, as_json
from lib.choices import names
from lib.engine_worker import EngineWorker
from lib.servers import ServerError, stop_all, undone_at_end
from lib.token_traces import TraceError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from packinfer_sgl.tools.tiny_model import write_tiny_model

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()
ENGINE_GIB = 4  # memory of an engine of the tiny model with all its processes, rounded up
GPU_ENGINES = 3  # of a model of 8 billion parameters in 16 bits, with the pool of SIZES, on 140 GB

console = Console(highlight=False)


class NothingMeasured(Exception):
    """There is nothing to report; the reasons have been told."""


def start(cells: Cells, configs: list[Config], args: argparse.Namespace, engines: ExitStack) -> dict[str, EngineWorker]:
    """The engines that come up, by label; the cells of the others are broken."""
    up: dict[str, EngineWorker] = {}
    engines.callback(stop_all, up.values())

    for config in configs:
        engine, packinfer = engine_arguments(config)
        name = label(config)
        arguments = [str(HERE / "ablate" / "engine.py"), json.dumps({**cells.common, **engine})]
        log = args.out / f"{name.replace(', ', '_').replace(' ', '-')}.log"
        up[name] = EngineWorker(name, arguments, log, {"PACKINFER_CONFIG": json.dumps(packinfer)})
    for name, engine in up.items():
        try:
            engine.wait()
        except ServerError as e:
            cells.break_all(name, str(e))
            console.print(Text(f"ablate_radix: {e}"), soft_wrap=True)
    return up


def measure(cells: Cells, args: argparse.Namespace, undo: ExitStack) -> None:
    """Runs what is missing."""
    left = cells.unfinished()
    if not left:
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(left) + len(cells.missing(left)))
        while left:
            batch, left = left[: args.at_once], left[args.at_once :]
            progress.update(bar, description=f"starting {len(batch)} engines")
            engines, began = undo.enter_context(ExitStack()), time.monotonic()
            up = start(cells, batch, args, engines)
            progress.advance(bar, len(batch))
            names_up = [name for name, engine in up.items() if engine.process.poll() is None]
            console.print(f"{len(names_up)} engines started in {time.monotonic() - began:.0f} s: {', '.join(names_up)}")
            for workload, turns in itertools.groupby(cells.missing(batch), key=lambda turn: turn[1]):
                began = time.monotonic()
                for config, _, run in turns:
                    name = label(config)
                    progress.update(bar, description=f"{workload}: {name}")
                    if (name, workload) not in cells.broken:
                        one_run(cells, config, workload, run, up[name])
                    progress.advance(bar)
                console.print(f"{workload}: done in {time.monotonic() - began:.0f} s")
            engines.close()


def one_run(cells: Cells, config: Config, workload: str, run: str, engine: EngineWorker) -> None:
    # dummy weights and half precision: on a GPU the answers say nothing
    order = {"turns": as_json(cells.workloads[workload].turns), "check": run == "check" and not ON_GPU}
    order["scatter"] = cells.scatter
    try:
        answer = engine.ask(order)
    except ServerError as e:
        cells.break_all(engine.name, str(e))
        answer = {"error": str(e)}
    if "error" in answer:
        cells.broken[engine.name, workload] = answer["error"]
        console.print(Text(f"ablate_radix: {engine.name}, {workload}: {answer['error']}"), soft_wrap=True)
    else:
        cells.add(config, workload, run, answer)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(f"no JSON: {e}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="folder for everything (default ./ablation)")
    parser.add_argument("--model", help="a model's folder or name (default: a tiny random Llama; needed on a GPU)")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, for a folder without any")
    parser.add_argument("--size", choices=SIZES, default="gpu" if ON_GPU else "cpu",
                        help="of the workloads and the KV pool (default here: %(default)s)")  # fmt: skip
    for name, axis in AXES.items():
        text = f"by comma, of {', '.join(axis.values)} (default {','.join(axis.default)})"
        parser.add_argument(f"--{name}", type=names(axis.values), metavar="VALUES", help=text)
    text = "fill the KV pool with other requests before each run, so that slots lie scattered (see --arena)"
    parser.add_argument("--scatter", action="store_true", help=text)
    parser.add_argument("--full", action="store_true", help="all products of all values, not one change at a time")
    parser.add_argument("--workloads", type=names(MAKERS), metavar="NAMES",
                        help=f"by comma, of {', '.join(MAKERS)} (default: all that --size has)")  # fmt: skip
    text = "a workload made from a request trace of Mooncake (.jsonl) or Azure (.csv); may be repeated"
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE", help=text)
    parser.add_argument("--rounds", type=int, choices=range(1, 100), default=3, metavar="N", help="default 3")
    text = f"engines up at a time (default: {GPU_ENGINES} on a GPU, else what fits into memory)"
    parser.add_argument("--at-once", type=int, choices=range(1, 100), metavar="N", help=text)
    parser.add_argument("--engine", type=json_object, default={}, help="more arguments of sglang.Engine, as JSON")
    args = parser.parse_args()
    for name, axis in AXES.items():
        if getattr(args, name) is None:
            setattr(args, name, list(axis.values if args.full else axis.default))
    if args.model is None and ON_GPU:
        parser.error("on a GPU give --model; a folder with a config and a tokenizer is enough with --load-format dummy")
    of_size = SIZES[args.size].workloads
    args.workloads = args.workloads or list(of_size)
    if left_out := [name for name in args.workloads if name not in of_size]:
        parser.error(f"--size {args.size} has no workload {left_out[0]}; it has {', '.join(of_size)}")
    if args.at_once is None:
        free_gib = psutil.virtual_memory().available >> 30
        args.at_once = GPU_ENGINES if ON_GPU else max(1, free_gib // ENGINE_GIB)
    return args


def ablate(args: argparse.Namespace, undo: ExitStack) -> bool:
    """Whether all that was asked for could be measured, with equal answers."""
    args.out.mkdir(parents=True, exist_ok=True)
    records = Records(args.out / "runs.jsonl")
    model = args.model
    if model is None:
        model = str(write_tiny_model(Path(undo.enter_context(tempfile.TemporaryDirectory())) / "tiny"))
    chosen = {name: getattr(args, name) for name in AXES}
    common = {"model_path": model, "load_format": args.load_format, **engine_defaults(SIZES[args.size]), **args.engine}
    cells = Cells(
        chosen, args.full, SIZES[args.size], args.workloads, args.trace, args.rounds, common, records, args.scatter
    )
    console.print(Text(cells.estimate()), soft_wrap=True)
    measure(cells, args, undo)
    results = cells.results(size=args.size, engines_up_at_once=args.at_once)
    if not results["runs"]:
        raise NothingMeasured("nothing could be measured")
    write(results, args.out, console)
    show(results, console)
    console.print(Text(f"\nthe whole report: {args.out / 'results.md'}"), soft_wrap=True)
    return not results["skipped"] and not any(
        counts["different"] for by_config in results["answers"].values() for counts in by_config.values()
    )


def main() -> int:
    args = arguments()
    with undone_at_end() as undo:
        try:
            return 0 if ablate(args, undo) else 1
        except (NothingMeasured, TraceError, OSError) as e:
            console.print(Text(f"ablate_radix: {e}"), soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("ablate_radix: interrupted; the same command goes on from here")
            return 130


if __name__ == "__main__":
    sys.exit(main())
