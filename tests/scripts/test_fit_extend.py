"""Fitting the router's times: planted ones come back, and those in use are near the first measurements; and how times
are written into a GPU's record."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from bench.kernel_report import OURS
from bench.kernel_workloads import workloads
from tune import fit_extend
from tune.fit_extend import FACTORS, PACKED, STOCK, STOCK_TIMES, TILES, Case, cases, fit_all, tiles_of
from tune.write_constants import SOURCE, write_profile

from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.profiles import H200, PROFILES

SMS = H200.multiprocessors
CASES = [Case(work, work.extend_plan(TILES, SMS), 0.0, 0.0) for work in workloads() if work.name[0] in "PMCR"]
PLANTED = replace(
    H200, extend_block_us=1.8, extend_half_block_us=1.2, extend_item_us=3.5, extend_partial_factor=0.5,
    extend_call_us=6.0, stock_block_us=1.5, stock_half_block_us=1.3, stock_tile_us=4.0, stock_call_us=7.0,
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


def written(path: Path) -> dict[str, DeviceProfile]:
    """``PROFILES`` of a copy of planning/profiles.py."""
    return {key: DeviceProfile(**asdict(each)) for key, each in runpy.run_path(str(path))["PROFILES"].items()}


def rounded(profile: Any, names: list[str]) -> dict[str, float]:
    return {name: float(f"{getattr(profile, name):.3g}") for name in names}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "profiles.py"
    copy.write_text(SOURCE.read_text())
    monkeypatch.setattr(fit_extend, "SOURCE", copy)
    return copy


def test_planted_times_come_back() -> None:
    measured = cases(results(), H200)
    assert len(measured) == len(CASES)
    fitted = asdict(fit_all(measured, H200)[0])
    names = [*PACKED, *STOCK_TIMES]
    assert [fitted[name] for name in names] == pytest.approx([getattr(PLANTED, name) for name in names], rel=0.01)
    assert all(fitted[name] == getattr(H200, name) for name in set(fitted) - set(names))


def test_planted_factors_come_back() -> None:
    """Of other head dimensions and of FP8 KV; nothing else of the record changes."""
    planted = replace(
        H200, extend_factor_64=1.3, stock_factor_64=1.4, extend_factor_256=0.9, stock_factor_256=1.1,
        extend_factor_fp8=1.2, stock_factor_fp8=0.8,
    )  # fmt: skip
    works = [work for work in workloads() if work.name.startswith(("HR1", "GR1", "FR1"))]
    measured = []
    for work in works:
        case = Case(work, work.extend_plan(tiles_of(work), SMS, planted), 0.0, 0.0)
        measured.append(replace(case, packed_us=case.packed_model(planted), stock_us=case.stock_model(planted)))
    factors = sorted(f"{kind}_factor_{name}" for kind in ("extend", "stock") for name in FACTORS.values())
    fitted, names = fit_all(measured, replace(H200, **dict.fromkeys(factors)))
    assert sorted(names) == factors
    assert [getattr(fitted, name) for name in factors] == pytest.approx(
        [getattr(planted, name) for name in factors], rel=0.01
    )
    assert replace(fitted, **dict.fromkeys(factors)) == replace(planted, **dict.fromkeys(factors))


def test_what_no_batch_tells_stays() -> None:
    measured = [case for case in cases(results(), H200) if case.work.name in ("C4096@0", "C4096@8k")]
    fitted, _ = fit_all(measured, H200)
    # float64: a value that is taken apart and put together again may differ in its last bit
    assert fitted.extend_partial_factor == pytest.approx(H200.extend_partial_factor, rel=1e-12)
    assert fitted.extend_half_block_us == pytest.approx(H200.extend_half_block_us, rel=1e-12)
    assert fitted.extend_block_us == pytest.approx(PLANTED.extend_block_us, rel=0.02)


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, gpu: str, results: list[dict]) -> None:
    """``fit_extend --write``."""
    file = folder / "results.json"
    planned_by = asdict(H200)
    file.write_text(json.dumps({"machine": {"gpu": gpu}, "profile": planned_by, "results": results}))
    monkeypatch.setattr(sys, "argv", ["fit_extend", "--results", str(file), "--write"])
    fit_extend.main()


def test_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = source.read_text()
    command(monkeypatch, tmp_path, "NVIDIA H200", results())
    shown = capsys.readouterr().out
    assert "worst 1.00" in shown and f" of {len(CASES)}" in shown
    fitted = [*PACKED, *STOCK_TIMES]
    assert rounded(written(source)["H200"], fitted) == rounded(PLANTED, fitted)
    others = set(asdict(H200)) - set(fitted)
    assert all(getattr(written(source)["H200"], name) == getattr(H200, name) for name in others)
    differ = [a for a, b in zip(before.splitlines(), source.read_text().splitlines(), strict=True) if a != b]
    assert len(differ) == len(fitted) and [line for line in before.splitlines() if "#" in line and line in differ] == []

    with pytest.raises(SystemExit, match="measured with another plan"):
        command(monkeypatch, tmp_path, "NVIDIA H200", [{**results()[0], "plan": {"partials": 1, "tokens_read": 2}}])
    with pytest.raises(SystemExit, match="no extend batch"):
        command(monkeypatch, tmp_path, "NVIDIA H200", [])
    with pytest.raises(SystemExit, match=r"NVIDIA X1 has no record: run scripts/fit_costs.py --write"):
        command(monkeypatch, tmp_path, "NVIDIA X1", results())


def test_a_new_gpu_gets_a_record(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As scripts/fit_costs.py makes it, and scripts/fit_extend.py completes it."""
    new = replace(H200, name="X100", is_measured=False, large_item_us=7.25, partial_us=0.5)
    write_profile(source, new, ["large_item_us"])
    assert written(source) == {**PROFILES, "X100": new}
    monkeypatch.setitem(PROFILES, "X100", new)
    command(monkeypatch, tmp_path, "NVIDIA X100 80GB", results())
    fitted = [*PACKED, *STOCK_TIMES]
    after = written(source)
    # a partial result costs more than on the H200, by which the batches were planned: so its part is smaller
    fitted.remove("extend_partial_factor")
    assert after["X100"].is_measured and rounded(after["X100"], fitted) == rounded(PLANTED, fitted)
    assert after["X100"].extend_partial_factor < PLANTED.extend_partial_factor
    assert after["X100"].large_item_us == 7.25 and after["H200"] == H200


def test_an_unknown_field_is_refused(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text().replace("        extend_call_us=", "        call_us="))
    with pytest.raises(SystemExit, match="no extend_call_us of H200"):
        write_profile(source, H200, ["extend_block_us", "extend_call_us"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(SystemExit, match="no PROFILES"):
        write_profile(tmp_path / "empty.py", H200, [])


# one H200; FA3's time on P3 comes out 12 % too long
@pytest.mark.parametrize(
    ("name", "packed_us", "stock_us", "stock_rel"),
    [("P1", 928, 959, 0.1), ("P2", 221, 242, 0.1), ("P3", 67.9, 82.7, 0.13), ("M1", 554, 728, 0.1),
     ("M2", 264, 578, 0.1)],
)  # fmt: skip
def test_times_are_near_what_was_measured(name: str, packed_us: float, stock_us: float, stock_rel: float) -> None:
    case = next(case for case in CASES if case.work.name.startswith(name + " "))
    assert case.packed_model(H200) == pytest.approx(packed_us, rel=0.15)
    assert case.stock_model(H200) == pytest.approx(stock_us, rel=stock_rel)
