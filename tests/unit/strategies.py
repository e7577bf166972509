"""Random batches as a radix cache lays them out, random plans over them, and what brute force says of both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import SplitTiming, TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree

Rows = list[list[int]]  # per row, the KV slot of each position
Span = tuple[frozenset[int], int, int]  # members, first position, position after the last


@st.composite
def radix_rows(draw: st.DrawFn, max_rows: int = 7, max_own: int = 7, min_own: int = 0) -> Rows:
    """Rows that leave an earlier row anywhere, or start afresh; two slots are equal only on a shared prefix."""
    rows: Rows = []
    used = 0
    for i in range(draw(st.integers(1, max_rows))):
        leaves = draw(st.integers(-1, i - 1))
        prefix = rows[leaves][: draw(st.integers(0, len(rows[leaves])))] if leaves >= 0 else []
        own = draw(st.integers(min_own, max_own))
        rows.append(prefix + list(range(used, used + own)))
        used += own
    # half of the pool belongs to nobody
    label = np.random.default_rng(draw(st.integers(0, 999))).permutation(2 * used + 2).tolist()
    return [[label[slot] for slot in row] for row in rows]


def pool_size(rows: Rows) -> int:
    """Slots of a pool that ``radix_rows`` may have numbered."""
    return 2 * sum(map(len, rows)) + 2


def ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    return indptr, np.array([x for row in rows for x in row], np.int32)


def tree_of(rows: Rows, limits: Sequence[int] | None = None) -> PrefixTree:
    limits = [len(row) for row in rows] if limits is None else limits
    return PrefixTree.from_slots(*ragged(rows), 1, np.array(limits, np.int32))


def shared_spans(rows: Sequence[Sequence[int]]) -> set[Span]:
    """Positions that the same two or more rows hold in equal slots, with all positions before."""
    holders = defaultdict(set)
    for r, row in enumerate(rows):
        for p in range(len(row)):
            holders[p, tuple(row[: p + 1])].add(r)
    positions = defaultdict(list)
    for (p, _), members in holders.items():
        if len(members) > 1:
            positions[frozenset(members)].append(p)
    assert all(max(ps) - min(ps) == len(ps) - 1 for ps in positions.values())
    return {(members, min(ps), max(ps) + 1) for members, ps in positions.items()}


def members(tree: PrefixTree, node: int) -> frozenset[int]:
    return frozenset(tree.row_order[tree.row_lo[node] : tree.row_hi[node]].tolist())


def spans_of(tree: PrefixTree) -> list[Span]:
    return [(members(tree, i), int(tree.start[i]), int(tree.end[i])) for i in range(tree.n_nodes)]


def keep_nodes(tree: PrefixTree, kept: set[int]) -> PrefixTree:
    """The tree of the ``kept`` nodes; a node that is not kept belongs to the spans below it."""
    order = sorted(kept)
    above = {i: [j for j in order if members(tree, j) > members(tree, i)] for i in order}
    order.sort(key=lambda i: (len(above[i]), tree.row_lo[i]))
    lowest = {i: max(above[i], key=lambda j: tree.end[j], default=None) for i in order}
    tail_start = np.zeros(tree.n_rows, np.int32)
    for i in order:
        tail_start[tree.row_lo[i] : tree.row_hi[i]] = tree.end[i]
    columns = [
        (-1 if (up := lowest[i]) is None else order.index(up), len(above[i]), tree.row_lo[i], tree.row_hi[i],
         0 if up is None else tree.end[up], tree.end[i])
        for i in order
    ]  # fmt: skip
    return PrefixTree(tree.row_order, *np.array(columns, np.int32).reshape(-1, 6).T.copy(), tail_start)


@dataclass(frozen=True)
class Case:
    """A batch, its queries, and how to cut it."""

    rows: Rows
    tree: PrefixTree
    kept: PrefixTree
    policy: TilePolicy
    qo_indptr: np.ndarray | None
    query_row: list[int]
    windows: list[tuple[int, int]] | None  # KV positions that each query sees; None: all of its row
    room: int
    once: bool = False  # each KV token is listed once

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows], np.int32)

    def seen(self, query: int) -> range:
        if self.windows is None:
            return range(len(self.rows[self.query_row[query]]))
        return range(*self.windows[query])

    def plan(self) -> Plan:
        visible = None
        if self.windows is not None:
            lo, hi = np.array(self.windows, np.int32).reshape(-1, 2).T.copy()
            visible = lo, hi
        return make_plan(
            self.kept,
            self.kv_lens,
            self.policy,
            kv_tokens_unique=self.tree.unique_tokens(self.kv_lens),
            qo_indptr=self.qo_indptr,
            visible=visible,
            room_tokens=self.room,
            listed_once=self.tree if self.once else None,
        )


@st.composite
def policies(draw: st.DrawFn) -> TilePolicy:
    small = draw(st.integers(1, 4))
    tile_queries = (draw(st.integers(small, 9)), small)
    inline = draw(st.sampled_from([0, 0, 3, 10, 1000]))
    if draw(st.booleans()):
        return TilePolicy(tile_queries, draw(st.sampled_from([1, 2, 3, 5, 8, 1000])), max_inline_tail_tokens=inline)
    parallel, fixed_us = draw(st.integers(1, 3)), draw(st.sampled_from([0.1, 0.4, 1.0]))
    small_ = SplitTiming(parallel, fixed_us, 1.0, 0.0, draw(st.integers(0, 5)), 6, 2.0)
    taken = {
        "dynamic": draw(st.integers(0, 2)),
        "block": draw(st.integers(1, 2)),
        "half_tile_factor": draw(st.sampled_from([1, 0.6])),
    }
    large = SplitTiming(parallel, fixed_us, 1.0, 0.0, 0, 6, 2.0, **taken)
    return TilePolicy(tile_queries, 1000, (large, small_), inline)


DECODE = ("decode",)
PREFILL = ("full", "causal", "sliding", "any", "decode_window")


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[str] = DECODE + PREFILL, max_rows: int = 7) -> Case:
    """Every row has a KV token, and every query sees one (see ``test_queries_that_see_nothing`` for the others)."""
    rows = draw(radix_rows(max_rows=max_rows))
    rows = [row for row in rows if row] or [[0]]
    kind = draw(st.sampled_from(kinds))
    decode = kind.startswith("decode")
    q_lens = [1 if decode else draw(st.integers(0, min(5, len(row)))) for row in rows]
    q_lens[0] = q_lens[0] or 1
    query_row = [r for r, n in enumerate(q_lens) for _ in range(n)]
    windows: list[tuple[int, int]] | None = None
    if kind not in ("decode", "full"):
        windows = []
        left = draw(st.integers(0, 6))
        for row, n in zip(rows, q_lens, strict=True):
            for i in range(n):
                end = len(row) - n + i + 1
                if kind == "any":
                    lo = draw(st.integers(0, len(row) - 1))
                    windows.append((lo, draw(st.integers(lo + 1, len(row)))))
                else:
                    windows.append((0 if kind == "causal" else max(end - 1 - left, 0), end))
    limits = [draw(st.integers(0, len(row))) for row in rows] if draw(st.booleans()) else None
    room, once = draw(st.integers(0, 4)) if kind == "decode" else 0, draw(st.booleans())
    if room and once:  # the newest token of a row that grows is its own
        limits = [min(len(row) - 1, limit) for row, limit in zip(rows, limits or map(len, rows), strict=True)]
    tree = tree_of(rows, limits)
    kept = set(range(tree.n_nodes)) if draw(st.booleans()) else draw(st.sets(st.integers(0, max(tree.n_nodes - 1, 0))))
    return Case(
        rows=rows,
        tree=tree,
        kept=keep_nodes(tree, kept & set(range(tree.n_nodes))),
        policy=draw(policies()),
        qo_indptr=None if decode else ragged([[0] * n for n in q_lens])[0],
        query_row=query_row,
        windows=windows,
        room=room,
        once=once,
    )


def slot_list(plan: Plan, rows: Rows) -> torch.Tensor:
    """[plan.kv_capacity] int64: what a caller copies there; room holds its row's first slot, whose KV is finite."""
    slots = torch.full((plan.kv_capacity,), -1)
    for row, first, tokens, offset, _ in plan.spans.tolist():
        slots[offset:] = rows[row][first] if first < len(rows[row]) else -1
        slots[offset : offset + tokens] = torch.tensor(rows[row][first : first + tokens], dtype=torch.int64)
    return slots


def attention64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: Sequence[Sequence[int]],
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 attention of each query over the slots it sees, one query at a time: out and lse2. With ``sinks`` [heads]
    it sees one more token, whose logit that is and whose value is 0."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse2 = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for i, slots in enumerate(seen):
        if slots or sinks is not None:
            keys = k[list(slots)].double().repeat_interleave(group, 1)
            values = v[list(slots)].double().repeat_interleave(group, 1)
            s = torch.einsum("hd,lhd->hl", q[i].double(), keys) * sm_scale
            if logits_soft_cap:
                s = logits_soft_cap * torch.tanh(s / logits_soft_cap)
            if sinks is not None:
                s = torch.cat([s, sinks.double()[:, None]], 1)
                values = torch.cat([values, torch.zeros(1, *values.shape[1:])])
            weights = s.softmax(-1).masked_fill((s == -math.inf).all(-1, keepdim=True), 0.0)  # only a sink of -inf
            out[i] = torch.einsum("hl,lhd->hd", weights, values)
            lse2[i] = s.logsumexp(-1) / math.log(2)
    return out, lse2


def kv_pool(slots: int, referenced: Sequence[int], kv_heads: int, head_dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Keys and values [slots, kv_heads, head_dim] float32, NaN in every slot that is not referenced."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.ones(slots, dtype=torch.bool)
    free[list(referenced)] = False
    pool = [torch.randn(slots, kv_heads, head_dim, generator=generator) for _ in range(2)]
    return tuple(x.masked_fill_(free[:, None, None], math.nan) for x in pool)
