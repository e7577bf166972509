"""The reference and the CPU kernels against attention in float64, query by query; unwritten memory and foreign KV are
NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DECODE, PREFILL, Case, attention64, cases, kv_pool, pool_size, ragged, slot_list, tree_of
from test_plan import some_see_nothing

from packinfer_sgl.kernels import cpu_attention, reference
from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.kernels.reference import MaskRows, packed_attention
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}  # those of FlashInfer's own tests
SINK_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = [1, 2, 4, 5, 6, 7, 8, 32]
HEADS = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from(GROUPS))  # KV heads, query heads of each


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """What is allocated and never written is NaN."""
    with (
        mock.patch.object(torch, "empty", lambda *shape, **kwargs: torch.full(shape, math.nan, **kwargs)),
        mock.patch.object(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, math.nan, **kwargs)),
    ):
        yield


def assert_close(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], tol: float) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol)


def packed(case: Case, plan: Plan) -> PackedReference:
    """Ready to run at the planned lengths."""
    ready = PackedReference(plan, token_bytes=256, room_tokens=case.room)
    ready.bind(slot_list(plan, case.rows), torch.tensor(case.kv_lens).long())
    return ready


def meant(case: Case, plan: Plan, *qkv: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """By the reference, at the planned lengths."""
    return packed_attention(
        plan, *qkv, slot_list(plan, case.rows), kv_lens=torch.tensor(case.kv_lens).long(), **how
    )  # fmt: skip


def seen_slots(case: Case) -> list[list[int]]:
    return [[case.rows[row][p] for p in case.seen(query)] for query, row in enumerate(case.query_row)]


def inputs(case: Case, kv_heads: int, group: int, head_dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    """q, and keys and values in which only slots of the rows are finite."""
    held = {slot for row in case.rows for slot in row}
    k, v = kv_pool(pool_size(case.rows), sorted(held), kv_heads, head_dim, seed)
    q = torch.randn(len(case.query_row), kv_heads * group, head_dim, generator=torch.Generator().manual_seed(seed + 1))
    return q, k, v


def some_sinks(heads: tuple[int, int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[heads], from such that hide all tokens to such that do not count."""
    sinks = torch.randn(heads[0] * heads[1], generator=torch.Generator().manual_seed(seed)) * 3
    sinks[seed % len(sinks)] = [200.0, -200.0, -math.inf][seed % 3]
    return sinks.to(dtype)


def check(
    case: Case, heads: tuple[int, int], head_dim: int, seed: int, cap: float = 0.0, sinks: torch.Tensor | None = None
) -> None:
    q, k, v = inputs(case, *heads, head_dim, seed)
    how = {"sm_scale": head_dim**-0.5, "logits_soft_cap": cap, "sinks": sinks}
    plan = case.plan()
    ready = packed(case, plan)
    want = attention64(q, k, v, seen_slots(case), head_dim**-0.5, cap, sinks)
    assert_close(meant(case, plan, q, k, v, **how), want, 1e-5)
    with poisoned_empty():
        assert_close(ready.run(q, k, v, **how), want, 1e-5)
        out = torch.empty_like(q)
        written, lse2 = ready.run(q, k, v, **how, out=out)
    assert written is out and lse2.dtype == torch.float32
    assert_close((out, lse2), want, 1e-5)


@settings(max_examples=400)
@given(cases(), HEADS, st.integers(0, 999), st.sampled_from([0.0, 0.0, 1.5, 30.0]))
def test_attention(case: Case, heads: tuple[int, int], seed: int, cap: float) -> None:
    check(case, heads, 64, seed, cap)


@settings(max_examples=200)
@given(cases(), HEADS, st.integers(0, 999), st.sampled_from([0.0, 0.0, 1.5]), st.sampled_from(SINK_DTYPES))
def test_sinks(case: Case, heads: tuple[int, int], seed: int, cap: float, dtype: torch.dtype) -> None:
    check(case, heads, 64, seed, cap, some_sinks(heads, seed, dtype))


@given(some_see_nothing(), HEADS, st.integers(0, 999))
def test_sinks_of_queries_that_see_nothing(case: Case, heads: tuple[int, int], seed: int) -> None:
    check(case, heads, 64, seed, sinks=some_sinks(heads, seed))


@pytest.mark.parametrize("sinks", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)], ids=str)
def test_sinks_of_another_shape_are_refused(sinks: torch.Tensor) -> None:
    case = Case([[0, 1]], *[tree_of([[0, 1]])] * 2, TilePolicy((8, 1), 8), None, [0], None, 0)
    with pytest.raises(ValueError, match="sinks must be one float32, float16 or bfloat16 for each of 2 query heads"):
        packed(case, case.plan()).run(*inputs(case, 1, 2, 64, 0), sm_scale=1.0, sinks=sinks)


@settings(max_examples=20)
@given(cases(), HEADS, st.sampled_from([128, 256]), st.integers(0, 999))
def test_other_head_dims(case: Case, heads: tuple[int, int], head_dim: int, seed: int) -> None:
    check(case, heads, head_dim, seed)


@given(some_see_nothing(), HEADS, st.integers(0, 999))
def test_queries_that_see_nothing(case: Case, heads: tuple[int, int], seed: int) -> None:
    check(case, heads, 64, seed)


@pytest.mark.parametrize(
    ("rows", "windows"),
    [
        ([[]], None),
        ([[1], []], None),
        ([[1], [1], []], None),
        ([[1, 2]], [(2, 2)]),
        ([[1], [1]], [(0, 0), (0, 1)]),
        ([[1], [1]], [(0, 0), (1, 1)]),
        ([[1, 2], [1, 2], [1, 3]], [(0, 2), (0, 0), (0, 0)]),
    ],
)
def test_rows_without_kv_and_empty_windows(rows: list[list[int]], windows: list[tuple[int, int]] | None) -> None:
    tree = tree_of(rows)
    check(Case(rows, tree, tree, TilePolicy((1, 1), 8), None, list(range(len(rows))), windows, 0), (1, 2), 64, 0)


def test_rows_without_queries() -> None:
    tree = tree_of([[1], [1, 2]])
    no_queries = Case([[1], [1, 2]], tree, tree, TilePolicy((8, 1), 8), torch.zeros(3).int().numpy(), [], None, 0)
    check(no_queries, (1, 2), 64, 0)


@settings(max_examples=60)
@given(cases(), HEADS, st.integers(0, 999), st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision(case: Case, heads: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(case, *heads, 64, seed))
    out, lse2 = packed(case, case.plan()).run(q, k, v, sm_scale=0.125)
    assert (out.dtype, lse2.dtype) == (dtype, torch.float32)
    want = attention64(q, k, v, seen_slots(case), 0.125)
    torch.testing.assert_close(out.double(), want[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse2.double(), want[1], rtol=1e-5, atol=1e-5)  # float32 all the way


@settings(max_examples=60)
@given(cases(), HEADS, st.integers(0, 999), st.sampled_from([0.0, 1.5]), st.sampled_from([1.0, 0.75]))
def test_fp8_kv(case: Case, heads: tuple[int, int], seed: int, cap: float, v_scale: float) -> None:
    """Values count times their scale, in results that are merged and in those that are not."""
    q, k, v = inputs(case, *heads, 64, seed)
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    want = attention64(q, k.double(), v.double() * v_scale, seen_slots(case), 0.125, cap)
    how = {"sm_scale": 0.125, "logits_soft_cap": cap, "v_scale": v_scale}
    assert_close(packed(case, case.plan()).run(q, k, v, **how), want, 1e-5)
    assert_close(meant(case, case.plan(), q, k, v, **how), want, 1e-5)


@settings(max_examples=60)
@given(cases(), HEADS, st.integers(0, 999), st.sampled_from([1, 2, 5]), st.booleans())
def test_pages(case: Case, heads: tuple[int, int], seed: int, page_size: int, heads_first: bool) -> None:
    q, k, v = inputs(case, *heads, 64, seed)
    want = attention64(q, k, v, seen_slots(case), 0.125)
    fill = (0, 0, 0, 0, 0, -len(k) % page_size)
    pages = [torch.nn.functional.pad(x, fill, value=math.nan).unflatten(0, (-1, page_size)) for x in (k, v)]
    if heads_first:  # the same shape over [pages, kv_heads, page_size, head_dim] memory
        pages = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in pages]
    assert_close(packed(case, case.plan()).run(q, *pages, sm_scale=0.125), want, 1e-5)


@settings(max_examples=100)
@given(cases((*DECODE, "full")), HEADS, st.integers(0, 999), st.floats(0, 1))
def test_custom_mask(case: Case, heads: tuple[int, int], seed: int, share: float) -> None:
    q, k, v = inputs(case, *heads, 64, seed)
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(len(case.rows[row]), generator=generator) < share for row in case.query_row]
    seen = [
        [s for s, ok in zip(slots, mask.tolist(), strict=True) if ok]
        for slots, mask in zip(seen_slots(case), masks, strict=False)
    ]
    starts = torch.tensor(ragged([[0] * len(mask) for mask in masks])[0][:-1]).long()
    flat = torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool)
    with poisoned_empty():
        got = packed(case, case.plan()).run(q, k, v, sm_scale=0.125, mask=MaskRows(flat, starts))
    want = attention64(q, k, v, seen, 0.125)
    assert_close(got, want, 1e-5)
    assert_close(meant(case, case.plan(), q, k, v, sm_scale=0.125, mask=MaskRows(flat, starts)), want, 1e-5)


@settings(max_examples=80)
@given(cases(DECODE), HEADS, st.integers(0, 999))
def test_rows_that_grow(case: Case, heads: tuple[int, int], seed: int) -> None:
    """One plan serves all lengths up to its room; only rows with a tail can grow."""
    tails = dict(zip(case.kept.row_order.tolist(), case.kept.tail_start.tolist(), strict=True))
    growing = [r for r, row in enumerate(case.rows) if len(row) > tails[r]]
    kv_heads, group = heads
    plan = case.plan()
    used, rows = pool_size(case.rows), [list(row) for row in case.rows]
    q, k, v = inputs(case, kv_heads, group, 64, seed)
    more = kv_pool(case.room * len(rows), range(case.room * len(rows)), kv_heads, 64, seed + 2)
    k, v = torch.cat([k, more[0]]), torch.cat([v, more[1]])
    kv_slots = slot_list(plan, rows)
    ready = PackedReference(plan, token_bytes=256, room_tokens=case.room)
    for step in range(case.room + 1):
        kv_lens = torch.tensor([len(row) for row in rows])
        ready.bind(kv_slots, kv_lens)
        seen = [rows[row] for row in case.query_row]
        with poisoned_empty():
            want = attention64(q, k, v, seen, 0.125)
            assert_close(ready.run(q, k, v, sm_scale=0.125), want, 1e-5)
        assert_close(packed_attention(plan, q, k, v, kv_slots, kv_lens=kv_lens, sm_scale=0.125), want, 1e-5)
        if step < case.room:
            for r in growing:
                kv_slots[plan.append_base[r] + len(rows[r])] = used
                rows[r].append(used)
                used += 1


@settings(max_examples=40)
@given(cases(PREFILL), HEADS, st.integers(0, 999), st.integers(0, 2048))
def test_the_cut_into_slabs_does_not_matter(case: Case, heads: tuple[int, int], seed: int, slab_bytes: int) -> None:
    q, k, v = inputs(case, *heads, 64, seed)
    with mock.patch.object(cpu_attention, "SLAB_BYTES", slab_bytes):
        ready = packed(case, case.plan())
    assert all(len(c.entry) == 1 or c.entry.numel() * 256 <= slab_bytes for c in ready.classes)
    assert_close(ready.run(q, k, v, sm_scale=0.125), attention64(q, k, v, seen_slots(case), 0.125), 1e-5)


@given(cases())
def test_padding_reads_what_its_item_reads(case: Case) -> None:
    plan = case.plan()
    own = {}  # entries of the KV slot list by the first of them and the first query
    for item in plan.items.tolist():
        room = case.room if item[Col.OPEN_ROW] >= 0 else 0
        entries = [*range(item[Col.A_OFF], item[Col.A_OFF] + item[Col.A_LEN] + room)]
        entries += range(item[Col.B_OFF], item[Col.B_OFF] + item[Col.B_LEN])
        if entries:
            own[entries[0], int(plan.query_rows[item[Col.Q_OFF]])] = set(entries)
    for c in packed(case, plan).classes:
        for entries, queries in zip(c.entry.tolist(), c.queries.tolist(), strict=True):
            assert set(entries) == own[entries[0], queries[0]]


def test_extreme_logits_stay_finite() -> None:
    """A softmax without its maximum taken out would overflow."""
    q, k = torch.full((1, 1, 64), 40.0), torch.full((2, 1, 64), 40.0)
    v = torch.stack([torch.zeros(1, 64), torch.ones(1, 64)])
    case = Case([[0, 1]], *[tree_of([[0, 1]])] * 2, TilePolicy((8, 1), 8), None, [0], None, 0)
    out, lse2 = packed(case, case.plan()).run(q, k, v, sm_scale=1.0)
    assert_close((out, lse2), attention64(q, k, v, [[0, 1]], 1.0), 1e-5)


# merging


@st.composite
def states(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Partial results of ``sizes[i]`` items for query ``i``; some are empty for some heads, some for all."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    n, heads = sum(sizes), 3
    o = torch.randn(n, heads, 8, generator=generator)
    lse2 = torch.randn(n, heads, generator=generator) * draw(st.sampled_from([1.0, 30.0, 300.0]))
    empty = torch.rand(n, heads, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return o.masked_fill_(empty[..., None], 0.0), lse2.masked_fill_(empty, -math.inf), sizes


def merge(o: torch.Tensor, lse2: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    indptr = torch.tensor([0, *sizes]).cumsum(0)
    return merge_states(o, lse2, torch.arange(len(o)), indptr)


def merge_states(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By the CPU kernel, which agrees with the reference."""
    fast, meant = cpu_attention.merge_states(*arguments), reference.merge_states(*arguments)
    assert_close(fast, tuple(x.double() for x in meant), 2e-5)
    return fast


def merge64(o: torch.Tensor, lse2: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = [], []
    for oo, ll in zip(o.double().split(sizes), lse2.double().split(sizes), strict=True):
        lses.append(torch.logsumexp(ll * math.log(2), 0) / math.log(2))
        weight = torch.where(ll.isinf(), 0.0, torch.exp2(ll - torch.where(lses[-1].isinf(), 0.0, lses[-1])))
        outs.append((weight[..., None] * oo).sum(0))
    return torch.stack(outs), torch.stack(lses)


@given(states(), st.randoms(use_true_random=False))
def test_merge_in_any_order(states: tuple[torch.Tensor, torch.Tensor, list[int]], random) -> None:
    o, lse2, sizes = states
    want = merge64(o, lse2, sizes)
    assert_close(merge(o, lse2, sizes), want, 2e-5)
    order = [
        i
        for lo, hi in pairwise([0, *torch.tensor(sizes).cumsum(0).tolist()])
        for i in random.sample(range(lo, hi), hi - lo)
    ]
    assert_close(merge(o[order], lse2[order], sizes), want, 2e-5)


@given(states(), st.data())
def test_merge_of_merged_groups(states: tuple[torch.Tensor, torch.Tensor, list[int]], data: st.DataObject) -> None:
    o, lse2, sizes = states
    groups: list[int] = []
    per_query = []
    for size in sizes:
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1)))), size] if size > 1 else [0, 1]
        groups += [hi - lo for lo, hi in pairwise(cuts)]
        per_query.append(len(cuts) - 1)
    assert_close(merge(*merge(o, lse2, groups), per_query), merge64(o, lse2, sizes), 2e-5)


@given(states(), st.data())
def test_empty_states_change_nothing(states: tuple[torch.Tensor, torch.Tensor, list[int]], data: st.DataObject) -> None:
    o, lse2, sizes = states
    more_o, more_lse2, more_sizes = [], [], []
    for oo, ll, size in zip(o.split(sizes), lse2.split(sizes), sizes, strict=True):
        at = data.draw(st.integers(0, size))
        more_o += [oo[:at], torch.zeros(1, *o.shape[1:]), oo[at:]]
        more_lse2 += [ll[:at], torch.full((1, o.shape[1]), -math.inf), ll[at:]]
        more_sizes.append(size + 1)
    assert_close(merge(torch.cat(more_o), torch.cat(more_lse2), more_sizes), merge64(o, lse2, sizes), 2e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_empty_states_merge_to_the_empty_state(n: int) -> None:
    o, lse2 = merge(torch.zeros(n, 2, 4), torch.full((n, 2), -math.inf), [n])
    assert (o == 0).all() and (lse2 == -math.inf).all()


@given(states(), st.integers(1, 5))
def test_merge_reads_no_other_row(states: tuple[torch.Tensor, torch.Tensor, list[int]], gap: int) -> None:
    """Rows between those of the queries are NaN; a short query beside a long one must not run into them."""
    o, lse2, sizes = states
    padded_o = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, gap), value=math.nan) for x in o.split(sizes)]
    padded_lse2 = [torch.nn.functional.pad(x, (0, 0, 0, gap), value=math.nan) for x in lse2.split(sizes)]
    first = torch.tensor([0, *[size + gap for size in sizes[:-1]]]).cumsum(0)
    at = torch.cat([torch.arange(size) + begin for size, begin in zip(sizes, first.tolist())])
    got = merge_states(torch.cat(padded_o), torch.cat(padded_lse2), at, torch.tensor([0, *sizes]).cumsum(0))
    assert_close(got, merge64(o, lse2, sizes), 2e-5)
