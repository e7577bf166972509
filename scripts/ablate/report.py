"""Answers, tables and plots of what ablate_radix.py measured.

python scripts/ablate/report.py DIR     # again, from DIR/results.json; ablate_radix.py does so by itself
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from ablate.matrix import AXES, LADDER, Config, Step, label, steps, usual
from bench.serving_report import Spread, number
from lib.report_files import write_again, write_files
from rich.console import Console
from rich.table import Table
from rich.text import Text

Results = dict[str, Any]
TITLES = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tpot_p50_ms": "TPOT p50, ms",
    "tpot_p99_ms": "TPOT p99, ms",
}
WORDS = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_p50_ms": "the time to the first token",
    "tpot_p50_ms": "the time per output token",
}
MATTERS = 0.05  # a smaller change is none, even where the rounds do not overlap: few rounds do so by chance
NOTHING_TO_SAVE = 0.98
SAVED = {"prompt": "prompt tokens computed", "kv": "KV tokens read"}
PLOT_ARMS = 8
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo", "++")
LEGEND = (
    "Requests of a workload are sent at once and wait for their turn in the engine. Medians of the rounds, in brackets "
    "lowest and highest. TPOT: time per output token after the first. *KV tokens read*: in packed decode steps, "
    "of what a kernel that knows of no prefixes reads; *at least*: what any kernel must read there. *Hit rate*: prompt "
    "tokens found in the radix cache; *at best*: in one that never forgets, requests coming one after the other. "
    "*In one piece*: shared KV tokens that were read from contiguous slots, where there is an arena."
)


class Cell:
    """All rounds of a configuration and a workload."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self.spread = {metric: Spread.of([run[metric] for run in runs]) for metric in TITLES}
        total = lambda name: sum(run[name] for run in runs)  # noqa: E731
        self.steps = total("packed_steps") + total("unpacked_steps")
        self.packed = total("packed_steps") / self.steps if self.steps else 0.0
        logical = total("kv_tokens_logical") or 1
        self.kv_read, self.kv_least = total("kv_tokens_read") / logical, total("kv_tokens_unique") / logical
        prompt = total("prompt_tokens")
        self.computed, self.computed_least = (
            total("computed_prompt_tokens") / prompt,
            total("least_prefill_tokens") / prompt,
        )
        self.plan_us = total("plan_us_total") / (total("plans") or 1)
        self.plans = total("plans") / len(runs)
        arena = lambda name: sum(run.get(f"arena_{name}", 0) for run in runs)  # noqa: E731
        shared = arena("shared_tokens_read")
        self.contiguous = arena("contiguous_tokens_read") / shared if shared else None  # unknown without an arena
        self.copied_mb = arena("copied_bytes") / len(runs) / 1e6


def cells(results: Results) -> dict[tuple[str, str], Cell]:
    """By configuration and workload."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in results["runs"]:
        runs.setdefault((run["config"], run["workload"]), []).append(run)
    return {key: Cell(found) for key, found in runs.items()}


def change(step: Step, before: Cell, after: Cell) -> tuple[float, str]:
    """How many times better ``after`` is, and in a word: ``better``, ``worse``, or ``same`` within the spread."""
    metric = AXES[step.axis].metric
    old, new = before.spread[metric], after.spread[metric]
    if metric.endswith("_ms"):
        ratio, apart = old.median / new.median, (new.high < old.low, new.low > old.high)
    else:
        ratio, apart = new.median / old.median, (new.low > old.high, new.high < old.low)
    left = saving(step, after)
    can_gain = left is None or left[1] < NOTHING_TO_SAVE  # else it is the machine that was faster
    if can_gain and apart[0] and ratio >= 1 + MATTERS:
        return ratio, "better"
    return ratio, "worse" if apart[1] and ratio <= 1 - MATTERS else "same"


def saving(step: Step, after: Cell) -> tuple[float, float] | None:
    """What ``after`` still does of the work that the thing saves, and the least possible; 1 = all."""
    return {"prompt": (after.computed, after.computed_least), "kv": (after.kv_read, after.kv_least)}.get(
        AXES[step.axis].saves
    )


def fraction(part: float) -> str:
    return f"1/{1 / part:.1f}" if part > 0 else "0"


def compared(results: Results) -> Iterator[tuple[Step, list[tuple[str, Cell, Cell]]]]:
    """Each step with the workloads for which both sides were measured."""
    known = cells(results)
    for step in steps(results["chosen"]):
        keys = [(label(step.before), label(step.after), workload) for workload in results["workloads"]]
        found = [(w, known[a, w], known[b, w]) for a, b, w in keys if (a, w) in known and (b, w) in known]
        if found:
            yield step, found


def answer(step: Step, found: list[tuple[str, Cell, Cell]]) -> str:
    """One thing in plain words."""
    axis = AXES[step.axis]
    by_word: dict[str, list[tuple[float, str]]] = {"better": [], "worse": [], "same": []}
    for workload, before, after in found:
        ratio, word = change(step, before, after)
        left = saving(step, after)
        note = f" ({fraction(left[0])}, {fraction(left[1])})" if left else ""
        by_word[word].append((ratio, f"{workload} {ratio:.2f}x{note}"))
    what = WORDS[axis.metric]
    parts = []
    if by_word["better"]:
        items = ", ".join(text for _, text in sorted(by_word["better"], reverse=True))
        parts.append(f"{'cuts' if axis.metric.endswith('_ms') else 'raises'} {what}: {items}.")
    else:
        parts.append(f"gains nothing in {what} on any workload.")
    if by_word["same"]:
        parts.append(
            "Nothing gained beyond the spread of the rounds: " + ", ".join(t for _, t in by_word["same"]) + "."
        )
    if by_word["worse"]:
        parts.append("Slower: " + ", ".join(t for _, t in by_word["worse"]) + ".")
    if axis.saves:
        parts.append(f"In brackets: the share of {SAVED[axis.saves]}, and the least possible.")
    thing, values = step.title().split(": ")
    return f"**{thing[0].upper()}{thing[1:]}** ({values}) {' '.join(parts)}"


def usual_settings() -> str:
    return "usual settings: " + ", ".join(f"{name} {value}" for name, value in usual().items())


def notices(results: Results) -> list[str]:
    """What must not be overlooked."""
    lines = []
    counts = {
        v: sum(c[v] for by in results["answers"].values() for c in by.values())
        for v in ("equal", "near-tie", "different")
    }
    if sum(counts.values()):
        lines.append(
            f"Greedy answers against those of the first configuration: {counts['equal']} equal, {counts['near-tie']} "
            f"parted at a near-tie, {counts['different']} different."
        )
    else:
        lines.append("Answers were not compared (half precision, on a GPU).")
    for workload, by_config in results["answers"].items():
        lines += [
            f"**DIFFERENT ANSWERS**: {workload}, {name}: {c['different']}"
            for name, c in by_config.items()
            if c["different"]
        ]
    lines += [f"**not measured**: {s['workload']}, {s['config']}: {s['reason']}" for s in results["skipped"]]
    return lines


def comparison_rows(step: Step, found: list[tuple[str, Cell, Cell]], spreads: bool) -> list[list[str]]:
    """A table of one step, the header first; without ``spreads`` medians alone, as a terminal has room for."""
    saves = AXES[step.axis].saves
    metrics = ("output_tokens_per_s", "tpot_p50_ms", "ttft_p50_ms")
    rows = [["workload", *map(TITLES.get, metrics), *([SAVED[saves], "at least"] if saves else []), "times better"]]
    for workload, before, after in found:
        ratio, word = change(step, before, after)
        pairs = [(before.spread[m], after.spread[m]) for m in metrics]
        texts = [f"{a} → {b}" if spreads else f"{number(a.median)} → {number(b.median)}" for a, b in pairs]
        rows.append([workload, *texts, *map(fraction, saving(step, after) or ()), f"{ratio:.2f} {word}"])
    return rows


def cell_rows(results: Results) -> list[list[str]]:
    rows = [["workload", "configuration", *TITLES.values(), "KV tokens read", "at least", "packed steps",
             "hit rate", "at best", "plan, us", "plans", "in one piece", "copied, MB"]]  # fmt: skip
    known = cells(results)
    for workload in results["workloads"]:
        for name in results["configs"]:
            if (cell := known.get((name, workload))) is not None:
                rows.append([
                    workload, name, *map(str, cell.spread.values()), f"{cell.kv_read:.0%}", f"{cell.kv_least:.0%}",
                    f"{cell.packed:.0%}", f"{1 - cell.computed:.0%}", f"{1 - cell.computed_least:.0%}",
                    f"{cell.plan_us:,.0f}", f"{cell.plans:.0f}",
                    "-" if cell.contiguous is None else f"{cell.contiguous:.0%}", f"{cell.copied_mb:,.0f}",
                ])  # fmt: skip
    return rows


def markdown_table(rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(rows[0])} |",
        "|" + "---|" * len(rows[0]),
        *(f"| {' | '.join(row)} |" for row in rows[1:]),
        "",
    ]


def markdown(results: Results) -> str:
    given = [AXES[name].gives for name in LADDER if len(results["chosen"][name]) > 1]
    what = f"{', '.join(given[:-1])} and {given[-1]} give" if given[1:] else f"{(given or ['each setting'])[0]} gives"
    lines = [f"# What {what}", "", "![](ablation.svg)", ""]
    found = list(compared(results))
    lines += (
        [f"- {answer(*pair)}" for pair in found]
        + [f"- {line}" for line in notices(results)]
        + ["", f"{LEGEND} {usual_settings().capitalize()}.", ""]
    )
    for step, workloads in found:
        lines += [f"## {step.title()}", "", f"before: {label(step.before)}; after: {label(step.after)}", ""]
        lines += markdown_table(comparison_rows(step, workloads, spreads=True))
    lines += ["## All cells", "", *markdown_table(cell_rows(results)), "## Workloads", ""]
    lines += [f"- {name}: {about}" for name, about in results["workloads"].items()]
    lines += ["", "## How", "", *(f"- {name}: {value}" for name, value in results["environment"].items())]
    lines += [f"- engine: {', '.join(f'{k}={v}' for k, v in results['engine'].items())}"]
    return "\n".join(lines) + "\n"


def show(results: Results, console: Console) -> None:
    for step, workloads in compared(results):
        rows = comparison_rows(step, workloads, spreads=False)
        table = Table(*rows[0], title=f"{step.title()}\n{label(step.before)} → {label(step.after)}", show_edge=False)
        for row in rows[1:]:
            table.add_row(*row)
        console.print("", table)
    lines = [answer(*pair) for pair in compared(results)] + notices(results)
    console.print("", Text("\n\n".join(line.replace("**", "") for line in lines)), soft_wrap=True)


def write_csv(results: Results, path: Path) -> None:
    """A row for each cell: the values of the axes, then plain numbers."""
    known = cells(results)
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        spreads = [f"{m}{end}" for m in TITLES for end in ("", "_low", "_high")]
        plain = ["kv_read", "kv_least", "packed", "computed", "computed_least", "plan_us", "plans",
                 "contiguous", "copied_mb"]  # fmt: skip
        out.writerow(["workload", *AXES, *spreads, *plain])
        for (name, workload), cell in known.items():
            config: Config = results["configs"][name]
            numbers = [x for s in cell.spread.values() for x in (s.median, s.low, s.high)]
            out.writerow([workload, *config.values(), *numbers, *(getattr(cell, field) for field in plain)])


def plot(results: Results, out: Path) -> None:
    """Bars for each workload and configuration; they differ by hatch, not by colour alone."""
    from matplotlib.figure import Figure

    known = cells(results)
    ladder = [config for step in steps(results["chosen"]) for config in (step.before, step.after)]
    order = [name for name in dict.fromkeys([*map(label, ladder), *results["configs"]]) if name in results["configs"]]
    arms = order[:PLOT_ARMS]
    workloads = [w for w in results["workloads"] if any((arm, w) in known for arm in arms)]
    figure = Figure(figsize=(13, 1.8 + 0.19 * len(workloads) * (len(arms) + 1)), layout="constrained")
    environment = results["environment"]
    figure.suptitle(
        f"{environment['model']}, {environment['device']}, SGLang {environment['sglang']}; "
        f"median of {environment['rounds']} rounds, whiskers from lowest to highest\n{usual_settings()}"
    )
    panels = figure.subplots(1, 3, sharey=True)
    height = 1 / (len(arms) + 1)
    for i, arm in enumerate(arms):
        rows = [(y, known[arm, w]) for y, w in enumerate(workloads) if (arm, w) in known]
        places = [y + (i + 0.5) * height for y, _ in rows]
        style = {"height": height, "label": arm, "hatch": HATCHES[i], "edgecolor": "black"}
        style |= {"facecolor": str(0.95 - 0.1 * (i % 4))}
        for axes, metric in zip(panels, ("output_tokens_per_s", "tpot_p50_ms")):
            spreads = [cell.spread[metric] for _, cell in rows]
            whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            axes.barh(places, [s.median for s in spreads], xerr=whiskers, capsize=2, **style)
        panels[2].barh(places, [100 * cell.kv_read for _, cell in rows], **style)
        least = [100 * cell.kv_least for _, cell in rows]
        panels[2].plot(
            least, places, "k|", markersize=11, markeredgewidth=2, label=None if i else "least any kernel reads"
        )
    panels[0].set_yticks([y + len(arms) * height / 2 for y in range(len(workloads))], workloads)
    panels[0].invert_yaxis()
    for axes, text in zip(panels, ("output tokens/s (more is better)", "TPOT p50, ms (less is better)",
                                   "KV tokens read in decode, % of logical (less is better)")):  # fmt: skip
        axes.set_xlabel(text)
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
    handles, texts = panels[2].get_legend_handles_labels()  # lines come before bars
    figure.legend(handles[1:] + handles[:1], texts[1:] + texts[:1], loc="outside lower center", ncols=3)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"ablation.{suffix}", dpi=120)


def write(results: Results, out: Path, console: Console) -> None:
    """results.json, results.md, cells.csv and the plots, into ``out``."""
    write_csv(results, out / "cells.csv")
    write_files(results, out, console, "scripts/ablate/report.py", markdown(results), plot)


if __name__ == "__main__":
    write_again("ablate_report", __doc__.splitlines()[0], "ablate_radix.py", show, write)
