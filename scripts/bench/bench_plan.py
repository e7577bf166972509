"""Host time of planning, on SGLang's own radix cache: stage by stage, warm and cold.

    python scripts/bench/bench_plan.py [--rounds 60] [--touch-mb 160]

Builds prompts with several levels of sharing and private tails, inserts them into the radix cache of the installed
SGLang release, and times what the backend does on the host when it plans: reading the rows of the batch, their lengths,
the plan (paths, tree, groups, work items), and loading it (here on the CPU, where the copy to the device is one, too).
Either the batch stays, or one request leaves and another one joins. Cold: other memory is touched before each step, so
that neither code nor data is in a cache, as in an engine, where much happens between two plans.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count, pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import multiprocessors, shape_tiles
from packinfer_sgl.planning.batch import StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import decode_capacity, verify_capacity
from packinfer_sgl.planning.planners import DecodePlanner, ExtendPlanner
from packinfer_sgl.runners.cuda import ROOM_TOKENS, decode_planner, extend_planner
from packinfer_sgl.serving.batch_rows import BatchRows

SHAPE = AttentionShape(qo_heads=32, kv_heads=8, head_dim=128, kv_bytes=2)
CPU = torch.device("cpu")
STAGES = ("rows", "lengths", "plan", "load")
# (requests, branches at each level, tokens of each level); the last level is private
BATCHES = [
    (64, (1, 64), (16000, 300)),
    (64, (1, 2, 4, 8, 64), (2048, 512, 256, 128, 200)),
    (64, (64,), (2000,)),
    (256, (1, 256), (16000, 300)),
    (256, (1, 4, 8, 32, 256), (2048, 512, 256, 128, 200)),
]


@dataclass
class Request:
    """The fields of SGLang's request that the plugin reads, in both releases' places."""

    last_node: Any
    cache_protected_len: int
    req_pool_idx: int
    kv: Any = field(init=False)
    retraction_count: int = 0

    def __post_init__(self) -> None:
        self.kv = SimpleNamespace(req_pool_idx=self.req_pool_idx, cache_protected_len=self.cache_protected_len)


class NoPool:
    """Takes back the slots of what the cache holds already."""

    device, page_size = "cpu", 1

    def free(self, slots: torch.Tensor) -> None: ...

    def free_segment(self, slots: torch.Tensor, *, start_pos: int) -> None: ...


def radix_cache() -> tuple[Any, str]:
    """The prefix cache that this release builds for a plain model, without a model, and its name."""
    try:
        from sglang.srt.mem_cache.rust_tree_core import adapter  # noqa: F401
    except ImportError:  # 0.5.17
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache.create_simulated(mock_allocator=NoPool()), "RadixCache"
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params = CacheInitParams(
        disable=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=NoPool(),
        page_size=1,
        tree_components=(ComponentType.FULL,),
    )
    cache = UnifiedRadixCache(params)
    return cache, f"UnifiedRadixCache, {type(cache.tree_core).__name__}"


def fill(cache: Any, n: int, branches: tuple[int, ...], tokens: tuple[int, ...]) -> SimpleNamespace:
    """A batch of ``n`` requests whose prompts stand in the cache; level ``i`` has ``branches[i]`` different spans."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    requests = []
    for i in range(n):
        ids = [
            1 + (level + 1) * 1_000_000 + i * spans // n * 10_000 + t
            for level, (spans, length) in enumerate(zip(branches, tokens, strict=True))
            for t in range(length)
        ]
        slots = torch.arange(len(ids)) + i * sum(tokens)
        cache.insert(InsertParams(key=RadixKey(array("q", ids)), value=slots))
        node = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids)))).last_device_node
        requests.append(Request(node, len(ids), i))
    return SimpleNamespace(reqs=requests, tree_cache=cache, prompt=ids)


def other(batch: SimpleNamespace, tokens: int, serial: int) -> SimpleNamespace:
    """The batch without its first request, and with one more behind ``tokens`` tokens of the last one's prompt."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    ids = array("q", [*batch.prompt[:tokens], *(-1 - serial * 1000 - t for t in range(200))])
    batch.tree_cache.insert(InsertParams(key=RadixKey(ids), value=torch.arange(len(ids))))
    node = batch.tree_cache.match_prefix(MatchPrefixParams(key=RadixKey(ids))).last_device_node
    joined = Request(node, len(ids), batch.reqs[0].req_pool_idx)
    return SimpleNamespace(reqs=[*batch.reqs[1:], joined], tree_cache=batch.tree_cache, prompt=batch.prompt)


class Steps:
    """What the backend does on the host for one batch; each method is a stage, in the order of ``STAGES``."""

    def __init__(self, n: int, drafts: int) -> None:
        sizes = {"max_rows": n, "context_tokens": 1 << 17, "pool_tokens": 500_000}
        tiles = shape_tiles(SHAPE, CPU, extend=drafts > 0)
        self.planner: DecodePlanner | ExtendPlanner
        if drafts:
            limits = verify_capacity(SHAPE, drafts, tiles[0].rows // SHAPE.group_size, **sizes)
            self.planner = extend_planner(
                SHAPE, tiles, multiprocessors(CPU), grouping="multi", always=True, limits=limits, must_fit=True
            )
        else:
            limits = decode_capacity(SHAPE, room_tokens=ROOM_TOKENS, row_spans=2, **sizes)
            self.planner = decode_planner(SHAPE, CPU, grouping="multi", limits=limits)
        self.packed = PackedCuda(
            limits, tiles, qo_heads=SHAPE.qo_heads, kv_heads=SHAPE.kv_heads, head_dim=1, device=CPU
        )  # fmt: skip
        self.drafts = drafts

    def run(self, batch: SimpleNamespace) -> list[float]:
        """Microseconds of each stage."""
        times = [time.perf_counter()]
        rows = BatchRows.of(batch)
        times.append(time.perf_counter())
        q_lens = np.full(len(rows.reqs), self.drafts or 1, np.int32)
        kv_lens = np.array([request.cache_protected_len for request in batch.reqs], np.int32) + np.int32(256)
        visible = causal(q_lens, kv_lens) if self.drafts else None
        step = StepBatch(q_lens, kv_lens, rows, visible=visible, row_tokens=self.drafts or 1)
        times.append(time.perf_counter())
        planned = self.planner.plan(step)
        times.append(time.perf_counter())
        self.packed.load(planned.plan)
        times.append(time.perf_counter())
        if isinstance(self.planner, DecodePlanner):
            self.planner._steps_left = 0  # a new plan at each step
        return [(b - a) * 1e6 for a, b in pairwise(times)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument(
        "--touch-mb", type=int, default=160, help="memory that is touched before each step that is cold"
    )
    args = parser.parse_args()
    touched = np.zeros(args.touch_mb << 17)
    table = Table("requests", "levels", "drafts", "batch", "", *STAGES)
    for (n, branches, tokens), drafts in product(BATCHES, (0, 4)):
        cache, name = radix_cache()
        batch = fill(cache, n, branches, tokens)
        steps, serials = Steps(n, drafts), count()
        for changes, cold in product((False, True), (False, True)):
            took = []
            for _ in range(args.rounds + 5):
                if changes:
                    batch = other(batch, sum(tokens[:-1]), next(serials))
                if cold:
                    touched += 1
                took.append(steps.run(batch))
            stages = zip(*took[5:], strict=True)
            cells = (f"{min(times):.0f} / {statistics.median(times):.0f}" for times in stages)
            names = "changes" if changes else "stays", "cold" if cold else "warm"
            table.add_row(str(n), str(len(branches)), str(drafts), *names, *cells)
    table.title = f"SGLang {version('sglang')}, {name}; microseconds, least / median of {args.rounds}"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
