"""What the ablation's report says of results that are known, and that its plots are drawn."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ablate import report as ablate_report
from ablate.matrix import AXES, label, select, steps
from ablate.report import answer, cells, change, compared, comparison_rows, fraction, markdown, notices, plot, write_csv

CHOSEN = {name: list(axis.default) for name, axis in AXES.items()} | {"schedule": ["fcfs", "lpm"]}
CONFIGS = {label(config): config for config in select(CHOSEN, full=False)}


def runs(
    config: str, workload: str, per_s: tuple[float, float], tpot: tuple[float, float], **more: float
) -> list[dict]:
    """Two rounds; by default all prompts are computed and all KV is read."""
    same = {
        "ttft_p50_ms": 20.0, "ttft_p99_ms": 30.0, "prompt_tokens": 1000, "computed_prompt_tokens": 1000,
        "least_prefill_tokens": 200, "packed_steps": 90, "unpacked_steps": 10, "kv_tokens_logical": 800,
        "kv_tokens_read": 800, "kv_tokens_unique": 100, "plans": 4, "plan_us_total": 400.0, **more,
    }  # fmt: skip
    return [
        {"config": config, "workload": workload, "round": i, "output_tokens_per_s": per_s[i], "tpot_p50_ms": tpot[i],
         "tpot_p99_ms": 2 * tpot[i], **same}
        for i in (0, 1)
    ]  # fmt: skip


HITS = {"computed_prompt_tokens": 250}
RESULTS = {
    "environment": {"model": "m", "device": "d", "sglang": "0", "rounds": 2, "size": "cpu"},
    "engine": {"random_seed": 0},
    "chosen": CHOSEN,
    "configs": CONFIGS,
    "workloads": {"fork": "a tree", "alone": "nothing shared"},
    "runs": [
        *runs("radix off", "fork", (50, 60), (10, 12), kv_tokens_unique=800),
        *runs("grouping off", "fork", (100, 120), (9, 11), **HITS),
        *runs("grouping single", "fork", (110, 130), (6, 11), **HITS, kv_tokens_read=400),
        *runs("usual settings", "fork", (150, 170), (4, 6), **HITS, kv_tokens_read=160),
        *runs("radix off", "alone", (50, 60), (10, 12), least_prefill_tokens=1000, kv_tokens_unique=800),
        *runs("grouping off", "alone", (55, 58), (10, 12), least_prefill_tokens=1000, kv_tokens_unique=800),
        *runs("usual settings", "alone", (40, 45), (13, 14), least_prefill_tokens=1000, kv_tokens_unique=800),
    ],
    "answers": {"fork": {"grouping off": {"equal": 5, "near-tie": 1, "different": 0}}, "alone": {}},
    "skipped": [{"config": "schedule lpm", "workload": "fork", "reason": "it did not start"}],
}


def test_the_sides_of_a_step() -> None:
    found = {step.title(): (step, workloads) for step, workloads in compared(RESULTS)}
    assert list(found) == [
        "the radix cache: on against off", "grouping: multi against off", "grouping: single against off",
    ]  # fmt: skip
    step, ((_, before, after), (_, *alone)) = found["grouping: multi against off"]
    assert change(step, before, after) == (10 / 5, "better")
    assert change(step, *alone) == (11 / 13.5, "worse")
    step, ((_, before, after), (_, *alone)) = found["the radix cache: on against off"]
    assert change(step, before, after) == (110 / 55, "better")
    assert change(step, *alone)[1] == "same"
    step, ((_, before, after),) = found["grouping: single against off"]
    assert change(step, before, after)[1] == "same"  # a better median within the spread


def test_where_nothing_can_be_saved_nothing_is_gained() -> None:
    faster = [
        *runs("radix off", "alone", (50, 55), (10, 10), least_prefill_tokens=1000),
        *runs("grouping off", "alone", (60, 65), (10, 10), least_prefill_tokens=1000),
    ]
    ((step, ((_, before, after),)),) = compared({**RESULTS, "runs": faster})
    assert change(step, before, after) == (62.5 / 52.5, "same")


def test_the_saving_stands_beside_the_speeds() -> None:
    said = [answer(*pair) for pair in compared(RESULTS)]
    assert said[0] == (
        "**The radix cache** (on against off) raises output tokens/s: fork 2.00x (1/4.0, 1/5.0). Nothing gained beyond "
        "the spread of the rounds: alone 1.03x (1/1.0, 1/1.0). In brackets: the share of prompt tokens computed, and "
        "the least possible."
    )
    assert "cuts the time per output token: fork 2.00x (1/5.0, 1/8.0)." in said[1]
    assert "Slower: alone 0.81x" in said[1]
    assert said[2].startswith("**Grouping** (single against off) gains nothing in the time per output token on any")
    rows = comparison_rows(*list(compared(RESULTS))[1], spreads=True)
    assert rows[1][1] == "110 (100 to 120) → 160 (150 to 170)"
    assert comparison_rows(*list(compared(RESULTS))[1], spreads=False)[1][1] == "110 → 160"
    assert rows[1][-3:] == ["1/5.0", "1/8.0", "2.00 better"] and len(rows[0]) == len(rows[1])
    assert fraction(1.0) == "1/1.0"


def test_what_must_not_be_overlooked() -> None:
    lines = notices(RESULTS)
    assert "5 equal, 1 parted at a near-tie, 0 different" in lines[0]
    assert lines[1:] == ["**not measured**: fork, schedule lpm: it did not start"]
    wrong = {"fork": {"grouping off": {"equal": 5, "near-tie": 0, "different": 2}}}
    assert "**DIFFERENT ANSWERS**: fork, grouping off: 2" in notices({**RESULTS, "answers": wrong})
    assert "not compared" in notices({**RESULTS, "answers": {"fork": {}}})[0]


def test_markdown_and_csv(tmp_path: Path) -> None:
    text = markdown(RESULTS)
    assert text.startswith("# What the radix cache and grouping give\n")
    one = {**RESULTS, "chosen": {**CHOSEN, "radix": ["on"]}}
    assert markdown(one).startswith("# What grouping gives\n")
    assert "| fork | usual settings | 160 (150 to 170) |" in text
    row = next(line for line in text.splitlines() if line.startswith("| fork | usual settings"))
    assert row.endswith("| 20% | 12% | 90% | 75% | 80% | 100 | 4 | - | 0 |")
    arena = {"arena_shared_tokens_read": 50, "arena_contiguous_tokens_read": 48, "arena_copied_bytes": 3e6}
    copied = {**RESULTS, "runs": runs("usual settings", "fork", (150, 170), (4, 6), **arena)}
    row = next(line for line in markdown(copied).splitlines() if line.startswith("| fork | usual settings"))
    assert row.endswith("| 4 | 96% | 3 |")
    assert "- fork: a tree" in text and "- size: cpu" in text
    write_csv(RESULTS, tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open() as file:
        rows = {(row["workload"], row["radix"], row["grouping"]): row for row in csv.DictReader(file)}
    assert len(rows) == 7 and rows["fork", "on", "multi"]["kv_least"] == "0.125"
    assert rows["fork", "on", "multi"]["output_tokens_per_s_high"] == "170"


@pytest.mark.parametrize("workloads", [1, 2])
def test_plots(tmp_path: Path, workloads: int) -> None:
    plot({**RESULTS, "workloads": dict(list(RESULTS["workloads"].items())[:workloads])}, tmp_path)
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "ablation.svg").read_text()


def test_report_from_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    done = subprocess.run([sys.executable, ablate_report.__file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"results.json", "results.md", "cells.csv", "ablation.png", "ablation.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "The radix cache (on against off) raises output tokens/s: fork 2.00x" in done.stdout


def test_many_configurations_are_not_all_drawn(tmp_path: Path) -> None:
    chosen = {name: list(axis.values) for name, axis in AXES.items()}
    configs = {label(config): config for config in select(chosen, full=True)}
    many = [run for name in configs for run in runs(name, "fork", (5, 6), (7, 8))]
    results = {**RESULTS, "chosen": chosen, "configs": configs, "runs": many}
    plot(results, tmp_path)
    shown = (tmp_path / "ablation.svg").read_text()
    assert len(cells(results)) == len(configs) > ablate_report.PLOT_ARMS and "least any kernel reads" not in shown[:100]
    assert {label(c) for s in steps(chosen) for c in (s.before, s.after)} <= set(configs)
