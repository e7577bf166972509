"""Prefill and decode apart: two servers, SGLang's own router before them, and a KV cache that is really sent.

    python scripts/check/pd.py --transfer nixl|mooncake [--out DIR]

A pair of stock servers answers the same, so that what a transfer cannot do on this machine is not packinfer's. With two
GPUs each server has one. Needs the transfer's package and sglang-router; runs on a CPU, too. One line for each check:
PASS, FAIL, or REFUSED with the line of the log that says why. Exit code 0 unless one FAILs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is started, too

import requests
import torch
from check.areas import ROUNDS
from check.compare import Ran
from check.judge import Judge, Row, account, report
from check.models import write_model
from check.rounds import Talk
from check.runs import last_error
from check.scenarios import FA3, OURS, RECENT, Check, Scenario
from lib.answers import NEAR_TIE
from lib.servers import Router, Server, ServerError, free_port, stop_all, undone_at_end
from rich.console import Console

TRANSFERS = {"nixl": "nixl", "mooncake": "mooncake_tcp"}
# without its own radix cache, SGLang's default, the decode server holds a prefix once for each request
RADIX = {"disaggregation_decode_enable_radix_cache": True}
SCENARIOS = {
    "pd-fa3": Scenario("llama", {**FA3, **RADIX}),
    "pd-packinfer": Scenario("llama", {**OURS, **RADIX}),
    "pd-default": Scenario("llama", OURS),
}
HERE = {"SGLANG_HOST_IP": "127.0.0.1"}  # else it is the address of a network card
# SGLang 0.5.23's mooncake then sends from memory that no GPU has pinned
CPU = {"SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER": "1"}


class Pair:
    """A prefill and a decode server, asked through the router like one ``sglang.Engine``."""

    def __init__(self, router: Server, decode: Server) -> None:
        self.router, self.decode = router, decode

    def generate(self, input_ids: list[list[int]], **more: Any) -> list[dict[str, Any]]:
        """All at once, each in a request of its own."""

        def one(ids: list[int]) -> dict[str, Any]:
            answer = requests.post(f"{self.router.url}/generate", json={"input_ids": ids, **more}, timeout=240)
            if not answer.ok:
                raise ServerError(self.router, f"says {answer.status_code}: {answer.text[:300]}")
            out = answer.json()
            if (why := out["meta_info"]["finish_reason"])["type"] != "length":
                raise ServerError(self.decode, f"ended an answer: {why}")
            return out

        with ThreadPoolExecutor(len(input_ids)) as pool:
            return list(pool.map(one, input_ids))


class PairTalk(Talk):
    """A pair is asked over HTTP."""

    def _send(self, fields: dict[str, Any]) -> Any:
        return self.engine.generate(**fields)


def flags_of(engine: dict[str, Any]) -> Iterator[str]:
    for name, value in engine.items():
        yield "--" + name.replace("_", "-")
        if value is not True:
            yield str(value)


def states_of(server: Server) -> list[dict[str, Any]]:
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    return [state.get("packinfer") or {} for state in info["internal_states"]]


def run_pair(name: str, scenario: Scenario, transfer: str, gpus: int, out: Path) -> dict[str, Ran]:
    """What the pair said and its decode server's own account, as ``name``; its prefill server's as ``name``-prefill.

    The logs are ``out``/``name``-prefill.log, -decode.log and -router.log.
    """
    common = {"model_path": out / "models" / scenario.model, "disaggregation_transfer_backend": TRANSFERS[transfer]}
    engine = {**scenario.engine, **common}
    radix = engine.pop("disaggregation_decode_enable_radix_cache", False)
    bootstrap = free_port()
    prefill = {**engine, "disaggregation_mode": "prefill", "disaggregation_bootstrap_port": bootstrap}
    decode = {**engine, "disaggregation_mode": "decode"} | (RADIX if radix else {})
    if gpus:
        decode["base_gpu_id"] = (engine["base_gpu_id"] + 1) % gpus
    else:  # what is sent while another batch runs waits for a CUDA event
        prefill["disable_overlap_schedule"] = True
        if RECENT:  # by default a decode server keeps what it retracts in memory that CUDA has pinned
            decode["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    env = HERE if gpus else HERE | CPU
    servers: list[Server] = []
    console = Console(stderr=True, highlight=False)

    def start(role: str, flags: list[str], kind: type[Server] = Server) -> Server:
        servers.append(kind(f"{name}-{role}", flags, out / f"{name}-{role}.log", env))
        return servers[-1]

    stage = "while starting"
    try:
        with ExitStack() as undo:
            undo.callback(lambda: stop_all(servers))
            for role, arguments in ("prefill", prefill), ("decode", decode):
                start(role, list(flags_of(arguments)))
            for server in servers:
                server.wait(console)
            workers = ["--prefill", servers[0].url, str(bootstrap), "--decode", servers[1].url]
            metrics = ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
            flags = ["--pd-disaggregation", "--policy", "round_robin", *workers, *metrics]
            router = start("router", flags, Router)
            router.wait(console)
            stage = "while serving"
            talk = PairTalk(Pair(router, servers[1]), scenario.logprobs, {})
            said = {f"{i}-{asked}": ROUNDS[asked](talk) for i, asked in enumerate(scenario.rounds)}
            return {
                name: Ran(said=said, states=states_of(servers[1])),
                f"{name}-prefill": Ran(states=states_of(servers[0])),
            }
    except (ServerError, requests.RequestException) as error:
        logs = [server.log.read_text(errors="replace") for server in servers]
        why = "; ".join(dict.fromkeys(filter(None, map(reason, logs))))
        return {name: Ran(problem=f"{stage}: {error}" + (f"; {why}" if why else ""))}


LIBRARY = re.compile(r"^E\d{4} .*?\] (.*)", re.MULTILINE)  # an error that the transfer's library logs


def reason(log: str) -> str:
    """The lines of ``log`` that say why a server is of no use; empty if none does."""
    return ": ".join(filter(None, [*LIBRARY.findall(log)[-1:], last_error(log)]))


def judge_pairs(judge: Judge) -> None:
    if not judge.started("pd", "pd-packinfer", "pd-default", stock=("fa3", "triton", "pd-fa3")):
        return
    judge.same("pd", "pd-packinfer", "fa3", control="pd-fa3")
    judge.same("pd, no radix cache", "pd-default", "fa3", packed=False, control="pd-fa3")
    for name in ("pd-packinfer", "pd-default"):
        prefill = judge.ran[f"{name}-prefill"]
        judge.add(f"{name}-prefill", bool(prefill.state.get("active")), account(prefill))


CHECKS = {
    f"pd-{transfer}": Check(judge_pairs, tuple(SCENARIOS), f"prefill and decode apart, KV sent by {transfer}", gpus=0)
    for transfer in TRANSFERS
}


def pd_check(out: Path, gpus: int, transfer: str) -> list[Row]:
    """Rows for pairs of servers with ``transfer``, a key of TRANSFERS."""
    from check_engine import FIRST_PORT, for_device, play

    (out / "models").mkdir(parents=True, exist_ok=True)
    write_model("llama", out / "models")
    ran = play(["fa3", "triton"], gpus, 2 if gpus else 1, FIRST_PORT, out)
    with ThreadPoolExecutor(len(SCENARIOS) if gpus else 1) as pool:
        pairs = {name: for_device(scenario, gpus, 2 * i) for i, (name, scenario) in enumerate(SCENARIOS.items())}
        for result in pool.map(lambda name: run_pair(name, pairs[name], transfer, gpus, out), pairs):
            ran |= result
    judge = Judge(ran, near_tie=0.0 if gpus else NEAR_TIE)
    judge.judge(f"pd-{transfer}", judge_pairs)
    return judge.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transfer", choices=TRANSFERS, required=True)
    parser.add_argument("--out", type=Path, default=Path("."), help="models, logs and check_engine.json")
    args = parser.parse_args()
    out, gpus = args.out.resolve(), torch.cuda.device_count()
    with undone_at_end():
        rows = pd_check(out, gpus, args.transfer)
    sys.exit(report(rows, gpus, out))


if __name__ == "__main__":
    main()
