"""A plan in device memory at fixed addresses, and the launches of the packed attention kernels over it."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
import triton

from packinfer_sgl.kernels.attention_hopper_decode import packed_attention_hopper_kernel
from packinfer_sgl.kernels.attention_hopper_extend import packed_attention_extend_kernel
from packinfer_sgl.kernels.attention_triton import packed_attention_kernel
from packinfer_sgl.kernels.merge import merge_kernel, merge_listed_kernel
from packinfer_sgl.kernels.reference import check_sinks
from packinfer_sgl.kernels.slot_list_triton import append_kernel, snapshot_kernel
from packinfer_sgl.kernels.tiles import Tile
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import (
    ARRAYS,
    BLOCK_ALIGN,
    MAX_ARRAYS,
    MAX_CLASSES,
    Col,
    Header,
    Plan,
    SpanCol,
    length_at,
)

SLOTS_AHEAD = 256  # kernels read slots this far past a span, at most, and use none of them
LOG2_E = math.log2(math.e)
_N_QUERIES, _N_MERGED, _N_SPANS, _HAS_RUN_B = (
    int(at) for at in (Header.N_QUERIES, Header.N_MERGED, Header.N_SPANS, Header.HAS_RUN_B)
)
_GROW, _FOLLOWED, _CHAINED = (int(at) for at in (Header.GROW, Header.FOLLOWED, Header.CHAINED))
_N_CLASS_INDPTR = length_at("class_indptr")
# partial results that a program of the merge loads at once, and its warps: few programs have many results each
MERGE_FEW, MERGE_MANY = (128, 4), (16, 1)
# The same in the deterministic mode, for any number of queries: another form would add in another order.
MERGE_UNITS = (32, 4)


class PackedCuda:
    """A plan on the GPU, at fixed addresses: ``load`` it, then ``run`` it for each layer, captured in a graph or not.

    Loading copies what the plan uses, as one block of int32 (``Plan.block``), from pinned memory on the current stream;
    ``snapshot`` puts its arrays where the kernels look for them, and what lies there beyond them is left from earlier
    plans. Neither waits for the GPU, except when two loads are still on their way.
    """

    def __init__(
        self,
        capacity: Capacity,
        tiles: tuple[Tile, ...],
        *,
        qo_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        replayed: bool = False,
    ) -> None:
        """
        Args:
            tiles: the classes by which plans are cut (``tiles.shape_tiles``).
            replayed: captured graphs run other plans than they were captured with. The merge is then always launched,
                because a plan that is loaded later may need it.

        Raises:
            ValueError: more tile classes than ``counts`` have room for.
        """
        if len(tiles) > MAX_CLASSES:
            raise ValueError(f"{len(tiles)} tile classes: at most {MAX_CLASSES} are supported")
        self.capacity, self.tiles, self.device, self.replayed = capacity, tiles, device, replayed
        self.kv_heads = kv_heads
        c = capacity
        sizes = {
            "header": int(Header.SIZE),
            "items": c.items * len(Col),
            "query_rows": c.slots,
            "partial_rows": c.slots,
            "win_lo": c.slots,
            "win_hi": c.slots,
            "merge_indptr": c.queries + 1,
            "merged": c.queries,
            "spans": c.spans * len(SpanCol),
            "append_base": c.queries,
            "class_indptr": MAX_CLASSES + 1,
        }
        sizes = {name: -(-sizes[name] // BLOCK_ALIGN) * BLOCK_ALIGN for name in ARRAYS}
        starts = [*accumulate(sizes.values(), initial=0)]
        self._block = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self._view = {name: self._block[at:to] for name, (at, to) in zip(ARRAYS, pairwise(starts))}
        starts += [0] * (MAX_ARRAYS - len(starts))
        self._places = torch.tensor(starts[:MAX_ARRAYS], dtype=torch.int32, device=device)
        self._arrived = torch.zeros_like(self._block)  # the block of the plan that is loaded
        pinned = device.type == "cuda"
        self._staging = [torch.zeros(len(self._block), dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        # what is copied is of a power of two; to take a slice of a tensor may take as long as a copy
        sizes_of = [1 << bits for bits in range(len(self._block).bit_length() + 1)]
        self._copies = [[(self._arrived[:n], staging[:n]) for n in sizes_of] for staging in self._staging]
        self._blocks = [staging.numpy() for staging in self._staging]
        self._staged = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._turn = 0
        self.kv_slots = torch.zeros(c.kv_slots + SLOTS_AHEAD, dtype=torch.int32, device=device)
        self._part_out = torch.empty(max(c.partials, 1), qo_heads, head_dim, dtype=torch.float32, device=device)
        self._part_lse2 = torch.empty(max(c.partials, 1), qo_heads, dtype=torch.float32, device=device)
        # of states that items of plans in units hand on
        sums = max(c.partials, 1) if tiles[0].units else 0
        self._part_sum = torch.empty(sums, qo_heads, dtype=torch.float32, device=device)
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        self._pdl, self._is_hopper = capability >= (9, 0), capability[0] == 9

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        tensors = (self._block, self._arrived, self.kv_slots, self._part_out, self._part_lse2, self._part_sum)
        return sum(t.nbytes for t in tensors)

    def load(self, plan: Plan) -> None:
        """Copy ``plan`` to the GPU on the current stream.

        Raises:
            ValueError: it is larger than the capacity, or has items that the kernel of their tile class cannot run.
        """
        if over := self.capacity.overflow(plan):
            raise ValueError(f"the plan does not fit the buffers: {over}")
        self._check_items(plan)
        self._turn ^= 1
        staged = self._staged[self._turn]
        if staged is not None:
            staged.synchronize()  # the copy of two loads ago
        block, header = plan.block, plan.header
        self._blocks[self._turn][: len(block)] = block
        arrived, staging = self._copies[self._turn][len(block).bit_length()]
        arrived.copy_(staging, non_blocking=True)
        if staged is not None:
            staged.record()
        self._n_queries, self._n_merged, self.n_spans = header[_N_QUERIES], header[_N_MERGED], header[_N_SPANS]
        self._class_items = [b - a for a, b in pairwise(header[: len(self.tiles) + 1])]
        self._has_run_b, self._is_placed = header[_HAS_RUN_B] > 0, False

    def _check_items(self, plan: Plan) -> None:
        """Raise ValueError for what the Hopper kernels take for granted and the plan does not keep."""
        header = plan.header
        if header[_N_CLASS_INDPTR] != len(self.tiles) + 1:
            raise ValueError(f"a plan of {header[_N_CLASS_INDPTR] - 1} tile classes for {len(self.tiles)} tiles")
        for i, tile in enumerate(self.tiles):
            # the Triton kernel runs classes of the decode kernel, too: elsewhere, and with run B
            elsewhere = tile.kernel == "hopper_decode" and (plan.windowed or not self._is_hopper)
            kernel = "triton" if elsewhere else tile.kernel
            cannot = [("go on with a unit", _CHAINED)] if kernel == "triton" or not tile.units else []
            if kernel != "triton":
                grows = tile.units or (kernel == "hopper_extend" and not plan.windowed)
                cannot += [("are followed by others", _FOLLOWED), *([] if grows else [("grow", _GROW)])]
            for what, flags in cannot:
                if header[flags + i]:
                    raise ValueError(f"the {kernel} kernel runs no items that {what}")

    def snapshot(self, req_to_token: torch.Tensor, pool_rows: torch.Tensor, page_size: int = 1) -> None:
        """Put the loaded plan in its place, and fill its slot list from SGLang's table, or from page tables.

        Args:
            req_to_token: [pool rows, max context] int32 on the device; or FlashInfer's ``indices``: [pages] int32.
            pool_rows: [n] row of the table of each row of the batch, on the device; or FlashInfer's ``indptr``.
            page_size: tokens for each entry of the table.
        """
        grid = (max(1, min(self.n_spans, 1024)), 8)
        snapshot_kernel[grid](
            req_to_token_ptr=req_to_token, pool_rows_ptr=pool_rows, block_ptr=self._arrived, placed_ptr=self._block,
            places_ptr=self._places, kv_slots_ptr=self.kv_slots, stride_row=req_to_token.stride(0), PAGE=page_size,
            BLOCK=1024, PLACED=256,
        )  # fmt: skip
        self._is_placed = True

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        """Enter each row's newest slot.

        Args:
            kv_lens: [n] KV tokens of each row, the new one included, on the device.
            out_slots: [n] slot of the new token, on the device.
        """
        grid = (triton.cdiv(self.capacity.queries, 128),)
        append_kernel[grid](
            kv_slots_ptr=self.kv_slots, append_base_ptr=self._view["append_base"], kv_lens_ptr=kv_lens,
            out_slots_ptr=out_slots, counts_ptr=self._view["header"], BLOCK=128,
        )  # fmt: skip

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        v_scale: float = 1.0,
        page_size: int = 1,
        windowed: bool = False,
        mask: tuple[torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse2: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every query over its row's KV, each span read once for its group; one call at a time.

        Args:
            q: [n_queries, qo_heads, head_dim] bf16 or fp16, last dimension contiguous; queries past the plan's pad a
                captured graph and come out as 0.
            k, v: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim]; equal strides, last
                dimension contiguous; of q's dtype, or float8_e4m3fn. For the extend kernel, and in FP8, each head
                begins at a multiple of 16 bytes.
            kv_lens: [n_rows] current length of each row, for items that grow.
            sm_scale: factor of the logits before the softmax; that of FP8 keys is part of it.
            logits_soft_cap: cap ``c`` in ``c * tanh(logits / c)``; 0 for none.
            v_scale: factor of the values.
            windowed: whether the plan has run B.
            mask: what queries see of what the plan lets them see: [n] bool, and [n_queries] int64 of each query the
                flag for KV position 0. The plan must have no inline tails (``TilePolicy.max_inline_tail_tokens``).
            sinks: [qo_heads] float, see ``Runner.run``.

        Returns:
            out as q, and lse2 [n_queries, qo_heads] float32.

        Raises:
            ValueError: sinks of another shape or type; what the hopper_extend kernel does not take.
        """
        n, n_heads, head_dim = q.shape
        out = torch.empty_like(q) if out is None else out
        lse2 = torch.empty(n, n_heads, dtype=torch.float32, device=q.device) if lse2 is None else lse2
        assert windowed or not self._has_run_b, "the loaded plan has run B"
        if sinks is not None:
            check_sinks(sinks, n_heads)
        copies = any(tile.kernel == "hopper_extend" for tile in self.tiles)  # 16 bytes at a time
        if (copies or k.itemsize == 1) and not (_aligned(k) and _aligned(v)):
            raise ValueError("heads of K and V that do not begin at multiples of 16 bytes are not supported")
        if copies:
            if mask is not None:
                raise ValueError("the hopper_extend kernel takes no custom mask")
            q = q if _aligned(q) else q.clone(memory_format=torch.contiguous_format)
        self._attend(q, k, v, kv_lens, out, lse2, sm_scale, logits_soft_cap, v_scale, page_size, windowed, mask, sinks)
        self._merge(out, lse2, windowed, sinks)
        return out, lse2

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor,
        out: torch.Tensor,
        lse2: torch.Tensor,
        sm_scale: float,
        logits_soft_cap: float,
        v_scale: float,
        page_size: int,
        windowed: bool,
        mask: tuple[torch.Tensor, torch.Tensor] | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """Launch the kernel of each tile class. Arguments as for ``run``."""
        assert self._is_placed, "take the snapshot of the loaded plan first"
        n, n_heads, head_dim = q.shape
        stride_page, stride_slot, stride_head = (0, *k.stride()[:2]) if k.dim() == 3 else k.stride()[:3]
        view, group = self._view, n_heads // self.kv_heads
        # with run B nothing grows; the type of what is not read is part of a kernel's signature all the same
        lens = self.kv_slots if windowed else kv_lens
        arguments = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse2_ptr": lse2, "part_out_ptr": self._part_out,
            "part_lse2_ptr": self._part_lse2, "slots_ptr": self.kv_slots, "items_ptr": view["items"],
            "counts_ptr": view["header"], "query_rows_ptr": view["query_rows"],
            "partial_rows_ptr": view["partial_rows"], "kv_lens_ptr": lens,
            "stride_q_token": q.stride(0), "stride_q_head": q.stride(1),
            "stride_out_token": out.stride(0), "stride_out_head": out.stride(1), "stride_page": stride_page,
            "stride_slot": stride_slot, "stride_kv_head": stride_head, "scale2": sm_scale * LOG2_E,
            "cap2": logits_soft_cap * LOG2_E, "v_scale": v_scale, "kv_heads": self.kv_heads, "n_heads": n_heads,
            "GROUP": group, "HEAD_DIM": head_dim, "PAGE": page_size, "SOFT_CAP": logits_soft_cap > 0,
            **_sink_arguments(sinks, lse2),
        }  # fmt: skip
        windows = {"win_lo_ptr": view["win_lo"], "win_hi_ptr": view["win_hi"]}
        flags, flags_from = (view["header"], view["header"]) if mask is None else (mask[0].view(torch.uint8), mask[1])
        is_first = True
        for i, tile in enumerate(self.tiles):
            goes_elsewhere = any(n * group <= smaller.rows < tile.rows for smaller in self.tiles[i + 1 :])
            if goes_elsewhere or (tile.goes_on and n == 1):
                # so few queries go into a smaller tile, whatever they share, in any plan that a graph will replay; and
                # nothing goes on with what one query alone began
                assert self._class_items[i] == 0, f"a plan for {n} queries has tiles of {tile.rows} rows"
                continue
            grid = (self._sms * tile.programs,)
            launch = {
                "first_count": i, "last_count": i + 1, "BLOCK_N": tile.tokens, "STAGES": tile.stages,
                # the first launch needs all that came before it on the stream
                "launch_pdl": self._pdl and not is_first,
            }  # fmt: skip
            if tile.kernel == "hopper_extend":
                packed_attention_extend_kernel[grid](
                    **arguments, **windows, **launch, Q_STAGES=tile.q_stages, FP8_KV=tile.raw_stages > 0,
                    RUN_B=windowed, CONSUMER_REGISTERS=tile.consumer_registers,
                    PRODUCER_REGISTERS=tile.producer_registers, num_warps=4, maxnreg=tile.registers,
                )  # fmt: skip
            elif tile.kernel == "hopper_decode" and self._is_hopper and not windowed and mask is None:
                packed_attention_hopper_kernel[grid](
                    **arguments, **launch, RAW_STAGES=tile.raw_stages, OUT_PARTS=tile.out_parts,
                    UNITS=tile.units, GOES_ON=tile.goes_on, part_sum_ptr=self._part_sum if tile.units else lse2,
                    PRODUCER_REGISTERS=tile.producer_registers,
                    num_warps=4, maxnreg=tile.registers,
                )  # fmt: skip
            else:
                launch["BLOCK_N"] = tile.triton_tokens or tile.tokens
                launch["STAGES"] = stages = tile.triton_stages or tile.stages
                packed_attention_kernel[grid](
                    **arguments, **windows, **launch, mask_ptr=flags, mask_rows_ptr=flags_from,
                    BLOCK_M=tile.rows, RUN_B=windowed, CUSTOM_MASK=mask is not None, PDL=self._pdl,
                    num_warps=tile.warps, num_stages=stages,
                    # full blocks apart from the rest pay where they are many; tails are short, and flags spill
                    PEEL=i == 0 and mask is None, maxnreg=tile.registers if tile.kernel == "triton" else 255,
                )  # fmt: skip
            is_first = False

    def _merge(self, out: torch.Tensor, lse2: torch.Tensor, windowed: bool, sinks: torch.Tensor | None) -> None:
        """Launch the merge of partial results, and of queries past the plan's."""
        n, n_heads, head_dim = out.shape
        # an SM holds 32 CTAs at once: where there are more, each merges several heads
        crowded = n * n_heads > 32 * self._sms
        heads = next(h for h in (4, 2, 1) if n_heads % h == 0 and (crowded or h == 1))
        at_once, warps = MERGE_FEW if n * n_heads <= self._sms else MERGE_MANY
        if self.tiles[0].units:
            heads, (at_once, warps) = 1, MERGE_UNITS
        arguments = {
            "part_out_ptr": self._part_out, "part_lse2_ptr": self._part_lse2,
            "merge_indptr_ptr": self._view["merge_indptr"], "counts_ptr": self._view["header"], "out_ptr": out,
            "lse2_ptr": lse2, "stride_out_token": out.stride(0), "stride_out_head": out.stride(1), "n_heads": n_heads,
            "HEAD_DIM": head_dim, "HEADS": heads, "BLOCK_P": at_once, "PDL": self._pdl, "num_warps": warps,
            "launch_pdl": self._pdl, **_sink_arguments(sinks, lse2),
        }  # fmt: skip
        if not windowed:
            merge_kernel[n, n_heads // heads](**arguments, most_queries=self.capacity.queries)
        elif many := n if self.replayed else self._n_merged + n - self._n_queries:
            grid = (min(many, max(1, 32 * self._sms * heads // n_heads)), n_heads // heads)
            merge_listed_kernel[grid](**arguments, merged_ptr=self._view["merged"], n_rows=n)


def _sink_arguments(sinks: torch.Tensor | None, unused: torch.Tensor) -> dict[str, object]:
    """What each kernel is told of sinks; ``unused`` stands for them where there are none."""
    return {"sinks_ptr": unused if sinks is None else sinks.contiguous(), "SINKS": sinks is not None}


def _aligned(x: torch.Tensor) -> bool:
    """Whether each head's elements begin at a multiple of 16 bytes; a dimension of 1 has any stride."""
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1)
    return x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in strides)
