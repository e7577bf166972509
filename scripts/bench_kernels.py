"""Packed attention against what SGLang users run today, on one GPU, without a model.

    python scripts/bench_kernels.py [--only D1,P] [--slots random,contiguous] [--baselines fa3,fi,cascade]
                                    [--trees kernel_trees.json] [--out DIR]    # results.json, results.md, plots
    python scripts/bench_kernels.py --only D --deterministic 512    # the deterministic mode

Workloads: decode (D, E; few requests with long contexts: S), prompts over cached prefixes and without (P), prompts
beside decodes (M), and, if asked for,
drafts to verify (V), one request's chunk over its cached tokens (C256@0 to C4096@32k) and random batches of prompts and
decodes (R0 to R39). FlashInfer compiles its kernels when they are first called, some for minutes: ``--baselines`` can
leave out those of decode and prefill (``fi``), ``cascade``, ``batch`` (BatchAttention) and ``pod`` (BatchPOD).

Every method is checked against float32 attention before it is timed. A time is the median over replays of a CUDA graph
that walks through copies of the inputs larger than the L2 cache; the methods of a workload take turns. ``floor`` is
the time to move unique KV, queries and outputs once, or that of the products where it is longer ("compute").
``bound`` is how much less KV than a prefix-unaware kernel any kernel must read: what sharing can save at most, and
more than it can save where products set the floor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import flashinfer
import torch
import triton
from bench.kernel_baselines import Method, baselines, in_fixed_splits
from bench.kernel_inputs import Inputs
from bench.kernel_report import floor, show, write
from bench.kernel_workloads import Workload, tree_workload, workloads
from rich.console import Console

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import decode_cost, device_profile, multiprocessors, shape_tiles, tile_policy
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Col

ROUNDS = 5
FAMILIES = "fa3,fi,cascade,batch,triton,pod"


def ours(x: Inputs, unit_tokens: int = 0) -> tuple[Method, dict]:
    """``unit_tokens``: of SGLang's deterministic mode, for decode; 0 without it."""
    work = x.work
    device = torch.device(x.device)
    windowed = work.kind != "decode"
    tiles, sms = shape_tiles(work.shape, device, windowed, unit_tokens), multiprocessors(device)
    profile = device_profile(device)
    started = time.perf_counter()
    if unit_tokens:
        plan = work.unit_plan(profile.decode_cost, tile_policy(work.shape, device, unit_tokens=unit_tokens))
    elif windowed:
        plan = work.extend_plan(tiles, sms, profile)
    else:
        cost = decode_cost(work.shape, tiles, profile)
        plan = work.plan(work.pruned(cost), tile_policy(work.shape, device))
    plan_us = (time.perf_counter() - started) * 1e6
    packed = PackedCuda(
        Capacity.of(plan), tiles, qo_heads=work.qo_heads, kv_heads=work.kv_heads,
        head_dim=work.head_dim, device=device,
    )  # fmt: skip
    packed.load(plan)
    packed.snapshot(x.table(1), torch.arange(len(x.rows), device=device))
    lens = x.i32(work.kv_lens).long()
    lse2 = torch.empty(sum(work.new), work.qo_heads, device=device)

    def call(i: int) -> None:
        packed.run(
            x.q[i], x.k[i], x.v[i], lens, sm_scale=x.sm_scale, logits_soft_cap=work.soft_cap, windowed=windowed,
            sinks=x.sinks, out=x.out[i], lse2=lse2,
        )  # fmt: skip

    classes = [plan.items[plan.items[:, Col.TILE_CLASS] == i] for i in range(len(plan.class_indptr) - 1)]
    info = {
        "groups": len(plan.spans) - len(work.new),
        "items": [len(items) for items in classes],
        "longest": [int(items[:, Col.A_LEN].max()) if len(items) else 0 for items in classes],
        "partials": plan.n_partials,
        "tokens_read": plan.kv_tokens_read,
        "plan_us": round(plan_us),
    }
    return (call, x.out), info


class Timed:
    """A CUDA graph of one call for each copy of the inputs."""

    def __init__(self, call: Callable[[int], object], copies: int) -> None:
        self.call = call  # the graph uses memory that it holds
        for i in range(2):
            call(i)
        torch.cuda.synchronize()
        self.copies, self.graph = copies, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(copies):
                call(i)
        self.repeats = max(1, int(3000 / self._us(1)))
        self.us: list[float] = []

    def _us(self, repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / repeats

    def measure(self) -> None:
        self.us.append(self._us(self.repeats) / self.copies)


def error(outs: list, reference: torch.Tensor) -> float:
    """Relative error of the worst query; NaN counts as 9."""
    out = torch.cat(outs[0]) if isinstance(outs[0], tuple) else outs[0]
    difference = (out.float().view_as(reference) - reference).flatten(1).norm(dim=1)
    return float(torch.nan_to_num(difference / reference.flatten(1).norm(dim=1), nan=9.0).max())


def bench(work: Workload, contiguous: bool, families: set[str], unit_tokens: int = 0) -> dict:
    x = Inputs(work, contiguous)
    reference = x.reference()
    (call, outs), info = ours(x, unit_tokens)
    timed, failed = {}, {}
    others = in_fixed_splits(x, families, unit_tokens) if unit_tokens else baselines(x, families)
    for name, make in {"packinfer": lambda: (call, outs), **others}.items():
        try:
            method, results = make()
            for out in results:
                if out is not None:
                    out.fill_(float("nan"))
            method(0)
            torch.cuda.synchronize()
            wrong = error(results, reference)
            # bf16: two roundings of 2^-9 relative each stay far below; with FP8 FA3 rounds queries and weights by 2^-4
            if wrong > (0.1 if work.fp8 and name.startswith("fa3") else 0.02):
                failed[name] = f"wrong by {wrong:.3f}"
                continue
            timed[name] = Timed(method, x.copies)
        except Exception as e:
            failed[name] = f"{type(e).__name__}: {e}"[:160]
    for _ in range(ROUNDS):
        for method in timed.values():
            method.measure()
    times = {name: (statistics.median(t.us), min(t.us), max(t.us)) for name, t in timed.items()}
    return {
        "workload": work.name,
        "kind": work.kind,
        "heads": [work.qo_heads, work.kv_heads],
        "slots": "contiguous" if contiguous else "random",
        "floor_us": work.floor_us,
        "compute_bound": work.flops_us > work.bytes_us,
        "bound": float(work.kv_lens.sum() / work.unique_tokens),
        "plan": info,
        "us": times,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="D,E,S,P,M", help="beginnings of workload names, by comma")
    parser.add_argument("--slots", default="random,contiguous")
    parser.add_argument("--baselines", default=FAMILIES)
    parser.add_argument("--trees", type=Path, help="JSON file of tree shapes, run with each of its head configurations")
    parser.add_argument("--out", type=Path, help="folder for results and plots")
    parser.add_argument(
        "--deterministic", type=int, default=0, metavar="TOKENS",
        help="decode as in SGLang's deterministic mode, in units of so many tokens (512), beside FA3 with one split "
        "and FlashInfer with splits of so many tokens",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no workload after this time")
    args = parser.parse_args()
    started = time.perf_counter()
    todo = [w for w in workloads() if w.name.startswith(tuple(args.only.split(",")))]
    todo = [w for w in todo if w.kind == "decode" or not args.deterministic]
    if args.trees:
        trees = json.loads(args.trees.read_text())
        todo = [
            tree_workload(f"{t['source']} {t['nodes_per_level']} x {t['tokens_per_node']}", (hq, hkv),
                          t["nodes_per_level"], t["tokens_per_node"])
            for t in trees["trees"] for hq, hkv in trees["head_configs"]
        ]  # fmt: skip
    versions = {module.__name__: module.__version__ for module in (torch, triton, flashinfer)}
    machine = {"gpu": torch.cuda.get_device_name(), **versions, "sglang": version("sglang")}
    profile = asdict(device_profile(torch.device("cuda")))  # scripts/fit_extend.py makes the plans again
    file: dict = {"machine": machine, "profile": profile, "deterministic": args.deterministic, "results": []}
    console = Console(highlight=False)
    for work, slots in itertools.product(todo, args.slots.split(",")):
        if time.perf_counter() - started > args.seconds:
            print("out of time before", work.name, slots)
            break
        r = bench(work, slots == "contiguous", set(args.baselines.split(",")), args.deterministic)
        if "packinfer" in r["failed"]:
            sys.exit(f"bench_kernels: {work.name}, {slots} slots: packinfer: {r['failed']['packinfer']}")
        file["results"].append(r)
        torch.cuda.empty_cache()
        ours_us = r["us"].get("packinfer", (float("nan"),) * 3)
        others = {name: us for name, us in r["us"].items() if name != "packinfer"}
        best = min(others, key=lambda name: others[name][0]) if others else "none"
        ratio = others[best][0] / ours_us[0] if others else float("nan")
        print(
            f"{work.name} {work.qo_heads}/{work.kv_heads} {slots}: {ours_us[0]:.1f} "
            f"({ours_us[1]:.1f}-{ours_us[2]:.1f}), floor {floor(r)}, bound {r['bound']:.1f}x, "
            f"best {best} {others[best][0] if others else 0:.1f} -> {ratio:.2f}x | "
            + ", ".join(f"{n} {us[0]:.0f}" for n, us in others.items()) + f" | {r['plan']} {r['failed'] or ''}",
            flush=True,
        )  # fmt: skip
        if args.out:  # after each, so that a run that is cut off keeps what it has
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "results.json").write_text(json.dumps(file, indent=1) + "\n")
    show(file, console)
    if args.out:
        write(file, args.out, console)


if __name__ == "__main__":
    main()
