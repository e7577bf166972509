"""Real engines and servers in their own processes, on a tiny model with real weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))  # the models of check_engine.py
SGLANG = version("sglang")
START_S = 600

POOL = {"max_total_tokens": 12000, "max_running_requests": 64}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason="compares with the stock CPU backend: needs a machine without GPU"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    from packinfer_sgl.tiny_model import write_tiny_model

    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def run_engine(scenario: dict, env: dict[str, str] | None = None) -> dict:
    """The result of ``drive.py`` on ``scenario``; fails the test with the engine's last words."""
    run = subprocess.run(
        [sys.executable, str(HERE / "drive.py"), json.dumps(scenario)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    pytest.fail(f"the engine gave no result (exit {run.returncode}):\n{run.stderr[-4000:]}")


@pytest.fixture(scope="session")
def stock(model) -> dict[str, list[dict]]:
    """What the stock backend says in every round, with its log-probabilities."""
    rounds = ["tree", "cold", "samples", "abort", "busy", *(["beams"] if SGLANG != "0.5.17" else [])]
    engine = {"model_path": model, "attention_backend": "torch_native", **POOL}
    said = run_engine({"engine": engine, "rounds": rounds, "logprobs": True})["said"]
    return {name.split("-", 1)[1]: outputs for name, outputs in said.items()}
