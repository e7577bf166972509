"""Measured constants, written into the source."""

from __future__ import annotations

import re
from pathlib import Path


def write(path: Path, constants: dict[str, float]) -> None:
    """Replace ``name = number`` and ``name=number`` of an ``H200 = Record(...)``."""
    text = path.read_text()
    for name, value in constants.items():
        at = text.index("H200 = ") if name.islower() else 0
        text, found = re.subn(rf"(\b{name} ?= ?)[\d.e]+", rf"\g<1>{value:.3g}", text[at:], count=1)
        text = path.read_text()[:at] + text
        if not found:
            raise SystemExit(f"write_constants: {path.name} has no {name}")
        path.write_text(text)
