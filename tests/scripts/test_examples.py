"""The examples run as their first lines say, and sharing is seen in what they print."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lib.servers import Server
from rich.console import Console

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=2, heads=4, kv_heads=2)


def run(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def times_fewer(said: str) -> float:
    read, logical = re.search(r"KV tokens read: ([\d,]+) instead of ([\d,]+)$", said, re.M).groups()
    return int(logical.replace(",", "")) / int(read.replace(",", ""))


def test_they_are_short_and_each_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {"engine.py", "server.py", "wrapper.py"}
    assert all(len(path.read_text().splitlines()) < MOST_LINES for path in EXAMPLES.glob("*.py"))


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is float32, which no GPU kernel packs")
def test_engine(model: Path) -> None:
    said = run("engine.py", model)
    assert "8 of 8 samples in groups" in said and times_fewer(said) > 4


@pytest.mark.engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny model is float32, which no GPU kernel packs")
def test_server(model: Path, tmp_path: Path) -> None:
    flags = ["--model-path", str(model), "--attention-backend", "packinfer", "--max-total-tokens", "20000"]
    server = Server("example", flags, tmp_path / "log")
    try:
        server.wait(Console(file=io.StringIO()))
        said = run("server.py", server.url)
    finally:
        server.stop()
    assert said.count("What does rule") == 8 and times_fewer(said) > 2


def test_wrapper() -> None:
    assert run("wrapper.py") == "(3, 32, 128) KVTokens(logical=6170, unique=2074, read=2074)\n"
