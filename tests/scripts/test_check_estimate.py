"""Nightly: what packinfer-sgl estimate expects of a server's request log, against what the server counted."""

from __future__ import annotations

import pytest
import torch
from check_estimate import main


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="the loads are for the CPU's server")
def test_estimates_are_within_a_tenth(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
