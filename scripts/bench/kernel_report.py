"""Tables and plots of what bench_kernels.py measured.

python scripts/bench/kernel_report.py DIR     # again, from DIR/results.json; bench_kernels.py does so by itself
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

from lib.report_files import write_again, write_files
from rich.console import Console
from rich.table import Table

OURS = "packinfer"
# beginnings of the methods' names in ``kernel_baselines``, and whose they are
FAMILIES = {
    "fa3 page": "FA3",
    "fa3 twice": "FA3 twice + merge",
    "flashinfer": "FlashInfer decode",
    "prefill": "FlashInfer prefill",
    "cascade": "FlashInfer cascade",
    "batch attention": "FlashInfer BatchAttention",
    "pod": "FlashInfer BatchPOD",
    "sglang": "SGLang triton",
}
MARKERS = dict(zip(FAMILIES.values(), "sD^>vPXx"))
SECTIONS = {"decode": "Decode", "extend": "Extend and mixed", "mixed": "Extend and mixed"}
LEGEND = (
    "Microseconds a call, medians with extremes over the turns; a family's best over page sizes and both slot layouts. "
    "floor: unique KV, queries and outputs moved once, or the products, where they take longer (compute); bound: "
    "logical over unique KV tokens, out of reach where the products set the floor. The ratios: the best baseline with "
    "random slots and that with any, over packinfer with random slots."
)


def family(method: str) -> str:
    return next(name for beginning, name in FAMILIES.items() if method.startswith(beginning))


def floor(result: dict[str, Any]) -> str:
    return f"{result['floor_us']:.1f}" + ", compute" * result["compute_bound"]


def cases(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each workload and its heads, with the runs of all slot layouts; those without packinfer are left out."""
    grouped: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for r in results:
        grouped.setdefault((r["workload"], *r["heads"]), {})[r["slots"]] = r
    found = []
    for (workload, *heads), by_slots in grouped.items():
        main = by_slots.get("random") or by_slots["contiguous"]
        if OURS not in main["us"]:
            continue
        best: dict[str, float] = {}
        for r in by_slots.values():
            for method, (us, _, _) in r["us"].items():
                if method != OURS:
                    best[family(method)] = min(us, best.get(family(method), math.inf))
        others = [us for method, (us, _, _) in main["us"].items() if method != OURS]
        ours = main["us"][OURS]
        found.append({
            "workload": workload, "section": SECTIONS[main["kind"]], "heads": "/".join(map(str, heads)),
            "floor_us": main["floor_us"], "floor": floor(main), "bound": main["bound"], "ours": ours, "best": best,
            "contiguous_us": by_slots["contiguous"]["us"].get(OURS, [None])[0] if "contiguous" in by_slots else None,
            "ratio": min(others) / ours[0] if others else None,
            "ratio_any": min(best.values()) / ours[0] if best else None,
        })  # fmt: skip
    return found


def sections(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        section: some
        for section in dict.fromkeys(SECTIONS.values())
        if (some := [case for case in found if case["section"] == section])
    }


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """Header and rows, with the families that some case was measured with."""
    families = [name for name in MARKERS if any(name in case["best"] for case in found)]
    header = [
        "workload", "heads", "floor", "bound", "packinfer, random slots", "contiguous", *families,
        "random / packinfer", "any / packinfer",
    ]  # fmt: skip
    show = lambda value, form="{:.1f}": "-" if value is None else form.format(value)  # noqa: E731
    rows = [
        [
            case["workload"], case["heads"], case["floor"], show(case["bound"], "{:.1f}x"),
            "{:.1f} ({:.1f} to {:.1f})".format(*case["ours"]), show(case["contiguous_us"]),
            *(show(case["best"].get(name)) for name in families),
            show(case["ratio"], "{:.2f}"), show(case["ratio_any"], "{:.2f}"),
        ]
        for case in found
    ]  # fmt: skip
    return [header, *rows]


def summary(found: list[dict[str, Any]]) -> list[str]:
    """Geometric means of the ratios, and the cases below 1."""
    lines = []
    for name, some in (
        ("that share", [c for c in found if c["bound"] >= 1.01]),
        ("that share nothing", [c for c in found if c["bound"] < 1.01]),
    ):
        ratios = [c["ratio"] for c in some if c["ratio"] is not None]
        if not ratios:
            continue
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        slower = sorted((c["ratio"], f"{c['workload']} {c['heads']}") for c in some if (c["ratio"] or 1) < 1)
        line = f"{len(ratios)} cases {name}: geometric mean {mean:.2f}, {len(slower)} below 1"
        lines.append(line + "".join(f"; {ratio:.2f} {which}" for ratio, which in slower))
    return lines


def markdown(file: dict[str, Any]) -> str:
    lines = ["# Packed attention kernels", "", LEGEND, ""]
    for section, found in sections(cases(file["results"])).items():
        rows = table(found)
        header, *rest = (f"| {' | '.join(row)} |" for row in rows)
        lines += [f"## {section}", "", header, "|" + "---|" * len(rows[0]), *rest, ""]
        lines += [*(f"- {line}" for line in summary(found)), ""]
    lines += ["## Machine", "", *(f"- {k}: {v}" for k, v in file["machine"].items())]
    failed = [f"- {r['workload']} {r['slots']}: {m}: {why}" for r in file["results"] for m, why in r["failed"].items()]
    return "\n".join(lines + (["", "## Failed", "", *failed] if failed else [])) + "\n"


def show(file: dict[str, Any], console: Console) -> None:
    for section, found in sections(cases(file["results"])).items():
        header, *rows = table(found)
        drawn = Table(*header, title=section, show_edge=False)
        for row in rows:
            drawn.add_row(*row)
        console.print("", drawn, *summary(found), sep="\n")


def plot(file: dict[str, Any], out: Path) -> None:
    """Of each section a row of marks for each case: how many times the floor each family takes."""
    for section, found in sections(cases(file["results"])).items():
        name = "kernels" if section == SECTIONS["decode"] else "kernels_extend"
        draw(found, f"{section} attention on {file['machine']['gpu']}", out / name)


def draw(found: list[dict[str, Any]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.9 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(found))
    axes.axvline(1, color="grey", linewidth=1)
    for i, (name, marker) in enumerate(MARKERS.items()):
        points = [(case["best"][name] / case["floor_us"], y) for y, case in zip(rows, found) if name in case["best"]]
        if points:
            axes.plot(*zip(*points), marker, color=f"C{i}", label=name, markersize=6)
    ours = [case["ours"][0] / case["floor_us"] for case in found]
    axes.plot(ours, rows, "*", color="black", label=OURS, markersize=11)
    axes.set_yticks(rows, [f"{case['workload']}  {case['heads']}" for case in found])
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time of a call / floor: unique KV moved once, or the products if longer (less is better)")
    axes.grid(axis="x", alpha=0.4)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.6 / figure.get_figheight()), ncols=3)
    axes.set_title(f"{title}\npackinfer with random slots, each other with those it is fastest with")
    for suffix in ("png", "svg"):
        figure.savefig(f"{path}.{suffix}", dpi=120)


def write(file: dict[str, Any], out: Path, console: Console) -> None:
    """results.json, results.md and the plots, into ``out``."""
    write_files(file, out, console, "scripts/bench/kernel_report.py", markdown(file), plot)


if __name__ == "__main__":
    write_again("kernel_report", __doc__.splitlines()[0], "bench_kernels.py", show, write)
