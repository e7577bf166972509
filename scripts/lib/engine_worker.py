"""Engines of sglang.Engine that take orders: a line of JSON into the process, a line of JSON back.

The script that uses ``EngineWorker`` starts itself again with an argument that leads to a loop over ``Orders``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.servers import START_LIMIT_S, Child, ServerError

ORDER_LIMIT_S = 1800


class EngineWorker(Child):
    """``arguments`` are those of a Python that loops over ``Orders``; ``wait`` before the first ``ask``."""

    kind = "engine"
    grace_s = 5  # one that is busy does not see that its orders have ended

    def __init__(self, name: str, arguments: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        super().__init__(name, [sys.executable, *arguments], log, env, **pipes)

    def ask_to_end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # SGLang takes SIGTERM, but looks at it while it generates only

    def wait(self) -> None:
        """Until the engine is up; raises ServerError if it ends or takes too long."""
        self._answer("start", START_LIMIT_S)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``order``; raises ServerError if there is none."""
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ServerError(self, f"has ended; see {self.log}") from None
        return self._answer("answer", ORDER_LIMIT_S)

    def _answer(self, what: str, limit_s: float) -> dict[str, Any]:
        overdue = threading.Timer(limit_s, self.process.kill)
        overdue.start()
        try:
            line = self.process.stdout.readline()
        finally:
            overdue.cancel()
        if not line:
            last = (self.tail(1) or ["nothing"])[0].strip()
            raise ServerError(self, f"did not {what}; its last words: {last[:200]} (more in {self.log})")
        return json.loads(line)


class Orders:
    """The worker's side; made before SGLang is imported, so that what SGLang prints goes to the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The engine is up: the orders, until nobody can give any more."""
        self.answer({})
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, what: dict[str, Any]) -> None:
        self._out.write(json.dumps(what) + "\n")
