"""Packed attention of large tiles on Hopper, for decode plans: warp-specialised, in Gluon.

The same items and the same results as ``attention_triton.packed_attention_kernel`` for run A. A producer warpgroup
copies keys and values to a ring of stages in shared memory, a consumer warpgroup multiplies (FlashAttention-3,
https://arxiv.org/abs/2407.08608). Both together take so few registers that CTAs of the other tile class run beside them
on the same SM and read their KV meanwhile.

Map, for head_dim 128, BLOCK_N 64, STAGES 3 (``tiles.TILES``):

    CTA         8 warps.  WG0 consumer: 64 query rows.  WG1 producer: cp.async.
    registers   maxnreg 112 x 256 threads = 28,672 = 64 x 128 (producer) + 160 x 128 (consumer); 36,864 are left, for
                three CTAs of the small class
    smem        K 3 x 16 KiB | V 3 x 16 KiB | Q 16 KiB = 112 of 227 KiB, and 12 barriers
    scheduling  static: CTA i runs (item, KV head) pairs i, i + n_ctas, ...; both warpgroups count them alike

    barrier   arrivals            arrived at by                   awaited by                     use, parity
    k_full    128, one a thread   producer, when K has landed     consumer, before QK            n, full
    v_full    128, one a thread   producer, when V has landed     consumer, before PV            n, full
    k_empty   1                   consumer, after QK              producer, before it copies K   n, empty
    v_empty   1                   consumer, after PV              producer, before it copies V   n, empty

    n counts the KV blocks of all items of a CTA; its stage is n % STAGES, its parity full_phase(n) or empty_phase(n).
    Q needs no barrier: the consumer loads it itself, between two items.

    producer  |K0 V0|K1 V1|K2 V2|   K3 V3|   K4 V4| ...     up to STAGES blocks ahead, across items
    consumer        |Q|QK0|QK1    |PV0|QK2    |PV1| ... |store|Q| ...
                          |softmax|   |softmax|             one block's beside the next block's product

FP8 KV (RAW_STAGES > 0): the producer copies its bytes to a ring of RAW_STAGES blocks that nobody else sees, and fills a
stage by converting the block that was begun RAW_STAGES - 1 blocks before, to float16, which is exact. It goes on with
the next item's blocks before it has converted an item's last. Queries and weights are float16, too. In the map:

    smem        RAW_STAGES 3: K raw 3 x 8 KiB | V raw 3 x 8 KiB | K 3 x 16 KiB | V 3 x 16 KiB | Q 16 KiB = 160 KiB
    k_full      1 arrival, when all threads have converted K and made it visible to products; v_full likewise
    k_empty     is awaited before K is converted, v_empty before V; n is that of the block that is converted

    producer  |K0 V0|K1 V1|K2 V2|to 0|K3 V3|to 1|K4 V4|to 2| ... |to n - 1, to n|      (Kn Vn: bytes; to n: convert)

Within the producer, ``wait_group`` waits for a thread's own copies, and the compiler lets the warpgroup meet before it
reads what others copied, before it copies over what others read, and between its fence and the arrival.

Plans in units (UNITS, ``planning.units``): items may grow, and one may leave its state, the output before it is divided
and softmax's maximum and sum, where the results of its queries' unit belong. Those of the launch with GOES_ON begin
with such a state: it waits until the launch before is done.

Taken for granted (``device_plan`` checks it): no run B, no item that another follows; none that grows or has to do with
another's state but with UNITS. An empty item has one block, all of it hidden.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from packinfer_sgl.kernels.columns import A_LEN, A_OFF, CHAIN, HANDS_ON, N_COLS, Q_CNT, Q_OFF, SPLIT
from packinfer_sgl.kernels.hopper_common import (
    CONVERT_ARRIVALS,
    COPY_ARRIVALS,
    ROWS,
    allocate_barriers,
    empty_phase,
    full_phase,
    grown,
    part_of_cap,
    row_layout,
)
from packinfer_sgl.kernels.hopper_decode_fp8 import RawRing, produce_from_fp8
from packinfer_sgl.kernels.hopper_decode_tile import load_q, load_state, store_results

CONSUMER_ARRIVALS = gl.constexpr(1)  # one for the warpgroup


class KvPipeline(NamedTuple):
    """The ring of KV blocks: shared memory [STAGES, BLOCK_N, HEAD_DIM], and barriers [STAGES, 1]."""

    k_stages: gl.shared_memory_descriptor
    v_stages: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


class ProducerArgs(NamedTuple):
    k_ptr: gl.tensor
    v_ptr: gl.tensor
    slots_ptr: gl.tensor
    items_ptr: gl.tensor
    kv_lens_ptr: gl.tensor
    first: gl.tensor  # item of the class
    work: gl.tensor  # (item, KV head) pairs
    kv_heads: gl.tensor
    stride_page: gl.tensor
    stride_slot: gl.tensor
    stride_kv_head: gl.tensor


class ConsumerArgs(NamedTuple):
    q_ptr: gl.tensor
    out_ptr: gl.tensor
    lse2_ptr: gl.tensor
    part_out_ptr: gl.tensor
    part_lse2_ptr: gl.tensor
    part_sum_ptr: gl.tensor
    items_ptr: gl.tensor
    kv_lens_ptr: gl.tensor
    query_rows_ptr: gl.tensor
    partial_rows_ptr: gl.tensor
    sinks_ptr: gl.tensor
    first: gl.tensor
    work: gl.tensor
    kv_heads: gl.tensor
    n_heads: gl.tensor
    stride_q_token: gl.tensor
    stride_q_head: gl.tensor
    stride_out_token: gl.tensor
    stride_out_head: gl.tensor
    scale2: gl.tensor
    cap2: gl.tensor
    v_scale: gl.tensor
    q_tile: gl.shared_memory_descriptor  # [ROWS, HEAD_DIM]


@gluon.jit
def _produce(
    args, pipe, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    UNITS: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: copy the KV blocks of all items to the ring, one after the other."""
    layout: gl.constexpr = row_layout(HEAD_DIM)
    at = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    n = 0
    for w in range(gl.program_id(0), args.work, gl.num_programs(0)):
        item_ptr = args.items_ptr + (args.first + w // args.kv_heads) * N_COLS
        a_len = gl.load(item_ptr + A_LEN)
        if UNITS:
            a_len = grown(item_ptr, a_len, args.kv_lens_ptr)
        a_slots = args.slots_ptr + gl.load(item_ptr + A_OFF)
        head = (w % args.kv_heads).to(gl.int64) * args.stride_kv_head
        # slots are loaded a block ahead; the slot list ends in room for it
        slot = gl.load(a_slots + at)  # [BLOCK_N]
        for j in range(0, gl.maximum(a_len, 1), BLOCK_N):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * args.stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * args.stride_page + (slot % PAGE).to(gl.int64) * args.stride_slot
            inside = gl.expand_dims(j + at < a_len, 1)  # [BLOCK_N, 1]
            slot = gl.load(a_slots + j + BLOCK_N + at)
            offset = gl.expand_dims(head + kv_row, 1) + gl.expand_dims(d, 0)  # [BLOCK_N, HEAD_DIM]
            stage = n % STAGES
            mbarrier.wait(pipe.k_empty.index(stage), empty_phase(n, STAGES))
            async_copy.async_copy_global_to_shared(pipe.k_stages.index(stage), args.k_ptr + offset, mask=inside)
            async_copy.mbarrier_arrive(pipe.k_full.index(stage), increment_count=False)
            mbarrier.wait(pipe.v_empty.index(stage), empty_phase(n, STAGES))
            async_copy.async_copy_global_to_shared(pipe.v_stages.index(stage), args.v_ptr + offset, mask=inside)
            async_copy.mbarrier_arrive(pipe.v_full.index(stage), increment_count=False)
            n += 1


@gluon.jit
def _begin_scores(args, pipe, n, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr):
    """Begin the product of the queries with the keys of block ``n``."""
    stage = n % STAGES
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    mbarrier.wait(pipe.k_full.index(stage), full_phase(n, STAGES))
    fence_async_shared()  # keys came by cp.async, the product reads them through the async proxy
    k = pipe.k_stages.index(stage).permute((1, 0))  # [HEAD_DIM, BLOCK_N]
    return warpgroup_mma(args.q_tile, k, zeros, use_acc=False, is_async=True)  # [ROWS, BLOCK_N]


@gluon.jit
def _softmax_block(
    args, s, top, total, SOFT_CAP: gl.constexpr, MAY_BE_EMPTY: gl.constexpr, s_layout: gl.constexpr,
    o_rows: gl.constexpr,
):  # fmt: skip
    """Online softmax: the weights of a block, the new ``top`` and ``total``, and the factor of all before the block.

    A full block has the same bits in the loop as where it is the last: the factor of ``s`` comes after what is masked,
    so that the compiler contracts the same operations.

    MAY_BE_EMPTY: nothing of the item may have been seen yet, nor in this block.
    """
    factor = args.cap2 if SOFT_CAP else args.scale2
    new_top = gl.maximum(top, gl.convert_layout(gl.max(s, 1), o_rows) * factor)  # [ROWS]
    shift = gl.where(new_top == -float("inf"), 0.0, new_top) if MAY_BE_EMPTY else new_top
    keep = gl.exp2(top - shift)
    shift = gl.expand_dims(gl.convert_layout(shift, gl.SliceLayout(1, s_layout)), 1)
    p = gl.exp2(s * factor - shift)  # [ROWS, BLOCK_N]
    return p, new_top, total * keep + gl.convert_layout(gl.sum(p, 1), o_rows), keep


@gluon.jit
def _begin_values(pipe, n, p_operand, acc, STAGES: gl.constexpr, FIRST_D: gl.constexpr):
    """Begin the product of the weights with the values of block ``n``, columns from FIRST_D on."""
    v = pipe.v_stages.index(n % STAGES).slice(FIRST_D, acc.shape[1], dim=1)
    return warpgroup_mma(p_operand, v, acc, is_async=True)


@gluon.jit
def _consume(
    args, pipe, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, OUT_PARTS: gl.constexpr, UNITS: gl.constexpr, GOES_ON: gl.constexpr,
):  # fmt: skip
    """The consumer warpgroup: online softmax over the blocks in the ring, and the results."""
    WIDTH: gl.constexpr = HEAD_DIM // OUT_PARTS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = pipe.k_stages.dtype
    n = 0
    for w in range(gl.program_id(0), args.work, gl.num_programs(0)):
        item_ptr = args.items_ptr + (args.first + w // args.kv_heads) * N_COLS
        kv_head = w % args.kv_heads
        q_off = gl.load(item_ptr + Q_OFF)
        q_cnt = gl.load(item_ptr + Q_CNT)
        a_len = gl.load(item_ptr + A_LEN)
        if UNITS:
            a_len = grown(item_ptr, a_len, args.kv_lens_ptr)
        split = gl.load(item_ptr + SPLIT)
        hands_on = 0
        if UNITS:
            hands_on = gl.load(item_ptr + CHAIN) & HANDS_ON
        load_q(args, q_off, q_cnt, kv_head, GROUP, HEAD_DIM)

        acc = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
        if OUT_PARTS == 2:
            right = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
        top = gl.full([ROWS], -float("inf"), gl.float32, o_rows)
        total = gl.zeros([ROWS], gl.float32, o_rows)
        if GOES_ON:
            acc, top, total = load_state(args, q_off, q_cnt, split, kv_head, GROUP, HEAD_DIM, WIDTH, 0, o_layout)
            if OUT_PARTS == 2:
                right, _, _ = load_state(
                    args, q_off, q_cnt, split, kv_head, GROUP, HEAD_DIM, WIDTH, WIDTH, o_layout
                )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=[_begin_scores(args, pipe, n, BLOCK_N, STAGES, s_layout)])
        mbarrier.arrive(pipe.k_empty.index(n % STAGES), count=1)
        for _ in range(BLOCK_N, a_len, BLOCK_N):  # all blocks but the last
            next_s = _begin_scores(args, pipe, n + 1, BLOCK_N, STAGES, s_layout)
            if SOFT_CAP:
                s = part_of_cap(s, args.scale2, args.cap2)
            p, top, total, keep = _softmax_block(args, s, top, total, SOFT_CAP, False, s_layout, o_rows)
            acc = acc * gl.expand_dims(keep, 1)
            p_operand = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(pipe.v_full.index(n % STAGES), full_phase(n, STAGES))
            fence_async_shared()
            acc = _begin_values(pipe, n, p_operand, acc, STAGES, 0)
            if OUT_PARTS == 2:
                right = _begin_values(pipe, n, p_operand, right * gl.expand_dims(keep, 1), STAGES, WIDTH)
                s, acc, right = warpgroup_mma_wait(0, deps=[next_s, acc, right])
            else:
                s, acc = warpgroup_mma_wait(0, deps=[next_s, acc])
            mbarrier.arrive(pipe.k_empty.index((n + 1) % STAGES), count=1)
            mbarrier.arrive(pipe.v_empty.index(n % STAGES), count=1)
            n += 1
        if SOFT_CAP:
            s = part_of_cap(s, args.scale2, args.cap2)
        pos = (gl.maximum(a_len, 1) - 1) // BLOCK_N * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        s = gl.where(gl.expand_dims(pos < a_len, 0), s, -float("inf"))
        p, top, total, keep = _softmax_block(args, s, top, total, SOFT_CAP, True, s_layout, o_rows)
        acc = acc * gl.expand_dims(keep, 1)
        p_operand = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(pipe.v_full.index(n % STAGES), full_phase(n, STAGES))
        fence_async_shared()
        acc = _begin_values(pipe, n, p_operand, acc, STAGES, 0)
        if OUT_PARTS == 2:
            right = _begin_values(pipe, n, p_operand, right * gl.expand_dims(keep, 1), STAGES, WIDTH)
            acc, right = warpgroup_mma_wait(0, deps=[acc, right])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(pipe.v_empty.index(n % STAGES), count=1)
        n += 1

        store_results(
            args, acc, top, total, q_off, q_cnt, split, kv_head, hands_on, GROUP, HEAD_DIM, SINKS, UNITS, 0, o_layout
        )  # fmt: skip
        if OUT_PARTS == 2:
            store_results(
                args, right, top, total, q_off, q_cnt, split, kv_head, hands_on, GROUP, HEAD_DIM, SINKS, UNITS, WIDTH,
                o_layout,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_hopper_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, part_sum_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, kv_lens_ptr, sinks_ptr, stride_q_token, stride_q_head, stride_out_token,
    stride_out_head, stride_page, stride_slot, stride_kv_head, scale2, cap2, v_scale, first_count, last_count, kv_heads,
    n_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, SOFT_CAP: gl.constexpr,
    SINKS: gl.constexpr, STAGES: gl.constexpr, RAW_STAGES: gl.constexpr, OUT_PARTS: gl.constexpr,
    UNITS: gl.constexpr, GOES_ON: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As ``packed_attention_kernel`` with BLOCK_M 64, for items without run B.

    With OUT_PARTS 2 values are multiplied by halves of HEAD_DIM: a product of 256 columns wants more registers than
    CTAs of the other tile class leave.

    A thread of the producer gets PRODUCER_REGISTERS, one of the consumer what ``maxnreg`` leaves.
    """
    first = gl.load(counts_ptr + first_count)
    work = (gl.load(counts_ptr + last_count) - first) * kv_heads
    if GOES_ON:
        if gl.program_id(0) < gl.maximum(work, 1):  # one at least, so that the merge waits for the launch before this
            gdc_wait()
    # a CTA without work is gone before those of the next launch begin: they would spread unevenly around it
    if gl.program_id(0) < work:
        gdc_launch_dependents()
        dtype: gl.constexpr = gl.float16 if RAW_STAGES else q_ptr.dtype.element_ty
        full_arrivals: gl.constexpr = CONVERT_ARRIVALS if RAW_STAGES else COPY_ARRIVALS
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        k_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        v_stages = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        q_tile = gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], layout)
        k_full = allocate_barriers(STAGES)
        v_full = allocate_barriers(STAGES)
        k_empty = allocate_barriers(STAGES)
        v_empty = allocate_barriers(STAGES)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=full_arrivals)
            mbarrier.init(v_full.index(i), count=full_arrivals)
            mbarrier.init(k_empty.index(i), count=CONSUMER_ARRIVALS)
            mbarrier.init(v_empty.index(i), count=CONSUMER_ARRIVALS)
        pipe = KvPipeline(
            k_stages=k_stages, v_stages=v_stages, k_full=k_full, v_full=v_full, k_empty=k_empty, v_empty=v_empty
        )  # fmt: skip
        consumer = ConsumerArgs(
            q_ptr=q_ptr, out_ptr=out_ptr, lse2_ptr=lse2_ptr, part_out_ptr=part_out_ptr, part_lse2_ptr=part_lse2_ptr,
            part_sum_ptr=part_sum_ptr, items_ptr=items_ptr, kv_lens_ptr=kv_lens_ptr, query_rows_ptr=query_rows_ptr,
            sinks_ptr=sinks_ptr, partial_rows_ptr=partial_rows_ptr, first=first, work=work, kv_heads=kv_heads,
            n_heads=n_heads, stride_q_token=stride_q_token, stride_q_head=stride_q_head,
            stride_out_token=stride_out_token, stride_out_head=stride_out_head, scale2=scale2, cap2=cap2,
            v_scale=v_scale, q_tile=q_tile,
        )  # fmt: skip
        producer = ProducerArgs(
            k_ptr=k_ptr, v_ptr=v_ptr, slots_ptr=slots_ptr, items_ptr=items_ptr, kv_lens_ptr=kv_lens_ptr, first=first,
            work=work, kv_heads=kv_heads, stride_page=stride_page, stride_slot=stride_slot,
            stride_kv_head=stride_kv_head,
        )  # fmt: skip
        if RAW_STAGES:
            raw_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            raw_dtype: gl.constexpr = k_ptr.dtype.element_ty
            raw = RawRing(
                k=gl.allocate_shared_memory(raw_dtype, [RAW_STAGES, BLOCK_N, HEAD_DIM], raw_rows),
                v=gl.allocate_shared_memory(raw_dtype, [RAW_STAGES, BLOCK_N, HEAD_DIM], raw_rows),
            )
            gl.warp_specialize(
                [
                    (_consume, (consumer, pipe, GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP, SINKS, OUT_PARTS, UNITS,
                                GOES_ON)),
                    (produce_from_fp8, (producer, pipe, raw, HEAD_DIM, BLOCK_N, PAGE, STAGES, RAW_STAGES, UNITS)),
                ],
                [4],
                [PRODUCER_REGISTERS],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_consume, (consumer, pipe, GROUP, HEAD_DIM, BLOCK_N, STAGES, SOFT_CAP, SINKS, OUT_PARTS, UNITS,
                                GOES_ON)),
                    (_produce, (producer, pipe, HEAD_DIM, BLOCK_N, PAGE, STAGES, UNITS)),
                ],
                [4],
                [PRODUCER_REGISTERS],
            )  # fmt: skip
