"""Packed attention on CUDA: Triton kernels over the work items of a plan, and their launches.

One program of ``packed_attention_kernel`` is one work item and one KV head. Its rows are (query token, query head of
the KV head) pairs, token after token, so any GQA ratio fills a tile without padding between tokens. Items with few
query rows (decode tails) and items with many (shared spans) are two launches, because their tiles want different
numbers of warps; they may run at the same time. Queries with several partial results are merged by ``merge_kernel``.

``lse2`` is the log-sum-exp in base 2. The empty state is an output of 0 with an lse2 of -inf.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
import triton
import triton.language as tl

from packinfer_sgl.groups import H200, AttentionShape
from packinfer_sgl.plan import Col, PieceTiming, Plan, TilePolicy

LOG2_E = math.log2(math.e)
Q_OFF = tl.constexpr(int(Col.Q_OFF))
Q_CNT = tl.constexpr(int(Col.Q_CNT))
A_OFF = tl.constexpr(int(Col.A_OFF))
A_LEN = tl.constexpr(int(Col.A_LEN))
A_POS = tl.constexpr(int(Col.A_POS))
B_OFF = tl.constexpr(int(Col.B_OFF))
B_LEN = tl.constexpr(int(Col.B_LEN))
PIECE = tl.constexpr(int(Col.PIECE))
OPEN_ROW = tl.constexpr(int(Col.OPEN_ROW))
N_COLS = tl.constexpr(len(Col))
# entries of ``counts``: first the item at which each tile class begins, and the end of the last
N_QUERIES = tl.constexpr(6)


@triton.jit
def _attend(
    q,
    acc,
    top,
    total,
    k_ptr,
    v_ptr,
    slots_ptr,
    begin,
    end,
    length,
    win_lo,
    win_hi,
    scale2,
    cap2,
    stride_page,
    stride_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over tokens ``begin`` to ``end`` of a run of ``length`` tokens, whose slots lie at ``slots_ptr``.

    MASK 0: every block is full; 1: tokens from ``length`` on are hidden; 2: query rows see [win_lo, win_hi) only.
    """
    at = tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    # Slots travel one block ahead in registers. Loaded in the block that uses them they are an indirect load, on
    # which Triton's pipeliner spends half of its stages.
    next_slot = tl.load(slots_ptr + begin + at, mask=begin + at < length, other=0)
    for j in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slot = next_slot
        pos = j + at
        next_slot = tl.load(slots_ptr + pos + BLOCK_N, mask=pos + BLOCK_N < length, other=0)
        if PAGE == 1:
            kv_row = slot.to(tl.int64) * stride_slot
        else:
            kv_row = (slot // PAGE).to(tl.int64) * stride_page + (slot % PAGE) * stride_slot
        offset = kv_row[:, None] + d[None, :]
        if MASK == 0:
            k = tl.load(k_ptr + offset)
            v = tl.load(v_ptr + offset)
        else:
            inside = (pos < length)[:, None]
            k = tl.load(k_ptr + offset, mask=inside, other=0.0)
            v = tl.load(v_ptr + offset, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k))
        if SOFT_CAP:
            # tanh by exp2, exact at both ends
            s = cap2 * (1.0 - 2.0 / (1.0 + tl.exp2(s * scale2 * (2.0 * 1.4426950408889634) / cap2)))
        if MASK == 1:
            s = tl.where((pos < length)[None, :], s, -float("inf"))
        if MASK == 2:
            s = tl.where((pos[None, :] >= win_lo[:, None]) & (pos[None, :] < win_hi[:, None]), s, -float("inf"))
        # scaling after the maximum makes one fused multiply-add of scale and shift for each element
        new_top = tl.maximum(top, tl.max(s, 1) if SOFT_CAP else tl.max(s, 1) * scale2)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top) if MASK == 2 else new_top
        p = tl.exp2(s - shift[:, None] if SOFT_CAP else s * scale2 - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse2_ptr,
    part_out_ptr,
    part_lse2_ptr,
    slots_ptr,
    items_ptr,
    counts_ptr,
    query_rows_ptr,
    partial_rows_ptr,
    win_lo_ptr,
    win_hi_ptr,
    kv_lens_ptr,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_page,
    stride_slot,
    stride_kv_head,
    scale2,
    cap2,
    first_count,
    last_count,
    kv_heads,
    n_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PEEL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Items ``counts[first_count]`` to ``counts[last_count] - 1``, all KV heads of an item next to each other.

    PEEL runs full blocks without masks and the rest apart. WINDOW adds run B.
    """
    first = tl.load(counts_ptr + first_count)
    work = (tl.load(counts_ptr + last_count) - first) * kv_heads
    for w in tl.range(tl.program_id(0), work, tl.num_programs(0), num_stages=1):
        item_ptr = items_ptr + (first + w // kv_heads) * N_COLS
        kv_head = w % kv_heads
        q_off = tl.load(item_ptr + Q_OFF)
        q_cnt = tl.load(item_ptr + Q_CNT)
        a_len = tl.load(item_ptr + A_LEN)
        open_row = tl.load(item_ptr + OPEN_ROW)
        if open_row >= 0:
            a_len = tl.load(kv_lens_ptr + open_row).to(tl.int32) - tl.load(item_ptr + A_POS)
        row = tl.arange(0, BLOCK_M)
        d = tl.arange(0, HEAD_DIM)
        nth = row // GROUP
        head = kv_head * GROUP + row % GROUP
        live = nth < q_cnt
        query = tl.load(query_rows_ptr + q_off + nth, mask=live, other=0).to(tl.int64)
        q = tl.load(
            q_ptr + query[:, None] * stride_q_token + head[:, None] * stride_q_head + d[None, :],
            mask=live[:, None],
            other=0.0,
        )
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        k_head = k_ptr + kv_head * stride_kv_head
        v_head = v_ptr + kv_head * stride_kv_head
        a_slots = slots_ptr + tl.load(item_ptr + A_OFF)
        if PEEL:
            full = a_len // BLOCK_N * BLOCK_N
            acc, top, total = _attend(
                q, acc, top, total, k_head, v_head, a_slots, 0, full, a_len, nth, nth, scale2, cap2,
                stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 0, SOFT_CAP, STAGES,
            )  # fmt: skip
            acc, top, total = _attend(
                q, acc, top, total, k_head, v_head, a_slots, full, a_len, a_len, nth, nth, scale2, cap2,
                stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 1, SOFT_CAP, 1,
            )  # fmt: skip
        else:
            acc, top, total = _attend(
                q, acc, top, total, k_head, v_head, a_slots, 0, a_len, a_len, nth, nth, scale2, cap2,
                stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 1, SOFT_CAP, STAGES,
            )  # fmt: skip
        if WINDOW:
            b_len = tl.load(item_ptr + B_LEN)
            lo = tl.load(win_lo_ptr + q_off + nth, mask=live, other=0)
            hi = tl.load(win_hi_ptr + q_off + nth, mask=live, other=0)
            acc, top, total = _attend(
                q, acc, top, total, k_head, v_head, slots_ptr + tl.load(item_ptr + B_OFF), 0, b_len, b_len, lo, hi,
                scale2, cap2, stride_page, stride_slot, HEAD_DIM, BLOCK_N, PAGE, 2, SOFT_CAP, STAGES,
            )  # fmt: skip
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        lse2 = top + tl.log2(total)
        # read again rather than kept in registers across the loops
        query = tl.load(query_rows_ptr + q_off + nth, mask=live, other=0).to(tl.int64)
        part = tl.load(partial_rows_ptr + q_off + nth, mask=live, other=0)
        direct = live & (part < 0)
        partial = live & (part >= 0)
        tl.store(
            out_ptr + query[:, None] * stride_out_token + head[:, None] * stride_out_head + d[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=direct[:, None],
        )
        tl.store(lse2_ptr + query * n_heads + head, lse2, mask=direct)
        part_row = (part + tl.load(item_ptr + PIECE)).to(tl.int64) * n_heads + head
        tl.store(part_out_ptr + part_row[:, None] * HEAD_DIM + d[None, :], result, mask=partial[:, None])
        tl.store(part_lse2_ptr + part_row, lse2, mask=partial)


@triton.jit(do_not_specialize=["n_heads"])
def merge_kernel(
    part_out_ptr,
    part_lse2_ptr,
    merge_indptr_ptr,
    counts_ptr,
    out_ptr,
    lse2_ptr,
    stride_out_token,
    stride_out_head,
    n_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (query, head): the softmax over the union of what its partial results saw.

    Queries past those of the plan pad a captured graph: they come out as 0.
    """
    query = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, HEAD_DIM)
    out = out_ptr + query.to(tl.int64) * stride_out_token + head * stride_out_head + d
    if query >= tl.load(counts_ptr + N_QUERIES):
        tl.store(out, tl.zeros([HEAD_DIM], out_ptr.dtype.element_ty))
    else:
        begin = tl.load(merge_indptr_ptr + query)
        end = tl.load(merge_indptr_ptr + query + 1)
        if end > begin:
            acc = tl.zeros([HEAD_DIM], tl.float32)
            top = -float("inf")
            total = 0.0
            for i in range(begin, end, BLOCK_P):
                row = i + tl.arange(0, BLOCK_P)
                part = row.to(tl.int64) * n_heads + head
                lse2 = tl.load(part_lse2_ptr + part, mask=row < end, other=-float("inf"))
                o = tl.load(part_out_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=(row < end)[:, None], other=0.0)
                new_top = tl.maximum(top, tl.max(lse2, 0))
                shift = tl.where(new_top == -float("inf"), 0.0, new_top)
                weight = tl.exp2(lse2 - shift)
                keep = tl.exp2(top - shift)
                acc = acc * keep + tl.sum(weight[:, None] * o, 0)
                total = total * keep + tl.sum(weight, 0)
                top = new_top
            tl.store(out, (acc / tl.where(total == 0.0, 1.0, total)).to(out_ptr.dtype.element_ty))
            tl.store(lse2_ptr + query * n_heads + head, top + tl.log2(total))


@triton.jit
def snapshot_kernel(
    req_to_token_ptr, pool_rows_ptr, spans_ptr, n_spans_ptr, kv_slots_ptr, stride_row, BLOCK: tl.constexpr
):
    """Copy the slots of each span (row, first position, tokens, offset) from SGLang's table to the plan's slot list."""
    for span in tl.range(tl.program_id(0), tl.load(n_spans_ptr), tl.num_programs(0)):
        row = tl.load(spans_ptr + span * 4)
        start = tl.load(spans_ptr + span * 4 + 1)
        length = tl.load(spans_ptr + span * 4 + 2)
        offset = tl.load(spans_ptr + span * 4 + 3)
        table = req_to_token_ptr + tl.load(pool_rows_ptr + row).to(tl.int64) * stride_row + start
        for i in tl.range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
            at = i + tl.arange(0, BLOCK)
            slots = tl.load(table + at, mask=at < length)
            tl.store(kv_slots_ptr + offset + at, slots.to(tl.int32), mask=at < length)


@triton.jit
def append_kernel(kv_slots_ptr, append_base_ptr, kv_lens_ptr, out_slots_ptr, counts_ptr, BLOCK: tl.constexpr):
    """Enter the slot of each row's new token, its last one, in the plan's slot list."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < tl.load(counts_ptr + N_QUERIES)
    base = tl.load(append_base_ptr + row, mask=live, other=0)
    length = tl.load(kv_lens_ptr + row, mask=live, other=0).to(tl.int32)
    slot = tl.load(out_slots_ptr + row, mask=live, other=0).to(tl.int32)
    tl.store(kv_slots_ptr + base + length - 1, slot, mask=live)


@dataclass(frozen=True)
class Tile:
    """One tile class.

    Attributes:
        rows: query rows, that is tokens times query heads of a KV head.
        tokens: KV tokens of a block.
        warps, stages: of the program, and blocks in flight.
        resident: programs of a multiprocessor at once, by which pieces are cut.
        programs: programs launched for each multiprocessor.
        fixed_us: time of an item besides its tokens.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    resident: int
    programs: int
    fixed_us: float


# Largest class first; measured with scripts/tune_kernels.py on an H200.
TILES = {
    64: (Tile(128, 64, 8, 3, 1, 1, 5.8), Tile(64, 64, 4, 3, 1, 1, 5.8), Tile(16, 64, 2, 4, 4, 8, 2.2)),
    128: (Tile(128, 64, 8, 3, 1, 1, 5.8), Tile(64, 64, 4, 3, 1, 1, 5.8), Tile(16, 32, 4, 4, 4, 8, 2.2)),
    256: (Tile(64, 32, 4, 2, 1, 1, 5.8), Tile(16, 32, 4, 2, 2, 4, 2.2)),
}
BYTES_PER_US, FLOPS_PER_US = 4.6e6, 4.6e8


def tiles_for(head_dim: int) -> tuple[Tile, ...]:
    """The tile classes for a head dimension; raises ValueError for one that the kernels do not know."""
    if head_dim not in TILES:
        raise ValueError(f"packed attention knows head dimensions {sorted(TILES)}, not {head_dim}")
    return TILES[head_dim]


def tile_policy(shape: AttentionShape, device: torch.device) -> TilePolicy:
    """How a plan for these kernels is cut on ``device``.

    The constants are of an H200; on other GPUs only the number of multiprocessors is taken from the device.
    """
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    timings = []
    for tile in tiles_for(shape.head_dim):
        programs = sms * tile.resident
        moved_us = programs * 2 * shape.head_dim * shape.kv_bytes / BYTES_PER_US
        multiplied_us = programs * tile.rows * 4 * shape.head_dim / FLOPS_PER_US
        token_us = max(moved_us, multiplied_us)
        timings.append(PieceTiming(programs / shape.kv_heads, tile.fixed_us, token_us, H200.partials_us(shape)))
    tile_queries = tuple(max(1, tile.rows // shape.group_size) for tile in tiles_for(shape.head_dim))
    return TilePolicy(tile_queries, chunk_tokens=1 << 30, timings=tuple(timings))


@dataclass(frozen=True)
class Capacity:
    """Sizes of the buffers of a plan, fixed as long as captured graphs use them.

    Attributes:
        queries: rows of q and out.
        slots: query slots (a query counts once for each tile that it is in).
        items, spans: work items, and spans of the slot list.
        partials: partial results.
        kv_slots: entries of the KV slot list.
    """

    queries: int
    slots: int
    items: int
    spans: int
    partials: int
    kv_slots: int

    @classmethod
    def of(cls, plan: Plan) -> Capacity:
        """Just what ``plan`` needs."""
        return cls(
            queries=len(plan.merge_indptr) - 1,
            slots=len(plan.query_rows),
            items=len(plan.items),
            spans=len(plan.spans),
            partials=plan.n_partials,
            kv_slots=plan.kv_capacity,
        )

    def holds(self, plan: Plan) -> bool:
        need = Capacity.of(plan)
        return all(getattr(self, f.name) >= getattr(need, f.name) for f in fields(self))


class PackedCuda:
    """A plan on the GPU, at fixed addresses: ``load`` it, then ``run`` it for each layer, captured in a graph or not.

    Loading copies one block of int32 from pinned memory on the current stream and never waits for the GPU, except
    when two loads are still on their way.
    """

    def __init__(
        self, capacity: Capacity, *, qo_heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> None:
        self.capacity, self.device = capacity, device
        self.qo_heads, self.kv_heads, self.head_dim = qo_heads, kv_heads, head_dim
        self.tiles = tiles_for(head_dim)
        c = capacity
        sizes = {
            "counts": 8,
            "items": c.items * 10,
            "query_rows": c.slots,
            "partial_rows": c.slots,
            "win_lo": c.slots,
            "win_hi": c.slots,
            "merge_indptr": c.queries + 1,
            "spans": c.spans * 4,
            "append_base": c.queries,
        }
        self._at: dict[str, slice] = {}
        total = 0
        for name, size in sizes.items():
            self._at[name] = slice(total, total + size)
            total += -(-size // 4) * 4
        self._block = torch.zeros(total, dtype=torch.int32, device=device)
        self._view = {name: self._block[at] for name, at in self._at.items()}
        pinned = device.type == "cuda"
        self._staging = [torch.zeros(total, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._staged = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._turn = 0
        self.kv_slots = torch.zeros(max(c.kv_slots, 1), dtype=torch.int32, device=device)
        self._part_out = torch.empty(max(c.partials, 1), qo_heads, head_dim, dtype=torch.float32, device=device)
        self._part_lse2 = torch.empty(max(c.partials, 1), qo_heads, dtype=torch.float32, device=device)
        self._sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        self._branches = [torch.cuda.Stream(device) for _ in self.tiles[1:]] if device.type == "cuda" else []

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(t.nbytes for t in (self._block, self.kv_slots, self._part_out, self._part_lse2))

    def load(self, plan: Plan) -> None:
        """Copy ``plan`` to the GPU on the current stream; raises ValueError if it is larger than the capacity."""
        if not self.capacity.holds(plan):
            raise ValueError(f"the plan needs {Capacity.of(plan)}, the buffers hold {self.capacity}")
        self._turn ^= 1
        staged, staging = self._staged[self._turn], self._staging[self._turn]
        if staged is not None:
            staged.synchronize()  # the copy of two loads ago
        block = staging.numpy()
        classes = np.arange(len(self.tiles) + 1)
        counts = block[self._at["counts"]]
        counts[: len(classes)] = plan.items[:, Col.TILE_CLASS].searchsorted(classes)
        counts[int(N_QUERIES)] = len(plan.merge_indptr) - 1
        for name in ("items", "query_rows", "partial_rows", "win_lo", "win_hi", "merge_indptr", "spans", "append_base"):
            values = getattr(plan, name).reshape(-1)
            start = self._at[name].start
            block[start : start + len(values)] = values
        self._block.copy_(staging, non_blocking=True)
        if staged is not None:
            staged.record()
        self.n_spans, self.windowed = len(plan.spans), bool(plan.items[:, Col.B_LEN].any())

    def snapshot(self, req_to_token: torch.Tensor, pool_rows: torch.Tensor) -> None:
        """Fill the slot list of the loaded plan from SGLang's table.

        Args:
            req_to_token: [pool rows, max context] int32 on the device.
            pool_rows: [n] row of the table of each row of the batch, on the device.
        """
        grid = (max(1, min(self.n_spans, 1024)), 8)
        spans = self._view["spans"]
        self._n_spans_gpu = torch.full((1,), self.n_spans, dtype=torch.int32, device=self.device)
        snapshot_kernel[grid](
            req_to_token, pool_rows, spans, self._n_spans_gpu, self.kv_slots, req_to_token.stride(0), BLOCK=1024
        )

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        """Enter each row's newest slot.

        Args:
            kv_lens: [n] KV tokens of each row, the new one included, on the device.
            out_slots: [n] slot of the new token, on the device.
        """
        grid = (triton.cdiv(self.capacity.queries, 128),)
        append_kernel[grid](
            self.kv_slots, self._view["append_base"], kv_lens, out_slots, self._view["counts"], BLOCK=128
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        page_size: int = 1,
        windowed: bool = False,
        out: torch.Tensor | None = None,
        lse2: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every query over its row's KV, each span read once for its group.

        Args:
            q: [n_queries, qo_heads, head_dim] bf16 or fp16, last dimension contiguous; queries past the plan's pad a
                captured graph and come out as 0.
            k, v: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim]; equal strides, last
                dimension contiguous.
            kv_lens: [n_rows] current length of each row, for items that grow.
            sm_scale: factor of the logits before the softmax.
            logits_soft_cap: cap ``c`` in ``c * tanh(logits / c)``; 0 for none.
            windowed: whether the plan has run B.

        Returns:
            out as q, and lse2 [n_queries, qo_heads] float32.
        """
        n, n_heads, head_dim = q.shape
        out = torch.empty_like(q) if out is None else out
        lse2 = torch.empty(n, n_heads, dtype=torch.float32, device=q.device) if lse2 is None else lse2
        stride_page, stride_slot, stride_head = (0, *k.stride()[:2]) if k.dim() == 3 else k.stride()[:3]
        view = self._view

        def launch(i: int, tile: Tile) -> None:
            # full blocks apart from the rest pay where blocks are many; tails are short
            peel = i < len(self.tiles) - 1
            packed_attention_kernel[(self._sms * tile.programs,)](
                q, k, v, out, lse2, self._part_out, self._part_lse2, self.kv_slots,
                view["items"], view["counts"], view["query_rows"], view["partial_rows"], view["win_lo"], view["win_hi"],
                kv_lens, q.stride(0), q.stride(1), out.stride(0), out.stride(1), stride_page, stride_slot, stride_head,
                sm_scale * LOG2_E, logits_soft_cap * LOG2_E, i, i + 1, self.kv_heads, n_heads,
                GROUP=n_heads // self.kv_heads, HEAD_DIM=head_dim, BLOCK_M=tile.rows, BLOCK_N=tile.tokens,
                PAGE=page_size, WINDOW=windowed, SOFT_CAP=logits_soft_cap > 0, PEEL=peel, STAGES=tile.stages,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        # a branch for each class, so that the tensor work of large tiles and the reading of tails overlap
        current = torch.cuda.current_stream(self.device) if self._branches else None
        for branch in self._branches:
            branch.wait_stream(current)
        launch(0, self.tiles[0])
        for i, tile in enumerate(self.tiles[1:]):
            with torch.cuda.stream(self._branches[i]) if self._branches else nullcontext():
                launch(i + 1, tile)
        for branch in self._branches:
            current.wait_stream(branch)
        merge_kernel[(n, n_heads)](
            self._part_out, self._part_lse2, view["merge_indptr"], view["counts"], out, lse2,
            out.stride(0), out.stride(1), n_heads, HEAD_DIM=head_dim, BLOCK_P=16, num_warps=1,
        )  # fmt: skip
        return out, lse2
