"""FP8 KV on its way into the stages of ``attention_hopper_extend``; the map there says who waits for whom.

The bytes of K or of V of one block are in flight, in ``raw`` [chunks, rows of a chunk, HEAD_DIM]. Chunk by chunk those
of the next take their place: K0, V0, K1, V1, ... of an item.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from packinfer_sgl.kernels.hopper_common import convert, empty_phase, raw_layout


@gluon.jit
def _copy_chunk(raw, i: gl.constexpr, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr):
    layout: gl.constexpr = raw_layout(HEAD_DIM)
    rows: gl.constexpr = raw.shape[1]
    row = i * rows + gl.arange(0, rows, gl.SliceLayout(1, layout))
    d = gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout)), 0)
    from_row = gl.multiple_of(offsets.index(i).load(gl.SliceLayout(1, layout)), 16)
    offset = gl.expand_dims(from_row, 1) + d  # [rows of a chunk, HEAD_DIM]
    inside = gl.expand_dims(row < n_inside, 1)
    async_copy.async_copy_global_to_shared(raw.index(i), pointer + offset, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _copy_half(raw, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr):
    """Begin to copy the rows at ``offsets`` [chunks, rows of a chunk]; those past ``n_inside`` become 0."""
    chunks: gl.constexpr = raw.shape[0]
    for i in gl.static_range(chunks):
        _copy_chunk(raw, i, pointer, offsets, n_inside, HEAD_DIM)


@gluon.jit
def _convert_and_copy_half(tile, raw, pointer, offsets, n_inside, HEAD_DIM: gl.constexpr):
    """Convert what was copied last to ``tile`` [rows, HEAD_DIM], while the rows at ``offsets`` take its place."""
    chunks: gl.constexpr = raw.shape[0]
    rows: gl.constexpr = raw.shape[1]
    for i in gl.static_range(chunks):
        async_copy.wait_group(chunks - 1)
        convert(tile.slice(i * rows, rows), raw.index(i), HEAD_DIM)
        _copy_chunk(raw, i, pointer, offsets, n_inside, HEAD_DIM)
    fence_async_shared()  # products read through the async proxy


@gluon.jit
def fill_stages(
    pipe, raw, k_pointer, v_pointer, offsets, n_inside, n, is_first, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """For block ``n`` of the CTA: fill its stage of K, and, unless it is the first of its item, that of V of the block
    before. Its own V is on its way afterwards."""
    stage = n % STAGES
    if is_first:
        _copy_half(raw, k_pointer, offsets, n_inside, HEAD_DIM)
    else:
        before = (n - 1) % STAGES
        mbarrier.wait(pipe.v_empty.index(before), empty_phase(n - 1, STAGES))
        _convert_and_copy_half(pipe.v_stages.index(before), raw, k_pointer, offsets, n_inside, HEAD_DIM)
        mbarrier.arrive(pipe.v_full.index(before), count=1)
    mbarrier.wait(pipe.k_empty.index(stage), empty_phase(n, STAGES))
    _convert_and_copy_half(pipe.k_stages.index(stage), raw, v_pointer, offsets, n_inside, HEAD_DIM)
    mbarrier.arrive(pipe.k_full.index(stage), count=1)


@gluon.jit
def fill_last(pipe, raw, n, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Fill the stage of V of block ``n``, the last of its item."""
    chunks: gl.constexpr = raw.shape[0]
    rows: gl.constexpr = raw.shape[1]
    stage = n % STAGES
    mbarrier.wait(pipe.v_empty.index(stage), empty_phase(n, STAGES))
    async_copy.wait_group(0)
    for i in gl.static_range(chunks):
        convert(pipe.v_stages.index(stage).slice(i * rows, rows), raw.index(i), HEAD_DIM)
    fence_async_shared()
    mbarrier.arrive(pipe.v_full.index(stage), count=1)
