from __future__ import annotations

import pytest
from hypothesis import settings

# Examples that build trees or call torch are slower than hypothesis' 200 ms on a busy two-core machine.
settings.register_profile("packinfer", settings.default, deadline=None)
settings.load_profile("packinfer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
