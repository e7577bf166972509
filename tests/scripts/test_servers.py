"""Processes that a script starts: what is said of one that ends early, and that nothing outlives the script."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from left_over import survivors
from lib import servers
from lib.engine_worker import EngineWorker
from lib.servers import Child, Server, ServerError
from rich.console import Console

# a script with two children, each with a child of its own; the second does not end when it is asked to
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from lib.servers import Child, stop_all, undone_at_end

SLEEPS = "import subprocess; subprocess.run(['sleep', '300'])"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPS
Child.grace_s = 1
with undone_at_end() as undo:
    try:
        children = [Child("c", [sys.executable, "-c", code], Path("log"), None) for code in (SLEEPS, DEAF)]
        undo.callback(stop_all, children)
        print("up", flush=True)
        time.sleep(300)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(servers.__file__).parents[1])]
    script = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert script.stdout.readline() == "up\n"
    deadline = time.monotonic() + 60
    while len(started := psutil.Process(script.pid).children(recursive=True)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(number)
    said, _ = script.communicate(timeout=60)
    assert (script.returncode, said) == (130, "interrupted\n")
    assert survivors(started) == []


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "command", (sys.executable, "-c", "import sys; print(sys.argv[1]); sys.exit(2)"))
    server = Server("packinfer", ["--no-such-flag"], tmp_path / "log")
    with pytest.raises(ServerError, match="^the packinfer server ended with code 2 while starting$"):
        server.wait(Console(file=io.StringIO()))
    server.stop()
    assert server.tail(1) == ["--no-such-flag"]


def test_an_engine_that_does_not_start(tmp_path: Path) -> None:
    engine = EngineWorker("grouping off", ["-c", "raise TypeError('no such argument')"], tmp_path / "log")
    with pytest.raises(ServerError, match="^the grouping off engine did not start; its last words: TypeError: no such"):
        engine.wait()
    engine.stop()
    assert isinstance(engine, Child) and engine.process.returncode == 1


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [servers.free_port() for _ in range(2)]
    assert all(10_000 <= port < servers.EPHEMERAL for port in given)
    monkeypatch.setattr(servers.random, "randrange", lambda *_: given.pop(0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", given[0]))
        other = given[1]
        assert servers.free_port() == other
