"""Words for what a server counted: every reason has some, and what is said first is what matters most."""

from __future__ import annotations

import pytest

from packinfer_sgl.reasons import BatchReason, UngroupedReason
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.tools.explain import FALLBACK, UNGROUPED, explain

STATE = {
    **Stats().as_dict(),
    "active": True,
    "reason": None,
    "base_backend": "fa3",
    "packs": ["decode", "extend"],
    "device": {"record": "H200", "measured": True, "least_saving": 1.4},
    "config": {"extend": "auto", "check": False},
    "packed_steps": 1000,
    "ungrouped_steps": {"small_saving": 150, "nothing_shared": 650},
    "kv_tokens_logical": 6_000_000,
    "kv_tokens_unique": 3_000_000,
    "kv_tokens_read": 4_000_000,
    "plans": 40,
    "plan_us_p50": 87.4,
}


def said(**state) -> str:
    return "\n".join(explain({**STATE, **state}))


def test_not_active():
    assert explain({**STATE, "active": False, "reason": "no layer can be packed (kv_dtype)"}) == [
        "packinfer is not active: no layer can be packed (kv_dtype)."
    ]
    _, what_to_do = explain(Stats().as_dict())  # of a server with another backend
    assert "--attention-backend packinfer" in what_to_do


def test_decode():
    lines = explain(STATE)
    assert lines[0] == "packinfer is active over fa3; on this device it packs decode, extend."
    assert lines[1:4] == [
        "In 200 of 1,000 packed decode steps a shared prefix was read once.",
        "In 650 nothing was: their requests shared nothing that is known.",
        "In 150 nothing was: groups would have saved less than the gate asks for (1.4x).",
    ]
    assert "read 4,000,000 KV tokens" in lines[4] and "6,000,000 (1.50x)" in lines[4]
    assert lines[4].endswith("the bound is 2.00x.") and lines[5].startswith("So at most 33% of the time")
    assert len(lines) == 6


def test_held_requests():
    held = {"requests": 1, "passes": 2, "prefix_tokens": 14_336, "reason": None}
    assert "1 request waited until another one" in said(held=held) and "14,336 prompt tokens" in said(held=held)
    for nothing in (None, {**held, "requests": 0}):
        assert "waited" not in said(held=nothing)


def test_little_is_shared_or_saved():
    nothing, unsaved = "shared next to nothing", "Requests did share something"
    assert nothing not in said() and unsaved not in said()
    assert nothing in said(kv_tokens_unique=5_900_000, kv_tokens_read=5_900_000)
    assert unsaved in said(kv_tokens_read=5_900_000)


def test_before_the_first_step():
    lines = explain({**STATE, "packed_steps": 0, "ungrouped_steps": {}, "kv_tokens_read": 0, "kv_tokens_unique": 0})
    assert len(lines) == 2 and lines[1].startswith("No decode or verify step was packed yet")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({}, "fa3 was expected to be faster"),
        ({"config": {"extend": "off", "check": False}}, "the setting extend is off"),
        ({"deterministic": {"unit_tokens": 512}}, "in SGLang's deterministic mode only decode is packed"),
        ({"packs": ["decode"]}, "times of prefill on this device or head dimension are not measured"),
    ],
)
def test_prefill(state, why):
    text = said(packed_extends=3, fallback_steps={"extend": 7}, **state)
    assert f"Packed prefill and mixed batches: 3 of 10; the others ran on fa3: {why}" in text
    assert "Packed prefill and mixed batches: 1 of 1." in said(packed_extends=1).splitlines()


def test_what_else_runs_on_the_stock_backend():
    text = said(fallback_steps={"error": 1, "no_batch": 20}, fallback_layers={"sliding_window": 24})
    assert "20 batches on fa3: forwards without a batch" in text and "1 batch on fa3: planning failed" in text
    assert "24 layers of the model on fa3 in every batch: sliding_window." in text


def test_settings_that_cost():
    assert "--packinfer-check is on" in said(config={"extend": "auto", "check": True})
    unmeasured = {"record": "A100", "measured": False, "least_saving": 2.0}
    assert "no measured times of A100" in said(device=unmeasured)
    assert "needed a new plan (87 us, median)" in said(plans=501)


def test_every_reason_has_words():
    assert set(UNGROUPED) == set(UngroupedReason)
    assert set(FALLBACK) | {BatchReason.EXTEND} == set(BatchReason)
    assert all(f"In 5 nothing was: {UNGROUPED[r]}" in said(ungrouped_steps={r.value: 5}) for r in UngroupedReason)
    assert all(f"5 batches on fa3: {FALLBACK[r]}." in said(fallback_steps={r.value: 5}) for r in FALLBACK)
