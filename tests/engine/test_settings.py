"""Engines with settings of the plugin: outputs stay the stock backend's, and the settings do what they say."""

from __future__ import annotations

import pytest
from check.models import write_model
from compare import check
from engines import POOL, SGLANG, run_engine
from test_exactness import ALL

from packinfer_sgl.planning.prefix_hold import LEAST_TOKENS

pytestmark = pytest.mark.engine

SHARED, IDENTICAL = 900, 450  # tokens: what `family` shares; at least what `cold` has
# its paged allocator needs a GPU, and it has one tree core
PAGE, PYTHON_CORE = ({}, {}) if SGLANG == "0.5.17" else (
    {"page_size": 16}, {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"},
)  # fmt: skip


def test_grouping_off(model, stock):
    engine = {"model_path": model, "attention_backend": "packinfer", **POOL}
    ran = run_engine({"engine": engine, "rounds": ["tree"]}, {"grouping": "off"})
    check(ran.said, stock)
    assert ran.state["packed_steps"] > 30 and ran.state["kv_tokens_read"] == ran.state["kv_tokens_logical"]
    assert ran.state["held"]["requests"] == 15, "what is computed once does not depend on what is read once"


def test_a_stock_backend_is_wrapped(model, stock):
    """For models for which SGLang insists on a stock backend's name; one group a request, read from SGLang's other
    tree."""
    engine = {"model_path": model, "attention_backend": "torch_native", **POOL}
    config = {"wrap": True, "grouping": "single", "check": True}
    ran = run_engine({"engine": engine, "rounds": ALL}, config, PYTHON_CORE)
    check(ran.said, stock)
    state = ran.state
    assert state["active"] and state["base_backend"] == "torch_native" and state["packed_steps"] > 30
    assert state["held"]["requests"] >= 15 + 7
    assert all(node["parent"] == -1 for at in ran.states.values() for node in at["tree"])
    read = ran.counted("0-tree", "kv_tokens_read")
    assert ran.counted("0-tree", "kv_tokens_unique") < read < 0.6 * ran.counted("0-tree", "kv_tokens_logical")


def test_layers_with_a_window_stay_with_the_stock_backend(tmp_path):
    """Gemma 3: the other layers are packed, each checked against the stock backend."""
    engine = {"model_path": str(write_model("gemma3", tmp_path)), "attention_backend": "packinfer", **POOL}
    state = run_engine({"engine": engine, "rounds": ["tree", "tree"]}, {"check": True}).state
    assert state["held"]["requests"] == 15 and state["held"]["prefix_tokens"] >= 15 * 300
    assert state["fallback_layers"] == {"sliding_window": 2} and 0 < state["check_error"] < 1e-5
    assert state["packed_steps"] > 30 and state["kv_tokens_read"] < 0.6 * state["kv_tokens_logical"]


def cached(said: dict[str, list[dict]], name: str) -> list[int]:
    return sorted(out["cached"] for out in said[name])


@pytest.mark.parametrize("case", ["default", "small pool"])
def test_arena_and_held_requests(case, model, stock):
    """With ``check`` every shared span is copied in its first step and again before each that reads the copy, and what
    it was copied from is NaN for the packed kernels; SGLang's check for leaks raises when it is idle.

    With overlap, where what a pass computes enters the tree one pass later; `family` takes two chunks.
    """
    small = case == "small pool"
    flags = {"max_total_tokens": 4992, "chunked_prefill_size": 128, **PAGE} if small else {"chunked_prefill_size": 512}
    engine = {"model_path": model, "attention_backend": "packinfer", **POOL, **flags}
    rounds = ["cold", "family", "tree", "samples", "abort", "flush", "tree"]
    ran = run_engine({"engine": engine, "rounds": rounds}, {"check": True, "arena_tokens": 2000})
    check(ran.said, stock)
    arena, held = ran.state["arena"], ran.state["held"]
    assert ran.state["packed_steps"] > 100 and arena["tokens"] == 2000
    assert arena["hits"] > 10 and arena["copies"] > 10 and arena["refused"] == 0
    # but for the step that makes a copy, which the next one reads
    assert 0.9 * arena["shared_tokens_read"] < arena["contiguous_tokens_read"] < arena["shared_tokens_read"]
    assert arena["shared_tokens_read"] > 10000
    assert 0 < arena["used_tokens"] <= 2000 and arena["spans"] <= arena["copies"]

    first, *others = cached(ran.said, "0-cold")
    # in chunks of 128 nobody waits for the last LEAST_TOKENS
    assert first == 0 and min(others) >= IDENTICAL - LEAST_TOKENS * small and len(others) == 7
    assert sum(n >= IDENTICAL for n in cached(stock, "cold")) < 4, "as without it: most compute all of the prompt"
    if small:  # what has been computed may be evicted before those behind it come
        return
    alone, others = cached(ran.said, "1-family")[:3], cached(ran.said, "1-family")[3:]
    assert alone == [0, 0, 0] and min(others) >= SHARED, "one of the eight, and the two unrelated ones"
    assert held["requests"] >= 7 + 7 and held["requests"] <= held["passes"] <= 4 * held["requests"]
    assert held["prefix_tokens"] >= 7 * IDENTICAL + 7 * (SHARED - 512), "the first chunk is there before anybody waits"
    assert ran.state["config"]["hold_siblings"] is True
