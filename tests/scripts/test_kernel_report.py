"""The arithmetic of the kernel benchmark's table, and that its plot is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench import kernel_report
from bench.kernel_report import cases, family, floor, markdown, sections, summary, table


def result(slots: str, ours: float, bound: float = 4.0, name: str = "D1", kind: str = "decode", **us: float) -> dict:
    methods = {method.replace("_", " "): [value, value - 1, value + 1] for method, value in us.items()}
    return {
        "workload": name, "kind": kind, "heads": [32, 8], "slots": slots, "floor_us": 10.0,
        "compute_bound": kind != "decode", "bound": bound, "plan": {},
        "us": {"packinfer": [ours, ours - 1, ours + 1], **methods}, "failed": {},
    }  # fmt: skip


FILE = {
    "machine": {"gpu": "G", "torch": "0"},
    "results": [
        result("random", 20, fa3_page_1=80, fa3_twice_page_1=30, flashinfer_page_1=60, sglang_triton=90),
        result("contiguous", 18, fa3_page_1=81, fa3_twice_page_64=25, cascade_fa2_page_16=40),
        result("random", 50, bound=1.0, name="D5", fa3_page_1=40, flashinfer_page_1=55),
    ],
}


def test_families() -> None:
    names = (
        "fa3 page 64", "fa3 twice page 1", "flashinfer page 16", "prefill fa3 page 1", "cascade fa3 page 1",
        "batch attention page 1", "pod page 16", "sglang triton",
    )  # fmt: skip
    assert list(map(family, names)) == list(kernel_report.FAMILIES.values())


def test_ratios_with_random_and_with_any_slots() -> None:
    shared, alone = cases(FILE["results"])
    assert (shared["ratio"], shared["ratio_any"], shared["contiguous_us"]) == (1.5, 1.25, 18)
    assert shared["best"] == {
        "FA3": 80, "FA3 twice + merge": 25, "FlashInfer decode": 60, "SGLang triton": 90, "FlashInfer cascade": 40,
    }  # fmt: skip
    assert (alone["ratio"], alone["ratio_any"], alone["contiguous_us"]) == (0.8, 0.8, None)


def test_means_and_what_is_slower() -> None:
    twice = [*cases(FILE["results"]), *cases([result("random", 20, name="D2", fa3_page_1=120)])]
    assert summary(twice) == [
        "2 cases that share: geometric mean 3.00, 0 below 1",
        "1 cases that share nothing: geometric mean 0.80, 1 below 1; 0.80 D5 32/8",
    ]


EXTENDS = [
    result("random", 60, name="P1", kind="extend", fa3_page_1=90, prefill_fa2_page_1=75),
    result("random", 80, name="M1", kind="mixed", fa3_page_1=40, pod_page_1=100),
]


def test_extends_are_a_section_with_their_own_families() -> None:
    found = sections(cases([*EXTENDS, *FILE["results"]]))
    assert {section: [case["workload"] for case in some] for section, some in found.items()} == {
        "Decode": ["D1", "D5"],
        "Extend and mixed": ["P1", "M1"],
    }
    header, prompt, mixed = table(found["Extend and mixed"])
    assert header[6:9] == ["FA3", "FlashInfer prefill", "FlashInfer BatchPOD"]
    assert prompt[6:] == ["90.0", "75.0", "-", "1.25", "1.25"] and mixed[6:] == ["40.0", "-", "100.0", "0.50", "0.50"]
    assert summary(found["Extend and mixed"]) == ["2 cases that share: geometric mean 0.79, 1 below 1; 0.50 M1 32/8"]
    assert "\n## Decode\n" not in markdown({**FILE, "results": EXTENDS})


def test_a_floor_set_by_products_says_so() -> None:
    assert (floor(EXTENDS[0]), floor(FILE["results"][0])) == ("10.0, compute", "10.0")


def test_a_workload_that_failed_is_told(tmp_path: Path) -> None:
    broken = {**result("random", 1, name="D9"), "us": {}, "failed": {"packinfer": "wrong by 0.5"}}
    text = markdown({**FILE, "results": [*FILE["results"], broken]})
    assert "- D9 random: packinfer: wrong by 0.5" in text
    assert (
        "| D1 | 32/8 | 10.0 | 4.0x | 20.0 (19.0 to 21.0) | 18.0 | 80.0 | 25.0 | 60.0 | 40.0 | 90.0 | 1.50 | 1.25 |"
        in text
    )


def test_report_from_results(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({**FILE, "results": [*FILE["results"], *EXTENDS]}))
    done = subprocess.run([sys.executable, kernel_report.__file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plots = {"kernels.png", "kernels.svg", "kernels_extend.png", "kernels_extend.svg"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", *plots}
    assert "<svg" in (tmp_path / "kernels.svg").read_text()
    missing = subprocess.run([sys.executable, kernel_report.__file__, tmp_path / "no"], capture_output=True, text=True)
    assert missing.returncode == 1 and missing.stderr.startswith("kernel_report: ") and missing.stderr.count("\n") == 1
