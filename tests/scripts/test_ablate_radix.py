"""Which cells the ablation runs and which it has, and (nightly) real runs of it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import ablate_radix
import pytest
import torch
from ablate import cells as ablate_cells
from ablate import matrix as ablate_matrix
from ablate.cells import Cells, Records, figures
from ablate.matrix import AXES, Config, engine_arguments, label, select, steps, usual
from ablate.workloads import SIZES
from left_over import family, has_scheduler, survivors
from lib.answers import compare
from lib.token_traces import TraceError

from packinfer_sgl import config as packinfer

SCRIPT = Path(ablate_matrix.__file__).parents[1] / "ablate_radix.py"
DEFAULT = {name: list(axis.default) for name, axis in AXES.items()}
WITH_LPM = {**DEFAULT, "schedule": ["fcfs", "lpm"]}
ALL = {name: list(axis.values) for name, axis in AXES.items()}
LIMIT_S = 600


def test_what_is_usual_is_what_the_plugin_does_by_default() -> None:
    _, settings = engine_arguments(usual())
    assert packinfer.Config(**settings) == packinfer.Config()
    assert AXES["hold"].default == ("on",)


def test_one_change_at_a_time_and_each_engine_once() -> None:
    assert list(map(label, select(DEFAULT, full=False))) == [
        "usual settings", "radix off", "grouping off", "grouping single",
    ]  # fmt: skip
    found = select(WITH_LPM, full=False)
    assert list(map(label, found))[4:] == ["schedule lpm"]
    wide = select(ALL, full=False)
    assert {label(c) for c in wide} == {label(c) for c in found} | {
        "arena 8192", "arena 32768", "extend off", "hold off", "page 16", "page 64", "eviction lfu",
        "schedule dfs-weight",
    }  # fmt: skip


def test_all_products_without_those_that_are_the_same_engine() -> None:
    found = select(ALL, full=True)
    on, off = ([c for c in found if c["radix"] == r] for r in ("on", "off"))
    assert (len(on), len(off)) == ((2 * 3 + 1) * 2 * 2 * 3 * 2 * 3, 3)
    assert {(c["grouping"], c["schedule"], c["eviction"]) for c in off} == {("off", "fcfs", "lru")}
    assert len({label(c) for c in found}) == len(found)


def test_the_ladder_gives_each_part_its_own_step() -> None:
    said = [(s.title(), label(s.before), label(s.after)) for s in steps(WITH_LPM)]
    assert said == [
        ("the radix cache: on against off", "radix off", "grouping off"),
        ("grouping: multi against off", "grouping off", "usual settings"),
        ("grouping: single against off", "grouping off", "grouping single"),
        ("schedule: lpm against fcfs", "usual settings", "schedule lpm"),
    ]
    some = {**DEFAULT, "radix": ["on"], "grouping": ["multi"], "page": ["16", "64"], "schedule": ["fcfs"]}
    assert [(s.axis, label(s.before), label(s.after)) for s in steps(some)] == [("page", "page 16", "page 64")]
    assert list(map(label, select(some, full=False))) == ["page 16", "page 64"]


def test_an_arena_is_looked_at_with_grouping_on() -> None:
    said = [(s.title(), label(s.before), label(s.after)) for s in steps({**DEFAULT, "arena": ["off", "8192"]})]
    assert said[-1] == ("contiguity: 8192 against off", "usual settings", "arena 8192")
    assert said[0] == ("the radix cache: on against off", "radix off", "grouping off")
    packed = steps({**DEFAULT, "extend": ["off", "auto"]})[-1]
    assert (packed.title(), label(packed.after)) == ("packed prefill: auto against off", "usual settings")
    assert engine_arguments(packed.before)[1] == {"grouping": "multi", "extend": "off"}
    assert engine_arguments({**usual(), "arena": "8192"})[1] == {"grouping": "multi", "arena_tokens": 8192}


def answer_of_an_engine(**more: object) -> dict:
    zero = dict.fromkeys(
        ("kv_tokens_logical", "kv_tokens_read", "kv_tokens_unique", "packed_steps", "unpacked_steps"), 0
    )
    return {
        **zero, "s": 2.0, "ttft_ms": [5.0, 7.0], "tpot_ms": [], "prompt_tokens": 40, "cached_tokens": 30,
        "output_tokens": 8, "least_prefill_tokens": 9, "plans": 2, "plan_us_total": 30.0, **more,
    }  # fmt: skip


def test_figures() -> None:
    found = figures(answer_of_an_engine())
    assert (found["output_tokens_per_s"], found["ttft_p50_ms"], found["tpot_p99_ms"]) == (4.0, 6.0, 0.0)
    assert (found["hit_rate"], found["computed_prompt_tokens"], found["plan_us"]) == (0.75, 10, 15.0)


def cells(path: Path, **more: object) -> Cells:
    common = {"model_path": "tiny", **more}
    return Cells(DEFAULT, False, SIZES["cpu"], ["few-shot", "unrelated"], [], 2, common, Records(path))


def test_only_what_is_missing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    first = cells(path)
    todo = first.missing(first.configs)
    assert len(todo) == 4 * 2 * 3 and [(w, run) for _, w, run in todo[:5]] == [("few-shot", "check")] * 4 + [
        ("few-shot", "0")
    ]
    turns = [[label(c) for c, w, run in todo if (w, run) == ("few-shot", r)] for r in ("check", "0", "1")]
    assert turns[1] == turns[0][1:] + turns[0][:1] and turns[2] == turns[0][2:] + turns[0][:2]  # nobody is always first
    for config, workload, run in todo[:-1]:
        first.add(config, workload, run, answer_of_an_engine(said={}))
    path.write_text(path.read_text() + '{"key": "cut o')  # an interrupt while writing

    second = cells(path)
    last: tuple[Config, str, str] = todo[-1]
    assert second.missing(second.configs) == [(last[0], "unrelated", "check"), last]  # a new engine warms up
    assert second.unfinished() == [last[0]] and "1 engines to start, 2 runs" in second.estimate()
    assert len(second.results()["runs"]) == 4 * 2 * 2 - 1
    second.add(*last, answer_of_an_engine())
    assert cells(path).unfinished() == [] and cells(path).missing([]) == []
    assert len(cells(path, dtype="float16").unfinished()) == 4  # other settings, other runs
    monkeypatch.setattr(ablate_cells, "source_digest", lambda: "changed")
    assert len(cells(path).unfinished()) == 4


def test_an_engine_that_ended(tmp_path: Path) -> None:
    some = cells(tmp_path / "runs.jsonl")
    usual_one = some.configs[0]
    for run in ("check", "0", "1"):
        some.add(usual_one, "few-shot", run, answer_of_an_engine())
    some.break_all(label(usual_one), "it ended")
    assert some.broken == {("usual settings", "unrelated"): "it ended"}
    assert some.results()["skipped"] == [{"config": "usual settings", "workload": "unrelated", "reason": "it ended"}]


def said(*tokens: int, gap: float = 1.0) -> dict:
    """Greedy answers with 7 as the second choice everywhere."""
    return {
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
        "output_top_logprobs": [[[-0.5, token, None], [-0.5 - gap, 7, None]] for token in tokens],
    }


def test_what_follows_another_answer_is_not_compared() -> None:
    ours = {"/0#0": said(1, 2), "/0/0#0": said(3), "/1#0": said(4), "/1/0#0": said(5), "/10#0": said(6)}
    assert compare(ours, ours) == {"equal": 5}
    assert compare(ours, {**ours, "/1#0": said(7), "/1/0#0": said(9)}) == {"equal": 3, "different": 1}
    close = {**ours, "/0#0": said(1, 2, gap=1e-5)}
    assert compare(close, {**ours, "/0#0": said(1, 7)}) == {"near-tie": 1, "equal": 3}


def run(out: Path, *more: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--page", "1,2"), "argument --page: 2 is none of 1, 16, 64"),
        (("--workloads", "few-shot,best"), "best is none of shared-prefix"),
        (("--workloads", "hot-prefix", "--size", "cpu"), "--size cpu has no workload hot-prefix"),
        (("--engine", "[]"), "must be a JSON object"),
    ],
)
def test_a_mistake_of_the_command_line(
    more: tuple[str, ...], what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate_radix.py", *more])
    with pytest.raises(SystemExit) as stop:
        ablate_radix.arguments()
    assert stop.value.code == 2 and what in capsys.readouterr().err


def test_a_trace_that_is_not_there_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate_radix.py", "--out", str(tmp_path), "--model", "m", "--trace", "no.csv"])
    with contextlib.ExitStack() as undo, pytest.raises(TraceError, match="no.csv cannot be read: No such file"):
        ablate_radix.ablate(ablate_radix.arguments(), undo)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path / "file" / "out")
    assert done.returncode == 1 and done.stdout.startswith("ablate_radix: ") and "Not a directory" in done.stdout
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_change_of_any_measured_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate_cells, "ROOT", tmp_path)
    seen = {ablate_cells.source_digest()}
    for name in ("packinfer_sgl/cli.py", "packinfer_sgl/planning/plan.py", "kernels/merge.py", "patches/hold.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        seen.add(ablate_cells.source_digest())
    assert len(seen) == 5


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU: a GPU needs a model")
def test_a_real_run_is_finished_once(tmp_path: Path) -> None:
    """A third configuration cannot run, the other two are reported."""
    out = tmp_path / "out"
    more = (
        "--grouping",
        "multi,off",
        "--radix",
        "on",
        "--schedule",
        "fcfs",
        "--workloads",
        "few-shot",
        "--rounds",
        "1",
    )
    done = run(out, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    multi, off = sorted(results["runs"], key=lambda run: run["config"], reverse=True)
    assert (multi["config"], off["config"]) == ("usual settings", "grouping off")
    questions = SIZES["cpu"].workloads["few-shot"]["questions"]
    for figures_ in (multi, off):
        assert figures_["output_tokens"] == 4 * questions and figures_["packed_steps"] > 0
        assert 0 <= figures_["hit_rate"] < 1  # 0 where SGLang admits all questions at once
        assert figures_["ttft_p50_ms"] > figures_["tpot_p50_ms"] > 0
        # how many run together depends on when they arrive
        assert figures_["kv_tokens_unique"] < figures_["kv_tokens_logical"] / 2
    # what runs together is one group: 512 tokens for all, 24 to 28 for each
    assert multi["kv_tokens_unique"] <= multi["kv_tokens_read"] <= 1.05 * multi["kv_tokens_unique"]
    assert off["kv_tokens_read"] == off["kv_tokens_logical"] == multi["kv_tokens_logical"]
    assert results["answers"]["few-shot"]["grouping off"] == {"equal": questions, "near-tie": 0, "different": 0}
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "results.md").read_text()

    again = run(out, *more)
    assert again.returncode == 0 and "0 engines to start, 0 runs" in again.stdout
    assert json.loads((out / "results.json").read_text())["runs"] == results["runs"]


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU: a GPU needs a model")
def test_engines_that_do_not_start(tmp_path: Path) -> None:
    flags = ("--radix", "on", "--grouping", "off", "--schedule", "fcfs", "--engine", '{"no_such": 1}')
    done = run(tmp_path / "out", *flags, "--workloads", "few-shot")
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "ablate_radix: nothing could be measured"
    assert "the grouping off engine did not start; its last words: TypeError" in done.stdout


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU: a GPU needs a model")
def test_an_interrupt_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--at-once", "2"]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + LIMIT_S
    while not has_scheduler(started := family(script.pid)):
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    script.send_signal(signal.SIGTERM)
    said_, _ = script.communicate(timeout=60)
    assert script.returncode == 130 and "interrupted; the same command goes on" in said_.splitlines()[-1]
    assert survivors(started) == []
