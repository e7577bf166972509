"""Starting a server: it runs as asked, or stops with one line that says why and leaves nothing behind.

One refusal of each kind, by the command line and in the model's process; all others are in test_refusals.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import psutil
import pytest
import requests
from engines import START_S
from lib.servers import free_port

from packinfer_sgl.cli import main
from packinfer_sgl.patches import hold
from packinfer_sgl.tools import estimate_server
from packinfer_sgl.tools.explain import explain

pytestmark = pytest.mark.engine

SERVE = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--dtype", "float32"]


def start(*flags: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop the server once it is full
    server = subprocess.Popen(
        [*SERVE, *flags],
        env={**os.environ, **(env or {})},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server.log = log
    return server


def said(server: subprocess.Popen) -> str:
    server.log.seek(0)
    return server.log.read()


def refused(*flags: str, env: dict[str, str] | None = None) -> str:
    """What a server that must not start says; asserts a non-zero exit and an empty process group."""
    server = start(*flags, env=env)
    try:
        server.wait(START_S)
        assert server.returncode != 0
        deadline = time.monotonic() + 30
        while left := processes_of(server.pid):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.5)
        return said(server)
    finally:
        stop(server)


def processes_of(group: int) -> list[str]:
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def stop(server: subprocess.Popen) -> None:
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait(30)


PACKINFER = ("--attention-backend", "packinfer", "--max-total-tokens", "4000")


def assert_the_dashboard_finds_its_metrics(url: str) -> None:
    """By each name that they have: to a Prometheus of before 3.0 prometheus_client writes other ones."""
    dashboard = (Path(__file__).parents[2] / "docs" / "grafana" / "packinfer.json").read_text()
    wanted = set(re.findall(r'=~\\"(packinfer[^\\]+)\\"', dashboard))
    assert len(wanted) > 10 and dashboard.count("packinfer[") == dashboard.count('{__name__=~\\"packinfer[')
    for accept in ("*/*", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"):
        exported = requests.get(f"{url}/metrics", headers={"Accept": accept}, timeout=30).text
        names = {line.split("{")[0] for line in exported.splitlines() if not line.startswith("#")}
        assert {pattern for pattern in wanted if not any(re.fullmatch(pattern, name) for name in names)} == set()


def assert_the_estimate_is_right(url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`estimate --server`, which reads SGLang's metrics only, against the server's own count of the same steps."""
    monkeypatch.setattr(estimate_server, "SAMPLE_S", 15.0)
    prompt = [400 + i % 300 for i in range(1200)]
    body = {
        "input_ids": [[*prompt, 310 + i] for i in range(4)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 90, "ignore_eos": True},
    }
    enough = threading.Event()

    def load() -> None:
        while not enough.is_set():
            requests.post(f"{url}/generate", json=body, timeout=300).raise_for_status()

    def counted() -> dict[str, int]:
        return requests.get(f"{url}/server_info", timeout=30).json()["internal_states"][0]["packinfer"]

    with ThreadPoolExecutor(1) as user:
        before, sent = counted(), user.submit(load)
        try:
            assert main(["estimate", "--server", url, "--gpu", "cpu", "--json"]) == 0
            after = counted()
        finally:
            enough.set()
        sent.result()
    logical, unique = (after[f"kv_tokens_{what}"] - before[f"kv_tokens_{what}"] for what in ("logical", "unique"))
    found = json.loads(capsys.readouterr().out)
    assert found["looks"] >= 1 and found["cached"] > 0.5 and 2 < found["rows"][0]["running"] <= 4
    assert found["rows"][0]["ceiling"] == pytest.approx(logical / unique, rel=0.1)


@pytest.mark.contract
def test_a_wrong_setting_stops_the_start(model):
    output = refused("--model-path", model, "--packinfer-grouping", "off")
    assert "packinfer: --packinfer-grouping needs --attention-backend packinfer" in output
    assert "Traceback" not in output  # checked before anything is started: nothing else is said about it


@pytest.mark.contract
def test_a_backend_that_cannot_be_built_stops_the_start(model, tmp_path):
    env = faults.install(tmp_path, "break-hook=ForwardBatch.init_new")
    output = refused("--model-path", model, *PACKINFER, env=env)
    assert "packinfer: cannot hook sglang.srt." in output and "ForwardBatch.init_new" in output
    assert "tested are 0.5.17, 0.5.23" in output


@pytest.mark.contract
def test_server_says_what_it_does(model, monkeypatch, capsys):
    """One log line, /server_info and Prometheus agree."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    flags = ("--model-path", model, *PACKINFER, "--port", port)
    server = start(*flags, "--enable-metrics", "--packinfer-check", "--packinfer-arena-tokens", "1000")
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None and time.monotonic() < deadline, said(server)[-3000:]
            try:
                if requests.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(1)
        prompt = [400 + i % 300 for i in range(300)]
        body = {
            "input_ids": [[*prompt, 310 + i] for i in range(4)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True},
        }
        for _ in range(2):
            assert requests.post(f"{url}/generate", json=body, timeout=300).status_code == 200
        state = requests.get(f"{url}/server_info", timeout=30).json()["internal_states"][0]["packinfer"]
        assert state["active"] and state["reason"] is None and state["base_backend"] == "torch_native"
        assert state["config"] == {
            "grouping": "multi", "extend": "auto", "check": True, "arena_tokens": 1000, "hold_siblings": True,
        }  # fmt: skip
        assert state["packs"] == ["decode", "extend"]
        assert state["packed_steps"] > 50 and state["plan_us_p50"] > 0
        # cold prompts are the stock backend's, what is behind a cached prefix is packed
        assert state["fallback_steps"]["extend"] >= 1 and state["packed_extends"] >= 1
        assert state["extend_kv_tokens_unique"] <= state["extend_kv_tokens_read"] < state["extend_kv_tokens_logical"]
        assert state["rows_grouped"] == 4 and state["tree"][0]["rows"] == 4 and state["tree"][0]["end"] >= 300
        assert state["kv_tokens_unique"] <= state["kv_tokens_read"] < state["kv_tokens_logical"] / 2
        alone = state["ungrouped_steps"]  # the warm-up, and steps before all four ran
        assert [*alone] == ["nothing_shared"] and 0 < alone["nothing_shared"] < state["packed_steps"] / 2
        words = "\n".join(explain(state))
        assert "active over torch_native" in words and "a shared prefix was read once" in words
        assert "--packinfer-check is on" in words and f"{state['kv_tokens_read']:,} KV tokens" in words
        metrics = requests.get(f"{url}/metrics", timeout=30).text
        own = [line for line in metrics.splitlines() if line.startswith("packinfer:")]
        assert all(f'{kind}_rank="0"' in line for kind in ("pp", "tp", "dp") for line in own)  # ranks are told apart
        values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in own if "reason=" not in line}
        for name in ("packed_steps", "packed_extends", "kv_tokens_read", "kv_tokens_logical", "kv_tokens_unique"):
            assert values[f"packinfer:{name}_total"] == state[name]
        assert values["packinfer:rows_grouped"] == 4
        arena = state["arena"]
        assert arena["tokens"] == 1000 and 0 < arena["contiguous_tokens_read"] < arena["shared_tokens_read"]
        for name in ("copies", "copied_bytes", "hits", "refused", "replaced", "contiguous_tokens_read"):
            assert values[f"packinfer:arena_{name}_total"] == arena[name]
        assert state["held"]["requests"] == 3 and len(state["hooks"]) == len({*state["hooks"]}) > 10
        assert {hook.target for hook in hold.hooks()} < {*state["hooks"]}
        for name in ("requests", "passes", "prefix_tokens"):
            assert values[f"packinfer:held_{name}_total"] == state["held"][name]
        assert values["packinfer:arena_used_tokens"] == arena["used_tokens"] > 0
        for name in ("fallback_steps", "ungrouped_steps"):
            counted = {}
            for line in own:
                if line.startswith(f"packinfer:{name}_total"):
                    counted[line.split('reason="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
            assert counted == state[name]
        assert_the_dashboard_finds_its_metrics(url)
        assert_the_estimate_is_right(url, monkeypatch, capsys)
    finally:
        stop(server)
    lines = [line for line in said(server).splitlines() if "packinfer 0." in line]
    assert len(lines) == 1 and "torch_native" in lines[0] and "hooks verified" in lines[0]
