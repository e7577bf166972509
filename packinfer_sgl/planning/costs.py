"""What attention costs: the layer's shape, and the model of time by which spans are chosen for grouping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class AttentionShape:
    """What one layer's attention moves and multiplies.

    Attributes:
        qo_heads, kv_heads: heads of this tensor-parallel rank.
        head_dim: elements of one head.
        kv_bytes: bytes of one KV element.
    """

    qo_heads: int
    kv_heads: int
    head_dim: int
    kv_bytes: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.qo_heads // self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all KV heads."""
        return 2 * self.kv_heads * self.head_dim * self.kv_bytes


@dataclass(frozen=True)
class CostModel:
    """What a layer's time grows by with each item, KV token and partial result; by this spans are chosen for grouping.

    Only ratios matter. A rate of ``math.inf`` says that this resource is never the limit.

    Attributes:
        bytes_per_us: read bandwidth of device memory.
        reread_bytes_per_us: bandwidth of reading the same KV again shortly after (from a cache).
        flops_per_us: rate of the attention tile's products, padding counted as work.
        item_us: time of a work item of one KV head besides its tokens.
        partial_us: time of one partial result of one query, written and merged, besides its bytes.
        partial_bytes_per_us: rate of writing and reading back partial results.
        large_rows, small_rows: query rows (tokens x group size) of the two tile classes.
        small_as_rows: cost of a small tile, in rows of a large tile.
        least_saving: how many times fewer KV tokens a decode step must read with groups than without. Rows that share
            nothing can be divided into equal parts (Stream-K), which the other terms do not know.
    """

    bytes_per_us: float
    reread_bytes_per_us: float
    flops_per_us: float
    item_us: float
    partial_us: float
    partial_bytes_per_us: float
    large_rows: int
    small_rows: int
    small_as_rows: float
    least_saving: float

    def tiles(self, shape: AttentionShape, queries: Any) -> tuple[Any, Any]:
        """Number of tiles for so many queries (a number of at least 1, or an array of them), and the cost of each in
        rows of a large tile."""
        query_rows = queries * shape.group_size
        is_small = query_rows <= self.small_rows
        tile_rows = np.where(is_small, self.small_rows, self.large_rows)
        return -(-query_rows // tile_rows), np.where(is_small, self.small_as_rows, self.large_rows)

    def read_us(self, shape: AttentionShape, queries: Any) -> tuple[Any, Any]:
        """Time of reading a span once for so many queries (as for ``tiles``): us per KV token, and us besides."""
        tiles, rows = self.tiles(shape, queries)
        moved = shape.token_bytes / self.bytes_per_us + (tiles - 1) * (shape.token_bytes / self.reread_bytes_per_us)
        multiplied = tiles * rows * (4 * shape.kv_heads * shape.head_dim / self.flops_per_us)
        return np.maximum(moved, multiplied), tiles * shape.kv_heads * self.item_us

    def prices(self, shape: AttentionShape, most: int) -> npt.NDArray[np.float64]:
        """[most + 1, 3] of spans for so many queries: ``read_us``, and the number of tiles."""
        key = shape, most
        if key not in self._prices:
            queries = np.arange(most + 1)
            with np.errstate(divide="ignore"):  # no query, where a model has no small tiles
                table = np.stack([*self.read_us(shape, queries), self.tiles(shape, queries)[0]], axis=1)
            self._prices[key] = table
        return self._prices[key]

    @cached_property
    def _prices(self) -> dict[tuple[AttentionShape, int], npt.NDArray[np.float64]]:
        return {}

    def partials_us(self, shape: AttentionShape) -> float:
        """Time of one partial result of one query (float32 output and ``lse2`` of all heads), in us."""
        return self.partial_us + 2 * shape.qo_heads * (shape.head_dim + 1) * 4 / self.partial_bytes_per_us

    def for_group_size(self, group_size: int) -> CostModel:
        """The same for so many query heads of a KV head: where a small tile does not hold those of a token, one of
        twice its rows takes its place."""
        rows = 2 * self.small_rows
        return self if group_size <= self.small_rows else replace(self, small_rows=rows, small_as_rows=rows)

    def in_units(self) -> CostModel:
        """The same for plans in units of KV (``units``): each query leaves the same partial results whatever is
        grouped, of as many items a tile, in tiles of the large class; so each shared unit is worth one read."""
        return replace(self.without_partials(), item_us=0, small_rows=0, least_saving=1.0)

    def without_partials(self) -> CostModel:
        """The same for tails that are inlined in their prefix's tiles, which leave no partial results."""
        return replace(self, partial_us=0, partial_bytes_per_us=math.inf)
