"""The wrappers through the Triton kernels: on a GPU if there is one, else small batches in Triton's interpreter.

The interpreter multiplies bf16 wrongly, so without a GPU all is float16.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import paged_cases as cases
import pytest
import torch
from paged_cases import EDGES, FREE, Batch, Layer, check, indptr, int32

from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper as Decode
from packinfer_sgl import BatchPrefillWithPagedKVCacheWrapper as Prefill
from packinfer_sgl.kernels.tiles import policy_of, tile_policy
from packinfer_sgl.paged import batch as paged
from packinfer_sgl.paged import checks, graph_buffers, kernels
from packinfer_sgl.planning import fitting
from packinfer_sgl.runners import cuda

HALF = Layer(2, 1, 64, q_dtype=torch.float16, kv_dtype=torch.float16, cuda=True)
DEVICE = HALF.device
POISON = 2**28  # a slot that no test has


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(paged, "kernels_on", kernels.OnCuda)


def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """All spans are kept, unless none may be."""

    def keep(tree, kv_lens, shape, cost, policy, *, mode, grouped_plan=fitting.grouped_plan, **more):
        mode = "off" if mode == "off" else "multi"
        return grouped_plan(tree, kv_lens, shape, FREE, policy, **{**more, "mode": mode, "partials_us": None})

    prune = fitting.prune
    monkeypatch.setattr(fitting, "grouped_plan", keep)
    monkeypatch.setattr(fitting, "prune", lambda *args: args[0] if args[3] != "off" else prune(*args))


@pytest.fixture
def all_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost model declines most spans of small batches; here every span is grouped, and cut into short pieces."""
    keep_all(monkeypatch)
    small = lambda policy: replace(policy, max_split_tokens=20, timings=None)  # noqa: E731
    monkeypatch.setattr(cuda, "tile_policy", lambda *args, **more: small(tile_policy(*args, **more)))
    monkeypatch.setattr(cuda, "policy_of", lambda *args: small(policy_of(*args)))
    monkeypatch.setattr(cuda, "INLINE_TAIL_TOKENS", 9)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("all_shared")
def test_small_batches(decode: bool, head_dim: int) -> None:
    for seed in range(5):
        rng = random.Random(f"{decode} {head_dim} {seed}")
        batch = cases.random_batch(rng, decode=decode)
        layer = replace(cases.random_layer(rng), q_dtype=torch.float16, kv_dtype=torch.float16, cuda=True)
        kv_heads = rng.choice([1, 2])
        check(batch, replace(layer, qo_heads=kv_heads * rng.choice([1, 3]), kv_heads=kv_heads, head_dim=head_dim), seed)


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.usefixtures("all_shared")
def test_small_batches_of_fp8_kv(decode: bool) -> None:
    """Masks and windows among them; each scale counts once."""
    for seed in range(8):
        rng = random.Random(f"{decode} fp8 {seed}")
        batch = cases.random_batch(rng, decode=decode)
        scales = {"k_scale": 0.5, "v_scale": rng.choice([1, 0.25])}
        layer = replace(cases.random_layer(rng), q_dtype=torch.float16, kv_dtype=FP8, run=scales, cuda=True)
        check(batch, replace(layer, qo_heads=3, kv_heads=1, head_dim=64), seed)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.usefixtures("all_shared")
def test_edges(name: str) -> None:
    check(EDGES[name], HALF, 0)


LAYERS = [
    Layer(kv_heads * group, kv_heads, head_dim, layout, combined, dtype, dtype, soft_cap=soft_cap, run=run, cuda=True)
    for (group, kv_heads), head_dim, (layout, combined), dtype, soft_cap, run in [
        ((4, 2), 128, ("NHD", True), torch.bfloat16, None, {}),
        ((1, 3), 128, ("HND", True), torch.float16, None, {"q_scale": 1.5, "k_scale": torch.tensor(0.5)}),
        ((5, 2), 128, ("NHD", False), torch.bfloat16, 2.5, {}),
        ((7, 1), 64, ("HND", False), torch.float16, None, {}),
        ((16, 2), 64, ("NHD", True), torch.bfloat16, None, {"v_scale": 2.0}),
        ((32, 2), 128, ("NHD", True), torch.bfloat16, None, {}),
        ((4, 1), 256, ("HND", True), torch.float16, 20.0, {}),
        ((8, 4), 256, ("NHD", False), torch.bfloat16, None, {}),
    ]
]

LAYERS += [replace(layer, kv_dtype=FP8, run={"k_scale": 0.5, "v_scale": 0.25}) for layer in LAYERS[::2]]


@pytest.mark.gpu
@pytest.mark.parametrize("sharing", ["by cost", "all_shared"])
@pytest.mark.parametrize(
    ("page_size", "layer"), list(zip([1, 16, 3, 64, 1, 4, 8, 32, 16, 1, 8, 64], LAYERS, strict=True))
)
def test_random_batches(page_size: int, layer: Layer, sharing: str, request: pytest.FixtureRequest) -> None:
    """Decode and prefill, causal and not, windows, scattered pages with gaps, requests without queries or KV."""
    if sharing == "all_shared":
        request.getfixturevalue("all_shared")
    reused: dict[bool, Any] = {True: None, False: None}
    for seed in range(40):
        decode = seed % 2 == 0
        rng = random.Random(f"{page_size} {sharing} {seed}")
        batch = cases.random_batch(rng, decode=decode, page_size=page_size)
        sinks = rng.choice([None, torch.float32, torch.bfloat16])
        check(batch, replace(layer, sinks=sinks), seed, reused[decode])
        reused[decode] = reused[decode] or cases.make_wrapper(batch, layer)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_large_batches(decode: bool) -> None:
    """Several levels, several tiles of queries, pieces by the real cost model."""
    pages = itertools.count(360)
    tables = [[*range(200), *range(200 + 40 * (i % 4), 240 + 40 * (i % 4)), next(pages)] for i in range(24)]
    tables += [[next(pages) for _ in range(60 * i)] for i in range(4)]
    q_lens = [1] * 28 if decode else [(37 * i) % 150 for i in range(28)]
    batch = Batch(16, tables, [1 + i % 16 for i in range(28)], q_lens, decode=decode, causal=not decode)
    counted = cases.make_wrapper(batch, LAYERS[0]).kv_tokens
    assert counted.read < counted.logical / 4 or not decode
    check(batch, LAYERS[0], 0)


@pytest.mark.parametrize("lse_base", ["log2", "ln"])
@pytest.mark.parametrize("lse_layout", ["NH", "HN"])
def test_buffers_and_forms_of_the_lse(lse_base: str, lse_layout: str) -> None:
    batch = Batch(4, [[0, 1, 2], [0, 1], []], [3, 4, 1], [2, 1, 1], causal=True)
    q, (_, _, cache) = cases.make_q(batch, HALF, 0), cases.make_kv(batch, HALF, 0)
    planned = cases.make_wrapper(batch, HALF)
    expected, expected_lse = planned.run_return_lse(q, cache)
    wide = torch.randn(4, 2, 3, 64, device=DEVICE).half()
    wide[:, :, 1] = q
    out = torch.empty(4, 4, 64, dtype=torch.float16, device=DEVICE)[:, ::2]
    lse = torch.empty((4, 2) if lse_layout == "NH" else (2, 4), device=DEVICE)
    got = planned.run(wide[:, :, 1], cache, out=out, lse=lse, return_lse=True, lse_base=lse_base, lse_layout=lse_layout)
    assert got[0] is out and got[1] is lse
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    expected_lse = expected_lse if lse_base == "log2" else expected_lse * np.log(2)
    torch.testing.assert_close(lse if lse_layout == "NH" else lse.t(), expected_lse)
    assert not out[3].any() and (lse if lse_layout == "NH" else lse.t())[3].eq(-torch.inf).all()
    layer = replace(HALF, o_dtype=torch.float32)
    torch.testing.assert_close(cases.make_wrapper(batch, layer).run(q, cache), expected.float(), rtol=1e-3, atol=1e-3)


def test_forward_replaces_what_was_planned() -> None:
    old = Batch(4, [[0, 1, 2], [0, 1]], [3, 4], [2, 1], causal=True)
    q, (k, v, cache) = cases.make_q(old, HALF, 0), cases.make_kv(old, HALF, 0)
    planned = cases.make_wrapper(old, HALF)
    out, lse = planned.forward_return_lse(q, cache, window_left=3, sm_scale=0.1, logits_soft_cap=3.0)
    new = replace(old, causal=False, window_left=3), replace(HALF, sm_scale=0.1, soft_cap=3.0)
    expected, expected_lse = cases.brute_force(*new, q, k, v)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=1e-3, atol=1e-3)


def test_a_plan_that_needs_too_many_partial_results_shares_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 0)
    batch = Batch(16, [[*range(40), 40 + i] for i in range(6)], [3] * 6, [1] * 6, decode=True)
    counted = cases.make_wrapper(batch, HALF).kv_tokens
    assert counted.read == counted.logical > counted.unique
    check(batch, HALF, 0)


# what a captured graph needs: buffers that stay where they are


def graph_wrapper(decode: bool, requests: int, pages: int, **changes: Any) -> Any:
    names = ["indptr", "indices", "last_page_len"]
    sizes = [requests + 1, pages, requests]
    buffers = {
        f"paged_kv_{name}_{'buffer' if decode else 'buf'}": torch.full((size,), -7, dtype=torch.int32, device=DEVICE)
        for name, size in zip(names, sizes)
    }
    if not decode:
        buffers["qo_indptr_buf"] = torch.full((requests + 1,), -7, dtype=torch.int32, device=DEVICE)
    options = {"use_cuda_graph": True, **buffers, **changes}
    return (Decode if decode else Prefill)(torch.empty(16, dtype=torch.uint8, device=DEVICE), "NHD", **options)


def batches(decode: bool) -> list[Batch]:
    """Three requests each; two share, nobody shares and one has no KV, all share at two levels."""
    tables = [
        [[*range(6), 6, 7], [*range(6), 8], [9, 10, 11]],
        [[0], [], [1, 2, 3, 4]],
        [[*range(8), 8], [*range(8), 9], [*range(4), 10]],
    ]
    q_lens = [[1] * 3] * 3 if decode else [[4, 6, 3], [1, 3, 5], [0, 2, 1]]
    return [
        Batch(4, t, last, q, decode=decode, causal=not decode)
        for t, last, q in zip(tables, ([1, 2, 4], [3, 1, 2], [4, 4, 1]), q_lens)
    ]


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.usefixtures("all_shared")
def test_plans_in_fixed_buffers(decode: bool) -> None:
    planned = graph_wrapper(decode, 3, 40)
    assert planned.is_cuda_graph_enabled
    places = set()
    for batch in [*batches(decode), *batches(decode)[1:]]:
        check(batch, HALF, 1, planned)
        packed = planned._kernels._runner._packed
        places.add((packed._block.data_ptr(), packed.kv_slots.data_ptr(), packed._part_out.data_ptr()))
        read_back = [x.tolist() for x in planned._kernels.graph._tables]
        assert read_back[0] == indptr([len(t) for t in batch.tables]).tolist()
        assert read_back[1][: read_back[0][-1]] == sum(batch.tables, [])
        assert read_back[2] == batch.last_page_len
        assert decode or read_back[3] == indptr(batch.q_lens).tolist()
        for buffer in (packed.kv_slots, packed._part_out, packed._part_lse2):
            buffer.fill_(POISON if buffer.dtype == torch.int32 else float("nan"))
    assert len(places) == 1


def test_rows_past_the_plan_come_out_as_zero() -> None:
    batch = batches(False)[0]
    planned = cases.make_wrapper(batch, HALF, graph_wrapper(False, 3, 40))
    q, (_, _, cache) = cases.make_q(batch, HALF, 0), cases.make_kv(batch, HALF, 0)
    expected = planned.run(q, cache)
    out = planned.run(torch.cat([q, q]), cache)
    assert torch.equal(out[: len(q)], expected) and not out[len(q) :].any()
    with pytest.raises(ValueError, match="q must be"):
        planned.run(q[1:], cache)


@pytest.mark.usefixtures("all_shared")
def test_a_plan_beyond_the_buffers_shares_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_buffers, "PARTIAL_BYTES", 0)
    for batch in batches(True):
        planned = graph_wrapper(True, 3, 40)
        check(batch, HALF, 0, planned)
        assert planned.kv_tokens.read == planned.kv_tokens.logical


def test_a_batch_beyond_the_buffers_is_found() -> None:
    for decode in (True, False):
        first, other, _ = batches(decode)
        planned = cases.make_wrapper(first, HALF, graph_wrapper(decode, 3, 18))
        name = "paged_kv_indices_buf"
        more_pages = replace(first, tables=[[*range(6), 6, 7, 12], *first.tables[1:]])
        faults = [
            ("requests", replace(first, tables=first.tables[:2], last_page_len=[1, 2], q_lens=first.q_lens[:2]), HALF),
            (f"19 kv indices, {name}", more_pages, HALF),
            ("queries", replace(first, q_lens=[7] * 3), HALF),
            ("num_qo_heads=1", other, replace(HALF, qo_heads=1)),
            ("q_data_type", other, replace(HALF, q_dtype=torch.bfloat16, kv_dtype=torch.bfloat16)),
            ("sm_scale=0.2", other, replace(HALF, sm_scale=0.2)),
            ("logits_soft_cap=1.0", other, replace(HALF, soft_cap=1.0)),
            ("causal or window_left", replace(other, causal=not other.causal, window_left=5 if decode else -1), HALF),
        ]
        for match, batch, layer in faults:
            with pytest.raises(ValueError, match=match):
                cases.make_wrapper(batch, layer, planned)
        check(other, replace(HALF, sm_scale=64**-0.5), 0, planned)
        with pytest.raises(NotImplementedError, match="window_left=2"):
            planned.forward(cases.make_q(other, HALF, 0), cases.make_kv(other, HALF, 0)[2], window_left=2)


def test_buffers_that_do_not_fit_each_other_are_found() -> None:
    for decode in (True, False):
        end = "buffer" if decode else "buf"
        for name in ("indptr", "indices", "last_page_len"):
            for wrong in (None, torch.zeros(4, device=DEVICE), int32([[1]]).to(DEVICE), int32([1] * 8).to(DEVICE)[::2]):
                with pytest.raises(ValueError, match=f"paged_kv_{name}_{end} must"):
                    graph_wrapper(decode, 3, 9, **{f"paged_kv_{name}_{end}": wrong})
        with pytest.raises(ValueError, match=f"paged_kv_indptr_{end} must have one entry more"):
            graph_wrapper(decode, 3, 9, **{f"paged_kv_indptr_{end}": torch.zeros(3, dtype=torch.int32, device=DEVICE)})
        with pytest.raises(ValueError, match="is on meta"):
            graph_wrapper(decode, 3, 9, **{f"paged_kv_indptr_{end}": int32([0] * 4).to("meta")})
        with pytest.raises(NotImplementedError, match="without use_cuda_graph"):
            graph_wrapper(decode, 3, 9, use_cuda_graph=False)
    with pytest.raises(ValueError, match="qo_indptr_buf must have one entry more"):
        graph_wrapper(False, 3, 9, qo_indptr_buf=torch.zeros(3, dtype=torch.int32, device=DEVICE))
    with pytest.raises(NotImplementedError, match="custom_mask_buf"):
        graph_wrapper(False, 3, 9, custom_mask_buf=torch.zeros(3, device=DEVICE))
    batch = Batch(4, [[0, 1], [2]], [1, 3], [2, 2])
    batch = replace(batch, mask=[torch.ones(2, n, dtype=torch.bool) for n in batch.kv_lens])
    for packed in (False, True):
        with pytest.raises(NotImplementedError, match="custom_mask is not supported with use_cuda_graph"):
            cases.make_wrapper(batch, HALF, graph_wrapper(False, 2, 9), packed=packed)


def test_what_the_kernels_cannot_do_is_refused_by_name() -> None:
    batch = Batch(4, [[0, 1], [2]], [1, 3], [2, 2])
    refused = [
        ("q_data_type", batch, replace(HALF, q_dtype=torch.float32, kv_dtype=torch.float32)),
        ("kv_data_type", batch, replace(HALF, kv_dtype=torch.bfloat16)),
        ("kv_data_type", batch, replace(HALF, kv_dtype=torch.float32)),
        ("kv_data_type", batch, replace(HALF, kv_dtype=torch.float8_e5m2)),
        ("head_dim=32", batch, replace(HALF, head_dim=32)),
        ("num_qo_heads=33 .* at head_dim=64 at most 32", batch, replace(HALF, qo_heads=33)),
        ("num_qo_heads=17 .* at head_dim=256 at most 16", batch, replace(HALF, qo_heads=17, head_dim=256)),
    ]
    planned = cases.make_wrapper(batch, HALF)
    q, (k, v, cache) = cases.make_q(batch, HALF, 0), cases.make_kv(batch, HALF, 0)
    for match, other, layer in refused:
        with pytest.raises(NotImplementedError, match=match):
            cases.make_wrapper(other, layer, planned)
    k, v = cache.unbind(1)
    apart = torch.stack([q, q], -1)[..., 0]
    for match, arguments, options in (
        ("q with strides", (apart, cache), {}),
        ("out with strides", (q, cache), {"out": apart}),
        ("k cache with strides", (q, (torch.stack([k, k], -1)[..., 0], v)), {}),
        ("v cache with strides", (q, (k, torch.stack([v, v], -1)[..., 0])), {}),
        ("paged_kv_cache with different strides", (q, (k.contiguous(), v)), {}),
        ("sm_scale", (q, cache), {"q_scale": 0.0}),
        ("sm_scale", (q, cache), {"k_scale": -1.0}),
        ("k_scale on", (q, cache), {"k_scale": torch.ones(1, device="meta")}),
    ):
        with pytest.raises(NotImplementedError, match=match):
            planned.run(*arguments, **options)
    assert planned.run(q, cache).isfinite().all()  # a refusal leaves the plan alone
    far = torch.empty_strided((1, 3, 64), (1, 2**31, 1), device="meta")  # which the kernels can do
    checks.check_strides(far, "q")


def test_pages_beyond_int32_slots_are_found() -> None:
    with pytest.raises(ValueError, match=r"2\*\*31"):
        cases.make_wrapper(Batch(64, [[2**25]], [1], [1], decode=True), HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_one_graph_replays_many_plans(decode: bool) -> None:
    """Other sharing, lengths and query counts; equal bit for bit to wrappers without a graph."""
    layer = replace(LAYERS[0], run={})
    planned = graph_wrapper(decode, 6, 400)
    plans = []
    for shared in (40, 0, 12):
        q_lens = [1] * 6 if decode else [50 - shared, 3, 1, 0, shared // 2, 7]
        tables = [[*range(shared), *range(50 + 40 * i, 50 + 40 * i + 3 * i)] for i in range(6)]
        plans.append(Batch(16, tables, [1 + 2 * i for i in range(6)], q_lens, decode=decode, causal=not decode))
    plans.sort(key=lambda batch: -sum(batch.q_lens))
    most = sum(plans[0].q_lens)
    everything = Batch(16, [[*range(300)]], [16], [1], decode=True)
    _, _, cache = cases.make_kv(everything, layer, 0)
    q = torch.randn(most, layer.qo_heads, layer.head_dim, device=DEVICE, dtype=layer.q_dtype)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    cases.make_wrapper(plans[0], layer, planned)
    planned.run(q, cache, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        planned.run(q, cache, out=out, lse=lse)
    for seed, batch in enumerate([*plans, *plans[::-1]]):
        n = sum(batch.q_lens)
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        cases.make_wrapper(batch, layer, planned)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        expected, expected_lse = cases.make_wrapper(batch, layer).run(q[:n], cache, return_lse=True)
        assert torch.equal(out[:n], expected) and torch.equal(lse[:n], expected_lse)
        assert not out[n:].any()
        check(batch, layer, seed, planned)
    with pytest.raises(ValueError, match="a captured cache has 300"):
        cases.make_wrapper(replace(plans[0], tables=[[300], *plans[0].tables[1:]]), layer, planned)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_run_never_waits_for_the_gpu(decode: bool) -> None:
    batch = batches(decode)[0]
    planned = cases.make_wrapper(batch, HALF)
    q, (_, _, cache) = cases.make_q(batch, HALF, 0), cases.make_kv(batch, HALF, 0)
    expected = planned.run(q, cache)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = planned.run(q, cache, return_lse=True, v_scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match="v_scale on cuda"):
        planned.run(q, cache, v_scale=torch.ones(1, device="cuda"))
