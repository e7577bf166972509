"""Requests whose KV is taken from them and computed anew: no plan outlives the slots that it was made for."""

from __future__ import annotations

import json

import faults
import pytest
from engines import SGLANG, run_engine
from test_exactness import differences

pytestmark = pytest.mark.contract

NO_CACHE = {"disable_radix_cache": True, "max_running_requests": 1, "max_total_tokens": 500}
CASES = {
    "one request": (NO_CACHE, {"at_once": 1, "tokens": 300}),
    "no overlap": ({**NO_CACHE, "disable_overlap_schedule": True}, {"at_once": 1, "tokens": 300}),
    "two that change places": (
        {"disable_radix_cache": True, "max_running_requests": 2, "max_total_tokens": 1000},
        {"at_once": 2, "tokens": 300},
    ),
    "radix cache": ({"max_running_requests": 1, "max_total_tokens": 640}, {"at_once": 1, "tokens": 320}),
}
if SGLANG != "0.5.17":  # its paged allocator needs a GPU
    CASES["pages of 64"] = (
        {"page_size": 64, "max_running_requests": 1, "max_total_tokens": 640},
        {"at_once": 1, "tokens": 320},
    )


def run(case: str, model: str, config: dict, env: dict[str, str]) -> dict:
    flags, preempt = CASES[case]
    engine = {"model_path": model, "attention_backend": "packinfer", "enable_priority_scheduling": True, **flags}
    return run_engine(
        {"engine": engine, "rounds": ["preempted"], "preempt": preempt}, {"PACKINFER_CONFIG": json.dumps(config), **env}
    )


@pytest.mark.parametrize("case", CASES)
def test_a_request_that_comes_back_has_new_slots(case, model, stock):
    """Row, radix node and length come back as they were; each decode step is audited, too."""
    result = run(case, model, {"check": True}, {})
    at_once = CASES[case][1]["at_once"]
    said = result["said"]["0-preempted"]
    wrong, _ = differences(said, stock["low"][:at_once] * (len(said) // at_once))
    assert not wrong
    state = result["packinfer"]
    assert state["audited_steps"] == state["packed_steps"] > 0


@pytest.mark.skipif(SGLANG == "0.5.17", reason="there no plan of this case goes stale, planted bug or not")
def test_the_audit_sees_a_stale_plan(model, tmp_path):
    with pytest.raises(
        pytest.fail.Exception, match="packinfer: a plan is not that of its batch: row 0 of the batch reads"
    ):
        run("one request", model, {"check": True}, faults.install(tmp_path, "forget-retractions"))
