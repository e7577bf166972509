"""Fit the times by which extend batches go to the packed kernels or to the stock backend; needs no GPU.

    python scripts/bench_kernels.py --only P,M,C,R,HR,GR,FR --baselines fa3 --slots random --out DIR    # on a GPU
    python scripts/tune/fit_extend.py --results DIR/results.json [--write]

The plans are made again, so fit in the checkout that was measured; what scripts/fit_costs.py has written since does no
harm. The table shows what the fitted times lead to. ``--write`` puts them into the GPU's record in
packinfer_sgl/planning/profiles.py (scripts/fit_costs.py makes one for a new GPU), which then counts as measured. Plans
may differ after that: measure again, and see whether they became faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
from bench.kernel_report import OURS
from bench.kernel_workloads import HEAD_DIM, Workload, workloads
from rich.console import Console
from rich.table import Table
from tune.write_constants import SOURCE, write_profile

from packinfer_sgl.kernels.tiles import EXTEND_TILES, FP8_EXTEND_TILES, Tile
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.profiles import H200, PROFILES, profile_for

STOCK = "fa3 page 1"
TILES = EXTEND_TILES[HEAD_DIM]
EVERY = [f.name for f in fields(DeviceProfile)]
# by head dimension and bytes of an element of KV: one factor each for the packed kernel and the stock backend
FACTORS = {(64, 2): "64", (256, 2): "256", (HEAD_DIM, 1): "fp8"}
FITTED = [name for name in EVERY if name != "extend_margin" and "_factor_" not in name]
PACKED = [name for name in FITTED if name.startswith("extend_")]
STOCK_TIMES = [name for name in FITTED if name.startswith("stock_")]


def tiles_of(work: Workload) -> tuple[Tile, ...]:
    return (FP8_EXTEND_TILES if work.fp8 else EXTEND_TILES)[work.head_dim]


@dataclass
class Case:
    """A measured batch: microseconds of the packed plan, and of the stock backend."""

    work: Workload
    plan: Plan
    packed_us: float
    stock_us: float

    def packed_model(self, profile: DeviceProfile) -> float:
        tile = tiles_of(self.work)[0]
        return profile.packed_extend_us(self.plan, self.work.shape, profile.multiprocessors, tile.rows, tile.tokens)

    def stock_model(self, profile: DeviceProfile) -> float:
        new = np.array(self.work.new, np.int32)
        return profile.stock_extend_us(new, self.work.kv_lens, self.work.shape, profile.multiprocessors)

    def is_packed(self, profile: DeviceProfile) -> bool:
        """Whether the router packs it."""
        return profile.extend_margin * self.packed_model(profile) <= self.stock_model(profile)


def cases(results: list[dict[str, Any]], profile: DeviceProfile) -> list[Case]:
    """Extend and mixed batches that both have run; raises SystemExit if other plans were measured.

    Args:
        profile: by which they were planned.
    """
    known = {work.name: work for work in workloads()}
    found = []
    for r in results:
        if r["kind"] == "decode" or r["slots"] != "random" or not {OURS, STOCK} <= r["us"].keys():
            continue
        work = known[r["workload"]]
        plan = work.extend_plan(tiles_of(work), profile.multiprocessors, profile)
        if (plan.n_partials, plan.kv_tokens_read) != (r["plan"]["partials"], r["plan"]["tokens_read"]):
            raise SystemExit(f"fit_extend: {work.name} was measured with another plan: fit where it was measured")
        found.append(Case(work, plan, r["us"][OURS][0], r["us"][STOCK][0]))
    return found


def fit(errors: Callable[[DeviceProfile], np.ndarray], costs: DeviceProfile, names: list[str]) -> DeviceProfile:
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


def fit_all(measured: list[Case], profile: DeviceProfile) -> tuple[DeviceProfile, list[str]]:
    """Also the names of the fields that were fitted: of shapes other than 16 bits and HEAD_DIM one factor each."""
    todo = {(HEAD_DIM, 2): (PACKED, STOCK_TIMES)}
    todo |= {key: ([f"extend_factor_{name}"], [f"stock_factor_{name}"]) for key, name in FACTORS.items()}
    fitted = []
    for key, (packed, stock) in todo.items():
        alike = [case for case in measured if (case.work.shape.head_dim, case.work.shape.kv_bytes) == key]
        if not alike:
            continue
        if key in FACTORS:
            profile = replace(profile, **dict.fromkeys([*packed, *stock], 1.0))
        profile = fit(lambda p: np.array([c.packed_model(p) / c.packed_us - 1 for c in alike]), profile, packed)  # noqa: B023
        profile = fit(lambda p: np.array([c.stock_model(p) / c.stock_us - 1 for c in alike]), profile, stock)  # noqa: B023
        fitted += [*packed, *stock]
    return profile, fitted


def show(measured: list[Case], costs: DeviceProfile, in_use: DeviceProfile, names: list[str], console: Console) -> None:
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
    for name in names:
        console.print(f"{name}: {getattr(costs, name):.3g}, in use {getattr(in_use, name)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="results.json of scripts/bench_kernels.py")
    parser.add_argument("--write", action="store_true", help="into packinfer_sgl/planning/profiles.py")
    args = parser.parse_args()
    file = json.loads(args.results.read_text())
    in_use = profile_for(file["machine"]["gpu"])
    if in_use.name not in PROFILES:
        sys.exit(f"fit_extend: {in_use.name} has no record: run scripts/fit_costs.py --write on it first")
    in_use = replace(in_use, is_measured=True)
    planned_by = DeviceProfile(**file["profile"]) if "profile" in file else H200  # older files do not say
    measured = cases(file["results"], planned_by)
    if not measured:
        sys.exit(f"fit_extend: {args.results} has no extend batch of both {OURS} and {STOCK}")
    fitted, names = fit_all(measured, in_use)
    show(measured, fitted, in_use, names, Console(highlight=False))
    if args.write:
        write_profile(SOURCE, fitted, [*names, "is_measured"])


if __name__ == "__main__":
    main()
