"""How long attention takes on a CPU, and how plans are cut for it: the record that stands for all CPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32


@dataclass(frozen=True)
class CpuProfile:
    """Times of the CPU's kernels (kernels/cpu_attention.py) and of SGLang's ``torch_native``; the methods are those of
    ``device_profile.DeviceProfile``.

    Attributes:
        bytes_per_us: rate at which KV is gathered, which is what takes time there, however many queries read
            it; partial results are as fast.
        item_us: a work item at decode besides its tokens.
        packed_flops_per_us, stock_flops_per_us: rates at extend; ``torch_native`` computes the queries of cached
            tokens, too.
        extend_layer_us, extend_item_us: a packed extend layer, and an item of it, besides its products.
        stock_request_us: a request of ``torch_native`` besides its products.
        extend_margin: how many times faster packed must be expected to be: the fit is off by a fifth.
        least_saving: see ``CostModel``.
        decode_policy, extend_policy: how plans are cut.
    """

    name: str
    is_measured: bool
    bytes_per_us: float
    item_us: float
    packed_flops_per_us: float
    stock_flops_per_us: float
    extend_layer_us: float
    extend_item_us: float
    stock_request_us: float
    extend_margin: float
    least_saving: float
    decode_policy: TilePolicy
    extend_policy: TilePolicy

    def extend_cost(self, tile_rows: int) -> CostModel:
        """By which shared spans are chosen, for tiles of so many query rows (at decode one holds all of a span's).

        Keys and values are copied before they are multiplied: what sharing saves is the copy, whatever the products.
        """
        return CostModel(
            bytes_per_us=self.bytes_per_us,
            reread_bytes_per_us=self.bytes_per_us,
            flops_per_us=math.inf,
            item_us=self.item_us,
            partial_us=0.0,
            partial_bytes_per_us=self.bytes_per_us,
            large_rows=tile_rows,
            small_rows=1,
            small_as_rows=1,
            least_saving=self.least_saving,
        )

    def packed_extend_us(self, plan: Plan, shape: AttentionShape) -> float:
        """Expected time of an extend plan in one layer."""
        items = plan.items.astype(np.int64)
        seen = (items[:, Col.Q_CNT] * (items[:, Col.A_LEN] + items[:, Col.B_LEN])).sum()
        products_us = _flops(shape, seen) / self.packed_flops_per_us
        return float(self.extend_layer_us + len(items) * self.extend_item_us + products_us)

    def stock_extend_us(self, q_lens: Int32, kv_lens: Int32, shape: AttentionShape) -> float:
        """Expected time of ``torch_native`` in one layer.

        Args:
            q_lens, kv_lens: [n_rows] int32 new tokens, and KV tokens, of each row.
        """
        seen = (kv_lens.astype(np.int64) ** 2).sum() / 2
        return float(_flops(shape, seen) / self.stock_flops_per_us + len(kv_lens) * self.stock_request_us)


def _flops(shape: AttentionShape, seen: float) -> float:
    """Of ``seen`` pairs of a query token and a KV token."""
    return 4 * shape.qo_heads * shape.head_dim * seen


# Decode: two cores. Extend: one core.
CPU = CpuProfile(
    name="CPU",
    is_measured=True,
    bytes_per_us=6e3,
    item_us=5.0,
    packed_flops_per_us=3.7e4,
    stock_flops_per_us=4.5e4,
    extend_layer_us=500.0,
    extend_item_us=200.0,
    stock_request_us=250.0,
    extend_margin=1.25,
    least_saving=1.0,
    # one tile holds all queries of a node; splits bound the memory of a batched product
    decode_policy=TilePolicy(tile_queries=(1 << 20, 1), max_split_tokens=4096),
    # with more queries to a tile the logits leave the cache: 64 measured best from 8 to 64 queries a request
    extend_policy=TilePolicy(tile_queries=(64, 1), max_split_tokens=1024, max_inline_tail_tokens=256),
)
