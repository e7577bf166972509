"""The cells of ablate_radix.py: a configuration and a workload each, what is known of them, and what is missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablate.matrix import Chosen, Config, engine_arguments, label, select
from ablate.workloads import Size, as_json, from_trace, make
from lib.answers import compare
from lib.machine import machine

ROOT = Path(__file__).resolve().parents[2]
SCATTER_POOLS = 2  # how often the KV pool is filled before a run on scattered slots
VERDICTS = ("equal", "near-tie", "different")


def engine_defaults(size: Size) -> dict[str, Any]:
    """Arguments of sglang.Engine that all configurations have."""
    common = {
        "attention_backend": "packinfer",
        "max_total_tokens": size.pool_tokens,
        "max_running_requests": size.running,
        "random_seed": 0,
        "log_level": "warning",
        "sleep_on_idle": True,  # an idle scheduler would take a core from the engine whose turn it is
    }
    if not torch.cuda.is_available():
        return {**common, "dtype": "float32"}
    graphs = {"cuda_graph_max_bs_decode": size.running, "cuda_graph_backend_prefill": "disabled"}
    return {**common, "mem_fraction_static": 0.93, **graphs}


def source_digest() -> str:
    """Of the code that is measured: after a change of it all runs are made again."""
    digest = hashlib.sha256()
    for folder in ("packinfer_sgl", "kernels", "patches"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Records:
    """The file of all runs: a line for each, added as soon as the run has ended. ``run`` is its round, or ``check``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, str], dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # the last may have been cut off
                record = json.loads(line)
                self.lines[record["key"], record["run"]] = record
        with path.open("w") as file:  # also says at once if nothing can be written there
            file.writelines(json.dumps(record) + "\n" for record in self.lines.values())

    def add(self, record: dict[str, Any]) -> None:
        self.lines[record["key"], record["run"]] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Cells:
    """The matrix of one command; ``broken`` says why a cell (label, workload) cannot be measured."""

    def __init__(
        self, chosen: Chosen, full: bool, size: Size, workloads: list[str], traces: list[Path], rounds: int,
        common: dict[str, Any], records: Records, scatter: bool = False,
    ) -> None:  # fmt: skip
        self.chosen, self.size, self.rounds, self.common, self.records = chosen, size, rounds, common, records
        self.configs = select(chosen, full)
        self.workloads = {name: make(name, size) for name in workloads}
        self.workloads |= {f"trace {path.stem}": from_trace(path, size) for path in traces}
        self.machine = machine(common["model_path"])
        vocabulary = [size.vocabulary.start, size.vocabulary.stop]
        self.scatter = [SCATTER_POOLS * common["max_total_tokens"], vocabulary] if scatter else None
        settings = {**self.machine, **common, "model_path": "", "date": "", "source": source_digest()}
        settings["scatter"] = self.scatter
        self._keys = {
            (label(config), name): self._digest([settings, engine_arguments(config), as_json(workload.turns)])
            for config in self.configs for name, workload in self.workloads.items()
        }  # fmt: skip
        self.broken: dict[tuple[str, str], str] = {}

    @staticmethod
    def _digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

    def record(self, config: Config, workload: str, run: str) -> dict[str, Any] | None:
        return self.records.lines.get((self._keys[label(config), workload], run))

    def missing(self, configs: list[Config]) -> list[tuple[Config, str, str]]:
        """What to run, in order: for each workload first the checks, which warm up, then the engines in turn.

        A cell that lacks a round is also checked again: its engine is a new one.
        """
        found = []
        for workload in self.workloads:
            runs = ["check", *map(str, range(self.rounds))]
            lacks = {label(c): [run for run in runs if self.record(c, workload, run) is None] for c in configs}
            for i, run in enumerate(runs):
                first = i % max(1, len(configs))
                for config in configs[first:] + configs[:first]:
                    if run in lacks[label(config)] or (run == "check" and lacks[label(config)]):
                        found.append((config, workload, run))
        return found

    def unfinished(self) -> list[Config]:
        return [config for config in self.configs if self.missing([config])]

    def estimate(self) -> str:
        engines, runs = len(self.unfinished()), len(self.missing(self.configs))
        minutes = (engines * self.size.start_s + runs * self.size.run_s) / 60
        return (
            f"{len(self.configs)} configurations, {len(self.workloads)} workloads, {self.rounds} rounds and a warm-up; "
            f"to do: {engines} engines to start, {runs} runs, about {minutes:.0f} minutes"
        )

    def add(self, config: Config, workload: str, run: str, answer: dict[str, Any]) -> None:
        known = {"key": self._keys[label(config), workload], "run": run}
        if run == "check":
            self.records.add({**known, "said": answer.get("said")})
        else:
            self.records.add({**known, **figures(answer)})

    def break_all(self, name: str, why: str) -> None:
        """An engine has ended: none of its cells that lack something can be measured."""
        for config in self.configs:
            if label(config) == name:
                for _, workload, _ in self.missing([config]):
                    self.broken.setdefault((name, workload), why)

    def results(self, **environment: Any) -> dict[str, Any]:
        """What the report is made from."""
        runs = []
        for config in self.configs:
            for workload in self.workloads:
                for i in range(self.rounds):
                    if record := self.record(config, workload, str(i)):
                        mine = {"config": label(config), "workload": workload, "round": i}
                        runs.append({**mine, **{k: v for k, v in record.items() if k not in ("key", "run")}})
        return {
            "environment": {
                **self.machine,
                "rounds": self.rounds,
                "slots": "scattered" if self.scatter else "fresh",
                **environment,
            },
            "engine": {k: v for k, v in self.common.items() if k != "model_path"},
            "chosen": self.chosen,
            "configs": {label(config): config for config in self.configs},
            "workloads": {name: workload.about for name, workload in self.workloads.items()},
            "runs": runs,
            "answers": {workload: self._answers(workload) for workload in self.workloads},
            "skipped": [{"config": c, "workload": w, "reason": why} for (c, w), why in self.broken.items()],
        }

    def _answers(self, workload: str) -> dict[str, dict[str, int]]:
        """How the answers of each configuration compare with those of the first that gave any."""
        records = {label(config): self.record(config, workload, "check") for config in self.configs}
        said = {name: record["said"] for name, record in records.items() if record and record["said"]}
        if not said:
            return {}
        first = next(iter(said))
        found = {name: compare(said[first], answers) for name, answers in said.items() if name != first}
        return {name: {verdict: counts[verdict] for verdict in VERDICTS} for name, counts in found.items()}


def figures(answer: dict[str, Any]) -> dict[str, Any]:
    """A flat record of a run, from what engine.py says of it."""
    percentiles = {
        f"{name}_p{p}_ms": float(np.percentile(answer[f"{name}_ms"], p)) if answer[f"{name}_ms"] else 0.0
        for name in ("ttft", "tpot") for p in (50, 99)
    }  # fmt: skip
    computed = answer["prompt_tokens"] - answer["cached_tokens"]
    return {
        **{k: v for k, v in answer.items() if not k.endswith("_ms")},
        **percentiles,
        "output_tokens_per_s": answer["output_tokens"] / answer["s"],
        "hit_rate": answer["cached_tokens"] / answer["prompt_tokens"],
        "computed_prompt_tokens": computed,
        "plan_us": answer["plan_us_total"] / answer["plans"] if answer["plans"] else 0.0,
    }
