"""Finds processes that a script has left running, by a mark in their environment, which children inherit."""

from __future__ import annotations

from pathlib import Path


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
