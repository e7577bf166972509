"""Run one SGLang engine in processes of its own, and compare what two of them said (for ``check_engine.py``)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOP = 5  # log-probabilities of each output token
TOKENS = 40
LIMIT_S = 240


@dataclass(frozen=True)
class Scenario:
    """One engine: ``engine`` are arguments of ``sglang.Engine``, ``config`` the plugin's settings; see ``worker``."""

    model: str
    engine: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[str, ...] = ("tree", "tree")
    logprobs: bool = True
    gpus: int = 1


@dataclass
class Ran:
    """What became of a scenario: its result, or the line that says why there is none."""

    said: dict[str, list[dict]] = field(default_factory=dict)
    states: list[dict] = field(default_factory=list)
    ranks: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def state(self) -> dict:
        return (self.states or [{}])[0]


def worker(scenario: dict) -> None:
    """Print READY, then RESULT with what was said in each round and the engine's own account of it.

    Rounds: ``tree``: 16 requests in a three-level tree of prefixes; ``deep``: the same with a longer prefix for all;
    ``samples``: 4 samples of each of 3 prompts; ``three``, ``one``: so many requests; ``turns``: two requests at each
    turn of a conversation of 48 turns.
    """
    import sglang

    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    from drive import greedy, tree_prompts

    engine = sglang.Engine(**scenario["engine"])
    print("READY", flush=True)
    said = {}
    for i, name in enumerate(scenario["rounds"]):
        shared = 1500 if name == "deep" else 300
        prompts = tree_prompts(2, shared)[: {"samples": 3, "three": 3, "one": 1}.get(name)]
        if name == "turns":
            talk = tree_prompts(3, 48 * 64)[0]
            prompts = [[*talk[: 64 * (1 + i // 2)], 300 + i] for i in range(96)]
        params = greedy(TOKENS, **({"n": 4} if name == "samples" else {}))
        more = {"return_logprob": True, "top_logprobs_num": TOP} if scenario["logprobs"] else {}
        if "disaggregation_mode" in scenario["engine"]:  # SGLang's own stand-in for a prefill server
            more |= {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
        outs = engine.generate(input_ids=prompts, sampling_params=params, **more)
        said[f"{i}-{name}"] = [
            {
                "ids": out["output_ids"],
                "top": [
                    {str(token): lp for lp, token, _ in position}
                    for position in out["meta_info"].get("output_top_logprobs") or []
                ],
            }
            for out in outs
        ]
    info = engine.get_server_info()["internal_states"]
    states = [s.get("packinfer") or {} for s in info]
    for state, s in zip(states, info):
        state["accept_length"] = s.get("avg_spec_accept_length")
    print("RESULT " + json.dumps({"said": said, "states": states, "ranks": packed_steps_of_ranks()}), flush=True)
    engine.shutdown()


def packed_steps_of_ranks() -> dict[str, float]:
    """Packed steps by "tp rank / dp rank", which /server_info has for one rank of each group only."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return {
        f"tp{sample.labels['tp_rank']} dp{sample.labels['dp_rank']}": sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "packinfer:packed_steps_total"
    }


def run(name: str, scenario: Scenario, defaults: dict[str, Any], port: int, out: Path) -> Ran:
    """Run ``scenario`` on the models below ``out``/models; its log is ``out``/``name``.log.

    Args:
        defaults: arguments of ``sglang.Engine`` for all scenarios.
        port: SGLang takes some of those above.
    """
    engine = {**defaults, "model_path": str(out / "models" / scenario.model), "port": port, **scenario.engine}
    if "speculative_draft_model_path" in engine:
        engine["speculative_draft_model_path"] = str(out / "models" / engine["speculative_draft_model_path"])
    spec = {"engine": engine, "rounds": scenario.rounds, "logprobs": scenario.logprobs}
    log = out / f"{name}.log"
    with tempfile.TemporaryDirectory() as metrics, log.open("w") as err:
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": metrics, "PYTHONUNBUFFERED": "1"}
        env.pop("PACKINFER_CONFIG", None)
        if scenario.config:
            env["PACKINFER_CONFIG"] = json.dumps(scenario.config)
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


# what other processes say once one has ended
AFTER = re.compile(r"EOFError|scheduler died|child process")


def last_error(log: str) -> str:
    """The line of ``log`` that says why: packinfer's own if there is one, else that of the last exception."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if ERROR.match(line) and not AFTER.search(line)]
    ours = [line for line in errors if "packinfer:" in line]
    return (ours or errors or [""])[-1][:300]


@dataclass
class Diff:
    """How the outputs of two engines differ in all rounds that both ran.

    Attributes:
        equal, of: equal outputs, and all.
        common: tokens before the first difference, all outputs together.
        drift: largest difference of a log-probability among those tokens.
        gaps: per output that differs, how much less likely the reference holds the other's token than its own; infinite
            if that token is not among the likeliest.
    """

    equal: int = 0
    of: int = 0
    common: int = 0
    drift: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def gap(self) -> float:
        return max(self.gaps, default=0.0)

    def __str__(self) -> str:
        text = f"{self.equal}/{self.of} outputs equal, {self.common} tokens before the first differences"
        text += f", log-probabilities there within {self.drift:.3g}" if self.drift else ""
        return text + (f", largest gap at a first difference {self.gap:.3g}" if self.gaps else "")


def compare(ours: Ran, theirs: Ran) -> Diff:
    diff = Diff()
    for name in sorted(set(ours.said) & set(theirs.said)):
        for a, b in zip(ours.said[name], theirs.said[name], strict=True):
            diff.of += 1
            at = next((i for i, (x, y) in enumerate(zip(a["ids"], b["ids"])) if x != y), None)
            same = min(len(a["ids"]), len(b["ids"])) if at is None else at
            diff.common += same
            for i in range(same if a["top"] and b["top"] else 0):
                token = str(a["ids"][i])
                if token in a["top"][i] and token in b["top"][i]:
                    diff.drift = max(diff.drift, abs(a["top"][i][token] - b["top"][i][token]))
            if at is None:
                diff.equal += len(a["ids"]) == len(b["ids"])
            else:
                top = b["top"][at] if b["top"] else {}
                mine, own = top.get(str(a["ids"][at])), top.get(str(b["ids"][at]))
                diff.gaps.append(float("inf") if mine is None or own is None else own - mine)
    return diff


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
