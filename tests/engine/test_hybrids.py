"""Hybrids of linear and full attention, loaded by SGLang's own model runner: the full-attention layers are packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("hybrid_runner.py")


@pytest.mark.engine
@pytest.mark.contract
@pytest.mark.parametrize(("kind", "head_dim"), [("qwen3_next", 256), ("nemotron_h", 128)])
def test_full_layers_of_a_hybrid_are_packed(tmp_path: Path, kind: str, head_dim: int) -> None:
    """2 layers of full attention, 2 that keep a state; an MLP of Nemotron-H counts as neither."""
    env = os.environ | {"SGLANG_PLATFORM": "packinfer_cpu", "PACKINFER_CONFIG": '{"arena_tokens": 256}'}
    ran = subprocess.run(
        [sys.executable, str(RUNNER), kind, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
    )
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")] or [ran.stderr[-3000:]]
    told = json.loads(line.removeprefix("RESULT "))
    assert told["active"] and told["fallback_layers"] == {"linear_attention": 2}
    assert told["backends"][0].startswith("Hybrid") and told["backends"][1].startswith("PackInfer")
    assert [shape[1:] for shape in told["arena_buffers"]] == [[2, head_dim]] * 4  # keys and values of both
