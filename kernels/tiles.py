"""Tile classes of the packed attention kernels, and how plans for them are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.fitting import UNCUT_TOKENS
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.profiles import H200, profile_for


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile class.

    Attributes:
        kernel: which kernel runs it. "hopper_decode": on Hopper, for plans without run B and without a custom mask;
            the Triton kernel runs all others. "hopper_extend": on Hopper only.
        rows: query rows, that is tokens times query heads of a KV head.
        tokens: KV tokens of a block.
        stages: blocks in flight.
        triton_tokens, triton_stages: the same where the Triton kernel runs a class of the Hopper decode kernel, which
            has more registers and shared memory for a block; 0 for the same.
        q_stages: of the extend kernel, queries of so many items: with two those of the next come early.
        out_parts: of the Hopper decode kernel, into which the columns of an output are divided: 1 or 2.
        raw_stages: for FP8 KV: blocks (of the extend kernel: K or V of a block) whose bytes are in flight, besides the
            ``stages`` that are converted; 0 for KV that is multiplied as it is, and for the Triton kernel.
        warps: of a CTA of the Triton kernel; 0 where that never runs the class.
        registers: ``maxnreg``, low enough for CTAs of both tile classes to be co-resident. Of the Hopper kernels: the
            mean of all threads.
        producer_registers: of a thread of the Hopper kernels' producer warpgroup; 0 for the Triton kernel.
        resident: CTAs of an SM at once, by which KV is split.
        programs: CTAs launched for each SM.
        shares: CTAs of an SM among which a class that runs alone is divided (Stream-K); 0 for never.
        units: of plans in units (``planning.units``), whose classes are all one: items may grow, and partial results
            are merged in one form, so that the bits of a query depend on nothing but its own row.
        goes_on: the class of those items that go on from the state of others.
    """

    kernel: Literal["triton", "hopper_decode", "hopper_extend"]
    rows: int
    tokens: int
    stages: int
    triton_tokens: int = 0
    triton_stages: int = 0
    q_stages: int = 2
    out_parts: int = 1
    warps: int
    registers: int
    producer_registers: int = 0
    raw_stages: int = 0
    resident: int
    programs: int
    shares: int = 0
    units: bool = False
    goes_on: bool = False

    @property
    def consumer_registers(self) -> int:
        """Of a thread of the extend kernel's two consumer warpgroups, beside one producer warpgroup."""
        return (3 * self.registers - self.producer_registers) // 2


# Large tiles of decode plans, and of all plans where no Hopper kernel takes them.
_LARGE = Tile(
    kernel="hopper_decode", rows=64, tokens=64, stages=3, warps=4, registers=112, producer_registers=64,
    resident=1, programs=1,
)  # fmt: skip
# Largest class first; measured on an H200 (docs/kernels.md).
TILES = {
    64: (
        replace(_LARGE, tokens=128, triton_tokens=64, registers=128),
        Tile(kernel="triton", rows=16, tokens=32, stages=3, warps=4, registers=128, resident=4, programs=8, shares=4),
    ),
    128: (
        _LARGE,
        Tile(kernel="triton", rows=16, tokens=32, stages=3, warps=4, registers=96, resident=4, programs=8, shares=5),
    ),
    256: (
        Tile(
            kernel="hopper_decode", rows=64, tokens=64, stages=2, triton_tokens=32, out_parts=2, warps=4, registers=160,
            producer_registers=88, resident=1, programs=1,
        ),
        Tile(kernel="triton", rows=16, tokens=32, stages=2, warps=4, registers=168, resident=3, programs=6, shares=3),
    ),
}  # fmt: skip
# The small class where a token has more rows than that of ``TILES``: up to 32 query heads of a KV head. Unmeasured; so
# many registers that it spills none, and two CTAs run beside one of the large class.
WIDE_TILES = {
    64: Tile(kernel="triton", rows=32, tokens=64, stages=3, warps=4, registers=128, resident=4, programs=8, shares=4),
    128: Tile(kernel="triton", rows=32, tokens=32, stages=3, warps=4, registers=144, resident=3, programs=6, shares=3),
}
# Of plans with run B on Hopper, and of those that ``decodes_in_one_launch``.
_EXTEND = Tile(
    kernel="hopper_extend", rows=128, tokens=128, stages=2, warps=0, registers=168, producer_registers=56,
    resident=1, programs=1,
)  # fmt: skip
EXTEND_TILES = {64: (_EXTEND,), 128: (_EXTEND,), 256: (replace(_EXTEND, tokens=64, q_stages=1),)}


FP8_CAPABILITY = (8, 9)  # of a GPU whose FP8 Triton converts
# The same for FP8 KV; measured at head_dim 128 on an H200.
FP8_TILES = {
    64: (replace(TILES[64][0], raw_stages=3), TILES[64][1]),
    128: (
        replace(_LARGE, raw_stages=3),
        # two warps, so that six of them have registers enough on a multiprocessor
        replace(TILES[128][1], warps=2, registers=168, resident=6, programs=12, shares=6),
    ),
    256: (
        replace(
            TILES[256][0], tokens=32, stages=3, triton_stages=2, registers=136, producer_registers=64, raw_stages=2
        ),
        TILES[256][1],
    ),
}
_EXTEND_FP8 = replace(_EXTEND, producer_registers=104, raw_stages=1)
FP8_EXTEND_TILES = {64: (_EXTEND_FP8,), 128: (_EXTEND_FP8,)}


# CTAs of an SM in the deterministic mode, where no other class runs beside the large one: as many as its shared memory
# holds, by head dimension and bytes of a KV element; else 1.
UNIT_PROGRAMS = {(64, 2): 2, (128, 2): 2}


def unit_tiles(shape: AttentionShape) -> tuple[Tile, ...]:
    """The tile classes of the deterministic mode, of the same kernel: whether a span is shared or private, and whether
    an item begins a unit or goes on with it.

    Raises:
        ValueError: see ``decode_tiles``.
    """
    large = decode_tiles(shape.head_dim, shape.group_size, shape.kv_bytes)[0]
    programs = UNIT_PROGRAMS.get((shape.head_dim, shape.kv_bytes), 1)
    begins = replace(large, units=True, resident=programs, programs=programs)
    return begins, replace(begins, goes_on=True)


def unit_policy(shape: AttentionShape, unit_tokens: int, parts: bool = True) -> TilePolicy:
    """How a plan for ``unit_tiles`` is cut.

    Args:
        parts: whether spans may end within units: the Triton kernel, in whose interpreter such plans are tested, does
            not go on from another item's state.

    Raises:
        ValueError: a block of KV would lie in two units.
    """
    tile, _ = unit_tiles(shape)
    if unit_tokens <= 0 or unit_tokens % math.lcm(tile.tokens, tile.triton_tokens or tile.tokens):
        raise ValueError(f"units of {unit_tokens} tokens are not of whole blocks of {tile.tokens}")
    queries = max(1, tile.rows // shape.group_size)
    return TilePolicy((queries, queries), UNCUT_TOKENS, unit_tokens=unit_tokens, block_tokens=tile.tokens * parts)


def most_group_size(head_dim: int) -> int:
    """Most query heads of a KV head, by the rows of the smallest tile."""
    return max(tile.rows for tile in (TILES[head_dim][-1], WIDE_TILES.get(head_dim)) if tile is not None)


def decode_tiles(head_dim: int, group_size: int = 1, kv_bytes: int = 2) -> tuple[Tile, ...]:
    """The tile classes of plans without run B, on any GPU.

    Args:
        group_size: query heads of a KV head.
        kv_bytes: of an element of KV: 1 for FP8.

    Raises:
        ValueError: a head dimension or group size that the kernels do not know.
    """
    if head_dim not in TILES:
        raise ValueError(f"packed attention knows head dimensions {sorted(TILES)}, not {head_dim}")
    if group_size > (most := most_group_size(head_dim)):
        raise ValueError(
            f"packed attention at head dimension {head_dim} knows up to {most} query heads of a KV head, not "
            f"{group_size}"
        )
    tiles = (FP8_TILES if kv_bytes == 1 else TILES)[head_dim]
    return tiles if group_size <= tiles[-1].rows else (*tiles[:-1], WIDE_TILES[head_dim])


def tiles_for(
    head_dim: int, device: torch.device, extend: bool = False, *, group_size: int = 1, kv_bytes: int = 2
) -> tuple[Tile, ...]:
    """The tile classes on ``device``; for a layer's, see ``shape_tiles``.

    Args:
        extend: whether the extend kernel runs the plans, if this GPU has it.
        group_size, kv_bytes: see ``decode_tiles``.

    Raises:
        ValueError: see ``decode_tiles``.
    """
    tiles = decode_tiles(head_dim, group_size, kv_bytes)
    extends = FP8_EXTEND_TILES if kv_bytes == 1 else EXTEND_TILES
    return extends[head_dim] if extend and head_dim in extends and is_hopper(device) else tiles


def decodes_in_one_launch(shape: AttentionShape) -> bool:
    """Whether the extend kernel alone runs decode plans of this shape on Hopper.

    One or two KV heads, as a tensor-parallel rank has them, leave the two classes few items: where nothing is shared
    they are slower than FlashAttention-3 (docs/kernels.md has the heads that were measured on an H200). Shared batches
    may take longer or shorter in one launch. With more KV heads, or fewer rows a token, two classes are the faster.
    """
    few = shape.kv_heads <= 2 and shape.group_size >= 4
    return few and (shape.head_dim, shape.kv_bytes) == (128, 2)


def hopper_decode_tiles(shape: AttentionShape) -> tuple[Tile, ...]:
    """The tile classes of decode plans on Hopper.

    Raises:
        ValueError: see ``decode_tiles``.
    """
    tiles = decode_tiles(shape.head_dim, shape.group_size, shape.kv_bytes)
    return EXTEND_TILES[shape.head_dim] if decodes_in_one_launch(shape) else tiles


def shape_tiles(
    shape: AttentionShape, device: torch.device, extend: bool = False, unit_tokens: int = 0, masked: bool = False
) -> tuple[Tile, ...]:
    """The tile classes of a layer of this shape on ``device``.

    Args:
        extend: whether plans have run B and no custom mask.
        unit_tokens: if not 0, of plans in units (``unit_tiles``).
        masked: whether queries have a custom mask, of which the extend kernel knows nothing.

    Raises:
        ValueError: see ``decode_tiles``.
    """
    if unit_tokens:
        return unit_tiles(shape)
    if not extend and not masked and is_hopper(device):
        return hopper_decode_tiles(shape)
    return tiles_for(shape.head_dim, device, extend, group_size=shape.group_size, kv_bytes=shape.kv_bytes)


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def multiprocessors(device: torch.device) -> int:
    """Those of an H200 where there is no GPU."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else H200.multiprocessors


def device_profile(device: torch.device) -> DeviceProfile:
    """The times of a GPU (``profiles.profile_for``); those of an H200 where there is none."""
    if device.type != "cuda":
        return H200
    return profile_for(torch.cuda.get_device_name(device), multiprocessors(device))


def tile_policy(
    shape: AttentionShape, device: torch.device, extend: bool = False, unit_tokens: int = 0, masked: bool = False
) -> TilePolicy:
    """How a plan for these kernels is cut on ``device``, for the tiles of ``shape_tiles``."""
    if unit_tokens:
        return unit_policy(shape, unit_tokens, is_hopper(device))
    tiles = shape_tiles(shape, device, extend, masked=masked)
    return policy_of(shape, tiles, multiprocessors(device), device_profile(device))


def decode_cost(shape: AttentionShape, tiles: tuple[Tile, ...], profile: DeviceProfile) -> CostModel:
    """By which spans are chosen for decode plans of these tiles."""
    if tiles[0].kernel == "hopper_extend":  # at decode, unlike at extend, what tiles read counts, too
        return replace(
            profile.extend_cost(tiles[0].rows),
            bytes_per_us=profile.bytes_per_us,
            reread_bytes_per_us=profile.reread_bytes_per_us,
        )
    cost = profile.decode_cost.for_group_size(shape.group_size)
    return cost.in_units() if tiles[0].units else cost


def policy_of(shape: AttentionShape, tiles: tuple[Tile, ...], sms: int, profile: DeviceProfile = H200) -> TilePolicy:
    """The same by the times of ``profile`` on a GPU of ``sms`` multiprocessors."""
    timings = [
        profile.extend_timing(shape, sms, rows=tile.rows, block=tile.tokens)
        if tile.kernel == "hopper_extend"
        else profile.decode_timing(
            shape, sms, rows=tile.rows, resident=tile.resident, launched=tile.programs, stream_k=tile.shares
        )
        for tile in tiles
    ]
    tile_queries = tuple(max(1, tile.rows // shape.group_size) for tile in tiles)
    return TilePolicy(tile_queries, UNCUT_TOKENS, timings=tuple(timings))
