from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # radix caches of SGLang

# The same examples on every machine: a red run can be repeated anywhere.
settings.register_profile("unit", settings.get_profile("packinfer"), derandomize=True, database=None)
settings.load_profile("unit")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The tensors here are tiny: threads that wait for each other took 7 times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
