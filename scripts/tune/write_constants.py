"""Measured times, written into the source: the entry of one GPU in ``PROFILES`` of planning/profiles.py."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from packinfer_sgl.planning.device_profile import DeviceProfile

SOURCE = Path(__file__).resolve().parents[2] / "packinfer_sgl" / "planning" / "profiles.py"


def write_profile(path: Path, profile: DeviceProfile, names: list[str]) -> None:
    """Set the fields ``names`` of the entry ``profile.name``; without one, add one with all fields.

    Numbers are rounded to three digits. Comments stay.
    """
    text = path.read_text()
    begin = re.search(r"^PROFILES = \{\n", text, re.M)
    if begin is None:
        raise SystemExit(f"write_constants: {path.name} has no PROFILES")
    end = text.index("\n}\n", begin.end()) + 1
    entries, key = text[begin.end() : end], f'    "{profile.name}": DeviceProfile(\n'
    values = {name: _literal(value) for name, value in asdict(profile).items()}
    if key in entries:
        at = entries.index(key)
        stop = entries.index("\n    ),\n", at)
        entry = entries[at:stop]
        for name in names:
            entry, found = re.subn(rf"(\n        {name}=)[^,]+,", rf"\g<1>{values[name]},", entry)
            if not found:
                raise SystemExit(f"write_constants: {path.name} has no {name} of {profile.name}")
        entries = entries[:at] + entry + entries[stop:]
    else:
        entries += key + "".join(f"        {name}={value},\n" for name, value in values.items()) + "    ),\n"
    path.write_text(text[: begin.end()] + entries + text[end:])


def _literal(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.3g}" if isinstance(value, float) else str(value)
