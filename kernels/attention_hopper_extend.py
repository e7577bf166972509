"""Packed attention of extend plans on Hopper, and of decode plans in one launch: warp-specialised, in Gluon.

The same items and the same results as ``attention_triton.packed_attention_kernel``, for tiles of 128 rows.
Products bound it, so the tensor cores must not wait: a producer warpgroup copies queries, keys and values to shared
memory, blocks and items ahead, and two consumers multiply, each 64 of the rows, so that the softmax of one runs beside
the products of the other (FlashAttention-3, https://arxiv.org/abs/2407.08608).

Map, for head_dim 128, BLOCK_N 128, STAGES 2 (``tiles.EXTEND_TILES``):

    CTA         12 warps, one CTA an SM.  WG0, WG1 consumers: rows 0-63 and 64-127 of a tile.  WG2 producer: cp.async.
    registers   maxnreg 168 x 384 threads = 64,512 = 56 x 128 (producer) + 224 x 256 (consumers)
    smem        K 2 x 32 KiB | V 2 x 32 KiB | Q 2 stages x 2 x 16 KiB | row offsets 2 x 1 KiB | work tiles 2 x 64 B
                = 194 of 227 KiB, and 16 barriers
    scheduling  dynamic: a CTA begins with item ``program_id``, then takes tickets (``counts[NEXT_TICKET]``)

    barrier    arrivals            arrived at by                      awaited by                     use, parity
    work_full  1                   producer, work tile written        consumers, before an item      i, full
    q_full     128, one a thread   producer, when Q has landed        consumers, before the 1st QK   i, full
    q_empty    2, one a consumer   consumer, results out of Q stage   producer, before work tile, Q  i, empty
    k_full     128, one a thread   producer, when K has landed        consumers, before QK           n, full
    k_empty    2, one a consumer   consumer, after QK                 producer, before it copies K   n, empty
    v_full     128, one a thread   producer, when V has landed        consumers, before PV           n, full
    v_empty    2, one a consumer   consumer, after PV                 producer, before it copies V   n, empty
    stagger    1                   consumer 0, after its 1st QK       consumer 1, before its 1st     i, full

    i counts the items of a CTA (stage i % 2), n the KV blocks of all its items (stage n % STAGES); the parity is
    full_phase or empty_phase of it. q_empty guards the work tile as well: a consumer has read it by then. A consumer
    without live rows gives everything back without a product.

Life of an item: the producer holds ``w`` (item and KV head), waits for q_empty, writes the work tile, copies Q, then K
and V of block after block, and takes a ticket for the next. After the last item a work tile with w >= work ends the
consumers' loops. Each of the ``work`` items takes one ticket, so ticket work - 1 is the launch's last, and resets it.

    producer    |w|Q K0 V0|K1 V1|  K2 V2| ... |ticket|w'|Q' K0' V0'| ...
    consumer 0        |QK0|softmax|PV0|QK1|softmax|PV1| ... |store|QK0'| ...
    consumer 1            |QK0|softmax|PV0|QK1|softmax|PV1| ... |store| ...

FP8 KV (FP8_KV): the bytes of K or V of one block are in flight, in a buffer that only the producer sees. It converts
them to float16, which is exact, while those of the next take their place, 32 rows at a time (``hopper_extend_fp8``).
Weights are float16, too, and a consumer converts its queries in their stage before the first product. In the map:

    registers  maxnreg 168 x 384 threads = 104 x 128 (producer) + 200 x 256 (consumers)
    smem       the same and 16 KiB of raw bytes = 210 of 227 KiB
    k_full     1 arrival, when all threads have converted K and made it visible to products; v_full likewise
    k_empty    is awaited before K is converted; v_empty likewise

    producer    |w|Q k0|k0 to K0, v0 comes|v0 to V0, k1 comes|k1 to K1, v1 comes| ... |v to V|ticket|w'| ...

Taken for granted (``device_plan`` checks it): no custom mask, no item that another follows; in plans with run B none
that grows; heads of q, K and V begin at multiples of 16 bytes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from packinfer_sgl.kernels.hopper_common import CONVERT_ARRIVALS, COPY_ARRIVALS, ROWS, allocate_barriers
from packinfer_sgl.kernels.hopper_extend_consumer import ConsumerArgs, consume
from packinfer_sgl.kernels.hopper_extend_pipeline import (
    CONSUMERS,
    EMPTY_ARRIVALS,
    STAGGER_ARRIVALS,
    WORK_COLS,
    WORK_FULL_ARRIVALS,
    Pipeline,
)
from packinfer_sgl.kernels.hopper_extend_producer import COPY_ROWS, ProducerArgs, produce


@gluon.jit(do_not_specialize=["first_count", "last_count", "kv_heads", "n_heads"])
def packed_attention_extend_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, part_out_ptr, part_lse2_ptr, slots_ptr, items_ptr, counts_ptr,
    query_rows_ptr, partial_rows_ptr, win_lo_ptr, win_hi_ptr, kv_lens_ptr, sinks_ptr, stride_q_token, stride_q_head,
    stride_out_token, stride_out_head, stride_page, stride_slot, stride_kv_head, scale2, cap2, v_scale, first_count,
    last_count, kv_heads, n_heads,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, SOFT_CAP: gl.constexpr,
    SINKS: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, FP8_KV: gl.constexpr, RUN_B: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As ``packed_attention_kernel`` with BLOCK_M 128, for items that none follows. Without RUN_B, that is
    without windows, items may grow.

    Entry NEXT_TICKET of the counts is 0 before and after. A thread of the producer gets PRODUCER_REGISTERS, one of
    consumer 1 CONSUMER_REGISTERS, and one of consumer 0 what ``maxnreg`` leaves.
    """
    first = gl.load(counts_ptr + first_count)
    work = (gl.load(counts_ptr + last_count) - first) * kv_heads
    if gl.program_id(0) < work:
        gdc_launch_dependents()
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        kv_dtype: gl.constexpr = gl.float16 if FP8_KV else dtype
        full_arrivals: gl.constexpr = CONVERT_ARRIVALS if FP8_KV else COPY_ARRIVALS
        k_stages = gl.allocate_shared_memory(kv_dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        v_stages = gl.allocate_shared_memory(kv_dtype, [STAGES, BLOCK_N, HEAD_DIM], layout)
        q_stages = gl.allocate_shared_memory(dtype, [CONSUMERS * Q_STAGES, ROWS, HEAD_DIM], layout)
        q_offsets = gl.allocate_shared_memory(gl.int64, [CONSUMERS * ROWS // COPY_ROWS, COPY_ROWS], plain)
        kv_offsets = gl.allocate_shared_memory(gl.int64, [BLOCK_N // COPY_ROWS, COPY_ROWS], plain)
        work_tiles = gl.allocate_shared_memory(gl.int32, [Q_STAGES, WORK_COLS], plain)
        work_full = allocate_barriers(Q_STAGES)
        q_full = allocate_barriers(Q_STAGES)
        k_full = allocate_barriers(STAGES)
        v_full = allocate_barriers(STAGES)
        q_empty = allocate_barriers(Q_STAGES)
        k_empty = allocate_barriers(STAGES)
        v_empty = allocate_barriers(STAGES)
        stagger = allocate_barriers(Q_STAGES)
        for i in gl.static_range(Q_STAGES):
            mbarrier.init(q_full.index(i), count=COPY_ARRIVALS)
            mbarrier.init(q_empty.index(i), count=EMPTY_ARRIVALS)
            mbarrier.init(stagger.index(i), count=STAGGER_ARRIVALS)
            mbarrier.init(work_full.index(i), count=WORK_FULL_ARRIVALS)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=full_arrivals)
            mbarrier.init(v_full.index(i), count=full_arrivals)
            mbarrier.init(k_empty.index(i), count=EMPTY_ARRIVALS)
            mbarrier.init(v_empty.index(i), count=EMPTY_ARRIVALS)
        pipe = Pipeline(
            q_stages=q_stages, k_stages=k_stages, v_stages=v_stages, work_tiles=work_tiles, work_full=work_full,
            q_full=q_full, k_full=k_full, v_full=v_full, q_empty=q_empty, k_empty=k_empty, v_empty=v_empty,
            stagger=stagger,
        )  # fmt: skip
        consumer = ConsumerArgs(
            out_ptr=out_ptr, lse2_ptr=lse2_ptr, part_out_ptr=part_out_ptr, part_lse2_ptr=part_lse2_ptr,
            query_rows_ptr=query_rows_ptr, partial_rows_ptr=partial_rows_ptr, win_lo_ptr=win_lo_ptr,
            win_hi_ptr=win_hi_ptr, sinks_ptr=sinks_ptr, work=work, kv_heads=kv_heads, n_heads=n_heads,
            stride_out_token=stride_out_token, stride_out_head=stride_out_head, scale2=scale2, cap2=cap2,
            v_scale=v_scale,
        )  # fmt: skip
        producer = ProducerArgs(
            q_ptr=q_ptr, k_ptr=k_ptr, v_ptr=v_ptr, slots_ptr=slots_ptr, items_ptr=items_ptr, counts_ptr=counts_ptr,
            query_rows_ptr=query_rows_ptr, kv_lens_ptr=kv_lens_ptr, first=first, work=work, kv_heads=kv_heads,
            stride_q_token=stride_q_token, stride_q_head=stride_q_head, stride_page=stride_page,
            stride_slot=stride_slot, stride_kv_head=stride_kv_head, q_offsets=q_offsets, kv_offsets=kv_offsets,
        )  # fmt: skip
        raw = kv_offsets  # something to pass on, which nobody takes
        if FP8_KV:
            raw = gl.allocate_shared_memory(
                k_ptr.dtype.element_ty, [BLOCK_N // COPY_ROWS, COPY_ROWS, HEAD_DIM],
                gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
            )  # fmt: skip
        gl.warp_specialize(
            [
                (consume, (0, consumer, pipe, GROUP, HEAD_DIM, BLOCK_N, STAGES, Q_STAGES, SOFT_CAP, SINKS, RUN_B)),
                (consume, (1, consumer, pipe, GROUP, HEAD_DIM, BLOCK_N, STAGES, Q_STAGES, SOFT_CAP, SINKS, RUN_B)),
                (produce, (producer, pipe, raw, GROUP, HEAD_DIM, BLOCK_N, PAGE, STAGES, Q_STAGES, FP8_KV, RUN_B)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
