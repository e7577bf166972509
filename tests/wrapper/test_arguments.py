"""Arguments that are refused by name, contradictions that are found, and spellings that are accepted."""

from __future__ import annotations

from typing import Any

import flashinfer
import pytest
import torch
from paged_cases import Wrapper, indptr, int32

from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper as Decode
from packinfer_sgl import BatchPrefillWithPagedKVCacheWrapper as Prefill

X = torch.zeros(1)
NEW, PLAN, RUN, FORWARD = "__init__", "plan", "run", "forward"
# A value of each argument that is not supported; `both` have it in common.
BOTH: dict[str, list[tuple[str, Any]]] = {
    NEW: [("use_cuda_graph", True), ("jit_args", []), ("backend", "trtllm-gen"), ("backend", "no such thing")],
    PLAN: [
        ("pos_encoding_mode", "ROPE_LLAMA"),
        ("pos_encoding_mode", "ALIBI"),
        ("rope_scale", 1.0),
        ("rope_theta", 1e4),
        ("block_tables", X),
        ("fixed_split_size", 4),
        ("disable_split_kv", True),
        ("q_data_type", torch.float8_e4m3fn),
        ("q_data_type", "no such thing"),
        ("kv_data_type", torch.uint8),
        ("kv_data_type", torch.float8_e5m2),
        ("o_data_type", torch.float8_e4m3fn),
        ("o_data_type", torch.float64),
    ],
    RUN: [
        ("skip_softmax_threshold_scale_factor", 1.0),
        ("kv_cache_sf", X),
        ("window_left", 3),
        ("k_scale", torch.ones(2)),
        ("v_scale", torch.ones(2)),
        ("q_scale", torch.ones(1, device="meta")),
    ],
    FORWARD: [("pos_encoding_mode", "ALIBI"), ("rope_scale", 1.0), ("rope_theta", 1e4)],
}
REFUSED: dict[type, dict[str, list[tuple[str, Any]]]] = {
    Decode: {
        NEW: [(f"paged_kv_{name}_buffer", X) for name in ("indptr", "indices", "last_page_len")],
        PLAN: [("window_right", 1), ("window_right", -1)],
        RUN: [("q_len_per_req", 2)],
    },
    Prefill: {
        NEW: [
            *((f"{name}_buf", X) for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "mask_indptr")),
            ("paged_kv_last_page_len_buf", X),
            ("custom_mask_buf", X),
            ("jit_kwargs", {}),
            ("variant_owns_mask", True),
        ],
        PLAN: [
            ("head_dim_vo", 4),
            ("use_fp16_qk_reduction", True),
            ("prefix_len_ptr", X),
            ("token_pos_in_items_ptr", X),
            ("token_pos_in_items_len", 1),
            ("max_item_len_ptr", X),
        ],
        RUN: [("use_fp16_softmax", True), ("uses_spcompress", True)],
        FORWARD: [("use_fp16_qk_reduction", True)],
    },
}
CASES = [
    (kind, method, name, value)
    for kind in (Decode, Prefill)
    for method in (NEW, PLAN, RUN, FORWARD)
    for name, value in BOTH[method] + REFUSED[kind].get(method, [])
]


def plan(planned: Wrapper, **options: Any) -> None:
    """Two requests of 3 tokens on 2 pages of 2 tokens."""
    arguments: dict[str, Any] = {
        "num_qo_heads": 2,
        "num_kv_heads": 1,
        "page_size": 2,
        "q_data_type": torch.float32,
    }
    tables = (int32([0, 2, 4]), int32([0, 1, 0, 2]), int32([1, 1]))
    if isinstance(planned, Decode):
        arguments |= dict(zip(("indptr", "indices", "last_page_len"), tables, strict=True)) | {"head_dim": 8}
    else:
        names = ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        arguments |= dict(zip(names, (int32([0, 1, 2]), *tables), strict=True)) | {"head_dim_qk": 8}
    planned.plan(**arguments | options)


def ready(kind: type) -> tuple[Wrapper, torch.Tensor, torch.Tensor]:
    planned = kind(X)
    plan(planned)
    return planned, torch.randn(2, 2, 8), torch.randn(3, 2, 2, 1, 8)


@pytest.mark.parametrize(("kind", "method", "name", "value"), CASES)
def test_what_is_not_supported_is_refused_by_name(kind: type, method: str, name: str, value: Any) -> None:
    planned, q, cache = ready(kind)
    with pytest.raises(NotImplementedError, match=name):
        if method == NEW:
            kind(X, **{name: value})
        elif method == PLAN:
            plan(planned, **{name: value})
        else:
            getattr(planned, method)(q, cache, **{name: value})
    assert planned.run(q, cache).isfinite().all()  # a refusal leaves the plan alone


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_a_launch_hint_is_taken(kind: type) -> None:
    planned, q, cache = ready(kind)
    assert torch.equal(planned.run(q, cache, enable_pdl=True), planned.run(q, cache))


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_what_flashinfer_has_besides_is_refused_by_name(kind: type) -> None:
    planned = kind(X)
    names = ["workspace_size", "prewarm_paged_kv_stride_variant"]
    for name in names:
        with pytest.raises(NotImplementedError, match=name):
            getattr(planned, name)()
    if kind is Decode:
        with pytest.raises(NotImplementedError, match="resolved_backend"):
            planned.resolved_backend  # noqa: B018
        names.append("resolved_backend")
    theirs = getattr(flashinfer, kind.__name__)
    assert {name for name in dir(theirs) if not name.startswith("_")} <= {*dir(kind), *names}


def test_a_wrong_number_of_queries_names_how_many_a_request_has() -> None:
    planned, q, cache = ready(Decode)
    for wrong in (q[:1], torch.cat([q, q])):
        with pytest.raises(ValueError, match="2 requests with q_len_per_req=1"):
            planned.run(wrong, cache)


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_further_positional_arguments_are_refused(kind: type) -> None:
    planned, q, cache = ready(kind)
    with pytest.raises(NotImplementedError, match="args"):
        planned.run(q, cache, X)


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_tensors_elsewhere_than_the_wrapper_are_refused(kind: type) -> None:
    planned, q, cache = ready(kind)
    with pytest.raises(NotImplementedError, match="float_workspace_buffer on meta"):
        kind(X.to("meta"))
    for call in (
        lambda: planned.reset_workspace_buffer(X, X.to("meta")),
        lambda: planned.run(q.to("meta"), cache),
        lambda: planned.run(q, cache.to("meta")),
        lambda: planned.run(q, cache, out=q.to("meta")),
        lambda: planned.run(q, cache, lse=q[..., 0].to("meta"), return_lse=True),
    ):
        with pytest.raises(ValueError, match="is on meta, the wrapper on cpu"):
            call()
    planned.reset_workspace_buffer(X, X)
    assert not planned.is_cuda_graph_enabled


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_nothing_runs_before_a_plan_or_after_one_that_failed(kind: type) -> None:
    planned, q, cache = ready(kind)
    with pytest.raises(ValueError):
        plan(planned, num_kv_heads=2, seq_lens=int32([3, 4]))
    for stale in (planned, kind(X)):
        for call in (lambda p=stale: p.run(q, cache), lambda p=stale: p.forward(q, cache), lambda p=stale: p.kv_tokens):
            with pytest.raises(RuntimeError, match="plan"):
                call()


KV_FAULTS: list[tuple[str, Any]] = [
    ("indptr", indptr([2, 2]).long()),
    ("indptr", int32([0, 3, 2])),
    ("indptr", int32([1, 2, 4])),
    ("indptr", int32([0, 2])),
    ("indptr", int32([0, 2, 5])),
    ("indices", int32([0, 1, 0, -1])),
    ("last_page_len", int32([1, 3])),
    ("last_page_len", int32([1, -1])),
    ("last_page_len", int32([[1], [1]])),
]
PLAN_FAULTS = [
    *((Decode, name, value) for name, value in KV_FAULTS),
    *((Prefill, f"paged_kv_{name}", value) for name, value in KV_FAULTS),
    *((kind, "page_size", 0) for kind in (Decode, Prefill)),
    *((kind, "seq_lens", int32([3, 4])) for kind in (Decode, Prefill)),
    (Decode, "q_len_per_req", 0),
    (Prefill, "qo_indptr", int32([0, 2, 1])),
    (Prefill, "qo_indptr", int32([1, 2, 3])),
    (Prefill, "seq_lens_q", int32([1, 2])),
    (Prefill, "max_token_per_sequence", 0),
    (Prefill, "max_sequence_kv", 2),
    (Prefill, "custom_mask", torch.ones(7, dtype=torch.bool)),
    (Prefill, "custom_mask", torch.ones(6)),
    (Prefill, "packed_custom_mask", torch.ones(2, dtype=torch.uint8)),
    (Prefill, "packed_custom_mask", torch.ones(1, dtype=torch.int8)),
]


@pytest.mark.parametrize(("kind", "name", "value"), PLAN_FAULTS)
def test_plans_that_contradict_themselves_are_found(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name.removeprefix("paged_kv_")):
        plan(kind(X), **{name: value})


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_tensors_that_are_not_as_planned_are_found(kind: type) -> None:
    planned, q, cache = ready(kind)
    k, v = cache.unbind(1)
    for match, arguments, options in (
        ("q must", (q[:1], cache), {}),
        ("q must", (q.half(), cache), {}),
        ("cache must", (q, (k, v.half())), {}),
        ("cache must", (q, (k, v.expand(-1, -1, 2, -1))), {}),
        ("cache must", (q, (k[:, :1], v)), {}),
        ("page 2", (q, cache[:2]), {}),
        ("dimension 1", (q, torch.stack([k] * 3, 1)), {}),
        ("5 dimensions", (q, k[0]), {}),
        ("4 dimensions", (q, (k[0, 0], v)), {}),
        ("out must", (q, cache), {"out": q.half()}),
        ("lse must", (q, cache), {"lse": torch.empty(2, 1)}),
    ):
        with pytest.raises(ValueError, match=match):
            planned.run(*arguments, **options)
    for option in ({"lse_base": "e"}, {"lse_layout": "N"}) if kind is Prefill else ():
        with pytest.raises(ValueError, match="lse_"):
            planned.run(q, cache, **option)
    with pytest.raises(ValueError, match="kv_layout"):
        kind(X, "NDH")


@pytest.mark.parametrize("kind", [Decode, Prefill])
def test_harmless_arguments_change_nothing(kind: type) -> None:
    planned, q, cache = ready(kind)
    expected = planned.run(q, cache)
    for option in [{"backend": "fa2"}, {"backend": "fa3"}, *([{"use_tensor_cores": True}] if kind is Decode else [])]:
        other = kind(X, **option)
        plan(other, non_blocking=False, seq_lens=int32([3, 3]), q_data_type="float32")
        torch.testing.assert_close(other.run(q, cache, enable_pdl=False, window_left=-1), expected)
    if kind is Decode:
        plan(other, q_data_type=None, data_type=torch.float32, q_len_per_req=1, is_causal=True)
        torch.testing.assert_close(other.run(q, cache, q_len_per_req=1), expected)
    else:
        plan(other, head_dim_vo=8, seq_lens_q=int32([1, 1]), max_token_per_sequence=1, max_sequence_kv=9)
        torch.testing.assert_close(other.run(q, cache), expected)


def test_a_deprecated_data_type_is_that_of_the_cache_only() -> None:
    """FlashInfer's quirk: the query's has a default, so ``data_type`` does not reach it."""
    planned = Decode(X)
    planned.begin_forward(int32([0, 1]), int32([0]), int32([1]), 1, 1, 8, 1, data_type=torch.float32)
    assert planned.run(torch.zeros(1, 1, 8).half(), torch.zeros(1, 2, 1, 1, 8)).dtype == torch.float16


@pytest.mark.parametrize("kind", [Decode, Prefill])
@pytest.mark.parametrize("sinks", [torch.zeros(1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)], ids=str)
def test_sinks_of_another_shape_are_refused(kind: type, sinks: torch.Tensor) -> None:
    planned, q, cache = ready(kind)
    with pytest.raises(ValueError, match="sinks must be one float32, float16 or bfloat16 for each of 2 query heads"):
        planned.run(q, cache, sinks=sinks)
    with pytest.raises(ValueError, match="sinks is on meta, the wrapper on cpu"):
        planned.run(q, cache, sinks=torch.zeros(2, device="meta"))
