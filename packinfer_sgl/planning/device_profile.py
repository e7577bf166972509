"""How long attention takes on a GPU: a record of measured times, and the models that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import SplitTiming
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.planning.schedule import extend_makespan_us, makespan_us

# Of ``Plan.items``, for ``extend_makespan_us``.
_COLUMNS = int(Col.Q_CNT), int(Col.A_LEN), int(Col.B_LEN)
# Query rows of the decode kernels' tile classes (kernels/tiles.py); see ``CostModel.for_group_size``, too.
LARGE_ROWS, SMALL_ROWS = 64, 16
# Of the extend kernel and of FlashAttention-3: rows of a tile and of a warpgroup, KV tokens of a block; and the head
# dimension at which their times were measured.
EXTEND_ROWS, WARPGROUP_ROWS, EXTEND_BLOCK, EXTEND_HEAD_DIM = 128, 64, 128, 128


@dataclass(frozen=True)
class DeviceProfile:
    """Measured times of one kind of GPU, of bf16 KV in random slots. All other models of time are derived from it.

    ``scripts/fit_extend.py`` measures the fields ``extend_*`` and ``stock_*``, ``scripts/fit_costs.py`` all others,
    except those that were chosen by hand. The times of items count different things: ``grouping_item_us`` is what one
    more item adds to a layer while all multiprocessors are busy; ``large_item_us``, ``small_item_us`` and
    ``extend_item_us`` are what an item takes in its own program, while hundreds of others run beside it.

    Attributes:
        name: as in the name that CUDA gives the GPU.
        is_measured: False for a guess: no extend batch is then expected to be faster packed.
        multiprocessors: of the GPU that was measured.
        bytes_per_us, reread_bytes_per_us (by hand), flops_per_us, partial_us, partial_bytes_per_us, least_saving (by
            hand): see ``CostModel``.
        grouping_item_us: by hand: ``CostModel.item_us`` at decode.
        large_item_us, small_item_us: an item of the large or small decode tiles besides its tokens.
        saturating_programs: small decode programs of a multiprocessor that together draw 1 - 1/e = 63 % of the
            bandwidth; twice as many draw 86 %.
        extend_block_us: ``EXTEND_BLOCK`` KV tokens of ``EXTEND_ROWS`` rows of a full packed extend tile, of one KV head
            of ``EXTEND_HEAD_DIM`` elements, on one multiprocessor.
        extend_half_block_us: the same of a tile whose rows fit one of its two warpgroups.
        extend_item_us: a packed extend tile besides its blocks.
        extend_partial_factor: part of ``CostModel.partials_us`` by which a partial result delays an extend layer.
        extend_call_us: a packed extend layer besides its tiles.
        stock_block_us, stock_half_block_us, stock_tile_us, stock_call_us: the same of FlashAttention-3, which takes
            tiles of half the rows if every request of a batch fits one.
        extend_margin: by hand: how many times faster packed must be expected to be for an extend batch to be packed.
        extend_factor_64, extend_factor_256, stock_factor_64, stock_factor_256: a block's time an element at such a head
            dimension, over that at ``EXTEND_HEAD_DIM``; None where none was measured.
        extend_factor_fp8, stock_factor_fp8: the same of FP8 KV at ``EXTEND_HEAD_DIM``, over KV of 16 bits.
    """

    name: str
    is_measured: bool
    multiprocessors: int
    bytes_per_us: float
    reread_bytes_per_us: float
    flops_per_us: float
    grouping_item_us: float
    large_item_us: float
    small_item_us: float
    partial_us: float
    partial_bytes_per_us: float
    saturating_programs: float
    least_saving: float
    extend_block_us: float
    extend_half_block_us: float
    extend_item_us: float
    extend_partial_factor: float
    extend_call_us: float
    stock_block_us: float
    stock_half_block_us: float
    stock_tile_us: float
    stock_call_us: float
    extend_margin: float
    extend_factor_64: float | None = None
    extend_factor_256: float | None = None
    extend_factor_fp8: float | None = None
    stock_factor_64: float | None = None
    stock_factor_256: float | None = None
    stock_factor_fp8: float | None = None

    def knows(self, shape: AttentionShape) -> bool:
        """Whether times of extend batches of this shape were measured on this GPU."""
        return self.is_measured and None not in self._factors(shape)

    def _factors(self, shape: AttentionShape) -> tuple[float | None, float | None]:
        """The packed kernel's and the stock backend's."""
        known: dict[tuple[int, int], tuple[float | None, float | None]] = {
            (EXTEND_HEAD_DIM, 2): (1.0, 1.0),
            (64, 2): (self.extend_factor_64, self.stock_factor_64),
            (256, 2): (self.extend_factor_256, self.stock_factor_256),
            (EXTEND_HEAD_DIM, 1): (self.extend_factor_fp8, self.stock_factor_fp8),
        }
        return known.get((shape.head_dim, shape.kv_bytes), (None, None))

    def _widths(self, shape: AttentionShape) -> tuple[float, float]:
        """How many times as long as one of 16 bits and ``EXTEND_HEAD_DIM`` a block takes, packed and by the stock
        backend; what was not measured counts by elements."""
        packed, stock = self._factors(shape)
        return (packed or 1.0) * shape.head_dim / EXTEND_HEAD_DIM, (stock or 1.0) * shape.head_dim / EXTEND_HEAD_DIM

    @cached_property
    def decode_cost(self) -> CostModel:
        """By which shared spans are chosen at decode."""
        return CostModel(
            bytes_per_us=self.bytes_per_us,
            reread_bytes_per_us=self.reread_bytes_per_us,
            flops_per_us=self.flops_per_us,
            item_us=self.grouping_item_us,
            partial_us=self.partial_us,
            partial_bytes_per_us=self.partial_bytes_per_us,
            large_rows=LARGE_ROWS,
            small_rows=SMALL_ROWS,
            small_as_rows=SMALL_ROWS,
            least_saving=self.least_saving,
        )

    def extend_cost(self, tile_rows: int) -> CostModel:
        """By which shared spans are chosen at extend, for tiles of so many query rows.

        Only products count: rows that share a span find it in the L2 cache. Queries whose rows fit one warpgroup are
        the small class; the tile's other warpgroup idles.
        """
        flops = 4 * EXTEND_HEAD_DIM * EXTEND_ROWS * EXTEND_BLOCK * self.multiprocessors / self.extend_block_us
        half_tile_rows = EXTEND_ROWS * self.extend_half_block_us / self.extend_block_us
        return CostModel(
            bytes_per_us=math.inf,
            reread_bytes_per_us=math.inf,
            flops_per_us=flops,
            item_us=self.extend_item_us / self.multiprocessors,
            partial_us=self.partial_us,
            partial_bytes_per_us=self.partial_bytes_per_us,
            large_rows=tile_rows,
            small_rows=WARPGROUP_ROWS,
            small_as_rows=half_tile_rows if tile_rows > WARPGROUP_ROWS else tile_rows,
            least_saving=self.least_saving,
        )

    def decode_timing(
        self, shape: AttentionShape, sms: int, *, rows: int, resident: int, launched: int, stream_k: int
    ) -> SplitTiming:
        """By which the KV of decode tiles of one class is split on a GPU of ``sms`` multiprocessors.

        Args:
            rows: query rows of a tile.
            resident, launched, stream_k: programs of a multiprocessor: that run at once, of a launch, and among which a
                class alone may be divided (0 for never).
        """
        programs = sms * resident
        moved_us = programs * 2 * shape.head_dim * shape.kv_bytes / self.bytes_per_us
        multiplied_us = programs * rows * 4 * shape.head_dim / self.flops_per_us
        return SplitTiming(
            parallel=programs / shape.kv_heads,
            fixed_us=self.small_item_us if rows < LARGE_ROWS else self.large_item_us,
            token_us=max(moved_us, multiplied_us),
            partial_us=self.decode_cost.partials_us(shape),
            stream_k_ctas=int(sms * stream_k / shape.kv_heads),
            launched=max(1, round(sms * launched / shape.kv_heads)),
            bw_saturation=stream_k / self.saturating_programs,
        )

    def extend_timing(self, shape: AttentionShape, sms: int, *, rows: int, block: int) -> SplitTiming:
        """By which the KV of extend tiles is split: of ``rows`` query rows, in blocks of ``block`` KV tokens. Each of
        the ``sms`` multiprocessors runs one program."""
        token_us = self.extend_block_us / EXTEND_BLOCK * rows / EXTEND_ROWS * self._widths(shape)[0]
        return SplitTiming(
            parallel=sms / shape.kv_heads,
            fixed_us=self.extend_item_us,
            token_us=token_us,
            partial_us=self.decode_cost.partials_us(shape),
            stream_k_ctas=0,
            launched=max(1, round(sms / shape.kv_heads)),
            bw_saturation=0.0,
            dynamic=shape.kv_heads,
            block=block,
            half_tile_factor=self.extend_half_block_us / self.extend_block_us,
        )

    def packed_extend_us(self, plan: Plan, shape: AttentionShape, sms: int, rows: int, block: int) -> float:
        """Expected time of an extend plan in one layer.

        Args:
            sms: multiprocessors, each with one program; programs take items from a queue, longest first.
            rows, block: query rows of a tile, and KV tokens of its blocks.
        """
        warpgroups = rows // WARPGROUP_ROWS
        full_us = self.extend_block_us * rows / EXTEND_ROWS
        saved_us = full_us - self.extend_half_block_us  # by all warpgroups but one
        tiles_us = extend_makespan_us(
            plan.items, _COLUMNS, shape.group_size, WARPGROUP_ROWS, warpgroups, full_us, saved_us, block,
            block / EXTEND_BLOCK, self._widths(shape)[0], self.extend_item_us, shape.kv_heads, sms,
        )  # fmt: skip
        busy_us = max(
            tiles_us,
            plan.kv_tokens_unique * shape.token_bytes / self.bytes_per_us,
        )
        partials_us = self.extend_partial_factor * plan.n_partials * self.decode_cost.partials_us(shape)
        return float(busy_us) + partials_us + self.extend_call_us

    def stock_extend_us(self, q_lens: Int32, kv_lens: Int32, shape: AttentionShape, sms: int) -> float:
        """Expected time of the stock backend in one layer; 0 for shapes or on a GPU that were not measured, as nothing
        says that the packed kernels are faster there.

        It is that of FlashAttention-3, the fastest measured stock backend, so this is a lower bound for the others.

        Args:
            q_lens, kv_lens: [n_rows] int32 new tokens, and KV tokens, of each row.
        """
        if not self.knows(shape):
            return 0.0
        query_rows = q_lens.astype(np.int64) * shape.group_size
        is_narrow = query_rows.max() <= WARPGROUP_ROWS
        tile_rows = WARPGROUP_ROWS if is_narrow else EXTEND_ROWS
        tiles = -(-query_rows // tile_rows)
        row = np.repeat(np.arange(len(tiles)), tiles)
        nth = np.arange(len(row)) - (np.cumsum(tiles) - tiles)[row]
        # causal: a tile sees KV up to its last query
        unseen = np.maximum(q_lens[row] - (nth + 1) * tile_rows // shape.group_size, 0)
        blocks = -(-(kv_lens[row] - unseen) // EXTEND_BLOCK)
        if tiles.max() * shape.kv_heads < 0.8 * sms:  # few tiles: those longer than an equal share are split
            row_blocks = -(-kv_lens // EXTEND_BLOCK)
            share = np.ceil(1.1 * (tiles * row_blocks).sum() * shape.kv_heads / sms)
            splits = np.ceil(row_blocks / share).astype(np.int64)[row]
            blocks = np.repeat(blocks / splits, splits)
        block_us = self.stock_half_block_us if is_narrow else self.stock_block_us
        tile_us = blocks * (block_us * self._widths(shape)[1]) + self.stock_tile_us
        return float(makespan_us(-np.sort(-tile_us), shape.kv_heads, sms)) + self.stock_call_us
