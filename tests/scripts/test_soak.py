"""scripts/soak.py: what it takes for a fault, and short forms of it: real engines, a pool that is far too small."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from soaks import cpu, gpu
from soaks.load import Load, prompts, waves

from packinfer_sgl.tools.tiny_model import write_tiny_model

needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares with the stock CPU backend: needs a machine without GPU"
)
LIMITS = gpu.Limits(drift=0.1, gap=0.2)
RUN = gpu.Run({}, "{}", must=("retractions", "grouped_decode_steps"))
SEEN = {"retractions": 4, "grouped_decode_steps": 9}
TOP = [{"5": -0.1, "6": -3.0}, {"7": -0.7, "8": -0.8}, {"9": -0.2, "4": -1.0}]


def answer(ids: list[int], **more: Any) -> dict[str, Any]:
    return {"nth": 0, "prompt": 0, "tokens": 3, "samples": 1, "whole": True, "ids": ids, "top": [], **more}


def told(*answers: dict[str, Any], **state: Any) -> dict[str, Any]:
    """What an engine told that says [5, 7, 9] alone, and ``answers`` among others."""
    alone = [{"ids": [5, 7, 9], "top": TOP}]
    several = answer([5, 7, 9], nth=1, samples=3)
    fine = {"active": True, "packed_steps": 7, "audited_steps": 7, "fallback_steps": {}, "soak": SEEN}
    said = {"alone": alone, "soak": [*answers, several, several, several], "again": alone}
    return {"said": said, "aborted": 1, "state": {**fine, **state}}


def judged(*answers: dict[str, Any], **state: Any) -> list[str]:
    return gpu.judge(told(*answers, **state), RUN, LIMITS, requests=2)


def test_answers_may_differ_by_near_ties_alone() -> None:
    assert judged(answer([5, 7, 9])) == []
    assert judged(answer([5, 8, 1])) == []  # 0.1 less likely; what comes then follows from it
    assert judged(answer([5], whole=False)) == []
    assert judged(answer([5, 7, 4])) == ["1 answers differ from those to the same requests alone"]
    assert judged(answer([5, 1, 9])) == ["1 answers differ from those to the same requests alone"]
    assert judged(answer([5, 7])) == ["1 answers are cut short"]
    assert judged() == ["1 of 2 requests were answered"]
    off = [{"5": -0.1}, {"7": -0.85}, {"9": -0.2}]
    assert judged(answer([5, 7, 9], top=off)) == ["log-probabilities are 0.15 off those of the same requests alone"]


def test_what_must_happen_must_happen_and_be_audited() -> None:
    good = answer([5, 7, 9])
    assert judged(good, soak={"retractions": 4}) == ["grouped_decode_steps did not happen"]
    assert judged(good, audited_steps=6) == ["a decode or verify step was not audited"]
    assert judged(good, fallback_steps={"speculative": 1}) == ["verify steps ran on the stock backend"]
    assert judged(good, fallback_steps={"error": 1}) == ["a planning error"]
    assert judged(good, active=False, reason="no") == ["it is inactive: no"]


def test_the_limit_is_what_batches_change_in_stock_answers() -> None:
    off = [{"5": -0.13}, {"7": -0.7}, {"9": -0.2}]
    limits = gpu.Limits.of(gpu.by_itself(told(answer([5, 8, 1], top=off))))
    assert limits.drift == pytest.approx(0.06) and limits.gap == pytest.approx(0.2)
    assert gpu.Limits.of(gpu.by_itself(told(answer([5, 7, 9])))) == gpu.Limits(cpu.NEAR_TIE, 2 * cpu.NEAR_TIE)


def test_a_load_asks_each_request_once_and_a_part_of_it_the_same() -> None:
    load = replace(gpu.LOAD, requests=300)
    orders = [order for wave, _ in waves(load) for order in wave]
    assert [order.nth for order in orders] == list(range(300))
    assert {order.samples for order in orders} == {1, load.samples}
    assert all(order.samples == 1 or order.abort_at is None for order in orders)
    assert any(flush for _, flush in waves(load)) and len({order.logprobs for order in orders}) == 2
    made = prompts(load)
    assert len(made) == load.prompts and len({len(prompt) for prompt in made}) > 10
    assert prompts(Load(1, 0)) != made and prompts(replace(load, seed=1)) != made


@pytest.mark.engine
@pytest.mark.nightly
@needs_cpu
def test_answers_stay_the_stock_backends_while_eviction_never_stops() -> None:
    done = subprocess.run(
        [sys.executable, soak.__file__, "--requests", "120"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "120 answers: " in done.stdout and " 0 different; " in done.stdout


@pytest.mark.engine
@pytest.mark.nightly
@needs_cpu
def test_the_soak_of_a_gpu_without_graphs_and_chains(tmp_path: Path) -> None:
    """Its engines but the one with EAGLE, on the CPU: the same load, counts and verdict."""
    model = str(write_tiny_model(tmp_path / "model", **cpu.MODEL))
    engine = {**cpu.ENGINE, **gpu.MIXED, "max_total_tokens": 700, "chunked_prefill_size": 128, "model_path": model}
    must = (*gpu.ALWAYS, *gpu.PACKED)
    engines = {
        gpu.STOCK: gpu.Run({**engine, "attention_backend": "torch_native"}, None),
        "packinfer": gpu.Run({**engine, "attention_backend": "packinfer"}, gpu.PACKED_CONFIG, must=must),
    }
    lengths = (1, 3, 10, 20, 20, 20, 20)
    # two waves, one of which asks for log-probabilities
    load = replace(gpu.LOAD, requests=60, seed=17, prompts=12, root=(100, 300), lengths=lengths)
    assert gpu.soak(engines, load, tmp_path) == []
