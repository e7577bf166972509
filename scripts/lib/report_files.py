"""What the reports of the benchmarks have in common: the files of a folder, and writing them again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

Results = dict[str, Any]
NO_PLOTS = "no plots: matplotlib is missing (pip install 'packinfer-sgl[bench]', then {} {})"


def write_files(
    results: Results, out: Path, console: Console, script: str, markdown: str, plot: Callable[[Results, Path], None]
) -> None:
    """results.json, results.md and what ``plot`` draws, into ``out``; ``script`` can write them again."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown)
    try:
        plot(results, out)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "matplotlib":
            raise
        console.print(NO_PLOTS.format(script, out), markup=False, soft_wrap=True)


def write_again(
    script: str,
    about: str,
    benchmark: str,
    show: Callable[[Results, Console], None],
    write: Callable[[Results, Path, Console], None],
) -> None:
    """The command line of a report: the folder that was ``--out`` of ``benchmark``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("dir", type=Path, help=f"what --out of {benchmark} was")
    out = parser.parse_args().dir
    try:
        results = json.loads((out / "results.json").read_text())
    except OSError as e:
        sys.exit(f"{script}: {e}")
    console = Console(highlight=False)
    show(results, console)
    write(results, out, console)
