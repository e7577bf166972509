"""Real engines and servers in their own processes, on a tiny model with real weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from engines import POOL, SGLANG, run_engine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))  # the models of check_engine.py


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.skip(reason="compares with the stock CPU backend: needs a machine without GPU"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def stock(model) -> dict[str, list[dict]]:
    """What the stock backend says in every round, with its log-probabilities."""
    rounds = ["tree", "cold", "samples", "abort", "busy", "family", "low", *(["beams"] if SGLANG != "0.5.17" else [])]
    engine = {"model_path": model, "attention_backend": "torch_native", **POOL}
    said = run_engine({"engine": engine, "rounds": rounds, "logprobs": True})["said"]
    return {name.split("-", 1)[1]: outputs for name, outputs in said.items()}
