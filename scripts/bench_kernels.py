"""Packed decode attention against what SGLang users run today, on one GPU, without a model.

    python scripts/bench_kernels.py [--only D1,D2] [--slots random,contiguous] [--baselines fa3,fi,cascade,triton]
                                    [--trees kernel_trees.json] [--out DIR]

Every method is checked against float32 attention before it is timed. A time is the median over replays of a CUDA graph
that walks through copies of the inputs larger than the L2 cache; the methods of a workload take turns. ``floor`` is
the time to read the unique KV once, ``bound`` how much less KV than a prefix-unaware kernel any kernel must read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from packinfer_sgl.groups import H200, AttentionShape, prune
from packinfer_sgl.kernels.packed import Capacity, PackedCuda, tile_policy
from packinfer_sgl.plan import Col, make_plan
from packinfer_sgl.prefix_tree import PrefixTree

HEAD_DIM = 128
BYTES_PER_US = 4.3e6  # what a large copy reaches on an H200
L2_BYTES = 60 << 20
ROUNDS = 5


@dataclass
class Workload:
    """Requests at decode: ``paths[r]`` are the shared nodes of request ``r``, ``tails[r]`` its private KV tokens."""

    name: str
    qo_heads: int
    kv_heads: int
    node_tokens: list[int]
    paths: list[list[int]]
    tails: list[int]
    shape: AttentionShape = field(init=False)

    def __post_init__(self) -> None:
        self.shape = AttentionShape(self.qo_heads, self.kv_heads, HEAD_DIM, 2)

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([sum(self.node_tokens[n] for n in p) + t for p, t in zip(self.paths, self.tails)], np.int32)

    @property
    def unique_tokens(self) -> int:
        return sum(self.node_tokens) + sum(self.tails)

    @property
    def floor_us(self) -> float:
        kv = self.unique_tokens * self.kv_heads * HEAD_DIM * 4
        return (kv + 4 * len(self.paths) * self.qo_heads * HEAD_DIM) / BYTES_PER_US


def tree_workload(name: str, heads: tuple[int, int], nodes: list[int], tokens: list[int], jitter: int = 0) -> Workload:
    """``nodes[i]`` nodes of ``tokens[i]`` tokens at level ``i``; the last level are the requests' tails."""
    rng = np.random.default_rng(7)
    first = np.cumsum([0, *nodes[:-1]]).tolist()
    n = nodes[-1]
    paths = [[first[level] + r * nodes[level] // n for level in range(len(nodes) - 1)] for r in range(n)]
    tails = [tokens[-1] + (int(rng.integers(-jitter, jitter + 1)) if jitter else 0) for _ in range(n)]
    return Workload(name, *heads, [t for c, t in zip(nodes[:-1], tokens) for _ in range(c)], paths, tails)


def workloads() -> list[Workload]:
    rng = np.random.default_rng(7)
    flat = lambda name, lens: Workload(name, 32, 8, [], [[]] * len(lens), [int(x) for x in lens])  # noqa: E731
    return [
        tree_workload("D1 16k prefix, 64 x 512", (32, 8), [1, 64], [16384, 512], 128),
        tree_workload("D2 8 groups of 2k, 64 x 256", (32, 8), [8, 64], [2048, 256], 64),
        tree_workload("D3 three levels", (32, 8), [1, 8, 64], [2048, 1024, 256], 64),
        flat("D4 unequal 100 to 32k", np.exp(rng.uniform(np.log(100), np.log(32768), 64))),
        flat("D5 64 x 2k", [2048] * 64),
        flat("D6 short 32 to 1k, batch 128", rng.integers(32, 1025, 128)),
        tree_workload("D7 4k prefix, 256 x 128", (32, 8), [1, 256], [4096, 128], 64),
        tree_workload("D8 8/1 heads, 16k, 64 x 512", (8, 1), [1, 64], [16384, 512], 128),
        tree_workload("D9 MHA 2k, 64 x 256", (16, 16), [1, 64], [2048, 256], 64),
        tree_workload("D10 8k prefix, 8 x 256", (32, 8), [1, 8], [8192, 256], 64),
        tree_workload("D11 PAT 1,4,16,512", (32, 8), [1, 4, 16, 512], [1024, 256, 128, 32]),
        tree_workload("E2 2k prefix, 64 x 192", (32, 8), [1, 64], [2048, 192]),  # scripts/bench_engine.py, half-way
    ]


class Inputs:
    """A workload in device memory: copies of q, K and V that together exceed the L2 cache, and its slots."""

    def __init__(self, work: Workload, contiguous: bool, align: int = 64) -> None:
        self.work, rng = work, np.random.default_rng(1)
        spans = [*work.node_tokens, *work.tails]
        room = [-(-t // align) * align for t in spans]  # every span begins a page, whatever the page size
        offsets = np.cumsum([0, *room])
        self.n_slots = int(offsets[-1]) + align
        slot_of = np.arange(self.n_slots) if contiguous else rng.permutation(self.n_slots)
        self.spans = [slot_of[o : o + t].astype(np.int32) for o, t in zip(offsets, spans)]
        self.contiguous, self.offsets = contiguous, offsets
        kv_bytes = self.n_slots * work.kv_heads * HEAD_DIM * 4
        self.copies = min(24, max(2, -(-7 * L2_BYTES // kv_bytes)))
        make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        n = len(work.paths)
        self.q = [make(n, work.qo_heads, HEAD_DIM) for _ in range(self.copies)]
        self.k = [make(self.n_slots, work.kv_heads, HEAD_DIM) for _ in range(self.copies)]
        self.v = [make(self.n_slots, work.kv_heads, HEAD_DIM) for _ in range(self.copies)]
        self.out = [torch.empty_like(q) for q in self.q]
        n_nodes = len(work.node_tokens)
        self.rows = [
            np.concatenate([*(self.spans[i] for i in path), self.spans[n_nodes + r]])
            for r, path in enumerate(work.paths)
        ]
        self.sm_scale = HEAD_DIM**-0.5

    def reference(self) -> torch.Tensor:
        """Attention of copy 0 in float32, request by request."""
        outs = []
        group = self.work.qo_heads // self.work.kv_heads
        for r, slots in enumerate(self.rows):
            at = torch.from_numpy(slots).long().cuda()
            k, v = (x[0][at].float().repeat_interleave(group, 1).transpose(0, 1) for x in (self.k, self.v))
            p = ((k @ self.q[0][r].float()[:, :, None])[..., 0] * self.sm_scale).softmax(-1)
            outs.append((p[:, None] @ v)[:, 0])
        return torch.stack(outs)

    def page_lists(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> list[np.ndarray]:
        """Page numbers of each request (or of each list of spans); spans lie contiguous if pages have many tokens."""
        assert page_size == 1 or (self.contiguous and all(t % page_size == 0 for t in self.work.node_tokens))
        rows = rows or [[row] for row in self.rows]
        return [np.concatenate([span[::page_size] // page_size for span in row]) for row in rows]

    def paged(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> tuple[torch.Tensor, ...]:
        """FlashInfer's indptr, indices and last page lengths, on the GPU."""
        lists = self.page_lists(page_size, rows)
        tokens = [sum(map(len, row)) for row in rows] if rows else [len(row) for row in self.rows]
        indptr = np.cumsum([0, *map(len, lists)])
        last = [(t - 1) % page_size + 1 for t in tokens]
        return tuple(
            torch.tensor(np.asarray(x), dtype=torch.int32).cuda() for x in (indptr, np.concatenate(lists), last)
        )

    def table(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> torch.Tensor:
        """FA3's page table [n, pages], on the GPU."""
        lists = self.page_lists(page_size, rows)
        table = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
        for i, row in enumerate(lists):
            table[i, : len(row)] = torch.from_numpy(row)
        return table.cuda()

    def caches(self, i: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.n_slots // page_size
        k, v = (x[i][: n * page_size].view(n, page_size, self.work.kv_heads, HEAD_DIM) for x in (self.k, self.v))
        return k, v


Method = tuple[Callable[[int], object], list]  # call(copy), and the outputs of each copy


def ours(x: Inputs) -> tuple[Method, dict]:
    work = x.work
    ends = [np.cumsum([work.node_tokens[n] for n in path]).tolist() for path in work.paths]
    device = torch.device("cuda")
    policy = tile_policy(work.shape, device)
    started = time.perf_counter()
    tree = PrefixTree.from_paths([tuple(p) for p in work.paths], [tuple(e) for e in ends])
    kept = prune(tree, work.shape, H200)
    plan = make_plan(kept, work.kv_lens, policy, kv_tokens_unique=work.unique_tokens)
    plan_us = (time.perf_counter() - started) * 1e6
    packed = PackedCuda(
        Capacity.of(plan), qo_heads=work.qo_heads, kv_heads=work.kv_heads, head_dim=HEAD_DIM, device=device
    )
    packed.load(plan)
    packed.snapshot(x.table(1), torch.arange(len(x.rows), device=device))
    lens = torch.from_numpy(work.kv_lens).cuda().long()
    lse2 = torch.empty(len(x.rows), work.qo_heads, device=device)

    def call(i: int) -> None:
        packed.run(x.q[i], x.k[i], x.v[i], lens, sm_scale=x.sm_scale, out=x.out[i], lse2=lse2)

    classes = [plan.items[plan.items[:, Col.TILE_CLASS] == i] for i in range(len(policy.tile_queries))]
    info = {
        "groups": kept.n_nodes,
        "items": [len(items) for items in classes],
        "longest": [int(items[:, Col.A_LEN].max()) if len(items) else 0 for items in classes],
        "partials": plan.n_partials,
        "tokens_read": plan.kv_tokens_read,
        "plan_us": round(plan_us),
    }
    return (call, x.out), info


def i32(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32).cuda()


def fa3(x: Inputs, page_size: int) -> Method:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    table, lens, cu = x.table(page_size), i32(work.kv_lens), i32(np.arange(len(x.rows) + 1))
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        outs[i] = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=lens, page_table=table, cu_seqlens_q=cu, max_seqlen_q=1,
            softmax_scale=x.sm_scale, causal=True, num_splits=0,
        )  # fmt: skip

    return call, outs


def fa3_twice(x: Inputs, page_size: int) -> Method:
    """A cascade by hand over the first level: FA3 on the prefix, FA3 on the rest, merge_state_v2."""
    from sgl_kernel import merge_state_v2
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    work = x.work
    n_nodes, n = len(work.node_tokens), len(x.rows)
    roots = list(dict.fromkeys(path[0] for path in work.paths))
    rest = [[*(x.spans[i] for i in path[1:]), x.spans[n_nodes + r]] for r, path in enumerate(work.paths)]
    under = [sum(path[0] == root for path in work.paths) for root in roots]
    top_table, rest_table = x.table(page_size, [[x.spans[i]] for i in roots]), x.table(page_size, rest)
    top_lens, rest_lens = i32([work.node_tokens[i] for i in roots]), i32([sum(map(len, row)) for row in rest])
    top_cu, rest_cu = i32(np.cumsum([0, *under])), i32(np.arange(n + 1))
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        k, v = x.caches(i, page_size)
        common = {"softmax_scale": x.sm_scale, "num_splits": 0, "return_softmax_lse": True}
        a, lse_a, *_ = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=top_lens, page_table=top_table, cu_seqlens_q=top_cu,
            max_seqlen_q=max(under), causal=False, **common,
        )  # fmt: skip
        b, lse_b, *_ = flash_attn_with_kvcache(
            x.q[i], k, v, cache_seqlens=rest_lens, page_table=rest_table, cu_seqlens_q=rest_cu,
            max_seqlen_q=1, causal=True, **common,
        )  # fmt: skip
        outs[i] = merge_state_v2(a, lse_a.T.contiguous(), b, lse_b.T.contiguous())[0]

    return call, outs


def workspace() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def flashinfer_decode(x: Inputs, page_size: int) -> Method:
    import flashinfer

    work = x.work
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD", use_tensor_cores=True)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(*x.paged(page_size), work.qo_heads, work.kv_heads, HEAD_DIM, page_size, sm_scale=x.sm_scale, **dtypes)
    outs = [torch.empty_like(q) for q in x.q]
    return (lambda i: wrapper.run(x.q[i], x.caches(i, page_size), out=outs[i])), outs


def flashinfer_cascade(x: Inputs, page_size: int, backend: str) -> Method:
    import flashinfer

    work = x.work
    n_nodes, depth = len(work.node_tokens), len(work.paths[0])
    levels = []  # of each level: (queries under each node, its spans)
    for level in range(depth):
        nodes = list(dict.fromkeys(path[level] for path in work.paths))
        levels.append(([sum(p[level] == i for p in work.paths) for i in nodes], [[x.spans[i]] for i in nodes]))
    levels.append(([1] * len(x.rows), [[x.spans[n_nodes + r]] for r in range(len(x.rows))]))
    tables = [x.paged(page_size, spans) for _, spans in levels]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(depth + 1, workspace(), "NHD")
    for level_wrapper in wrapper._batch_prefill_wrappers:
        level_wrapper._backend = backend
    wrapper.plan(
        [i32(np.cumsum([0, *under])) for under, _ in levels], *(list(t) for t in zip(*tables)),
        work.qo_heads, work.kv_heads, HEAD_DIM, page_size,
        causal=True, sm_scale=x.sm_scale, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
    )  # fmt: skip
    outs: list = [None] * x.copies

    def call(i: int) -> None:
        outs[i] = wrapper.run(x.q[i], x.caches(i, page_size))

    return call, outs


def sglang_triton(x: Inputs, page_size: int) -> Method:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    work, n, splits = x.work, len(x.rows), 8
    indptr, indices, _ = x.paged(1)
    outs = [torch.empty_like(q) for q in x.q]
    logits = torch.empty(n, work.qo_heads, splits, HEAD_DIM, dtype=torch.float32, device="cuda")
    lse = torch.empty(n, work.qo_heads, splits, dtype=torch.float32, device="cuda")
    kv_splits = torch.full((n,), splits, dtype=torch.int32, device="cuda")

    def call(i: int) -> None:
        decode_attention_fwd(
            x.q[i], x.k[i], x.v[i], outs[i], indptr, indices, logits, lse, kv_splits, splits, x.sm_scale, 1.0, 1.0
        )

    return call, outs


def baselines(x: Inputs, families: set[str]) -> dict[str, Callable[[], Method]]:
    shared = bool(x.work.node_tokens)
    even = x.contiguous and all(t % 64 == 0 for t in x.work.node_tokens)
    methods: dict[str, Callable[[], Method]] = {}
    if "fa3" in families:
        for page_size in (1, 64) if even else (1,):
            methods[f"fa3 page {page_size}"] = lambda p=page_size: fa3(x, p)
            if shared:
                methods[f"fa3 twice page {page_size}"] = lambda p=page_size: fa3_twice(x, p)
    for page_size in (1, 16) if even else (1,):
        if "fi" in families:
            methods[f"flashinfer page {page_size}"] = lambda p=page_size: flashinfer_decode(x, p)
        if "cascade" in families and shared:
            for backend in ("fa2", "fa3"):
                name = f"cascade {backend} page {page_size}"
                methods[name] = lambda p=page_size, b=backend: flashinfer_cascade(x, p, b)
    if "triton" in families:
        methods["sglang triton"] = lambda: sglang_triton(x, 1)
    return methods


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
    difference = (outs[0].float().view_as(reference) - reference).flatten(1).norm(dim=1)
    return float(torch.nan_to_num(difference / reference.flatten(1).norm(dim=1), nan=9.0).max())


def bench(work: Workload, contiguous: bool, families: set[str]) -> dict:
    x = Inputs(work, contiguous)
    reference = x.reference()
    (call, outs), info = ours(x)
    timed, failed = {}, {}
    for name, make in {"packinfer": lambda: (call, outs), **baselines(x, families)}.items():
        try:
            method, results = make()
            for out in results:
                if out is not None:
                    out.fill_(float("nan"))
            method(0)
            torch.cuda.synchronize()
            wrong = error(results, reference)
            if wrong > 0.02:  # bf16: two roundings of 2^-9 relative each stay far below
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
        "heads": [work.qo_heads, work.kv_heads],
        "slots": "contiguous" if contiguous else "random",
        "floor_us": work.floor_us,
        "bound": float(work.kv_lens.sum() / work.unique_tokens),
        "plan": info,
        "us": times,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="beginnings of workload names, by comma")
    parser.add_argument("--slots", default="random,contiguous")
    parser.add_argument("--baselines", default="fa3,fi,cascade,triton")
    parser.add_argument("--trees", type=Path, help="JSON file of tree shapes, run with each of its head configurations")
    parser.add_argument("--out", type=Path, help="folder for results.json")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no workload after this time")
    args = parser.parse_args()
    started = time.perf_counter()
    only = tuple(args.only.split(",")) if args.only else ("",)
    todo = [w for w in workloads() if w.name.startswith(only)]
    if args.trees:
        file = json.loads(args.trees.read_text())
        todo = [
            tree_workload(f"{t['source']} {t['nodes_per_level']} x {t['tokens_per_node']}", (hq, hkv),
                          t["nodes_per_level"], t["tokens_per_node"])
            for t in file["trees"] for hq, hkv in file["head_configs"]
        ]  # fmt: skip
    results = []
    for work in todo:
        for slots in args.slots.split(","):
            if time.perf_counter() - started > args.seconds:
                print("out of time before", work.name, slots)
                break
            r = bench(work, slots == "contiguous", set(args.baselines.split(",")))
            results.append(r)
            torch.cuda.empty_cache()
            ours_us = r["us"].get("packinfer", (float("nan"),) * 3)
            others = {name: us for name, us in r["us"].items() if name != "packinfer"}
            best = min(others, key=lambda name: others[name][0]) if others else "none"
            ratio = others[best][0] / ours_us[0] if others else float("nan")
            print(
                f"{work.name} {work.qo_heads}/{work.kv_heads} {slots}: {ours_us[0]:.1f} "
                f"({ours_us[1]:.1f}-{ours_us[2]:.1f}), floor {r['floor_us']:.1f}, bound {r['bound']:.1f}x, "
                f"best {best} {others[best][0] if others else 0:.1f} -> {ratio:.2f}x | "
                + ", ".join(f"{n} {us[0]:.0f}" for n, us in others.items()) + f" | {r['plan']} {r['failed'] or ''}",
                flush=True,
            )  # fmt: skip
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
                (args.out / "results.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
