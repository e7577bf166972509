"""FlashInfer's wrapper for sinks: what the prefill wrapper gives with ``run(sinks=...)``, by other arguments."""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import paged_cases as cases
import pytest
import torch
from paged_cases import Batch, Layer, indptr, int32, tree_batch

from packinfer_sgl import BatchAttentionWithAttentionSinkWrapper as Sinks
from packinfer_sgl.paged import sink_wrapper

LAYER = Layer(8, 2, 64)
HALF = {"q_data_type": torch.float32, "kv_data_type": torch.float32, "head_dim_qk": 64, "head_dim_vo": 64}


def planned(batch: Batch, **options: Any) -> Sinks:
    wrapper = Sinks(torch.empty(0), LAYER.layout, **HALF, window_left=batch.window_left)
    plan(wrapper, batch, **options)
    return wrapper


def plan(wrapper: Sinks, batch: Batch, **options: Any) -> None:
    tables = indptr([len(t) for t in batch.tables]), int32([page for table in batch.tables for page in table])
    wrapper.plan(
        indptr(batch.q_lens), *tables, int32(batch.last_page_len), LAYER.qo_heads, LAYER.kv_heads,
        **{"head_dim_qk": 64, "page_size": batch.page_size, "causal": batch.causal, "window_left": batch.window_left,
           "q_data_type": torch.float32, **options},
    )  # fmt: skip


@pytest.mark.parametrize("batch", [tree_batch(q_len=3, causal=True), tree_batch(), tree_batch(window_left=30)], ids=str)
def test_equals_brute_force(batch: Batch) -> None:
    q, (k, v, cache) = cases.make_q(batch, LAYER, 0), cases.make_kv(batch, LAYER, 0)
    sinks = torch.randn(LAYER.qo_heads, generator=torch.Generator().manual_seed(0)) * 2 + 3
    wrapper = planned(batch, sm_scale=9.0)  # what run says holds
    expected = cases.brute_force(batch, replace(LAYER, sm_scale=0.3), q, k, v, sinks)
    got = wrapper.run(q, cache, sinks, 0.3, return_lse=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wrapper.run_return_lse(q, cache, sinks, 0.3)[0], got[0])


@pytest.mark.parametrize(
    ("made", "message"),
    [({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode"), ({"use_fp16_qk_reduction": True}, "use_fp16_qk_reduction"),
     ({"head_dim_vo": 32}, "head_dim_vo"), ({"custom_mask_buf": torch.zeros(1)}, "custom_mask_buf"),
     ({"q_data_type": torch.float8_e4m3fn}, "q_data_type")],
)  # fmt: skip
def test_constructors_that_are_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        Sinks(torch.empty(0), **{**HALF, **made})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head_dim_qk": 128}, "head_dim_qk=128 is not what the wrapper was made for"),
     ({"q_data_type": torch.float16}, "q_data_type=torch.float16 is not what"),
     ({"kv_data_type": torch.float16}, "kv_data_type=torch.float16 is not what"),
     ({"window_left": 3}, "window_left=3 is not what the wrapper was made for .none")],
)  # fmt: skip
def test_plans_for_which_it_was_not_made(options: dict[str, Any], message: str) -> None:
    wrapper = Sinks(torch.empty(0), **HALF)
    with pytest.raises(ValueError, match=message):
        plan(wrapper, tree_batch(), **options)
    with pytest.raises(NotImplementedError, match="logits_soft_cap"):
        plan(wrapper, tree_batch(), logits_soft_cap=3.0)


def test_calls_that_are_refused() -> None:
    batch = tree_batch()
    wrapper, q, cache = planned(batch), cases.make_q(batch, LAYER, 0), cases.make_kv(batch, LAYER, 0)[2]
    for args in ((), (torch.zeros(8),), (0.3, torch.zeros(8)), (torch.zeros(8), 0.3, 1)):
        with pytest.raises(ValueError, match="run takes sink and sm_scale"):
            wrapper.run(q, cache, *args)
    with pytest.raises(ValueError, match="for each of 8 query heads"):
        wrapper.run(q, cache, torch.zeros(7), 0.3)
    with pytest.raises(NotImplementedError, match="sinks"):
        wrapper.run(q, cache, torch.zeros(8), 0.3, sinks=torch.zeros(8))
    with pytest.raises(NotImplementedError, match="forward is not supported"):
        wrapper.forward(q, cache)


def test_examples() -> None:
    found = doctest.testmod(sink_wrapper)
    assert found.attempted > 5 and found.failed == 0
