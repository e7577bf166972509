"""How long extend batches take on a Hopper GPU, packed and with the stock backend: by this each goes to one of them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from packinfer_sgl.planning.groups import H200, AttentionShape, CostModel
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.prefix_tree import Int32

ROWS, BLOCK = 128, 128  # query rows of a tile of FlashAttention-3, and KV tokens of its blocks
HALF = ROWS // 2  # rows of a warpgroup
HEAD_DIM, SMS = 128, 132  # of the measurements
CLEARLY = 1.08  # by which packed must be expected to be faster: of 60 measured batches none was slower then


@dataclass(frozen=True)
class ExtendCosts:
    """Times of tiles of one KV head on one multiprocessor, in us, at head dimension 128.

    Attributes:
        block_us: of ``BLOCK`` KV tokens of each ``ROWS`` rows of a packed tile that is full.
        half_block_us: of a packed tile with so few rows that one of its warpgroups has all of them.
        item_us: of a packed tile besides.
        partials: part of ``CostModel.partials_us`` by which partial results delay a layer.
        call_us: of a packed layer besides.
        stock_block_us, stock_half_block_us, stock_tile_us, stock_call_us: the same of FlashAttention-3, which takes
            tiles of half the rows if all requests of a batch fit such a tile.
    """

    block_us: float
    half_block_us: float
    item_us: float
    partials: float
    call_us: float
    stock_block_us: float
    stock_half_block_us: float
    stock_tile_us: float
    stock_call_us: float

    def token_us(self, shape: AttentionShape, rows: int) -> float:
        """Of a KV token of a full packed tile of so many rows."""
        return self.block_us / BLOCK * rows / ROWS * shape.head_dim / HEAD_DIM

    def grouping(self, rows: int) -> CostModel:
        """By which shared spans are chosen: products count alone, as rows that share a span find it in the L2 cache.

        What has rows for one warpgroup is the small class here; the other waits meanwhile.
        """
        flops = 4 * HEAD_DIM * ROWS * BLOCK * SMS / self.block_us
        return replace(
            H200, bytes_per_us=np.inf, reread_bytes_per_us=np.inf, flops_per_us=flops,
            item_us=self.item_us / SMS, large_rows=rows, small_rows=HALF,
            small_as_rows=ROWS * self.half_block_us / self.block_us if rows > HALF else rows,
        )  # fmt: skip

    def packed_us(self, plan: Plan, shape: AttentionShape, sms: int, rows: int, block: int) -> float:
        """Expected time of a plan in one layer.

        Args:
            sms: multiprocessors, each with a program that takes items when it is free.
            rows, block: query rows of a tile, and KV tokens of its blocks.
        """
        items = plan.items
        tokens = items[:, Col.A_LEN] + items[:, Col.B_LEN]
        idle = rows // HALF - -(-items[:, Col.Q_CNT] * shape.group_size // HALF)  # warpgroups
        full_us = self.block_us * rows / ROWS
        block_us = full_us - (full_us - self.half_block_us) * idle / max(rows // HALF - 1, 1)
        blocks = -(-tokens // block) * (block / BLOCK)
        item_us = blocks * (block_us * (shape.head_dim / HEAD_DIM)) + self.item_us
        kv_bytes = 2 * shape.kv_heads * shape.head_dim * shape.kv_bytes
        busy_us = max(
            _next_free_us(-np.sort(-item_us), shape.kv_heads, sms),
            plan.kv_tokens_unique * kv_bytes / H200.bytes_per_us,
        )
        return float(busy_us) + self.partials * plan.n_partials * H200.partials_us(shape) + self.call_us

    def stock_us(self, q_lens: Int32, kv_lens: Int32, shape: AttentionShape, sms: int) -> float:
        """Expected time of FlashAttention-3 in one layer, by new tokens and KV tokens of each row ([n_rows] int32).

        It was the fastest of all stock backends that were measured, so no other is taken for slower than it is.
        """
        query_rows = q_lens.astype(np.int64) * shape.group_size
        narrow = query_rows.max() <= HALF
        tile_rows = HALF if narrow else ROWS
        tiles = -(-query_rows // tile_rows)
        row = np.repeat(np.arange(len(tiles)), tiles)
        nth = np.arange(len(row)) - (np.cumsum(tiles) - tiles)[row]
        # causal: a tile sees KV up to its last query
        unseen = np.maximum(q_lens[row] - (nth + 1) * tile_rows // shape.group_size, 0)
        blocks = -(-(kv_lens[row] - unseen) // BLOCK)
        if tiles.max() * shape.kv_heads < 0.8 * sms:  # few tiles: what is longer than an equal share is split
            row_blocks = -(-kv_lens // BLOCK)
            share = np.ceil(1.1 * (tiles * row_blocks).sum() * shape.kv_heads / sms)
            splits = np.ceil(row_blocks / share).astype(np.int64)[row]
            blocks = np.repeat(blocks / splits, splits)
        block_us = self.stock_half_block_us if narrow else self.stock_block_us
        tile_us = blocks * (block_us * shape.head_dim / HEAD_DIM) + self.stock_tile_us
        return float(_next_free_us(-np.sort(-tile_us), shape.kv_heads, sms)) + self.stock_call_us


@njit(cache=True)
def _next_free_us(tile_us: np.ndarray, kv_heads: int, sms: int) -> float:
    """When all multiprocessors are done of which the next free one takes the next tile."""
    busy = [0.0] * sms
    for us in tile_us:
        for _ in range(kv_heads):
            heapq.heapreplace(busy, busy[0] + us)
    return max(busy)


# Of an H200, bf16, random slots: scripts/fit_extend.py fits them to results of scripts/bench_kernels.py.
EXTEND_H200 = ExtendCosts(
    block_us=1.85,
    half_block_us=1.63,
    item_us=2.35,
    partials=0.687,
    call_us=2.51,
    stock_block_us=1.73,
    stock_half_block_us=1.31,
    stock_tile_us=3.88,
    stock_call_us=3.69,
)
