"""The arithmetic of the serving benchmark's tables, and that its plots are drawn."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import serving_report
from bench.serving_load import failed_requests
from bench.serving_report import TITLES, Spread, against_best, kv_line, markdown, plot, show, summary, write
from rich.console import Console


def run(arm: str, rate: str, value: float, **more: float) -> dict:
    return {"arm": arm, "rate": rate, **dict.fromkeys(TITLES, value), **more}


def packed(steps: int, stock_steps: int, logical: int, read: int, unique: int) -> dict[str, int]:
    return {
        "packed_steps": steps, "unpacked_steps": stock_steps,
        "kv_tokens_logical": logical, "kv_tokens_read": read, "kv_tokens_unique": unique,
    }  # fmt: skip


RUNS = [
    run("packinfer", "inf", 300, **packed(90, 10, 8000, 2000, 1000)),
    run("fa3", "inf", 100),
    run("triton", "inf", 50),
    run("fa3", "inf", 130),
    run("triton", "inf", 60),
    run("packinfer", "inf", 240, **packed(100, 0, 8000, 2000, 1000)),
    run("packinfer", "inf", 230, **packed(100, 0, 8000, 2000, 1000)),
    run("fa3", "inf", 120),
    run("triton", "inf", 70),
    run("packinfer", "4", 20, **packed(0, 7, 0, 0, 0)),
    run("fa3", "4", 20),
    run("triton", "4", 40),
]
RESULTS = {
    "workload": "test",
    "environment": {"model": "m", "device": "d", "sglang": "0", "rounds": 3},
    "load": "--load",
    "servers": {"packinfer": {"pool_tokens": 65536, "flags": "--flags"}},
    "runs": RUNS,
}


def test_medians_and_extremes_by_rate_and_arm() -> None:
    result = summary(RUNS, "tpot_p50_ms")
    assert list(result) == ["inf", "4"] and list(result["inf"]) == ["packinfer", "fa3", "triton"]
    assert result["inf"]["packinfer"] == Spread(240, 230, 300)
    assert result["inf"]["fa3"] == Spread(120, 100, 130)
    assert result["4"]["triton"] == Spread(40, 40, 40)


def test_the_best_other_is_fastest_or_soonest() -> None:
    spreads = summary(RUNS, "tpot_p50_ms")["inf"]
    assert against_best(spreads, "output_tokens_per_s") == "2.00 (fa3)"
    assert against_best(spreads, "tpot_p50_ms") == "4.00 (triton)"
    assert against_best({"fa3": spreads["fa3"]}, "tpot_p50_ms") == "-"
    assert against_best({"packinfer": spreads["packinfer"]}, "tpot_p50_ms") == "-"


def test_the_saving_stands_beside_the_speeds() -> None:
    line = kv_line(RUNS, "inf")
    assert "packed 290 of 300 decode steps (97%)" in line
    assert "reads 24,000 KV tokens a layer, packinfer read 6,000 (1/4.00)" in line
    assert "least possible are 3,000 (1/8.00)" in line
    assert kv_line(RUNS, "4") == "packinfer packed 0 of 7 decode steps."
    assert kv_line(RUNS[1:3], "inf") is None


def test_tables() -> None:
    text = markdown(RESULTS)
    assert "| TPOT p50, ms | 240 (230 to 300) | 120 (100 to 130) | 60.0 (50.0 to 70.0) | 4.00 (triton) |" in text
    assert "| TPOT p50, ms | 20.0 (20.0 to 20.0) | 20.0 (20.0 to 20.0) | 40.0 (40.0 to 40.0) | 1.00 (fa3) |" in text
    assert "## request rate 4 per second" in text and text.count("packinfer packed") == 2
    shown = Console(file=io.StringIO(), width=200)
    show(RESULTS, shown)
    assert "240 (230 to 300)" in shown.file.getvalue() and "1/4.00" in shown.file.getvalue()


@pytest.mark.parametrize("rates", [1, 2])
def test_plots(tmp_path: Path, rates: int) -> None:
    plot({**RESULTS, "runs": RUNS[: 9 + 3 * (rates - 1)]}, tmp_path)
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "serving.svg").read_text()


def test_results_are_drawn_again_from_the_file(tmp_path: Path) -> None:
    write(RESULTS, tmp_path, Console(file=io.StringIO()))
    before = (tmp_path / "results.md").read_text()
    for name in ("results.md", "serving.png", "serving.svg"):
        (tmp_path / name).unlink()
    command = [sys.executable, serving_report.__file__, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "results.md").read_text() == before and (tmp_path / "serving.svg").exists()
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS


def test_a_missing_matplotlib_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    said = Console(file=io.StringIO(), width=300)
    write(RESULTS, tmp_path, said)
    assert said.file.getvalue().count("\n") == 1 and "packinfer-sgl[bench]" in said.file.getvalue()
    assert (tmp_path / "results.md").exists() and not (tmp_path / "serving.png").exists()


def test_a_failed_request_is_found() -> None:
    rows = [SimpleNamespace(output_len=5), SimpleNamespace(output_len=6)]
    good = {"completed": 2, "ttfts": [0.1, 0.2], "errors": ["", ""], "total_output_tokens": 11}
    assert failed_requests(good, rows) is None
    lost = {**good, "completed": 1, "errors": ["", "Traceback:\nClientError: gone\n"]}
    assert failed_requests(lost, rows) == "completed 1 of 2 requests (ClientError: gone)"
    assert failed_requests({**good, "ttfts": [0.1, 0.0]}, rows) == "gave no text for 1 of 2 requests"
    short = {**good, "total_output_tokens": 10}
    assert failed_requests(short, rows) == "gave 10 tokens instead of 11"
    assert failed_requests(short, None) is None
