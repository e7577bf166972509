"""SGLang in other processes, each in a process group of its own, and the end of them all."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.text import Text

START_LIMIT_S = 600
EPHEMERAL = 32_768  # Linux's default; see free_port
# what the console script does, which need not lie beside this Python
SGLANG_SERVE = (sys.executable, "-c", "from sglang.cli.main import main; main()", "serve")


class ServerError(Exception):
    """A process is of no more use; the text is one line for the user."""

    def __init__(self, server: Child, what: str) -> None:
        super().__init__(f"the {server.name} {server.kind} {what}")
        self.server = server


class Child:
    """A process with a group of its own; what it says goes to ``log``, but for what ``pipes`` (of Popen) takes."""

    kind = "process"
    grace_s = 20  # from the request to end until it is made to

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str] | None, **pipes: Any) -> None:
        self.name, self.log = name, log
        with log.open("w") as out:
            streams = {"stdout": out, "stderr": out, **pipes}
            self.process = subprocess.Popen(
                command, start_new_session=True, env={**os.environ, **(env or {})}, **streams
            )

    def tail(self, lines: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 65536))
            text = log.read().decode(errors="replace").replace("\r", "\n")
        return [line for line in text.split("\n") if line.strip()][-lines:]

    def ask_to_end(self) -> None:
        self.process.terminate()

    def stop(self) -> None:
        """Ask it to end, then end whatever is left of its process group."""
        self.ask_to_end()
        try:
            self.process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def stop_all(children: Iterable[Child]) -> None:
    children = list(children)
    for child in children:  # they end side by side
        child.ask_to_end()
    for child in children:
        child.stop()


def free_port() -> int:
    """A free port that stays free until a server is up: the kernel gives those from ``EPHEMERAL`` on to whoever asks
    for any port, and a server that loads a model binds its own a minute later."""
    while True:
        port = random.randrange(10_000, EPHEMERAL)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class Server(Child):
    """``flags`` go to the command line; host and port are chosen here."""

    kind = "server"
    command: tuple[str, ...] = SGLANG_SERVE
    ready_path = "/health"

    def __init__(self, name: str, flags: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        port = free_port()
        self.url, self.began = f"http://127.0.0.1:{port}", time.monotonic()
        super().__init__(name, [*self.command, *flags, "--host", "127.0.0.1", "--port", str(port)], log, env)

    def wait(self, console: Console) -> None:
        """Until the server is healthy; raises ServerError if it ends or takes too long."""
        shown = time.monotonic()
        with console.status(f"{self.name}: starting") as status:
            while not self.ready():
                line = f"{self.name}: {time.monotonic() - self.began:3.0f} s  {(self.tail(1) or [''])[0].strip()}"
                line = line[: max(console.width - 4, 40)]
                status.update(Text(line))
                if not console.is_terminal and time.monotonic() - shown >= 10:
                    shown = time.monotonic()
                    console.print(Text(line))
                time.sleep(0.5)
        console.print(f"{self.name} is ready at {self.url}, after {time.monotonic() - self.began:.0f} s")

    def ready(self) -> bool:
        """Whether it has started; raises ServerError if it ends or takes too long."""
        if self.healthy():
            return True
        if self.process.poll() is not None:
            raise ServerError(self, f"ended with code {self.process.returncode} while starting")
        if time.monotonic() - self.began > START_LIMIT_S:
            raise ServerError(self, f"was not ready after {START_LIMIT_S} s")
        return False

    def healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}{self.ready_path}", timeout=10).ok
        except requests.RequestException:
            return False


class Router(Server):
    """SGLang's router, which is ready once it knows its servers."""

    kind = "router"
    command = (sys.executable, "-m", "sglang_router.launch_router")
    ready_path = "/readiness"


@contextlib.contextmanager
def undone_at_end() -> Iterator[contextlib.ExitStack]:
    """What must be undone however a script ends: SIGTERM and SIGHUP interrupt it like Ctrl-C, nothing the undoing."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with contextlib.ExitStack() as undo:
        try:
            yield undo
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
