from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
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
BY_DAY, LEAST_EXAMPLES = 0.4, 20  # part of a property's examples that run without --nightly


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, fetched by the first run; both halves of a run may ask for it at once."""
    from packinfer_sgl.tools.fetch_model import FetchError, fetch_model

    path = Path(__file__).parents[1] / ".pytest_cache" / "smollm2-135m-instruct"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                fetch_model(path)
            except FetchError as e:
                pytest.skip(str(e))
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("packinfer")
    group.addoption("--nightly", action="store_true", help="what takes minutes, and all examples of each property")
    group.addoption("--half", choices=("engine", "others"), help="tests that start engines, or all others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    nightly, half = config.getoption("--nightly"), config.getoption("--half")
    chosen = [
        item for item in items
        if (nightly or not item.get_closest_marker("nightly"))
        and (half is None or (half == "engine") == bool(item.get_closest_marker("engine")))
    ]  # fmt: skip
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if not nightly:
        for test in {item.obj for item in items if getattr(item.obj, "is_hypothesis_test", False)}:
            with_fewer_examples(test)


def with_fewer_examples(test: Callable[..., None]) -> None:
    """``settings`` of a property test are set when it is defined, so they are replaced there."""
    own = test._hypothesis_internal_use_settings
    fewer = min(own.max_examples, max(LEAST_EXAMPLES, round(BY_DAY * own.max_examples)))
    test._hypothesis_internal_use_settings = settings(own, max_examples=fewer)
