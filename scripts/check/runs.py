"""Run one SGLang engine in processes of its own (for ``check_engine.py``)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the worker starts here

from check.compare import Ran
from check.scenarios import Scenario

LIMIT_S = 240


def worker(spec: dict[str, Any]) -> None:
    """Print READY, then RESULT with what was said in each round and the engine's own account of it."""
    import sglang
    from check.areas import ROUNDS
    from check.rounds import Talk

    engine = sglang.Engine(**spec["engine"])
    print("READY", flush=True)
    asked = {}
    if "disaggregation_mode" in spec["engine"]:  # SGLang's own stand-in for a prefill server
        asked = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    talk = Talk(engine, spec["logprobs"], asked)
    said, after = {}, {}
    for i, name in enumerate(spec["rounds"]):
        said[f"{i}-{name}"] = ROUNDS[name](talk)
        after[name] = engine.get_server_info()["internal_states"][0].get("packinfer") or {}
    if spec["engine"].get("tp_size", 1) * spec["engine"].get("pp_size", 1) > 1:
        time.sleep(1.5)  # longer than the metrics stay as they are: then all ranks write them at the same step
        engine.generate(input_ids=[300, 301], sampling_params={"max_new_tokens": 2})
    info = engine.get_server_info()["internal_states"]
    states = [s.get("packinfer") or {} for s in info]
    for state, s in zip(states, info):
        state["accept_length"] = s.get("avg_spec_accept_length")
    result = {"said": said, "after": after, "states": states, "ranks": packed_steps_of_ranks()}
    print("RESULT " + json.dumps(result), flush=True)
    engine.shutdown()


def packed_steps_of_ranks() -> dict[str, float]:
    """Packed steps by pipeline, tensor and data rank; /server_info has one rank of each data rank only."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return {
        " ".join(f"{kind}{sample.labels[f'{kind}_rank']}" for kind in ("pp", "tp", "dp")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "packinfer:packed_steps_total"
    }


def run(name: str, scenario: Scenario, port: int, out: Path) -> Ran:
    """Run ``scenario`` on the models below ``out``/models; its log is ``out``/``name``.log.

    Args:
        port: SGLang takes some of those above.
    """
    engine = {"model_path": str(out / "models" / scenario.model), "port": port, **scenario.engine}
    if "speculative_draft_model_path" in engine:
        engine["speculative_draft_model_path"] = str(out / "models" / engine["speculative_draft_model_path"])
    spec = {"engine": engine, "rounds": scenario.rounds, "logprobs": scenario.logprobs}
    log = out / f"{name}.log"
    with tempfile.TemporaryDirectory() as metrics, log.open("w") as err:
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": metrics, "PYTHONUNBUFFERED": "1"}
        env.pop("PACKINFER_CONFIG", None)
        if scenario.config:
            env["PACKINFER_CONFIG"] = json.dumps(scenario.config)
        env |= scenario.env
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(spec)],
            stdout=subprocess.PIPE, stderr=err, text=True, env=env, start_new_session=True,
        )  # fmt: skip
        try:
            stdout, _ = process.communicate(timeout=LIMIT_S)
            late = ""
        except subprocess.TimeoutExpired:
            late = f"nothing after {LIMIT_S} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its own group
            except ProcessLookupError:
                pass
        if late:
            stdout, _ = process.communicate()
    with log.open("a") as more:
        more.write(stdout)
    for line in stdout.splitlines():
        if line.startswith("RESULT "):
            return Ran(**json.loads(line.removeprefix("RESULT ")))
    stage = "while serving" if "READY" in stdout.splitlines() else "while starting"
    why = late or last_error(log.read_text(errors="replace")) or f"exit code {process.returncode}"
    return Ran(problem=f"{stage}: {why}")


ERROR = re.compile(r"^(?:\[.*?\] )?[\w.]*(?:Error|Exception|UnsupportedModel)(?:: ?.*)?$")
CUDA_ERROR = re.compile(r"CUDA error[^\r\n]*")
# what other processes say once one has ended
AFTER = re.compile(r"EOFError|scheduler died|child process")


def last_error(log: str) -> str:
    """The line of ``log`` that says why: packinfer's own if there is one, else that of the last exception, else what a
    kernel said that ended the process."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if ERROR.match(line) and not AFTER.search(line)]
    ours = [line for line in errors if "packinfer:" in line]
    return (ours or errors or CUDA_ERROR.findall(log) or [""])[-1][:300]


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
