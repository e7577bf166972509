"""Host time of planning, on SGLang's own radix cache: a change of batch, and a step that changes nothing.

    python scripts/bench_plan.py [--rounds 300]

Builds prompts with several levels of sharing, inserts them into the radix cache of the installed SGLang release, and
times what the backend does per decode step: comparing the batch with the last one, or reading the paths, building and
pruning the tree, and cutting it into work items. Prints medians and 90 % points in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from packinfer_sgl.groups import H200, AttentionShape, prune
from packinfer_sgl.plan import TilePolicy, make_plan
from packinfer_sgl.radix import BatchRows

SHAPE = AttentionShape(qo_heads=32, kv_heads=8, head_dim=128, kv_bytes=2)
TILES = TilePolicy(large_queries=16, small_queries=4, chunk_tokens=1024)
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


def radix_cache() -> tuple[Any, str]:
    """The prefix cache that this release builds for a plain model, without a model, and its name."""
    try:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.components import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params = CacheInitParams(
            disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=None, page_size=1,
            tree_components=(ComponentType.FULL,),
        )  # fmt: skip
        cache = UnifiedRadixCache(params)
        return cache, f"UnifiedRadixCache, {type(cache.tree_core).__name__}"
    except (ImportError, TypeError, AttributeError) as e:
        print(e)
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache.create_simulated(), "RadixCache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    print(radix_cache())


if __name__ == "__main__":
    main()
