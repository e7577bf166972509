"""Requests whose KV is taken from them and computed anew: no plan outlives the slots that it was made for."""

from __future__ import annotations

import faults
import pytest
from compare import differences
from engines import SGLANG, Ran, run_engine

pytestmark = pytest.mark.engine

NO_CACHE = {"disable_radix_cache": True, "max_running_requests": 1, "max_total_tokens": 500}
CASES = {
    "one request": (NO_CACHE, {"at_once": 1, "tokens": 300}),
    "two that change places, no overlap": (
        {**NO_CACHE, "max_running_requests": 2, "max_total_tokens": 1000, "disable_overlap_schedule": True},
        {"at_once": 2, "tokens": 300},
    ),
    "radix cache": ({"max_running_requests": 1, "max_total_tokens": 640}, {"at_once": 1, "tokens": 320}),
}
if SGLANG != "0.5.17":  # its paged allocator needs a GPU
    CASES["pages of 64"] = (
        {"page_size": 64, "max_running_requests": 1, "max_total_tokens": 640},
        {"at_once": 1, "tokens": 320},
    )


CONTRACT = ("one request", "radix cache")


def run(case: str, model: str, env: dict[str, str]) -> Ran:
    flags, preempt = CASES[case]
    engine = {"model_path": model, "attention_backend": "packinfer", "enable_priority_scheduling": True, **flags}
    return run_engine({"engine": engine, "rounds": ["preempted"], "preempt": preempt}, {"check": True}, env)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.contract] if case in CONTRACT else []) for case in CASES]
)
def test_a_request_that_comes_back_has_new_slots(case, model, stock):
    """Row, radix node and length come back as they were; each decode step is audited, too."""
    ran = run(case, model, {})
    at_once = CASES[case][1]["at_once"]
    said = ran.said["0-preempted"]
    wrong, _ = differences(said, stock["low"][:at_once] * (len(said) // at_once))
    assert not wrong
    state = ran.state
    assert state["audited_steps"] == state["packed_steps"] > 0


@pytest.mark.skipif(SGLANG == "0.5.17", reason="there no plan of this case goes stale, planted bug or not")
def test_the_audit_sees_a_stale_plan(model, tmp_path):
    with pytest.raises(
        pytest.fail.Exception, match="packinfer: a plan is not that of its batch: row 0 of the batch reads"
    ):
        run("one request", model, faults.install(tmp_path, "forget-retractions"))
