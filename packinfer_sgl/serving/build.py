"""Puts a router together: planners, runners and arena for one model, device and setting."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from packinfer_sgl.config import Config
from packinfer_sgl.kernels.copy_slots import SlotCopier
from packinfer_sgl.kernels.reference import copy_slots
from packinfer_sgl.kernels.tiles import device_profile, is_hopper, multiprocessors, shape_tiles, tile_policy
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.fitting import (
    UNLIMITED,
    Capacity,
    decode_capacity,
    units_capacity,
    verify_capacity,
)
from packinfer_sgl.planning.units import choose_unit
from packinfer_sgl.runners import cpu, cuda
from packinfer_sgl.runners.arena import SPANS_PER_ROW, Arena
from packinfer_sgl.serving.layers import LayerGate, full_pool, heads_of, is_fp8, sinks_of
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import Kind, PackedPath
from packinfer_sgl.serving.router import EAGER_ROWS, Router

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention

logger = logging.getLogger(__name__)


def build_router(
    stock: AttentionBackend,
    runner: Any,
    config: Config,
    layers: Sequence[RadixAttention],
    slots: range | None,
    stats: Stats,
    *,
    deterministic: bool = False,
) -> Router:
    """The router of layers of the first one's shape.

    Args:
        stock: the backend beneath.
        runner: SGLang's model runner.
        layers: those that can be packed.
        slots: of the runner's KV pool, for the arena.
        deterministic: whether the server is in SGLang's deterministic mode: decode is packed in units of KV, and all
            else is the stock backend's.
    """
    packed, pool = layers[0], runner.token_to_kv_pool
    shape = AttentionShape(*heads_of(packed), pool.dtype.itemsize)
    req_to_token = runner.req_to_token_pool.req_to_token
    arena = None if slots is None else _arena(runner, shape, slots, force=config.check)
    parts: dict[str, Any] = {
        "gate": LayerGate(heads_of(packed), stats, layers if is_fp8(pool) else ()), "stats": stats,
        "req_to_token": req_to_token, "check": config.check, "arena": arena,
    }  # fmt: skip
    # with context parallelism a rank has only some of the new tokens
    extend = config.extend if getattr(runner.server_args, "attn_cp_size", 1) == 1 else "off"
    if req_to_token.device.type == "cpu":
        make = CpuPaths(shape, config, stats, arena)
        decode = make.decode()  # now: it compiles
        path = make.extend(always=extend == "on") if extend != "off" else None
        return Router(**parts, on_gpu=False, make_decode=lambda max_rows: decode, extend=path, make_verify=None)
    stock.needs_cpu_seq_lens = True  # plans are made on the host
    paths = CudaPaths(shape, config, stats, req_to_token, pool.size, arena, deterministic=deterministic)
    if deterministic:
        return Router(
            **parts, on_gpu=True, make_decode=paths.decode, extend=None, make_verify=None,
            make_any_rows=paths.decode_of_any_rows, unit_tokens=paths.unit_tokens,
        )  # fmt: skip
    # what the device record does not know, soft-capped layers among it, is left to the stock backend
    known = is_hopper(paths.device) and device_profile(paths.device).knows(shape) and not packed.logit_cap
    path = None
    if extend == "on" or (extend == "auto" and known):
        path = paths.extend(always=extend == "on")
        k, v = pool.get_key_buffer(packed.layer_id), pool.get_value_buffer(packed.layer_id)
        forms = {None if s is None else s.dtype: s for s in map(sinks_of(runner.model).get, layers)}
        cuda.warm_up(path.planner, path.runner, k, v, runner.dtype, packed.logit_cap, list(forms.values()))
    verifies = extend != "off" and known and not _masks_chains(stock)
    verify = paths.verify if verifies else None
    return Router(**parts, on_gpu=True, make_decode=paths.decode, extend=path, make_verify=verify)


class CpuPaths:
    """Makes the packed paths of a CPU."""

    def __init__(self, shape: AttentionShape, config: Config, stats: Stats, arena: Arena | None = None) -> None:
        self.shape, self.config, self.stats, self.arena = shape, config, stats, arena

    def decode(self) -> PackedPath:
        planner = cpu.decode_planner(self.shape, grouping=self.config.grouping)
        planner.compile()
        runner = cpu.CpuRunner(self.shape, room_tokens=planner.room_tokens)
        return PackedPath(Kind.DECODE, planner, runner, self.stats, check=self.config.check, arena=self.arena)

    def extend(self, *, always: bool) -> PackedPath:
        """``always``: every batch is packed, whatever is expected."""
        planner = cpu.extend_planner(self.shape, grouping=self.config.grouping, always=always)
        return PackedPath(Kind.EXTEND, planner, cpu.CpuRunner(self.shape), self.stats, check=self.config.check)


class CudaPaths:
    """Makes the packed paths of a GPU."""

    def __init__(
        self,
        shape: AttentionShape,
        config: Config,
        stats: Stats,
        req_to_token: torch.Tensor,
        pool_tokens: int,
        arena: Arena | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        """
        Args:
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            pool_tokens: KV tokens in the pool.
            deterministic: see ``build_router``. The unit is chosen for EAGER_ROWS rows, so that it depends on the
                layers' shape and the context length only, and not on which graphs are captured.
        """
        self.shape, self.config, self.stats, self.arena = shape, config, stats, arena
        self.device = req_to_token.device
        self._sizes = {"context_tokens": req_to_token.shape[1], "pool_tokens": pool_tokens}
        self.unit_tokens = 0
        if deterministic:
            self.unit_tokens = choose_unit(shape, max_rows=EAGER_ROWS, context_tokens=req_to_token.shape[1])

    def decode(self, max_rows: int) -> PackedPath:
        """In buffers at fixed addresses, so that a captured graph replays any plan."""
        sizes = {"max_rows": max_rows, "room_tokens": cuda.ROOM_TOKENS, "row_spans": SPANS_PER_ROW, **self._sizes}
        unit = self.unit_tokens
        capacity = units_capacity(unit, **sizes) if unit else decode_capacity(self.shape, **sizes)
        path = self._decode(capacity, max_rows)
        logger.info("packinfer: decode buffers for %d rows: %.0f MB", max_rows, path.runner.nbytes / 1e6)
        return path

    def decode_of_any_rows(self) -> PackedPath:
        """In buffers that grow: no graph runs it."""
        return self._decode(None, UNLIMITED)

    def _decode(self, capacity: Capacity | None, max_rows: int) -> PackedPath:
        tiles = shape_tiles(self.shape, self.device, unit_tokens=self.unit_tokens)
        runner = cuda.CudaRunner(self.shape, tiles, self.device, capacity=capacity)
        planner = cuda.decode_planner(
            self.shape, self.device, grouping=self.config.grouping, limits=capacity or Capacity.unlimited(),
            unit_tokens=self.unit_tokens,
        )  # fmt: skip
        planner.compile()
        return PackedPath(
            Kind.DECODE, planner, runner, self.stats, check=self.config.check, max_rows=max_rows, arena=self.arena
        )

    def extend(self, *, always: bool) -> PackedPath:
        """In buffers that grow; ``always``: every batch is packed, whatever is expected."""
        tiles = shape_tiles(self.shape, self.device, extend=True)
        planner = cuda.extend_planner(
            self.shape,
            tiles,
            multiprocessors(self.device),
            grouping=self.config.grouping,
            always=always,
            profile=device_profile(self.device),
        )
        runner = cuda.CudaRunner(self.shape, tiles, self.device)
        return PackedPath(Kind.EXTEND, planner, runner, self.stats, check=self.config.check)

    def verify(self, drafts: int, max_rows: int) -> PackedPath:
        """Of ``drafts`` new tokens a row, a chain; in buffers at fixed addresses. Each step has a plan of its own: rows
        grow by as many drafts as were accepted."""
        tiles = shape_tiles(self.shape, self.device, extend=True)
        tile_queries = max(1, tiles[0].rows // self.shape.group_size)
        capacity = verify_capacity(self.shape, drafts, tile_queries, max_rows=max_rows, **self._sizes)
        runner = cuda.CudaRunner(self.shape, tiles, self.device, capacity=capacity, replayed=True)
        planner = cuda.extend_planner(
            self.shape, tiles, multiprocessors(self.device), grouping=self.config.grouping, always=True,
            profile=device_profile(self.device), limits=capacity, must_fit=True,
        )  # fmt: skip
        return PackedPath(
            Kind.VERIFY, planner, runner, self.stats, check=self.config.check, max_rows=max_rows, row_tokens=drafts
        )


def _masks_chains(stock: AttentionBackend) -> bool:
    """Whether it gives verify steps a mask, though drafts are a chain; layers with a mask are not packed."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return isinstance(stock, TritonAttnBackend)


def _arena(runner: Any, shape: AttentionShape, slots: range, *, force: bool) -> Arena:
    pool = full_pool(runner.token_to_kv_pool)
    buffers = [*pool.k_buffer, *pool.v_buffer]
    on_cpu = buffers[0].device.type == "cpu"
    policy = CPU.decode_policy if on_cpu else tile_policy(shape, buffers[0].device)
    return Arena(
        slots,
        buffers,
        runner.req_to_token_pool.req_to_token,
        functools.partial(copy_slots, buffers) if on_cpu else SlotCopier(buffers).copy,
        gain=cpu.ARENA_GAIN if on_cpu else cuda.ARENA_GAIN,
        tile_queries=policy.tile_queries[0],
        force=force,
    )
