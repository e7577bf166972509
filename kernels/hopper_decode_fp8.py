"""The producer warpgroup of ``attention_hopper_decode`` for FP8 KV; its map and barriers are there."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from packinfer_sgl.kernels.columns import A_LEN, A_OFF, N_COLS
from packinfer_sgl.kernels.hopper_common import convert, empty_phase, grown, raw_layout


class RawRing(NamedTuple):
    """KV blocks in FP8, as they are: shared memory [RAW_STAGES, BLOCK_N, HEAD_DIM]."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor


@gluon.jit
def _convert_block(pipe, raw, n, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, RAW_STAGES: gl.constexpr):
    """Fill the ``n``th block's stage from its raw bytes, which have landed."""
    stage = n % STAGES
    mbarrier.wait(pipe.k_empty.index(stage), empty_phase(n, STAGES))
    convert(pipe.k_stages.index(stage), raw.k.index(n % RAW_STAGES), HEAD_DIM)
    fence_async_shared()  # products read through the async proxy
    mbarrier.arrive(pipe.k_full.index(stage), count=1)
    mbarrier.wait(pipe.v_empty.index(stage), empty_phase(n, STAGES))
    convert(pipe.v_stages.index(stage), raw.v.index(n % RAW_STAGES), HEAD_DIM)
    fence_async_shared()
    mbarrier.arrive(pipe.v_full.index(stage), count=1)


@gluon.jit
def produce_from_fp8(
    args, pipe, raw, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    RAW_STAGES: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """The producer warpgroup: copy the bytes of all items' KV blocks to the ring, up to RAW_STAGES blocks at once, and
    convert them one after the other."""
    layout: gl.constexpr = raw_layout(HEAD_DIM)
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
        slot = gl.load(a_slots + at)  # [BLOCK_N]
        for j in range(0, gl.maximum(a_len, 1), BLOCK_N):
            if PAGE == 1:
                kv_row = slot.to(gl.int64) * args.stride_slot
            else:
                kv_row = (slot // PAGE).to(gl.int64) * args.stride_page + (slot % PAGE).to(gl.int64) * args.stride_slot
            inside = gl.expand_dims(j + at < a_len, 1)  # [BLOCK_N, 1]
            slot = gl.load(a_slots + j + BLOCK_N + at)
            offset = gl.expand_dims(head + kv_row, 1) + gl.expand_dims(d, 0)  # [BLOCK_N, HEAD_DIM]
            async_copy.async_copy_global_to_shared(raw.k.index(n % RAW_STAGES), args.k_ptr + offset, mask=inside)
            async_copy.async_copy_global_to_shared(raw.v.index(n % RAW_STAGES), args.v_ptr + offset, mask=inside)
            async_copy.commit_group()
            n += 1
            if n >= RAW_STAGES:
                async_copy.wait_group(RAW_STAGES - 1)
                _convert_block(pipe, raw, n - RAW_STAGES, HEAD_DIM, STAGES, RAW_STAGES)
    async_copy.wait_group(0)
    for last in range(gl.maximum(n - RAW_STAGES + 1, 0), n):
        _convert_block(pipe, raw, last, HEAD_DIM, STAGES, RAW_STAGES)
