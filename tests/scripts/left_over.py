"""Finds processes that a script has left running.

By a mark in their environment, which children inherit; but SGLang's schedulers write their title over it. Of a script
that is running, ``family`` knows these, too.
"""

from __future__ import annotations

from pathlib import Path

import psutil


def left_over(mark: object) -> list[str]:
    """Command lines of the processes that have LEFT_OVER=``mark`` in their environment."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"LEFT_OVER={mark}\0".encode() in path.read_bytes():
                lines.append(path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # ended meanwhile, or another user's
    return lines


def family(pid: int) -> list[psutil.Process]:
    """All that came from the running process ``pid``."""
    return psutil.Process(pid).children(recursive=True)


def has_scheduler(processes: list[psutil.Process]) -> bool:
    def is_one(process: psutil.Process) -> bool:
        try:
            return "sglang::scheduler" in " ".join(process.cmdline())
        except psutil.Error:
            return False  # ended meanwhile

    return any(map(is_one, processes))


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = psutil.wait_procs(processes, timeout=5)[1]
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
