"""A server on packinfer for SGLang's own test kits, which come from the installed SGLang."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from rich.console import Console
from wide_model import write_wide_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))  # servers

from lib.servers import Server  # noqa: E402

FLAGS = (
    "--attention-backend packinfer --packinfer-extend on --dtype float32 --random-seed 0 --log-level warning "
    "--max-total-tokens 24000 --max-running-requests 32 --enable-streaming-session --allow-auto-truncate"
).split()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        return
    for item in items:
        if HERE in Path(item.fspath).parents and item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.skip(reason="its limits are those of float32: needs a machine without GPU"))


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory) -> str:
    return str(write_wide_model(tmp_path_factory.mktemp("wide") / "tiny"))


class Packed:
    """A server, and what packinfer does in it."""

    def __init__(self, server: Server, model: str) -> None:
        self.server, self.model, self.url = server, model, server.url

    def counted(self) -> dict:
        info = requests.get(f"{self.url}/server_info", timeout=60).json()
        return info["internal_states"][0]["packinfer"]


@pytest.fixture(scope="module")  # gone before other servers start
def packed(wide_model, tmp_path_factory) -> Iterator[Packed]:
    server = Server("packinfer", ["--model-path", wide_model, *FLAGS], tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait(Console(quiet=True))
        yield Packed(server, wide_model)
    finally:
        server.stop()
        print("\n".join(server.tail(40)))  # where the start fails, pytest shows it
