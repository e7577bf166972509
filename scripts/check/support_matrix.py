"""The support matrix: what ``check_engine.py`` and ``pd.py`` found on each SGLang release and device.

    python scripts/check/support_matrix.py [DIR/check_engine.json ...]

Adds each result to docs/support/, one file for each release and device; there a newer result of a check replaces the
older one, and a check that was not run keeps what it had. Then it writes docs/support.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from check import areas, pd
from check.scenarios import Check
from packaging.version import Version

from packinfer_sgl.plugin import TESTED

CHECKS = areas.CHECKS | pd.CHECKS
ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("CPU", "H100", "H200")
Result = dict[str, Any]  # verdict, reasons, date
Support = dict[tuple[str, str], dict[str, Result]]  # by release and device, then by check
HEAD = """# What runs where

Made by `scripts/check/support_matrix.py` from what `scripts/check_engine.py` found on whole engines; not edited by
hand. To add a run:

    python scripts/check_engine.py --out DIR
    python scripts/check/support_matrix.py DIR/check_engine.json

PASS: answers equal those of stock SGLang but for near ties, and what should be packed was packed. REFUSED: the server
does not start, and a line says why. A CPU can run a part of the checks, and some need two or four GPUs. The first
column has the names for `--only`; `scripts/check/pd.py --transfer nixl` (or `mooncake`) writes such a file, too.

"""


def result(rows: list[dict[str, str]], date: str) -> Result | None:
    """What the rows of one check say together, or None if it was not run."""
    rows = [row for row in rows if row["verdict"] != "UNTESTED"]
    verdicts = {row["verdict"] for row in rows}
    if not verdicts:
        return None
    verdict = "FAIL" if "FAIL" in verdicts else "REFUSED" if verdicts == {"REFUSED"} else "PASS"
    reasons = [short(f"{row['what']}: {row['note']}") for row in rows if row["verdict"] in ("FAIL", "REFUSED")]
    return {"verdict": verdict, "reasons": reasons, "date": date}


def short(text: str) -> str:
    """One line without folders of a machine."""
    text = re.sub(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+", "", " ".join(text.split()))
    return text if len(text) <= 200 else f"{text[:199]}…"


def device_of(name: str) -> str:
    return next((device for device in DEVICES if device in name.split()), name.removeprefix("NVIDIA "))


def add(support: Support, found: dict[str, Any]) -> None:
    """Put what a run of ``check_engine.py`` found into ``support``."""
    environment = found["environment"]
    known = support.setdefault((environment["sglang"], device_of(environment["device"])), {})
    for check in dict.fromkeys(row["check"] for row in found["rows"]):
        new = result([row for row in found["rows"] if row["check"] == check], environment["date"])
        if new and (check not in known or known[check]["date"] <= new["date"]):
            known[check] = new


def load(folder: Path) -> Support:
    files = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {(file["sglang"], file["device"]): file["checks"] for file in files}


def save(folder: Path, support: Support) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (sglang, device), checks in support.items():
        file = {"sglang": sglang, "device": device, "checks": dict(sorted(checks.items()))}
        path = folder / f"{sglang}-{device.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n")


def table(support: Support, checks: dict[str, Check]) -> str:
    """docs/support.md."""
    releases = sorted({*TESTED, *(sglang for sglang, _ in support)}, key=Version, reverse=True)
    devices = [*DEVICES, *sorted({device for _, device in support} - {*DEVICES})]
    columns = [(sglang, device) for sglang in releases for device in devices]
    notes: dict[str, int] = {}
    lines = ["| check | feature | " + " | ".join(f"{sglang} {device}" for sglang, device in columns) + " |"]
    lines.append("|" + "---|" * (2 + len(columns)))
    for name, check in checks.items():
        cells = [cell(check, column[0], support.get(column, {}).get(name), notes) for column in columns]
        lines.append(f"| `{name}` | {check.feature} | " + " | ".join(cells) + " |")
    said = [f"[^{number}]: {text.replace('<', '&lt;')}" for text, number in notes.items()]
    return HEAD + "\n".join([*lines, *([""] if said else []), *said]) + "\n"


def cell(check: Check, sglang: str, found: Result | None, notes: dict[str, int]) -> str:
    """``notes``: number of each footnote; new ones are added."""
    if found:
        marks = [f"[^{notes.setdefault(reason, len(notes) + 1)}]" for reason in found["reasons"]]
        return f"{found['verdict']} {found['date']}{''.join(marks)}"
    if Version(sglang) < Version(check.since):
        return f"since {check.since}"
    return "untested"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    args = parser.parse_args()
    support = load(ROOT / "docs" / "support")
    for path in args.results:
        add(support, json.loads(path.read_text()))
    save(ROOT / "docs" / "support", support)
    (ROOT / "docs" / "support.md").write_text(table(support, CHECKS))


if __name__ == "__main__":
    main()
