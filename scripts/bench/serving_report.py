"""Tables and plots of what bench_serving.py measured.

python scripts/bench/serving_report.py DIR     # again, from DIR/results.json; bench_serving.py does so by itself
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from lib.report_files import write_again, write_files
from rich.console import Console
from rich.table import Table

OURS = "packinfer"
TITLES = {
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tpot_p50_ms": "TPOT p50, ms",
    "tpot_p99_ms": "TPOT p99, ms",
    "e2e_p50_ms": "request latency p50, ms",
    "e2e_p99_ms": "request latency p99, ms",
}


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary(runs: list[dict[str, Any]], metric: str) -> dict[str, dict[str, Spread]]:
    """By request rate and arm, in the order of the runs."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        values.setdefault(run["rate"], {}).setdefault(run["arm"], []).append(run[metric])
    return {rate: {arm: Spread.of(v) for arm, v in arms.items()} for rate, arms in values.items()}


def against_best(spreads: dict[str, Spread], metric: str) -> str:
    """packinfer's median over the best median of the others; more is better for tokens/s, less for milliseconds."""
    others = {arm: spread.median for arm, spread in spreads.items() if arm != OURS}
    if OURS not in spreads or not others:
        return "-"
    best = (min if metric.endswith("_ms") else max)(others, key=lambda arm: others[arm])
    return f"{spreads[OURS].median / others[best]:.2f} ({best})"


def tables(runs: list[dict[str, Any]]) -> Iterator[tuple[str, list[list[str]]]]:
    """Per request rate a title and the rows of its table, the header first."""
    summaries = {metric: summary(runs, metric) for metric in TITLES}
    for rate, arms in next(iter(summaries.values())).items():
        rows = [["median (lowest to highest round)", *arms, f"{OURS} / best other"]]
        for metric, title in TITLES.items():
            spreads = summaries[metric][rate]
            rows.append([title, *map(str, spreads.values()), against_best(spreads, metric)])
        yield f"request rate {rate}" + ("" if rate == "inf" else " per second"), rows


def kv_line(runs: list[dict[str, Any]], rate: str) -> str | None:
    """What packinfer read in all rounds of one rate, and what could have been saved."""
    ours = [run for run in runs if run["arm"] == OURS and run["rate"] == rate]
    if not ours:
        return None
    total = {
        name: sum(run[name] for run in ours) for name in ours[0] if name.startswith("kv_") or name.endswith("steps")
    }
    packed, steps = total["packed_steps"], total["packed_steps"] + total["unpacked_steps"]
    logical, read, unique = (total[f"kv_tokens_{name}"] for name in ("logical", "read", "unique"))
    if not packed:
        return f"packinfer packed 0 of {steps:,} decode steps."
    return (
        f"packinfer packed {packed:,} of {steps:,} decode steps ({packed / steps:.0%}). In these a prefix-unaware "
        f"kernel reads {logical:,} KV tokens a layer, packinfer read {read:,} (1/{logical / read:.2f}), the least "
        f"possible are {unique:,} (1/{logical / unique:.2f})."
    )


def markdown(results: dict[str, Any]) -> str:
    lines = [f"# {results['workload']}", ""]
    for title, rows in tables(results["runs"]):
        lines += [f"## {title}", "", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
        lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
        if line := kv_line(results["runs"], title.split()[2]):
            lines += ["", line]
        lines.append("")
    lines += ["## How", ""]
    lines += [f"- {name}: {value}" for name, value in results["environment"].items()]
    lines += [f"- load: `{results['load']}`"]
    lines += [f"- {arm}: {s['pool_tokens']:,} KV tokens, `{s['flags']}`" for arm, s in results["servers"].items()]
    return "\n".join(lines) + "\n"


def show(results: dict[str, Any], console: Console) -> None:
    for title, rows in tables(results["runs"]):
        table = Table(*rows[0], title=f"{results['workload']}, {title}", show_edge=False)
        for row in rows[1:]:
            table.add_row(*row)
        console.print("", table)
        if line := kv_line(results["runs"], title.split()[2]):
            console.print(line)


def plot(results: dict[str, Any], out: Path) -> None:
    """Bars for one request rate, lines over several; arms differ by hatch, mark and dash, not by colour alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    environment = results["environment"]
    figure.suptitle(
        f"{results['workload']}: {environment['model']}, {environment['device']}, SGLang {environment['sglang']}\n"
        f"median of {environment['rounds']} rounds, whiskers from lowest to highest"
    )
    for axes, (metric, title) in zip(figure.subplots(2, 4).flat, TITLES.items()):
        by_rate = summary(results["runs"], metric)
        rates, arms = list(by_rate), list(next(iter(by_rate.values())))
        for i, arm in enumerate(arms):
            spreads = [by_rate[rate][arm] for rate in rates]
            medians = [s.median for s in spreads]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            if len(rates) == 1:
                bars = axes.bar(
                    [i], medians, yerr=whiskers, capsize=6, hatch=["", "//", "..", "xx", "--"][i % 5], edgecolor="black"
                )
                axes.bar_label(bars, labels=[number(m) for m in medians], label_type="center", backgroundcolor="white")
            else:
                axes.errorbar(
                    range(len(rates)), medians, yerr=whiskers, capsize=4, label=arm,
                    marker="osD^v"[i % 5], linestyle=["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))][i % 5],
                )  # fmt: skip
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
        if len(rates) == 1:
            axes.set_xticks(range(len(arms)), arms)
        else:
            axes.set_xticks(range(len(rates)), rates)
            axes.set_xlabel("requests/s sent")
            axes.legend()
    for suffix in ("png", "svg"):
        figure.savefig(out / f"serving.{suffix}", dpi=120)


def write(results: dict[str, Any], out: Path, console: Console) -> None:
    """results.json, results.md and the plots, into ``out``."""
    write_files(results, out, console, "scripts/bench/serving_report.py", markdown(results), plot)


if __name__ == "__main__":
    write_again("serving_report", __doc__.splitlines()[0], "bench_serving.py", show, write)
