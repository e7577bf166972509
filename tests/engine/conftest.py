"""Real engines and servers in their own processes, on a tiny model with real weights."""

from __future__ import annotations

import sys
from pathlib import Path

import faults
import pytest
import torch
from engines import POOL, SGLANG, Ran, run_engine

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
def stock_engine(model, tmp_path_factory) -> Ran:
    """The stock backend in every round, with its log-probabilities; hooks that packinfer needs cannot be applied."""
    rounds = ["tree", "cold", "samples", "abort", "busy", "family", "low", *(["beams"] if SGLANG != "0.5.17" else [])]
    engine = {"model_path": model, "attention_backend": "torch_native", **POOL}
    broken = ("break-hook=ForwardBatch.init_new", "break-hook=ModelRunner.forward")
    env = faults.install(tmp_path_factory.mktemp("faults"), *broken)
    return run_engine({"engine": engine, "rounds": rounds, "logprobs": True}, env=env)


@pytest.fixture(scope="session")
def stock(stock_engine) -> dict[str, list[dict]]:
    return {name.split("-", 1)[1]: outputs for name, outputs in stock_engine.said.items()}
