"""Tile classes of the packed attention kernels, and how plans for them are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.profiles import H200, profile_for


@dataclass(frozen=True)
class Tile:
    """One tile class.

    Attributes:
        rows: query rows, that is tokens times query heads of a KV head.
        tokens: KV tokens of a block.
        warps: of a program of the plain kernel; 0 where there is none.
        stages: blocks in flight.
        registers: most of a thread; so few that programs of both classes fit a multiprocessor together. Of the
            warp-specialised kernels, which run on Hopper in place of the plain one: the mean of all threads.
        gather_registers: of a gathering thread of the warp-specialised kernel; 0 for the plain one everywhere.
        resident: programs of a multiprocessor at once, by which pieces are cut.
        programs: programs launched for each multiprocessor.
        shares: programs of a multiprocessor among which a class that runs alone is divided; 0 for never.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    registers: int
    gather_registers: int
    resident: int
    programs: int
    shares: int

    @property
    def multiply_registers(self) -> int:
        """Of a multiplying thread of the extend kernel, with two such warpgroups for each that gathers."""
        return (3 * self.registers - self.gather_registers) // 2


# Largest class first. Those of head_dim 128 were measured with scripts/tune_kernels.py on an H200; 64 and 256 are
# right by test, but their speed is unmeasured.
TILES = {
    64: (Tile(64, 64, 4, 3, 96, 64, 1, 1, 0), Tile(16, 64, 4, 3, 128, 0, 4, 8, 5)),
    128: (Tile(64, 64, 4, 3, 96, 64, 1, 1, 0), Tile(16, 32, 4, 3, 96, 0, 4, 8, 5)),
    256: (Tile(64, 32, 4, 2, 255, 0, 1, 1, 0), Tile(16, 32, 4, 2, 255, 0, 2, 4, 2)),
}

# Of extend plans on Hopper, which run on kernels/attention_hopper_extend.py. Unmeasured at head_dim 64.
EXTEND_TILES = {64: (Tile(128, 128, 0, 2, 168, 56, 1, 1, 0),), 128: (Tile(128, 128, 0, 2, 168, 56, 1, 1, 0),)}


def tiles_for(head_dim: int, device: torch.device, extend: bool = False) -> tuple[Tile, ...]:
    """The tile classes for a head dimension; raises ValueError for one that the kernels do not know.

    Args:
        extend: whether plans have run B, and no custom mask.
    """
    if head_dim not in TILES:
        raise ValueError(f"packed attention knows head dimensions {sorted(TILES)}, not {head_dim}")
    return EXTEND_TILES[head_dim] if extend and head_dim in EXTEND_TILES and is_hopper(device) else TILES[head_dim]


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


def tile_policy(shape: AttentionShape, device: torch.device, extend: bool = False) -> TilePolicy:
    """How a plan for these kernels is cut on ``device``, for ``tiles_for(shape.head_dim, device, extend)``."""
    return policy_of(
        shape, tiles_for(shape.head_dim, device, extend), multiprocessors(device), device_profile(device)
    )  # fmt: skip


def policy_of(shape: AttentionShape, tiles: tuple[Tile, ...], sms: int, profile: DeviceProfile = H200) -> TilePolicy:
    """The same by the times of ``profile`` on a GPU of ``sms`` multiprocessors."""
    timings = [
        profile.extend_timing(shape, sms, rows=tile.rows, block=tile.tokens)
        if tile.rows > 64  # the extend kernel
        else profile.decode_timing(
            shape, sms, rows=tile.rows, resident=tile.resident, launched=tile.programs, stream_k=tile.shares
        )
        for tile in tiles
    ]
    tile_queries = tuple(max(1, tile.rows // shape.group_size) for tile in tiles)
    return TilePolicy(tile_queries, max_split_tokens=1 << 30, timings=tuple(timings))
