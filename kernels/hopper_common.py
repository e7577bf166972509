"""What the Hopper kernels are made of: layouts, barriers, the parity that a wait asks for, FP8, soft cap, sinks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from packinfer_sgl.kernels.columns import A_POS, OPEN_ROW

ROWS = gl.constexpr(64)  # query rows of one consumer warpgroup: those of one product
# Arrivals that complete a phase of a "full" barrier that copies fill: each thread of the producer warpgroup arrives
# when its own copies have landed.
COPY_ARRIVALS = gl.constexpr(128)
# Of one that the producer fills by converting: the warpgroup is past a barrier of its own.
CONVERT_ARRIVALS = gl.constexpr(1)
_TANH_FACTOR = gl.constexpr(2.0 * 1.4426950408889634)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def row_layout(head_dim):  # type: ignore[no-untyped-def]
    """[rows, head_dim] over a warpgroup: each thread moves 8 neighbouring elements, 16 bytes."""
    threads = head_dim // 8  # of a row
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])


@gluon.constexpr_function
def raw_layout(head_dim):  # type: ignore[no-untyped-def]
    """The same for elements of one byte: each thread moves 16 of them."""
    threads = head_dim // 16  # of a row
    return gl.BlockedLayout([1, 16], [32 // threads, threads], [4, 1], [1, 0])


@gluon.jit
def allocate_barriers(N: gl.constexpr):
    """N barriers, not yet initialised: [N, 1] in shared memory."""
    return gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())


@gluon.jit
def convert(tile, raw, HEAD_DIM: gl.constexpr):
    """FP8 rows that have landed in ``raw``, to rows of a product's operand: exact in float16. Each thread reads 8
    elements: so a quarter of a warp writes 128 bytes in a row, which no two of its threads do to the same bank."""
    tile.store(raw.load(row_layout(HEAD_DIM)).to(tile.dtype))


@gluon.jit
def grown(item_ptr, a_len, kv_lens_ptr):
    """Length of run A now: of an item that grows, up to the current length of its row."""
    open_row = gl.load(item_ptr + OPEN_ROW)
    kv_len = gl.load(kv_lens_ptr + gl.maximum(open_row, 0)).to(gl.int32)
    return gl.where(open_row >= 0, kv_len - gl.load(item_ptr + A_POS), a_len)


# The ``n``th use of a ring of STAGES is in stage n % STAGES. A wait returns when the phase of the given parity is
# complete; on a fresh barrier the phase "before the first" counts as complete and has parity 1.


@gluon.jit
def full_phase(n, STAGES: gl.constexpr):
    """Parity for a consumer's wait: the stage has been filled for its ``n``th use."""
    return (n // STAGES) & 1


@gluon.jit
def empty_phase(n, STAGES: gl.constexpr):
    """Parity for the producer's wait: the use before the ``n``th is over; the first STAGES waits return at once."""
    return (n // STAGES) & 1 ^ 1


@gluon.jit
def part_of_cap(s, scale2, cap2):
    """``tanh(scale * s / cap)``, by exp2: exact at both ends."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(s * scale2 * _TANH_FACTOR / cap2))


@gluon.jit
def soft_capped(s, scale2, cap2):
    """``cap * tanh(scale * s / cap)`` in base 2."""
    return cap2 * part_of_cap(s, scale2, cap2)


@gluon.jit
def with_sink(top, total, sink2):
    """As ``attention_triton.with_sink``."""
    new_top = gl.maximum(top, sink2)
    shift = gl.where(new_top == -float("inf"), 0.0, new_top)
    keep = gl.exp2(top - shift)
    return new_top, total * keep + gl.exp2(sink2 - shift), keep
