"""What scripts/bench_serving.py needs of SGLang's benchmark, and (nightly) real runs of it on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench_serving
import numpy as np
import pytest
from bench.serving_load import WARM_UP_TOKENS, Load
from left_over import family, left_over, survivors
from lib import servers

SCRIPT = Path(servers.__file__).parents[1] / "bench_serving.py"
LIMIT_S = 600
PROMPT_TOKENS, OUTPUT_TOKENS = 600, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny-serving", layers=2)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Eight requests behind one block of 512 tokens, and one that is too long for any server."""
    row = {"timestamp": 0, "input_length": PROMPT_TOKENS, "output_length": OUTPUT_TOKENS}
    rows = [{**row, "hash_ids": [0, i]} for i in range(1, 9)]
    rows.insert(1, {**row, "input_length": 512000, "hash_ids": list(range(1000))})
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, out: Path, *more: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), "--model", str(model), "--out", str(out), *map(str, more)]


@pytest.fixture
def here(tmp_path: Path, model: Path) -> dict:
    """Arguments of subprocess: an own working folder and home, and a mark on every process."""
    for name in ("cwd", "home"):
        (tmp_path / name).mkdir()
    env = {**os.environ, "HOME": str(tmp_path / "home"), "LEFT_OVER": str(model), "COLUMNS": "200"}
    return {"cwd": tmp_path / "cwd", "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


@pytest.mark.engine
@pytest.mark.nightly
def test_a_trace_against_two_servers(model: Path, trace: Path, tmp_path: Path, here: dict) -> None:
    out = tmp_path / "out"
    more = ("--trace", trace, "--rounds", "2", "--request-rate", "inf,16", "--running", "8", "--", "--num-prompts", "8")
    done = subprocess.run(command(model, out, *more), timeout=LIMIT_S, **here)
    assert done.returncode == 0, done.stdout
    assert "1 requests of the trace were left out" in done.stdout and "packinfer / best other" in done.stdout

    results = json.loads((out / "results.json").read_text())
    packinfer, stock = results["servers"]
    assert packinfer == "packinfer" and len(results["servers"]) == 2
    turns = [(run["round"], run["arm"], run["rate"]) for run in results["runs"]]
    arms = [(0, packinfer), (0, stock), (1, stock), (1, packinfer)]
    assert turns == [(i, arm, rate) for i, arm in arms for rate in ("inf", "16")]
    for run in results["runs"]:
        assert (run["completed"], run["total_output_tokens"]) == (8, 8 * OUTPUT_TOKENS)
        assert run["total_input_tokens"] == 8 * PROMPT_TOKENS
        assert run["output_tokens_per_s"] > 0 and run["ttft_p50_ms"] > 0 and run["tpot_p99_ms"] >= run["tpot_p50_ms"]
    # eight requests at once, all decode steps packed: the block is read once instead of eight times
    first = results["runs"][0]
    assert first["packed_steps"] >= OUTPUT_TOKENS - 1 and first["unpacked_steps"] == 0
    assert first["kv_tokens_unique"] <= first["kv_tokens_read"] < first["kv_tokens_logical"] / 2
    for arm in results["servers"]:  # before the warm-up and each of four runs
        assert (out / f"{arm}.log").read_text().count("Cache flushed successfully") == 5
    assert {server["pool_tokens"] for server in results["servers"].values()} == {65536}
    assert all(str(model.parent) not in text for text in (json.dumps(results), (out / "results.md").read_text()))

    names = {"results.json", "results.md", "serving.png", "serving.svg", "bench_serving.log", "bench_serving.jsonl"}
    assert {path.name for path in out.iterdir()} == names | {f"{arm}.log" for arm in results["servers"]}
    assert list((tmp_path / "cwd").iterdir()) == []
    assert left_over(model) == []


@pytest.mark.contract
def test_every_run_gets_the_same_requests_and_arrivals(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.benchmark.utils import get_tokenizer

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    groups = "--gsp-num-groups 2 --gsp-prompts-per-group 3 --gsp-system-prompt-len 40 --gsp-output-len 20"
    arguments = ["--dataset-name", "generated-shared-prefix", *groups.split(), "--seed", "7"]
    load = Load(str(model), arguments, None, tmp_path / "out")
    said = []
    for warm_up in (True, False, False):
        load.args.warm_up = warm_up
        rows = load._dataset(load.args, get_tokenizer(str(model)), "model")
        prompts = [row.prompt for row in rows]
        said.append((prompts, {row.output_len for row in rows}, np.random.exponential(), random.random()))
    assert said[1] == said[2] and said[1][1] == {20}
    assert said[0] == (said[1][0], {WARM_UP_TOKENS}, *said[1][2:])
    assert len(set(said[1][0])) == 6 and load.args.seed == 7 and load.args.flush_cache
    assert not list(tmp_path.rglob("gen_shared_prefix*"))


@pytest.mark.engine
@pytest.mark.nightly
def test_a_server_that_does_not_start(model: Path, tmp_path: Path, here: dict) -> None:
    out = tmp_path / "out"
    flags = ("--workload", "gsp-cpu", "--arms", "packinfer", "--server-args=--no-such-flag")
    done = subprocess.run(command(model, out, *flags), timeout=LIMIT_S, **here)
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert (
        last.startswith("bench_serving: the packinfer server ended with code 2") and str(out / "packinfer.log") in last
    )
    assert "--no-such-flag" in (out / "packinfer.log").read_text()
    assert left_over(model) == [] and not (out / "results.json").exists()


@pytest.mark.engine
@pytest.mark.nightly
def test_an_interrupt_leaves_nothing_running(model: Path, tmp_path: Path, here: dict) -> None:
    script = subprocess.Popen(command(model, tmp_path / "out", "--workload", "gsp-cpu"), **here)
    deadline = time.monotonic() + LIMIT_S
    while not any("sglang.cli" in line for line in left_over(model)):
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    started = family(script.pid)
    script.send_signal(signal.SIGTERM)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 130 and said.splitlines()[-1] == "bench_serving: interrupted"
    assert left_over(model) == [] and survivors(started) == []


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--workload", "gsp-cpu", "--arms", "packinfer,best"), "best is none of packinfer"),
        (("--workload", "gsp-cpu,best"), "best is none of gsp-8k"),
        (("--workload", "gsp-cpu", "--request-rate", "4,0"), "positive numbers"),
        (("--workload", "gsp-cpu", "--", "--gsp-no-such"), "unrecognized arguments: --gsp-no-such"),
    ],
)
def test_a_mistake_of_the_command_line_starts_nothing(
    more: tuple[str, ...], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", "--model", "m", "--out", str(tmp_path), *more])
    monkeypatch.setattr(bench_serving, "Server", lambda *_: pytest.fail("a server was started"))
    with contextlib.ExitStack() as undo, pytest.raises(SystemExit) as stop:
        bench_serving.benchmark(bench_serving.arguments(), undo)
    assert stop.value.code == 2 and what in capsys.readouterr().err
