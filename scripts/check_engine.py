"""Whole engines: is packinfer right, and does it start with what else SGLang can do?

    python scripts/check_engine.py [--only verify,logits] [--out DIR]

Writes tiny models with random weights, runs every engine in processes of its own, several at once, and prints one line
for each check: PASS, FAIL, REFUSED with the line that says why, or UNTESTED with what this machine lacks. Without a GPU
it runs the checks that a CPU allows. Exit code 0 unless one FAILs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from check.areas import CHECKS, SCENARIOS
from check.compare import Ran
from check.judge import STOCK, Judge, Row
from check.models import write_model
from check.runs import run
from check.scenarios import Check, Scenario
from lib.answers import NEAR_TIE
from lib.choices import names
from packaging.version import Version

ENGINE = {"mem_fraction_static": 0.8, "max_total_tokens": 40000, "random_seed": 0, "log_level": "info"}
CUDA = {"dtype": "bfloat16", "cuda_graph_max_bs_decode": 32, "cuda_graph_backend_prefill": "disabled"}
CPU = {"dtype": "float32", "disable_cuda_graph": True}
FIRST_PORT = 21_000


def for_device(scenario: Scenario, gpus: int, turn: int) -> Scenario:
    """Engines on one GPU take the GPUs by turns. On a CPU torch_native is the only stock backend."""
    if gpus:
        place = {"base_gpu_id": turn % gpus} if scenario.gpus == 1 else {}
        return dataclasses.replace(scenario, engine={**ENGINE, **CUDA, **place, **scenario.engine})
    backend = scenario.engine["attention_backend"]
    backend = {"fa3": "torch_native", "triton": "torch_native"}.get(backend, backend)
    return dataclasses.replace(scenario, engine={**ENGINE, **scenario.engine, **CPU, "attention_backend": backend})


def untested(check: Check, gpus: int) -> str:
    """What this machine lacks for ``check``, if anything."""
    if gpus < check.gpus:
        return f"needs {check.gpus} GPU{'s' * (check.gpus > 1)}, {gpus} there"
    if Version(version("sglang")) < Version(check.since):
        return f"SGLang has it since {check.since}"
    return ""


def play(todo: list[str], gpus: int, at_once: int, first_port: int, out: Path) -> dict[str, Ran]:
    """Run the scenarios; on a CPU "triton" would be "fa3" once more, and "x-triton" "x-fa3"."""
    scenarios = {name: for_device(SCENARIOS[name], gpus, i) for i, name in enumerate(todo)}
    step = (65_000 - first_port) // len(SCENARIOS)  # SGLang takes some above each
    ports = {name: first_port + step * i for i, name in enumerate(SCENARIOS)}
    ran: dict[str, Ran] = {}
    for count in sorted({scenarios[name].gpus for name in todo}):  # apart: SGLang wants its GPUs' memory balanced
        beside = [name for name in todo if scenarios[name].gpus == count and (gpus or not name.endswith("triton"))]
        with ThreadPoolExecutor(at_once) as pool:
            started = {name: pool.submit(run, name, scenarios[name], ports[name], out) for name in beside}
            for name, future in started.items():
                ran[name] = future.result()
                print(f"{name}: {ran[name].problem or 'served'}", flush=True)
    for name in [name for name in todo if name not in ran]:
        ran[name] = ran[name.removesuffix("triton") + "fa3"]
    unclear = [name for name in todo if ran[name].problem and "packinfer:" not in ran[name].problem]
    for name in [name for name in unclear if scenarios[name].config.get("wrap")]:
        unwrapped = dataclasses.replace(scenarios[name], config={})
        ran[name + STOCK] = run(name + STOCK, unwrapped, ports[name], out)
    return ran


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=names(CHECKS), default=list(CHECKS), help="checks, comma-separated")
    parser.add_argument("--at-once", type=int, default=4 if gpus else 1, help="engines at once")
    parser.add_argument("--first-port", type=int, default=FIRST_PORT, help="to run beside another check_engine.py")
    parser.add_argument("--out", type=Path, default=Path("."), help="models, logs and check_engine.json")
    args = parser.parse_args()
    lacking = {name: untested(CHECKS[name], gpus) for name in args.only}
    wanted = [name for name in args.only if not lacking[name]]
    needed = list(dict.fromkeys(name for check in wanted for name in CHECKS[check].scenarios))
    out = args.out.resolve()
    (out / "models").mkdir(parents=True, exist_ok=True)
    drafts = {SCENARIOS[name].engine.get("speculative_draft_model_path") for name in needed} - {None}
    for model in sorted({SCENARIOS[name].model for name in needed} | drafts):
        write_model(model, out / "models")
    judge = Judge(play(needed, gpus, args.at_once, args.first_port, out), near_tie=0.0 if gpus else NEAR_TIE)
    for check in args.only:
        if lacking[check]:
            judge.rows.append(Row(check, check, "UNTESTED", lacking[check]))
        else:
            judge.judge(check, CHECKS[check].judge)
    width = max(len(row.what) for row in judge.rows)
    print()
    for row in judge.rows:
        print(f"{row.verdict:9}{row.what:{width}}  {row.note}")
    environment = {
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "gpus": gpus,
        "date": time.strftime("%Y-%m-%d"),
    }
    result = {"environment": environment, "rows": [vars(row) for row in judge.rows]}
    (out / "check_engine.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(row.verdict == "FAIL" for row in judge.rows))


if __name__ == "__main__":
    main()
