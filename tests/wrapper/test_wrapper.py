"""The wrappers against brute force in float64, and that they find sharing in the page tables."""

from __future__ import annotations

import dataclasses
import doctest
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import paged_cases as cases
import pytest
import torch
from paged_cases import EDGES, FREE, Batch, Layer, check, tree_batch

from packinfer_sgl.paged import kernels, prefill_wrapper, wrapper
from packinfer_sgl.planning import fitting
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners import cpu


def all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(tree, kv_lens, shape, cost, policy, *, grouped_plan=fitting.grouped_plan, **more):
        return grouped_plan(tree, kv_lens, shape, FREE, policy, **{**more, "mode": "multi", "partials_us": None})

    monkeypatch.setattr(fitting, "grouped_plan", keep)
    monkeypatch.setattr(fitting, "prune", lambda tree, *_: tree)


@pytest.fixture(params=["by cost", "all shared, small tiles"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real cost model declines most spans of small batches; without it every shared span is grouped."""
    if request.param != "by cost":
        all_kept(monkeypatch)
        small = dataclasses.replace(cpu.CPU, extend_policy=TilePolicy(tile_queries=(5, 2), max_split_tokens=7))
        for room in (cpu, kernels):
            monkeypatch.setattr(room, "CPU", small)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("block", range(4))
@pytest.mark.usefixtures("sharing")
def test_random_batches_float32(decode: bool, block: int) -> None:
    for seed in range(block * 65, block * 65 + 65):  # 2 x 4 x 65 batches, each by cost and with all shared
        rng = random.Random(f"{decode} {seed}")
        check(cases.random_batch(rng, decode=decode), cases.random_layer(rng), seed, packed=seed % 2 == 0)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_random_batches_half(decode: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    all_kept(monkeypatch)
    for seed in range(30):
        rng = random.Random(f"{decode} {dtype} {seed}")
        q_dtype, kv_dtype, o_dtype = (
            (dtype, dtype, None),
            (dtype, torch.float32, dtype),
            (torch.float32, dtype, dtype),
        )[seed % 3]
        layer = replace(cases.random_layer(rng), q_dtype=q_dtype, kv_dtype=kv_dtype, o_dtype=o_dtype, run={})
        check(cases.random_batch(rng, decode=decode), layer, seed)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_random_batches_of_fp8_kv(decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scales that the cache was divided by, each of them once."""
    all_kept(monkeypatch)
    for seed in range(30):
        rng = random.Random(f"{decode} fp8 {seed}")
        q_dtype, o_dtype = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.float16)][seed % 3]
        scales = {"k_scale": rng.choice([0.5, torch.tensor(0.5)]), "v_scale": rng.choice([1, 0.25])}
        layer = replace(
            cases.random_layer(rng), q_dtype=q_dtype, kv_dtype=torch.float8_e4m3fn, o_dtype=o_dtype, run=scales
        )
        check(cases.random_batch(rng, decode=decode), layer, seed)


@pytest.mark.parametrize("batch", EDGES.values(), ids=EDGES.keys())
@pytest.mark.usefixtures("sharing")
def test_edges(batch: Batch) -> None:
    check(batch, Layer(), 0)


SHARED = {
    "decode": tree_batch(decode=True),
    "decode, page size 1": tree_batch(1, decode=True),
    "decode, page size 64": tree_batch(64, decode=True),
    "decode, several queries": tree_batch(q_len=4, causal=True, decode=True),
    "decode, a window inside the tails": tree_batch(window_left=20, decode=True),
    "decode, a window into the groups": tree_batch(window_left=300, decode=True),
    "decode, two requests": Batch(16, [[*range(64), 64], [*range(64), 65]], [7, 8], [1, 1], decode=True),
    "decode, equal requests": Batch(16, [[*range(8, 40)]] * 5, [7] * 5, [1] * 5, decode=True),
    "prefill": tree_batch(q_len=3, causal=True),
    "prefill without causal": tree_batch(q_len=3),
    "prefill with a mask": replace(
        tree_batch(q_len=2), mask=[torch.rand(2, n).round().bool() for n in tree_batch().kv_lens]
    ),
}
NOT_SHARED = {
    "no page in common": Batch(16, [[*range(n, n + 40)] for n in (0, 40, 80)], [5, 16, 1], [1] * 3, decode=True),
    "one request": Batch(4, [[*range(50)]], [1], [3], causal=True),
    "too short to pay": Batch(4, [[0, *range(10, 40)], [0, *range(40, 90)]], [1, 4], [1, 1], decode=True),
}


def check_reads_shared_spans_once(batch: Batch, layer: Layer) -> None:
    """The plan reads every token that a query sees, and reads it once."""
    counted = cases.make_wrapper(batch, layer).kv_tokens
    expected = batch.read_once() if batch.mask is None else counted.unique
    assert counted.read == expected < counted.logical


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("batch", SHARED.values(), ids=SHARED.keys())
def test_shared_pages_are_read_once(batch: Batch, heads: tuple[int, int]) -> None:
    layer = Layer(*heads, head_dim=128)
    check_reads_shared_spans_once(batch, layer)
    check(batch, layer, 0)


@pytest.mark.parametrize("batch", NOT_SHARED.values(), ids=NOT_SHARED.keys())
def test_nothing_is_grouped_without_gain(batch: Batch) -> None:
    counted = cases.make_wrapper(batch, Layer()).kv_tokens
    assert counted.read == counted.logical
    check(batch, Layer(), 0)


def test_equal_pages_behind_different_ones_are_not_shared() -> None:
    batch = Batch(4, [[1, *range(10, 150)], [2, *range(10, 150)]], [4, 4], [1, 1], decode=True)
    counted = cases.make_wrapper(batch, Layer(8, 2, head_dim=128)).kv_tokens
    assert counted.read == counted.unique == counted.logical == 2 * 141 * 4


@pytest.mark.parametrize("batch", [SHARED[name] for name in SHARED if "inside the tails" not in name])
def test_a_wrapper_that_reads_row_by_row_is_found(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    lonely = lambda indptr, *_: PrefixTree.from_neighbours(range(len(indptr) - 1), [0] * (len(indptr) - 2))  # noqa: E731
    monkeypatch.setattr(PrefixTree, "from_slots", lonely)
    with pytest.raises(AssertionError):
        check_reads_shared_spans_once(batch, Layer(8, 2, head_dim=128))


def test_run_many_times_and_plan_again(monkeypatch: pytest.MonkeyPatch) -> None:
    all_kept(monkeypatch)
    rng = random.Random(0)
    reused: dict[bool, Any] = {True: None, False: None}
    for seed in range(20):
        decode = seed % 2 == 0
        batch, layer = cases.random_batch(rng, decode=decode), replace(cases.random_layer(rng), layout="HND")
        reused[decode] = reused[decode] or cases.make_wrapper(batch, layer)
        for layer_seed in range(3):
            check(batch, layer, layer_seed, reused[decode])


def test_the_caller_may_overwrite_its_tensors() -> None:
    batch, layer = tree_batch(q_len=2, causal=True), Layer()
    q, (k, v, cache) = cases.make_q(batch, layer, 0), cases.make_kv(batch, layer, 0)
    tables = [
        cases.indptr([len(t) for t in batch.tables]),
        cases.int32(sum(batch.tables, [])),
        cases.int32(batch.last_page_len),
    ]
    mask = torch.cat([batch.sees(row).flatten() for row in range(8)])
    planned = prefill_wrapper.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0))
    qo_indptr = cases.indptr(batch.q_lens)
    planned.plan(qo_indptr, *tables, 4, 2, 16, 16, custom_mask=mask, q_data_type="float32")
    for x in (qo_indptr, *tables, mask):
        x.zero_()
    expected, _ = cases.brute_force(batch, layer, q, k, v)
    torch.testing.assert_close(planned.run(q, cache).double(), expected, rtol=1e-5, atol=1e-5)
    with_window = replace(batch, mask=[batch.sees(row) for row in range(8)], window_left=5)
    expected, _ = cases.brute_force(with_window, layer, q, k, v)
    torch.testing.assert_close(planned.forward(q, cache, window_left=5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("lse_layout", ["NH", "HN"])
def test_buffers_and_forms_of_the_lse(layout: str, lse_base: str, lse_layout: str) -> None:
    batch, layer = tree_batch(q_len=2, causal=True), Layer(layout=layout)
    q, (_, _, cache) = cases.make_q(batch, layer, 0), cases.make_kv(batch, layer, 0)
    planned = cases.make_wrapper(batch, layer)
    expected, expected_lse = planned.run_return_lse(q, cache)
    out, lse = torch.empty(16, 8, 16)[:, ::2], torch.empty((16, 4) if lse_layout == "NH" else (4, 16))
    forms = {"lse_base": lse_base, "lse_layout": lse_layout}
    got_out, got_lse = planned.run(q, cache, out=out, lse=lse, return_lse=True, **forms)
    assert got_out is out and got_lse is lse
    assert planned.run(q, cache, out=out, **forms) is out
    expected_lse = expected_lse if lse_base == "log2" else expected_lse * np.log(2)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse if lse_layout == "NH" else lse.t(), expected_lse)
    torch.testing.assert_close(planned.run(q, cache, return_lse=True, **forms)[1], lse)


def test_forward_replaces_what_was_planned() -> None:
    layer = Layer()
    for decode, old in ((True, {}), (False, {"causal": True})):
        batch = tree_batch(q_len=1 if decode else 3, decode=decode, **old)
        q, (k, v, cache) = cases.make_q(batch, layer, 0), cases.make_kv(batch, layer, 0)
        planned = cases.make_wrapper(batch, layer)
        new = replace(batch, causal=False, window_left=7), replace(layer, sm_scale=0.1, soft_cap=3.0)
        out, lse = planned.forward_return_lse(q, cache, window_left=7, sm_scale=0.1, logits_soft_cap=3.0, v_scale=2.0)
        expected, expected_lse = cases.brute_force(*new, q, k, v)
        torch.testing.assert_close(out.double(), expected * 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
        planned.end_forward()


def test_the_cache_is_never_copied() -> None:
    """A cache of 2**40 tokens, which is one token seen through strides of 0."""
    batch = tree_batch(decode=True)
    planned = cases.make_wrapper(batch, replace(Layer(), layout="HND"))
    cache = torch.ones(1, 2, 2, 1, 16).expand(2**36, 2, 2, 16, 16)
    torch.testing.assert_close(planned.run(torch.randn(8, 4, 16), cache), torch.ones(8, 4, 16))


def test_the_package_alone_imports_no_torch() -> None:
    code = "import sys, packinfer_sgl; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples() -> None:
    results = [doctest.testmod(room) for room in (wrapper, prefill_wrapper)]
    assert sum(result.attempted for result in results) > 15 and not any(result.failed for result in results)
