"""Fit the times by which extend batches go to the packed kernels or to the stock backend; needs no GPU.

    python scripts/bench_kernels.py --only P,M,C,R --baselines fa3 --slots random --out DIR    # on a GPU
    python scripts/tune/fit_extend.py --results DIR/results.json [--write]

The plans are made again, so fit in the checkout that was measured. The table shows what the fitted times lead to;
``--write`` puts them into packinfer_sgl/planning/extend_costs.py, after which plans may differ: measure again, and see
whether they became faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
from bench.kernel_report import OURS
from bench.kernel_workloads import HEAD_DIM, Workload, workloads
from rich.console import Console
from rich.table import Table
from tune.write_constants import write

from packinfer_sgl.kernels.tiles import EXTEND_TILES
from packinfer_sgl.planning.extend_costs import CLEARLY, EXTEND_H200, SMS, ExtendCosts
from packinfer_sgl.planning.plan import Plan

SOURCE = Path(__file__).resolve().parents[2] / "packinfer_sgl" / "planning" / "extend_costs.py"
STOCK = "fa3 page 1"
TILES = EXTEND_TILES[HEAD_DIM]


@dataclass
class Case:
    """A measured batch: microseconds of the packed plan, and of the stock backend."""

    work: Workload
    plan: Plan
    packed_us: float
    stock_us: float

    def packed_model(self, costs: ExtendCosts) -> float:
        return costs.packed_us(self.plan, self.work.shape, SMS, TILES[0].rows, TILES[0].tokens)

    def stock_model(self, costs: ExtendCosts) -> float:
        return costs.stock_us(np.array(self.work.new, np.int32), self.work.kv_lens, self.work.shape, SMS)

    def is_packed(self, costs: ExtendCosts) -> bool:
        """Whether the router packs it."""
        return CLEARLY * self.packed_model(costs) <= self.stock_model(costs)


def cases(results: list[dict[str, Any]]) -> list[Case]:
    """Extend and mixed batches that both have run; raises SystemExit if other plans were measured."""
    known = {work.name: work for work in workloads()}
    found = []
    for r in results:
        if r["kind"] == "decode" or r["slots"] != "random" or not {OURS, STOCK} <= r["us"].keys():
            continue
        work = known[r["workload"]]
        plan = work.extend_plan(TILES, SMS)
        if (plan.n_partials, plan.kv_tokens_read) != (r["plan"]["partials"], r["plan"]["tokens_read"]):
            raise SystemExit(f"fit_extend: {work.name} was measured with another plan: fit where it was measured")
        found.append(Case(work, plan, r["us"][OURS][0], r["us"][STOCK][0]))
    return found


def fit(errors: Callable[[ExtendCosts], np.ndarray], costs: ExtendCosts, names: list[str]) -> ExtendCosts:
    """``costs`` with those ``names`` that make the squares of the errors least (Gauss-Newton, in logarithms)."""
    for _ in range(50):
        now = errors(costs)
        each = {name: getattr(costs, name) for name in names}
        slopes = [(errors(replace(costs, **{name: us * 1.001})) - now) / np.log(1.001) for name, us in each.items()]
        # what no case tells stays as it is
        step = np.clip(np.linalg.lstsq(np.array(slopes).T, -now, rcond=1e-6)[0], -1, 1)
        for scale in 0.5 ** np.arange(8):
            better = replace(costs, **dict(zip(names, np.array(list(each.values())) * np.exp(scale * step))))
            if (errors(better) ** 2).sum() < (now**2).sum() * (1 - 1e-9):
                costs = better
                break
        else:
            break
    return costs


def fit_all(measured: list[Case], costs: ExtendCosts) -> ExtendCosts:
    names = list(asdict(costs))
    costs = fit(
        lambda c: np.array([case.packed_model(c) / case.packed_us - 1 for case in measured]),
        costs,
        [name for name in names if not name.startswith("stock")],
    )
    return fit(
        lambda c: np.array([case.stock_model(c) / case.stock_us - 1 for case in measured]),
        costs,
        [name for name in names if name.startswith("stock")],
    )


def show(measured: list[Case], costs: ExtendCosts, console: Console) -> None:
    table = Table("workload", "packed us", "model", "stock us", "model", "choice", "choice / stock", title=STOCK)
    ratios, right = [], 0
    for case in measured:
        is_packed = case.is_packed(costs)
        ratios.append(case.packed_us / case.stock_us if is_packed else 1.0)
        right += is_packed == (case.packed_us < case.stock_us)
        us = (case.packed_us, case.packed_model(costs), case.stock_us, case.stock_model(costs))
        table.add_row(
            case.work.name, *(f"{x:.1f}" for x in us), "packed" if is_packed else "stock", f"{ratios[-1]:.2f}"
        )
    console.print(table)
    console.print(
        f"choice over stock: worst {max(ratios):.2f}, geometric mean {np.exp(np.log(ratios).mean()):.3f}; "
        f"right in {right} of {len(measured)}"
    )
    for name, us in asdict(costs).items():
        console.print(f"{name}: {us:.3g}, in use {getattr(EXTEND_H200, name):.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results.json of scripts/bench_kernels.py")
    parser.add_argument("--write", action="store_true", help="into packinfer_sgl/planning/extend_costs.py")
    args = parser.parse_args()
    measured = cases(json.loads(args.results.read_text())["results"])
    if not measured:
        sys.exit(f"fit_extend: {args.results} has no extend batch of both {OURS} and {STOCK}")
    costs = fit_all(measured, EXTEND_H200)
    show(measured, costs, Console(highlight=False))
    if args.write:
        write(SOURCE, asdict(costs))


if __name__ == "__main__":
    main()
