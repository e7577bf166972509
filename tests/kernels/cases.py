"""Random packed batches with poisoned memory, and attention row by row in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import Tile, tiles_for
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import SplitTiming, TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.units import within_units

POISON = 2**28  # a slot that no test has

# Extend batches: what the kernels meet in their run A and run B.
EXTENDS = {
    "prompts": {"shared": [0] * 6, "tails": [1, 31, 33, 64, 130, 257, 4], "new": [1, 31, 33, 64, 130, 257, 4]},
    "suffixes": {"shared": [300] * 7, "tails": [20, 1, 64, 90, 5, 33, 7, 128], "new": [20, 1, 60, 90, 5, 33, 7, 100]},
    "suffixes of whole blocks": {"shared": [256] * 3, "tails": [128, 64, 128, 64], "new": [128, 64, 64, 1]},
    "riding tails": {"shared": [300] * 7, "tails": [20, 1, 6, 9, 5, 3, 7, 12], "new": [20, 1, 6, 9, 5, 3, 7, 12],
                     "max_split_tokens": 1 << 30, "max_inline_tail_tokens": 200},
    "riding on a prefix in pieces": {"shared": [500, 500, 0, 200], "tails": [20, 8, 3, 9, 30], "new": [20, 8, 3, 9, 3],
                                     "max_split_tokens": 150, "max_inline_tail_tokens": 200},
    "a chunk": {"shared": [], "tails": [700], "new": [300], "max_split_tokens": 1 << 30},
    "a chunk in pieces": {"shared": [], "tails": [700], "new": [150], "max_split_tokens": 100},
    "two levels": {"shared": [200, 90, 200, 0, 200], "tails": [40, 9, 70, 2, 5, 33], "new": [40, 9, 70, 2, 5, 33]},
    "queries of shared tokens": {"shared": [100, 60, 100], "tails": [0, 0, 0, 5], "new": [20, 30, 99, 100]},
    "window": {"shared": [150] * 4, "tails": [200, 40, 90, 1, 60], "new": [150, 40, 60, 1, 60], "window_left": 70},
    "window of a token": {"shared": [50] * 2, "tails": [90, 1, 40], "new": [80, 1, 40], "window_left": 0},
}  # fmt: skip


@dataclass
class Case:
    plan: Plan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: list[torch.Tensor]  # of each row
    new: list[int]  # queries of each row
    visible: tuple[np.ndarray, np.ndarray] | None  # see ``make_plan``
    tiles: tuple[Tile, ...]
    kv_lens: torch.Tensor
    req_to_token: torch.Tensor
    pool_rows: torch.Tensor
    soft_cap: float
    sinks: torch.Tensor | None  # [query heads]
    v_scale: float

    @property
    def sm_scale(self) -> float:
        return self.q.shape[-1] ** -0.5


def random_case(
    seed: int,
    *,
    shared: list[int],
    tails: list[int],
    group: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    page_size: int = 1,
    max_split_tokens: int = 48,
    shares: int = 0,
    room_tokens: int = 8,
    soft_cap: float = 0.0,
    kv_dtype: torch.dtype | None = None,
    v_scale: float = 1.0,
    new: list[int] | None = None,
    window_left: int = -1,
    max_inline_tail_tokens: int = 0,
    tiles: tuple[Tile, ...] | None = None,
    sinks: torch.dtype | None = None,
    unit_tokens: int = 0,
) -> Case:
    """Rows of which neighbours ``i`` and ``i + 1`` share ``shared[i]`` tokens, each with a tail of its own.

    All KV that no row holds is NaN. Slots are scattered, page by page. With ``shares`` rows that share nothing are
    divided among so many programs. With ``new`` the batch is an extend: each row's last so many tokens are queries,
    which see no later token, and none that lies more than ``window_left`` (if that is not -1) before their own.
    ``sinks``: the type of those of the layer; one hides all tokens, one is so low that it does not count.
    ``kv_dtype``: that of the queries, if not another. Values count times ``v_scale``. ``unit_tokens``: cut into units
    of so many tokens.
    """
    rng = np.random.default_rng(seed)
    n = len(tails)
    tree = PrefixTree.from_neighbours(rng.permutation(n).tolist(), shared)
    tree.check_integrity()
    lens = np.zeros(n, np.int32)
    lens[tree.row_order] = tree.tail_start + np.array(tails, np.int32)[tree.row_order]
    lens = np.maximum(lens, 1)
    total = int(tree.unique_tokens(lens))
    # spans of every row begin a page in SGLang; here slots are single, whatever the page size
    pages = -(-total // page_size) + 8
    free = (rng.permutation(pages)[:, None] * page_size + np.arange(page_size)).reshape(-1)
    table = np.full((n + 3, int(lens.max()) + room_tokens + 1), -(10**6), np.int32)
    pool_row = rng.permutation(n + 3)[:n]
    used = 0

    def take(count: int) -> np.ndarray:
        nonlocal used
        used += count
        return free[used - count : used]

    for i in range(tree.n_nodes):
        held = take(tree.end[i] - tree.start[i])
        table[pool_row[tree.row_order[tree.row_lo[i] : tree.row_hi[i]]], tree.start[i] : tree.end[i]] = held
    for place, row in enumerate(tree.row_order):
        table[pool_row[row], tree.tail_start[place] : lens[row]] = take(lens[row] - tree.tail_start[place])
    generator = torch.Generator().manual_seed(seed)
    kv = torch.full((2, pages * page_size, kv_heads, head_dim), float("nan"))
    held = torch.from_numpy(free[:used]).long()
    kv[:, held] = torch.randn(2, used, kv_heads, head_dim, generator=generator)
    visible, q_lens = None, [1] * n if new is None else new
    if new is not None:
        position = np.concatenate([np.arange(end - count, end) for end, count in zip(lens, new)]).astype(np.int32)
        see_from = np.maximum(position - window_left, 0) if window_left >= 0 else np.zeros_like(position)
        visible = see_from, position + 1
    q = torch.randn(sum(q_lens), kv_heads * group, head_dim, generator=generator)
    layer_sinks = None
    if sinks is not None:
        layer_sinks = torch.randn(kv_heads * group, generator=generator) * 3 + 2
        layer_sinks[0], layer_sinks[-1] = 40.0, -200.0
    kv_dtype = kv_dtype or dtype
    on = torch.device(device)
    tiles = tiles or tiles_for(head_dim, on, new is not None, group_size=group, kv_bytes=kv_dtype.itemsize)
    tile_queries = tuple(max(1, tile.rows // group) for tile in tiles)
    if shares:  # an item costs as much as a token besides its own, so nearly any cut pays
        timings = [SplitTiming(float(shares), 1.0, 1.0, 0.0, n, shares, 3.0) for n in (0, shares)]
        policy = TilePolicy(tile_queries, 1 << 30, tuple(timings))
    else:
        policy = TilePolicy(
            tile_queries, max_split_tokens, max_inline_tail_tokens=max_inline_tail_tokens, unit_tokens=unit_tokens,
            block_tokens=tiles[0].tokens if unit_tokens else 0,
        )  # fmt: skip
    qo_indptr = np.cumsum([0, *q_lens]).astype(np.int32)
    room_tokens = room_tokens if new is None else 0
    if unit_tokens:
        tree = within_units(tree, lens, policy)
    plan = make_plan(
        tree, lens, policy, kv_tokens_unique=total, qo_indptr=qo_indptr, visible=visible, room_tokens=room_tokens
    )
    k, v = kv.to(device, kv_dtype)
    if page_size > 1:
        k, v = (x.view(pages, page_size, kv_heads, head_dim) for x in (k, v))
    return Case(
        plan=plan,
        q=q.to(device, dtype),
        k=k,
        v=v,
        slots=[torch.from_numpy(table[pool_row[r], : lens[r]]).long() for r in range(n)],
        new=q_lens,
        visible=visible,
        tiles=tiles,
        kv_lens=torch.from_numpy(lens).long().to(device),
        req_to_token=torch.from_numpy(table).to(device),
        pool_rows=torch.from_numpy(pool_row).long().to(device),
        soft_cap=soft_cap,
        sinks=None if layer_sinks is None else layer_sinks.to(device, sinks),
        v_scale=v_scale,
    )


def brute_force(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse2, in float64 on the CPU, row by row."""
    kv_heads, head_dim = case.k.shape[-2:]
    k, v = (x.float().reshape(-1, kv_heads, head_dim).double().cpu() for x in (case.k, case.v))
    v = v * case.v_scale
    q = case.q.double().cpu()
    group = q.shape[1] // kv_heads
    outs, lses, first = [], [], 0
    for slots, count in zip(case.slots, case.new):
        mine = slice(first, first + count)
        first += count
        keys, values = (x[slots].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("qhd,lhd->qhl", q[mine], keys) * case.sm_scale
        if case.soft_cap:
            logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
        if case.visible is not None:
            see_from, see_to = (torch.from_numpy(x[mine])[:, None, None] for x in case.visible)
            position = torch.arange(len(slots))
            logits = logits.masked_fill((position < see_from) | (position >= see_to), -torch.inf)
        if case.sinks is not None:  # one more token, without a value, that all see
            sink = case.sinks.double().cpu()[None, :, None].expand(count, -1, 1)
            logits = torch.cat([logits, sink], -1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        outs.append(torch.einsum("qhl,lhd->qhd", logits.softmax(-1), values))
        lses.append(logits.logsumexp(-1) / np.log(2))
    return torch.cat(outs), torch.cat(lses)


def make_packed(case: Case, capacity: Capacity) -> PackedCuda:
    """Buffers for ``case``, poisoned."""
    packed = PackedCuda(
        capacity,
        case.tiles,
        qo_heads=case.q.shape[1],
        kv_heads=case.k.shape[-2],
        head_dim=case.q.shape[2],
        device=case.q.device,
    )
    for buffer in (packed.kv_slots, packed._part_out, packed._part_lse2):
        buffer.fill_(POISON if buffer.dtype == torch.int32 else float("nan"))
    return packed


def run_packed(case: Case, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse2 by the kernels."""
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype, device=case.q.device) if out is None else out
    lse2 = torch.full(case.q.shape[:2], float("nan"), device=case.q.device)
    page_size = case.k.shape[1] if case.k.dim() == 4 else 1
    packed.run(
        case.q, case.k, case.v, case.kv_lens,
        sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap, v_scale=case.v_scale, page_size=page_size,
        windowed=case.visible is not None, sinks=case.sinks, out=out, lse2=lse2,
    )  # fmt: skip
    return out, lse2


def check_attention(case: Case, out: torch.Tensor, lse2: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError unless each query's output is attention but for ``tolerance``, relative to its size."""
    expected, expected_lse2 = brute_force(case)
    error = (out.double().cpu() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert float(torch.nan_to_num(error, nan=9.0).max()) < tolerance
    torch.testing.assert_close(lse2.double().cpu(), expected_lse2, rtol=2e-3, atol=2e-3)
