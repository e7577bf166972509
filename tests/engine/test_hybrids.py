"""Hybrids of linear and full attention, and of windows and sinks, loaded by SGLang's own model runner: the
full-attention layers are packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("hybrid_runner.py")


def loaded(kind: str, folder: Path, config: dict) -> dict:
    """What ``hybrid_runner.py`` says of a model, on the CPU."""
    env = os.environ | {"SGLANG_PLATFORM": "packinfer_cpu", "PACKINFER_CONFIG": json.dumps(config)}
    ran = subprocess.run(
        [sys.executable, str(RUNNER), kind, str(folder)], env=env, capture_output=True, text=True, timeout=300
    )
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")] or [ran.stderr[-3000:]]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize(("kind", "head_dim"), [("qwen3_next", 256), ("nemotron_h", 128)])
def test_full_layers_of_a_hybrid_are_packed(tmp_path: Path, kind: str, head_dim: int) -> None:
    """2 layers of full attention, 2 that keep a state; an MLP of Nemotron-H counts as neither."""
    told = loaded(kind, tmp_path, {"arena_tokens": 256})
    assert told["active"] and told["fallback_layers"] == {"linear_attention": 2}
    assert told["backends"][0].startswith("Hybrid") and told["backends"][1].startswith("PackInfer")
    assert [shape[1:] for shape in told["arena_buffers"]] == [[2, head_dim]] * 4  # keys and values of both


@pytest.mark.engine
@pytest.mark.contract
def test_full_layers_of_gpt_oss_are_packed(tmp_path: Path) -> None:
    """2 layers of full attention, 2 with a window; all have sinks. SGLang checks the backend's name: it is wrapped."""
    told = loaded("gpt_oss", tmp_path, {"wrap": True})
    assert told["active"] and told["fallback_layers"] == {"sliding_window": 2}
    assert told["backends"][0].startswith("PackInfer") and told["pool"] in ("SWAKVPool", "MHATokenToKVPool")
    assert told["sinks"] == {str(layer): [64, "torch.bfloat16"] for layer in range(4)}
    assert 10 < told["sinks_sum"] / 256 < 14  # the checkpoint's
