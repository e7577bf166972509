"""scripts/test.sh runs pytest twice at once: what it makes of both results, and of an interrupt.

In place of Python there is a script that says what it got and ends as the test wants.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

HALVES = Path(__file__).parents[2] / "scripts" / "lib" / "test_halves.sh"
PYTHON = """#!/usr/bin/env bash
half=$4
echo "arguments: $*"
echo "threads: $OMP_NUM_THREADS"
trap 'echo "$half was interrupted"; kill $!; exit 2' INT
[[ -z ${SLEEP-} ]] || { sleep 60 & echo $! >"$half.sleeps"; wait; }
echo "the end of $half"
code="${half}_code"
exit "${!code}"
"""


def start(folder: Path, engine: int = 0, others: int = 0, *more: str, **env: str) -> subprocess.Popen:
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **env}
    env |= {"engine_code": str(engine), "others_code": str(others)}
    code = f'set -euo pipefail; source {HALVES}; rc=0; packinfer_test_halves "$@" || rc=$?; exit $rc'
    command = ["bash", "-c", code, "test.sh", *more]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "others", "code"), [(0, 0, 0), (5, 0, 0), (0, 5, 0), (5, 5, 5), (1, 0, 1), (0, 2, 2), (5, 1, 1)]
)  # fmt: skip
def test_a_half_may_be_empty_but_not_both(engine: int, others: int, code: int, tmp_path: Path) -> None:
    script = start(tmp_path, engine, others, "-k", "a plan")
    said, _ = script.communicate(timeout=60)
    assert script.returncode == code, said
    lines = said.splitlines()
    assert lines[-2:] == [
        "others (.pytest_cache/others.log): the end of others", "engine (.pytest_cache/engine.log): the end of engine",
    ]  # fmt: skip
    for half in ("engine", "others"):
        log = (tmp_path / ".pytest_cache" / f"{half}.log").read_text()
        assert f"--half {half} " in log and "-k a plan" in log and "threads: 1\n" in log
        assert said.count(log) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_running(number: signal.Signals, tmp_path: Path) -> None:
    script = start(tmp_path, SLEEP="1")
    files = [tmp_path / f"{half}.sleeps" for half in ("engine", "others")]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text().strip() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(script.pid).children(recursive=True)
    assert len(children) >= 4
    script.send_signal(number)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 130 and said.splitlines()[-1] == "scripts/test.sh: interrupted"
    assert psutil.wait_procs(children, timeout=5)[1] == []
    for half in ("engine", "others"):
        assert f"{half} was interrupted" in (tmp_path / ".pytest_cache" / f"{half}.log").read_text()
