"""What the producer and the consumers of ``attention_hopper_extend`` share: stages, barriers, work tile."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from packinfer_sgl.kernels.columns import A_LEN, N_COLS, TILE_CLASS

CONSUMERS = gl.constexpr(2)  # warpgroups, each ROWS of a tile
WORK_COLS = gl.constexpr(16)  # of a work tile: N_COLS, up to a power of two

# Arrivals that complete a phase, besides COPY_ARRIVALS; those of a warpgroup count once.
WORK_FULL_ARRIVALS = gl.constexpr(1)  # of the producer
EMPTY_ARRIVALS = CONSUMERS
STAGGER_ARRIVALS = gl.constexpr(1)  # of consumer 0
W = TILE_CLASS  # column of a work tile that holds ``w`` in place of the item's tile class


class Pipeline(NamedTuple):
    """Stages in shared memory, and their barriers ([stages, 1]); see the map in ``attention_hopper_extend``."""

    q_stages: gl.shared_memory_descriptor  # [CONSUMERS * Q_STAGES, ROWS, HEAD_DIM]
    k_stages: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, HEAD_DIM]
    v_stages: gl.shared_memory_descriptor
    work_tiles: gl.shared_memory_descriptor  # [Q_STAGES, WORK_COLS] int32
    work_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    stagger: gl.shared_memory_descriptor


@gluon.jit
def n_blocks(length, BLOCK_N: gl.constexpr):
    """KV blocks of an item; at least one, also where there is nothing to see."""
    return gl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def write_work_tile(work_tile, item_ptr, w, a_len):
    """Pass an item on to the consumers: its columns, ``w`` in column W, and run A as long as it is now."""
    col = gl.arange(0, WORK_COLS, gl.BlockedLayout([1], [32], [4], [0]))
    values = gl.load(item_ptr + col, mask=col < N_COLS, other=0)
    work_tile.store(gl.where(col == W, w, gl.where(col == A_LEN, a_len, values)))


@gluon.jit
def read_work_tile(work_tile, COLUMN: gl.constexpr):
    """A column as a scalar. Gluon loads only tensors from shared memory: the maximum over one element makes a scalar of
    it, which every thread of the warpgroup then holds."""
    return gl.max(work_tile.slice(COLUMN, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
