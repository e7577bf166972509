"""The support matrix is what the checks found, and nobody's results are lost."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from check.scenarios import Check
from check.support_matrix import CHECKS, ROOT, Support, add, device_of, load, result, save, table


def row(check: str, verdict: str, note: str = "", what: str = "it") -> dict[str, str]:
    return {"check": check, "what": what, "verdict": verdict, "note": note}


def ran(date: str, *rows: dict[str, str], device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    return {"environment": {"sglang": "0.5.23", "device": device, "gpus": 1, "date": date}, "rows": list(rows)}


def test_the_document_is_what_the_script_makes_of_the_results():
    support = load(ROOT / "docs" / "support")
    assert (ROOT / "docs" / "support.md").read_text() == table(support, CHECKS)
    assert {name for checks in support.values() for name in checks} <= set(CHECKS)
    assert "docs/support.md" in (ROOT / "README.md").read_text()


def test_every_check_has_a_name_of_its_own_for_people():
    features = [check.feature for check in CHECKS.values()]
    assert all(features) and len(set(features)) == len(features)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["PASS", "PASS"], "PASS"),
        (["PASS", "REFUSED"], "PASS"),
        (["REFUSED", "REFUSED"], "REFUSED"),
        (["REFUSED", "UNTESTED"], "REFUSED"),
        (["PASS", "REFUSED", "FAIL"], "FAIL"),
    ],
)
def test_the_verdict_of_a_check(verdicts: list[str], expected: str):
    found = result([row("a", verdict, verdict) for verdict in verdicts], "2026-01-01")
    assert found["verdict"] == expected
    assert found["reasons"] == [f"it: {verdict}" for verdict in verdicts if verdict in ("REFUSED", "FAIL")]


def test_a_newer_result_replaces_an_older_one_and_nothing_else():
    support: Support = {}
    add(support, ran("2026-01-02", row("a", "PASS"), row("b", "PASS")))
    add(support, ran("2026-01-01", row("a", "FAIL")))
    add(support, ran("2026-01-03", row("b", "REFUSED", "no"), row("a", "UNTESTED")))
    add(support, ran("2026-01-03", row("a", "FAIL"), device="CPU"))
    checks = support["0.5.23", "H100"]
    assert (checks["a"]["verdict"], checks["a"]["date"]) == ("PASS", "2026-01-02")
    assert (checks["b"]["verdict"], checks["b"]["date"]) == ("REFUSED", "2026-01-03")
    assert support["0.5.23", "CPU"]["a"]["verdict"] == "FAIL"


def test_what_is_saved_is_loaded(tmp_path):
    support: Support = {}
    add(support, ran("2026-01-02", row("a", "REFUSED", "…")))
    add(support, ran("2026-01-02", row("a", "PASS"), device="NVIDIA GeForce RTX 4090"))
    save(tmp_path, support)
    assert load(tmp_path) == support and len(list(tmp_path.iterdir())) == 2


def test_reasons_are_short_and_name_no_folder_of_a_machine():
    said = "pd: ValueError: no file /opt/models/tiny/config.json, see https://host/a/b " + "x" * 300
    reason = result([row("a", "REFUSED", said)], "2026-01-01")["reasons"][0]
    assert "no file config.json, see https://host/a/b" in reason and len(reason) == 200


def test_the_table():
    support: Support = {}
    add(support, ran("2026-01-02", row("a", "REFUSED", "no"), row("b", "PASS"), row("b", "REFUSED", "no")))
    checks = {
        "a": Check(print, (), "first", gpus=0),
        "b": Check(print, (), "second"),
        "c": Check(print, (), "third", since="0.5.23"),
    }
    lines = [line.split(" | ") for line in table(support, checks).splitlines()]
    head, _, first, second, third = (line for line in lines if line[0].startswith("|"))
    at = {name.strip(" |"): i for i, name in enumerate(head)}
    assert [line[at["0.5.23 H100"]] for line in (first, second, third)] == [
        "REFUSED 2026-01-02[^1]",
        "PASS 2026-01-02[^1]",
        "untested",
    ]
    assert [line[at["0.5.17 H100"]] for line in (second, third)] == ["untested", "since 0.5.23"]
    assert ["[^1]: it: no"] in lines


@pytest.mark.parametrize(("name", "short"), [("NVIDIA H200", "H200"), ("CPU", "CPU"), ("NVIDIA L40S", "L40S")])
def test_the_device_of_a_column(name: str, short: str):
    assert device_of(name) == short


def test_it_starts_as_a_script():
    script = [sys.executable, "scripts/check/support_matrix.py", "--help"]
    assert subprocess.run(script, cwd=ROOT, capture_output=True, check=True).stdout
