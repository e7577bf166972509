"""Measure the times by which decode plans are cut and groups are chosen, on one GPU.

    python scripts/tune/fit_costs.py [--write]

Each time comes from two loads that differ in one thing only (more tokens, more items, more partial results), so that
what a call costs besides cancels out. ``--write`` puts the times into the GPU's record in
packinfer_sgl/planning/profiles.py. A GPU without a record gets one: fields that no script measures are the H200's, and
it counts as unmeasured until scripts/fit_extend.py has written its times, too. Run scripts/bench_kernels.py before and
after: times are worth what the plans are worth that they lead to.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
import torch
from bench.kernel_inputs import Inputs
from bench.kernel_workloads import HEAD_DIM, Workload, tree_workload
from bench_kernels import Timed
from rich.console import Console
from rich.table import Table
from tune.write_constants import SOURCE, write_profile

from packinfer_sgl.kernels import tiles
from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.profiles import H200, PROFILES, profile_for

ROUNDS = 5
CUDA = torch.device("cuda")
GROUP, KV_HEADS = 4, 4
LARGE, SMALL = tiles.TILES[HEAD_DIM]
SLOT_BYTES = 2 * HEAD_DIM * 2  # K and V of a token and KV head, bf16


def plan_of(work: Workload) -> Plan:
    """Every node is read once, nothing is cut."""
    group = work.shape.group_size
    policy = TilePolicy((LARGE.rows // group, SMALL.rows // group), 1 << 30)
    return work.plan(work.tree(), policy)


def only(plan: Plan, tile_class: int) -> Plan:
    """The programs of one class; the other launch finds no work."""
    _, large, small = plan.class_indptr
    class_indptr = [0, large, large] if tile_class == 0 else [large, large, small]
    return dataclasses.replace(plan, class_indptr=np.array(class_indptr, np.int32))


def in_turn(plan: Plan, programs: int) -> Plan:
    """Small items in so many programs: program ``i`` runs items ``i``, ``i + programs`` and so on."""
    items = plan.items.copy()
    items[:-programs, Col.NEXT_ITEM] = np.arange(programs, len(items))
    return dataclasses.replace(plan, items=items, class_indptr=np.array([0, 0, programs], np.int32))


def partials(plan: Plan, each: int) -> Plan:
    """No attention; so many partial results of each query are merged."""
    merge_indptr = np.arange(len(plan.merge_indptr), dtype=np.int32) * each
    return dataclasses.replace(plan, class_indptr=np.zeros(3, np.int32), merge_indptr=merge_indptr)


def call_us(work: Workload, plan: Plan) -> float:
    """Median time of a call."""
    x = Inputs(work, contiguous=False)
    heads = {"qo_heads": work.qo_heads, "kv_heads": work.kv_heads, "head_dim": HEAD_DIM}
    packed = PackedCuda(Capacity.of(plan), tiles.tiles_for(HEAD_DIM, CUDA), **heads, device=CUDA)
    packed.load(plan)
    packed.snapshot(x.table(1), torch.arange(len(x.rows), device="cuda"))
    lens = torch.from_numpy(work.kv_lens).cuda().long()
    timed = Timed(lambda i: packed.run(x.q[i], x.k[i], x.v[i], lens, sm_scale=x.sm_scale, out=x.out[i]), x.copies)
    for _ in range(ROUNDS):
        timed.measure()
    return statistics.median(timed.us)


def flat(rows: int, tokens: int, kv_heads: int = KV_HEADS) -> Workload:
    return tree_workload(f"{rows} x {tokens}", (GROUP * kv_heads, kv_heads), [rows], [tokens])


def fit_small(sms: int) -> dict[str, float]:
    """Bandwidth against programs of a multiprocessor; then what each further item of a program costs."""
    drawn = []  # bytes a microsecond
    for n in range(1, SMALL.shares + 1):
        rows = sms * n // KV_HEADS
        short, long = (call_us(w, plan_of(w)) for w in (flat(rows, 2048), flat(rows, 6144)))
        drawn.append(rows * KV_HEADS * 4096 * SLOT_BYTES / (long - short))
    programs, rate = np.arange(1, SMALL.shares + 1), np.array(drawn)
    best = (np.inf, 0.0, 0.0)
    for scale in np.arange(0.3, 6, 0.02):
        curve = 1 - np.exp(-programs / scale)
        limit = (rate @ curve) / (curve @ curve)
        best = min(best, (float(((rate - limit * curve) ** 2).sum()), float(limit), float(scale)))
    rows = sms * SMALL.resident // KV_HEADS
    once, often = flat(rows, 4096), flat(8 * rows, 512)
    more = call_us(often, in_turn(plan_of(often), rows)) - call_us(once, plan_of(once))
    return {"bytes_per_us": best[1], "saturating_programs": best[2], "small_item_us": max(more / 7, 0.0)}


def fit_large(sms: int) -> dict[str, float]:
    """Nodes that each fill a tile, one on each multiprocessor."""
    queries, nodes = LARGE.rows // GROUP, sms // KV_HEADS

    def node_us(count: int, tokens: int) -> float:
        work = tree_workload("", (GROUP * KV_HEADS, KV_HEADS), [count, count * queries], [tokens, 1])
        return call_us(work, only(plan_of(work), 0))

    short, long = node_us(nodes, 1024), node_us(nodes, 4096)
    token_us = (long - short) / 3072
    often = node_us(4 * nodes, 1024)
    flops = nodes * KV_HEADS * LARGE.rows * 4 * HEAD_DIM
    return {"flops_per_us": flops / token_us, "large_item_us": max((often - long) / 3, 0.0)}


def fit_partials() -> dict[str, float]:
    """The merge reads a partial result, a tile has written it: twice the time of reading."""
    each_us = {}
    for kv_heads in (2, 16):
        work = flat(256, 16, kv_heads)
        few, many = (call_us(work, partials(plan_of(work), n)) for n in (2, 10))
        each_us[kv_heads * GROUP] = 2 * (many - few) / (256 * 8)
    (few_heads, few_us), (many_heads, many_us) = each_us.items()
    head_us = (many_us - few_us) / (many_heads - few_heads)
    return {
        "partial_us": max(few_us - few_heads * head_us, 0.0),
        "partial_bytes_per_us": 2 * (HEAD_DIM + 1) * 4 / head_us,
    }


def key_of(device_name: str) -> str:
    """The key of a GPU's record: its model, as ``H100`` in ``NVIDIA H100 80GB HBM3``."""
    known = profile_for(device_name)
    if known.name in PROFILES:
        return known.name
    model = re.search(r"\b[A-Z]{1,2}\d{2,4}[A-Z]?\b", device_name)
    return model[0] if model else device_name


def profile_of(device_name: str, sms: int, measured: dict[str, float]) -> DeviceProfile:
    """The GPU's record with the ``measured`` times; what is missing of a new one is the H200's."""
    key = key_of(device_name)
    before = PROFILES.get(key, dataclasses.replace(H200, name=key, is_measured=False))
    return dataclasses.replace(before, multiprocessors=sms, **measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into packinfer_sgl/planning/profiles.py")
    args = parser.parse_args()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    measured = fit_small(sms) | fit_large(sms) | fit_partials()
    in_use = tiles.device_profile(CUDA)
    table = Table("time", "measured", "in use", title=torch.cuda.get_device_name())
    for name, value in measured.items():
        table.add_row(name, f"{value:.3g}", f"{getattr(in_use, name):.3g}")
    console = Console()
    console.print(table)
    profile = profile_of(torch.cuda.get_device_name(), sms, measured)
    if profile.name not in PROFILES:
        console.print(f"{profile.name} has no record: a new one takes what no script measures from the H200's")
    if args.write:
        write_profile(SOURCE, profile, ["multiprocessors", *measured])


if __name__ == "__main__":
    main()
