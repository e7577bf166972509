"""Random packed batches with poisoned memory, and attention row by row in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from packinfer_sgl.cut import make_plan
from packinfer_sgl.kernels.packed_cuda import Capacity, PackedCuda
from packinfer_sgl.kernels.tiles import tiles_for
from packinfer_sgl.plan import PieceTiming, Plan, TilePolicy
from packinfer_sgl.prefix_tree import PrefixTree

POISON = 2**28  # a slot that no test has


@dataclass
class Case:
    plan: Plan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: list[torch.Tensor]  # of each row
    kv_lens: torch.Tensor
    req_to_token: torch.Tensor
    pool_rows: torch.Tensor
    soft_cap: float

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
    chunk_tokens: int = 48,
    shares: int = 0,
    room_tokens: int = 8,
    soft_cap: float = 0.0,
) -> Case:
    """Rows of which neighbours ``i`` and ``i + 1`` share ``shared[i]`` tokens, each with a tail of its own.

    All KV that no row holds is NaN. Slots are scattered, page by page. With ``shares`` rows that share nothing are
    divided among so many programs.
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
    q = torch.randn(n, kv_heads * group, head_dim, generator=generator)
    tile_queries = tuple(max(1, tile.rows // group) for tile in tiles_for(head_dim))
    if shares:  # an item costs as much as a token besides its own, so nearly any cut pays
        timings = [PieceTiming(float(shares), 1.0, 1.0, 0.0, n, shares, 3.0) for n in (0, shares)]
        policy = TilePolicy(tile_queries, 1 << 30, tuple(timings))
    else:
        policy = TilePolicy(tile_queries, chunk_tokens)
    plan = make_plan(tree, lens, policy, kv_tokens_unique=total, room_tokens=room_tokens)
    k, v = kv.to(device, dtype)
    if page_size > 1:
        k, v = (x.view(pages, page_size, kv_heads, head_dim) for x in (k, v))
    return Case(
        plan=plan,
        q=q.to(device, dtype),
        k=k,
        v=v,
        slots=[torch.from_numpy(table[pool_row[r], : lens[r]]).long() for r in range(n)],
        kv_lens=torch.from_numpy(lens).long().to(device),
        req_to_token=torch.from_numpy(table).to(device),
        pool_rows=torch.from_numpy(pool_row).long().to(device),
        soft_cap=soft_cap,
    )


def brute_force(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse2, in float64 on the CPU, row by row."""
    kv_heads, head_dim = case.k.shape[-2:]
    k, v = (x.reshape(-1, kv_heads, head_dim).double().cpu() for x in (case.k, case.v))
    q = case.q.double().cpu()
    group = q.shape[1] // kv_heads
    outs, lses = [], []
    for row, slots in enumerate(case.slots):
        keys, values = (x[slots].repeat_interleave(group, 1) for x in (k, v))
        logits = torch.einsum("hd,lhd->hl", q[row], keys) * case.sm_scale
        if case.soft_cap:
            logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
        outs.append(torch.einsum("hl,lhd->hd", logits.softmax(-1), values))
        lses.append(logits.logsumexp(-1) / np.log(2))
    return torch.stack(outs), torch.stack(lses)


def make_packed(case: Case, capacity: Capacity) -> PackedCuda:
    """Buffers for ``case``, poisoned."""
    packed = PackedCuda(
        capacity,
        qo_heads=case.q.shape[1],
        kv_heads=case.k.shape[-2],
        head_dim=case.q.shape[2],
        device=case.q.device,
    )
    for buffer in (packed.kv_slots, packed._part_out, packed._part_lse2):
        buffer.fill_(POISON if buffer.dtype == torch.int32 else float("nan"))
    return packed


def run_packed(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse2 by the kernels."""
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    out = torch.full_like(case.q, float("nan"))
    lse2 = torch.full(case.q.shape[:2], float("nan"), device=case.q.device)
    page_size = case.k.shape[1] if case.k.dim() == 4 else 1
    packed.run(
        case.q, case.k, case.v, case.kv_lens,
        sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap, page_size=page_size, out=out, lse2=lse2,
    )  # fmt: skip
    return out, lse2
