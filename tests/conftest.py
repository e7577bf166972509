from __future__ import annotations

import os
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import settings

# Compiled planning that reads or writes past an array must fail, not go on. Such code is cached apart.
numba.config.BOUNDSCHECK = 1
numba.config.CACHE_DIR = str(Path(__file__).parents[1] / ".pytest_cache" / "numba")

if not torch.cuda.is_available():
    # Without a GPU our Triton kernels run in Triton's interpreter, which is chosen when a kernel is defined. Only
    # ours: the servers that tests start are to see an environment as a user's.
    os.environ["TRITON_INTERPRET"] = "1"

    # the interpreter imports this late, and it looks at the variable, too
    import triton.experimental.gluon.language  # noqa: F401

    import packinfer_sgl.kernels.copy_slots  # noqa: F401
    import packinfer_sgl.kernels.device_plan  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

# Examples that build trees or call torch are slower than hypothesis' 200 ms on a busy two-core machine.
settings.register_profile("packinfer", settings.default, deadline=None)
settings.load_profile("packinfer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
