"""Run an engine in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

SGLANG = version("sglang")
START_S = 600
POOL = {"max_total_tokens": 12000, "max_running_requests": 64}


class Ran(NamedTuple):
    """What an engine said, and what it said of itself after each round; keys are ``<nth>-<round>``."""

    said: dict[str, list[dict]]
    states: dict[str, dict]

    @property
    def state(self) -> dict:
        """At the end."""
        return list(self.states.values())[-1]

    def counted(self, name: str, counter: str) -> int:
        """How much ``counter`` grew in the round ``name``."""
        names = list(self.states)
        before = names.index(name) - 1
        return self.states[name][counter] - (self.states[names[before]][counter] if before >= 0 else 0)


def run_engine(
    scenario: dict, config: dict | None = None, env: dict[str, str] | None = None, script: str = "drive.py", *words: str
) -> Ran:
    """Run ``script`` on ``scenario`` with the plugin's settings ``config``; fails with the engine's last words."""
    env = {**({"PACKINFER_CONFIG": json.dumps(config)} if config else {}), **(env or {})}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words, json.dumps(scenario)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            return Ran(**json.loads(line.removeprefix("RESULT ")))
    pytest.fail(f"the engine gave no result (exit {run.returncode}):\n{run.stderr[-4000:]}")
