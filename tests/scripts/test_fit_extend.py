"""Fitting the router's times: planted ones come back, and those in use are near the first measurements."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import fit_extend
import pytest
from fit_extend import STOCK, TILES, Case, cases, fit_all
from kernel_report import OURS
from kernel_workloads import workloads
from write_constants import write

from packinfer_sgl.planning.extend_costs import EXTEND_H200, SMS

CASES = [Case(work, work.extend_plan(TILES, SMS), 0.0, 0.0) for work in workloads() if work.name[0] in "PMCR"]
PLANTED = replace(
    EXTEND_H200, block_us=1.8, half_block_us=1.2, item_us=3.5, partials=0.5, call_us=6.0, stock_block_us=1.5,
    stock_half_block_us=1.3, stock_tile_us=4.0, stock_call_us=7.0,
)  # fmt: skip


def results() -> list[dict]:
    return [
        {
            "workload": case.work.name, "kind": case.work.kind, "slots": slots,
            "plan": {"partials": case.plan.n_partials, "tokens_read": case.plan.kv_tokens_read},
            "us": {OURS: [case.packed_model(PLANTED) * factor] * 3, STOCK: [case.stock_model(PLANTED) * factor] * 3},
        }
        for slots, factor in (("random", 1), ("contiguous", 9))
        for case in CASES
    ]  # fmt: skip


def test_planted_times_come_back() -> None:
    measured = cases(results())
    assert len(measured) == len(CASES)
    assert asdict(fit_all(measured, EXTEND_H200)) == pytest.approx(asdict(PLANTED), rel=0.01)


def test_what_no_batch_tells_stays() -> None:
    measured = [case for case in cases(results()) if case.work.name in ("C4096@0", "C4096@8k")]
    fitted = fit_all(measured, EXTEND_H200)
    # float64: a value that is taken apart and put together again may differ in its last bit
    assert fitted.partials == pytest.approx(EXTEND_H200.partials, rel=1e-12)
    assert fitted.half_block_us == pytest.approx(EXTEND_H200.half_block_us, rel=1e-12)
    assert fitted.block_us == pytest.approx(PLANTED.block_us, rel=0.02)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = tmp_path / "extend_costs.py", tmp_path / "results.json"
    source.write_text(fit_extend.SOURCE.read_text())
    monkeypatch.setattr(fit_extend, "SOURCE", source)
    file.write_text(json.dumps({"results": results()}))
    monkeypatch.setattr(sys, "argv", ["fit_extend", "--results", str(file), "--write"])
    fit_extend.main()
    shown = capsys.readouterr().out
    assert "worst 1.00" in shown and f" of {len(CASES)}" in shown
    written = source.read_text()
    for name, value in asdict(PLANTED).items():
        assert f"    {name}={value:.3g}," in written

    file.write_text(json.dumps({"results": [{**results()[0], "plan": {"partials": 1, "tokens_read": 2}}]}))
    with pytest.raises(SystemExit, match="measured with another plan"):
        fit_extend.main()
    file.write_text(json.dumps({"results": []}))
    with pytest.raises(SystemExit, match="no extend batch"):
        fit_extend.main()


def test_an_unknown_constant_is_refused(tmp_path: Path) -> None:
    (tmp_path / "costs.py").write_text("H200 = Costs(\n    block_us=1.5,\n)\n")
    with pytest.raises(SystemExit, match="no call_us"):
        write(tmp_path / "costs.py", {"block_us": 2.0, "call_us": 1.0})
    assert "block_us=2," in (tmp_path / "costs.py").read_text()


# one H200; FA3's time on P3 comes out 12 % too long
@pytest.mark.parametrize(
    ("name", "packed_us", "stock_us", "stock_rel"),
    [("P1", 928, 959, 0.1), ("P2", 221, 242, 0.1), ("P3", 67.9, 82.7, 0.13), ("M1", 554, 728, 0.1),
     ("M2", 264, 578, 0.1)],
)  # fmt: skip
def test_times_are_near_what_was_measured(name: str, packed_us: float, stock_us: float, stock_rel: float) -> None:
    case = next(case for case in CASES if case.work.name.startswith(name + " "))
    assert case.packed_model(EXTEND_H200) == pytest.approx(packed_us, rel=0.15)
    assert case.stock_model(EXTEND_H200) == pytest.approx(stock_us, rel=stock_rel)
