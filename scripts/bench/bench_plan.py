"""Host time of planning, on SGLang's own radix cache: a change of batch, and a step that changes nothing.

    python scripts/bench/bench_plan.py [--rounds 300]

Builds prompts with several levels of sharing, inserts them into the radix cache of the installed SGLang release, and
times what the backend does per decode step: comparing the batch with the last one, or reading the paths, building and
pruning the tree, and cutting it into work items. Prints medians and 90 % points in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.serving.batch_rows import BatchRows

SHAPE = AttentionShape(qo_heads=32, kv_heads=8, head_dim=128, kv_bytes=2)
TILES = TilePolicy(tile_queries=(16, 4), max_split_tokens=1024)
# (requests, branches at each level, tokens of each level)
BATCHES = [
    (64, (1,), (16384,)),
    (64, (1, 2, 4, 8, 16), (2048, 512, 256, 128, 64)),
    (256, (1, 4, 8, 32, 64), (2048, 512, 256, 128, 64)),
]


@dataclass
class Request:
    """The fields of SGLang's request that the plugin reads, in both releases' places."""

    last_node: Any
    cache_protected_len: int
    req_pool_idx: int
    kv: Any = field(init=False)

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
            1 + (level + 1) * 1_000_000 + i * count // n * 10_000 + t
            for level, (count, length) in enumerate(zip(branches, tokens, strict=True))
            for t in range(length)
        ]
        slots = torch.arange(len(ids)) + i * sum(tokens)
        cache.insert(InsertParams(key=RadixKey(array("q", ids)), value=slots))
        node = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids)))).last_device_node
        requests.append(Request(node, len(ids), i))
    return SimpleNamespace(reqs=requests, tree_cache=cache)


def time_us(function: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and 90 % point of one call, in microseconds."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        took.append((time.perf_counter() - started) * 1e6)
    took.sort()
    return statistics.median(took), took[int(0.9 * rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    table = Table(
        "requests", "levels", "groups", "unchanged step", "read paths + tree", "prune", "plan", "change of batch"
    )
    for n, branches, tokens in BATCHES:
        cache, name = radix_cache()
        batch = fill(cache, n, branches, tokens)
        before = BatchRows.of(batch)
        lens = np.full(n, sum(tokens) + 256, np.int64)
        kv_lens = lens.astype(np.int32)
        tree = before.prefix_tree()
        kept = prune(tree, SHAPE, H200.decode_cost, kv_lens=kv_lens)

        def unchanged(batch=batch, before=before, lens=lens) -> bool:
            return BatchRows.of(batch) == before and np.array_equal(lens + 1, lens)

        def plan(kept=kept, kv_lens=kv_lens, tree=tree) -> object:
            return make_plan(kept, kv_lens, TILES, kv_tokens_unique=tree.unique_tokens(kv_lens), room_tokens=64)

        def change(batch=batch, kv_lens=kv_lens) -> object:
            tree = BatchRows.of(batch).prefix_tree()
            kept = prune(tree, SHAPE, H200.decode_cost, kv_lens=kv_lens)
            return make_plan(kept, kv_lens, TILES, kv_tokens_unique=tree.unique_tokens(kv_lens), room_tokens=64)

        pruned = lambda tree=tree, kv_lens=kv_lens: prune(tree, SHAPE, H200.decode_cost, kv_lens=kv_lens)  # noqa: E731
        steps = (unchanged, before.prefix_tree, pruned, plan, change)
        times = [time_us(step, rounds) for step in steps]
        cells = (f"{median:.1f} ({p90:.1f})" for median, p90 in times)
        table.add_row(str(n), str(len(branches)), str(kept.n_nodes), *cells)
    table.title = f"SGLang {version('sglang')}, {name}; microseconds, median (90 % point) of {rounds}"
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
