"""The short form of scripts/soak.py: real engines, a pool and an arena that are far too small."""

from __future__ import annotations

import subprocess
import sys

import pytest
import soak
import torch


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares with the stock CPU backend: needs a machine without GPU"
)
def test_answers_stay_the_stock_backends_while_eviction_never_stops() -> None:
    done = subprocess.run(
        [sys.executable, soak.__file__, "--requests", "120"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "120 answers: " in done.stdout and " 0 different; " in done.stdout
