"""Run an engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SGLANG = version("sglang")
START_S = 600
POOL = {"max_total_tokens": 12000, "max_running_requests": 64}


def run_engine(scenario: dict, env: dict[str, str] | None = None) -> dict:
    """The result of ``drive.py`` on ``scenario``; fails the test with the engine's last words."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("drive.py")), json.dumps(scenario)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    pytest.fail(f"the engine gave no result (exit {run.returncode}):\n{run.stderr[-4000:]}")
